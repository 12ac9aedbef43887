"""The commands that show what checkpoints hold."""

from typing import Any

import click

from surgery.cli.group import command, main


def _workers_option(function: Any) -> Any:
    help = "Threads.  [default: two per core, at most 16]"
    return click.option("--workers", type=click.IntRange(min=1), help=help)(function)


def _token_option(function: Any) -> Any:
    return click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")(function)


@main.command()
@click.argument("model")
@click.option("--stats", is_flag=True, help="Read all weights: mean, std, min, max, NaN and Inf.")
@click.option("--all", "is_all", is_flag=True, help="A line for each tensor, instead of one for each layer pattern.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--variant", help="Weights' variant, such as fp16.")
@_token_option
@_workers_option
@command
def inspect(model: str, *, is_all: bool, as_json: bool, **settings: Any) -> None:
    """Show what MODEL holds, and what perturb would do with each tensor.

    MODEL is a Hub id, a folder, or a .safetensors or PyTorch file. Without --stats only headers are read, also those of
    a model on the Hub.
    """
    from surgery.report import inspect as report
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json
    from surgery.survey import inspect_checkpoint

    rows = report.rows(inspect_checkpoint(model, **settings))
    click.echo(to_json(rows) if as_json else report.table(rows, look_of_stdout(), is_all=is_all))


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--all", "is_all", is_flag=True, help="Show every tensor, not only the worst.")
@click.option("--variant", help="Weights' variant, such as fp16, of both.")
@_token_option
@_workers_option
@command
def diff(a: str, b: str, *, is_all: bool, as_json: bool, **settings: Any) -> None:
    """Show how checkpoint B differs from A, tensor by tensor, the worst first.

    A and B are Hub ids, such as org/name@revision, folders, or .safetensors or PyTorch files. Exit code 0 whether they
    differ or not.
    """
    from surgery.diff import diff_checkpoints
    from surgery.report import diff as report
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json

    rows = report.rows(diff_checkpoints(a, b, **settings))
    click.echo(to_json(rows) if as_json else report.table(rows, look_of_stdout(), is_all=is_all))
