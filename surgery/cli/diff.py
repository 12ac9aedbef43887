"""`surgery diff`: how two checkpoints differ, as a table, JSON or a picture."""

from pathlib import Path
from typing import Any

import click

from surgery.cli import options
from surgery.cli.group import command, main


@main.command()
@click.argument("a")
@click.argument("b")
@options.show_all("Show every tensor, not only the worst.")
@options.variant(", of both")
@options.token
@options.workers("one per core")
@options.plot("Draw it.")
@command
def diff(a: str, b: str, *, is_all: bool, plot: Path | None, as_json: bool, **settings: Any) -> None:
    """Show how checkpoint B differs from A, tensor by tensor, the worst first.

    A and B are Hub ids, such as org/name@revision, folders, or .safetensors or PyTorch files. Exit code 0 whether they
    differ or not.
    """
    from surgery.inspect.diff import diff_checkpoints
    from surgery.report import diff as report
    from surgery.report.tables import stdout_terminal
    from surgery.report.text import as_json as to_json

    if plot:
        from surgery.report.plot import check_plot

        check_plot(plot)
    comparison = diff_checkpoints(a, b, **settings)
    if plot:
        from surgery.report.pictures import diff_picture
        from surgery.report.plot import draw

        draw(diff_picture(comparison), plot)
    rows = report.rows(comparison)
    click.echo(to_json(rows) if as_json else report.table(rows, stdout_terminal(), is_all=is_all))
