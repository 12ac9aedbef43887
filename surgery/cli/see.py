"""The commands that look at checkpoints, and write nothing."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.group import command, main
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.report.plot import Picture


def _workers_option(function: Any) -> Any:
    help = "Threads.  [default: one per core, at most 16]"
    return click.option("--workers", type=click.IntRange(min=1), help=help)(function)


def _plot_option(function: Any) -> Any:
    return click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw it.")(function)


def _token_option(function: Any) -> Any:
    return click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")(function)


def _check(plot: Path | None) -> None:
    """Refuse a picture that could not be written, before any work is done."""
    if plot:
        from surgery.report.plot import check_plot

        check_plot(plot)


def _draw(picture: "Picture", plot: Path) -> None:
    from surgery.report.plot import draw

    draw(picture, plot)


@main.command()
@click.argument("model")
@click.option("--stats", is_flag=True, help="Read all weights: mean, std, min, max, NaN and Inf.")
@click.option("--all", "is_all", is_flag=True, help="A line for each tensor, instead of one for each layer pattern.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--variant", help="Weights' variant, such as fp16.")
@_token_option
@_workers_option
@_plot_option
@command
def inspect(model: str, *, is_all: bool, plot: Path | None, as_json: bool, **settings: Any) -> None:
    """Show what MODEL holds, and what perturb would do with each tensor.

    MODEL is a Hub id, a folder, or a .safetensors or PyTorch file. Without --stats only headers are read, also those of
    a model on the Hub.
    """
    from surgery.inspect.inspection import inspect_checkpoint
    from surgery.report import inspect as report
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json

    if plot and not settings["stats"]:
        raise SettingError("--plot: expected --stats with it, got headers alone. Add --stats.")
    _check(plot)
    inspection = inspect_checkpoint(model, **settings)
    if plot:
        from surgery.report.pictures import stats_picture

        _draw(stats_picture(inspection), plot)
    rows = report.rows(inspection)
    click.echo(to_json(rows) if as_json else report.table(rows, look_of_stdout(), is_all=is_all))


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--all", "is_all", is_flag=True, help="Show every tensor, not only the worst.")
@click.option("--variant", help="Weights' variant, such as fp16, of both.")
@_token_option
@_workers_option
@_plot_option
@command
def diff(a: str, b: str, *, is_all: bool, plot: Path | None, as_json: bool, **settings: Any) -> None:
    """Show how checkpoint B differs from A, tensor by tensor, the worst first.

    A and B are Hub ids, such as org/name@revision, folders, or .safetensors or PyTorch files. Exit code 0 whether they
    differ or not.
    """
    from surgery.inspect.diff import diff_checkpoints
    from surgery.report import diff as report
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json

    _check(plot)
    comparison = diff_checkpoints(a, b, **settings)
    if plot:
        from surgery.report.pictures import diff_picture

        _draw(diff_picture(comparison), plot)
    rows = report.rows(comparison)
    click.echo(to_json(rows) if as_json else report.table(rows, look_of_stdout(), is_all=is_all))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--source", help="Where the source is now: Hub id, folder or file.  [default: where it was]")
@click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: two per core, at most 16]")
@command
def verify(folder: str, *, source: str | None, token: str | None, workers: int | None, as_json: bool) -> None:
    """Compute DIR again from its source and its recipe, and compare it bit for bit.

    DIR is a folder that `surgery perturb` wrote, or a Hub id, which may end in @revision. Writes nothing. Exit code 0:
    equal; 1: not.
    """
    from surgery.perturb.verify import verify_checkpoint
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json
    from surgery.report.verify import verify_rows, verify_table

    start = time.perf_counter()
    found = verify_checkpoint(folder, source=source, token=token, workers=workers)
    rows = verify_rows(found, time.perf_counter() - start)
    click.echo(to_json(rows) if as_json else verify_table(rows, look_of_stdout()))
    if not found.is_equal:
        sys.exit(1)
