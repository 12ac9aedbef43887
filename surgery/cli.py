"""The command line: parse, call, print."""

import functools
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from surgery.errors import SurgeryError


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from surgery import __version__

        click.echo(f"surgery {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main() -> None:
    """Published regularizers for any checkpoint and any training script."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command --json and --debug, one line per error, and exit codes 1 for errors and 130 for Ctrl-C."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON on stdout.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, debug: bool, **kwargs: Any) -> None:
        try:
            function(*args, as_json=as_json, **kwargs)
        except (SurgeryError, OSError, MemoryError) as error:
            _fail(str(error), as_json=as_json, debug=debug)
        except KeyboardInterrupt:
            click.echo("interrupted: run the same command again to resume.", err=True)
            sys.exit(130)

    return wrapped


def _fail(message: str, *, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if as_json:
        from surgery.report import as_json as to_json

        click.echo(to_json({"error": message}))
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(1)


@main.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: MODEL-noisytune-lam…-seed…]"
)
@click.option("--lam", type=float, default=0.15, help="Noise intensity, from 0 to 1; the paper uses 0.1 to 0.15.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same bytes.")
@click.option("--noise", type=click.Choice(["uniform", "normal"]), default="uniform", help="Shape of the noise.")
@click.option("--scale", type=click.Choice(["matrix", "global"]), default="matrix", help="Whose std scales the noise.")
@click.option(
    "--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", help="How to round to 16 bits."
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Perturb only tensors whose name matches; `**` spans dots."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Copy tensors whose name matches.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--variant", help="Weights' variant, such as fp16.")
@click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: two per core, at most 16]")
@click.option("--overwrite", is_flag=True, help="Replace what a former run wrote to the folder.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@_command
def perturb(
    model: str,
    out: Path | None,
    *,
    revision: str | None,
    variant: str | None,
    token: str | None,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a copy of MODEL with NoisyTune's noise in its weights.

    MODEL is a Hub id, a folder, or a .safetensors or PyTorch file. An interrupted run is resumed by the same command.
    """
    from surgery import report
    from surgery.noisytune import NoisyTune
    from surgery.output import is_finished
    from surgery.perturb import execute
    from surgery.plan import make_plan

    start = time.perf_counter()
    plan = make_plan(model, out, NoisyTune(**settings), revision=revision, variant=variant, token=token)
    if dry_run:
        rows = report.plan_rows(plan)
        click.echo(report.as_json(rows) if as_json else report.plan_table(rows))
        return
    is_new = overwrite or not is_finished(plan.out)
    recipe = execute(plan, overwrite=overwrite, workers=workers)
    rows = report.result_rows(recipe, plan, time.perf_counter() - start, is_new=is_new)
    click.echo(report.as_json(rows) if as_json else report.result_table(rows))
