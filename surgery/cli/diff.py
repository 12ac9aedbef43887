"""`surgery diff`: how two checkpoints differ, as a table, JSON or a picture."""

from pathlib import Path
from typing import Any

import click

from surgery.cli import options
from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.syntax import echo_report


@main.command(
    examples=("surgery diff org/name ./trained", "surgery diff org/name@main org/name@v2 --all --json"),
    card=PERTURB_CARD,
)
@click.argument("a", shell_complete=options.complete_path)
@click.argument("b", shell_complete=options.complete_path)
@options.show_all("Show every tensor, not only the worst.")
@options.variant(", of both")
@options.token
@options.workers("one per core")
@options.plot("Draw it.")
@command
def diff(a: str, b: str, *, is_all: bool, plot: Path | None, as_json: bool, **settings: Any) -> None:
    """Show how checkpoint B differs from A, tensor by tensor, the worst first.

    A and B are Hub ids, such as org/name@revision, folders, URLs, or .safetensors or PyTorch files. Exit code 0 whether
    they differ or not.
    """
    from surgery.inspect.diff import diff_checkpoints
    from surgery.report import diff as report
    from surgery.report.tables import stdout_terminal

    if plot:
        from surgery.report.drawing import check_plot

        check_plot(plot)
    comparison = diff_checkpoints(a, b, **settings)
    if plot:
        from surgery.report.pictures import diff_picture
        from surgery.report.plot import draw

        draw(diff_picture(comparison), plot)
    rows = report.rows(comparison)
    echo_report(rows, lambda: report.table(rows, stdout_terminal(), is_all=is_all), as_json=as_json)
