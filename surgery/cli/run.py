"""The commands that regularize a training script without an edit."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.group import command, main
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.hooks.run.options import Options

_OPTIONS = (
    click.option("--noisytune", type=float, metavar="LAM", help="Perturb pretrained weights before they are trained."),
    click.option("--mixout", type=float, metavar="P", help="Mix pretrained weights back in at every forward pass."),
    click.option("--rdrop", type=float, metavar="ALPHA", help="Two passes; the loss holds their outputs together."),
    click.option("--anchor", type=float, metavar="WEIGHT", help="Decay weights toward the pretrained ones."),
    click.option("--rdrop-every", type=int, metavar="N", help="R-Drop at each N-th optimizer step only."),
    click.option("--mixout-granularity", type=click.Choice(["neuron", "element"]), help="What one mask value covers."),
    click.option("--seed", type=int, metavar="N", help="Of the noise; masks follow torch.manual_seed."),
    click.option("--include", multiple=True, metavar="GLOB", help="Only these model classes or parameters."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Not these model classes or parameters."),
    click.option("--w-pre", type=click.Choice(["perturbed", "original"]), help="Weights with noise, or before it."),
    click.option("--report", metavar="FILE.json", help="Write what became of each model."),
    click.option("--allow-inactive", is_flag=True, help="Do not exit 3 when one of them had no effect."),
)


def _options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@main.command(context_settings={"allow_interspersed_args": False})
@_options
@click.argument("arguments", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED)
@partial(command, code=2, has_json=False)
def run(arguments: tuple[str, ...], **flags: Any) -> None:
    """Run COMMAND, and regularize what it trains.

    COMMAND is python, torchrun, accelerate launch or another program of this environment; what it starts is covered.
    Each option can be given by a variable: SURGERY_MIXOUT=0.7 for --mixout 0.7. The exit code is the command's, or 3 if
    it is 0 and one of the regularizers had no effect.
    """
    from surgery.hooks.run.launch import launch

    sys.exit(launch(arguments, _read(flags)))


@main.command()
@_options
@partial(command, code=2)
def env(*, as_json: bool, **flags: Any) -> None:
    """Print the variables that regularize what is trained where they are set.

    For the launcher of a cluster: eval "$(surgery env --mixout 0.7)". Every process then prints what became of it.
    """
    from surgery.hooks.run.launch import SITE, environment_of

    options = _read(flags)
    if as_json:
        from surgery.report.text import as_json as to_json

        path = environment_of(options, os.environ)["PYTHONPATH"]
        click.echo(to_json({"PYTHONPATH": path} | options.variables))
        return
    from shlex import quote

    click.echo(f'export PYTHONPATH={quote(str(SITE))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    click.echo(" ".join(["export", *(f"{name}={quote(value)}" for name, value in options.variables.items())]))


def _read(flags: dict[str, Any]) -> "Options":
    """Read the options from the flags and, where they say nothing, from the variables."""
    from dataclasses import replace

    from surgery.hooks.run.options import make_options, read_options

    options = read_options(os.environ, flags) or make_options()  # which raises, for it asks for nothing
    return replace(options, report=_find_report(options.report)) if options.report else options


def _find_report(report: str) -> str:
    """Return the absolute path of the report. Refuse one that could not be written after hours of training."""
    path = Path(report).resolve()
    if path.exists() and not path.is_file():
        raise SettingError(f"--report: expected a file to write, got {report}, which is none. Choose another name.")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise SettingError(f"--report: expected a folder that can be written to, got {path.parent}. Make it first.")
    return str(path)
