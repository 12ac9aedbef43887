"""`surgery inspect`: what a checkpoint holds, as a table, JSON or a picture."""

from pathlib import Path
from typing import Any

import click

from surgery.cli import options
from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.syntax import echo_report
from surgery.errors import SettingError


@main.command(
    examples=("surgery inspect org/name", "surgery inspect ./model --stats --plot stats.png"),
    card=PERTURB_CARD,
)
@click.argument("model", shell_complete=options.complete_path)
@click.option("--stats", is_flag=True, help="Read all weights: mean, std, min, max, NaN and Inf.")
@options.show_all("A line for each tensor, instead of one for each layer pattern.")
@options.revision
@options.variant()
@options.key
@options.token
@options.workers("one per core")
@options.plot("Draw it.")
@command
def inspect(model: str, *, is_all: bool, plot: Path | None, as_json: bool, **settings: Any) -> None:
    """Show what MODEL holds, and what perturb would do with each tensor.

    MODEL is a Hub id, a folder, a URL, or a .safetensors or PyTorch file. Without --stats only headers are read, also
    those of a model on the Hub.
    """
    from surgery.inspect.inspection import inspect_checkpoint
    from surgery.report import inspect as report
    from surgery.report.tables import stdout_terminal

    if plot:
        from surgery.report.drawing import check_plot

        if not settings["stats"]:
            raise SettingError("--plot: expected --stats with it, got headers alone. Add --stats.")
        check_plot(plot)
    inspection = inspect_checkpoint(model, **settings)
    if plot:
        from surgery.report.pictures import stats_picture
        from surgery.report.plot import draw

        draw(stats_picture(inspection), plot)
    rows = report.rows(inspection)
    echo_report(rows, lambda: report.table(rows, stdout_terminal(), is_all=is_all), as_json=as_json)
