"""What `surgery run` and `surgery env` share: the options that choose regularizers, and how they are read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options
from surgery.errors import SettingError
from surgery.hooks.registry import METHODS
from surgery.hooks.regularizer import Flag

if TYPE_CHECKING:
    from surgery.hooks.run.options import Options


def _options() -> list[Callable[[Callable[..., None]], Callable[..., None]]]:
    numbers = [
        click.option(f"--{kind.name}", type=float, metavar=kind.number.upper(), help=kind.help) for kind in METHODS
    ]
    flags = [_option(f"--{kind.name}-{flag.field}", flag) for kind in METHODS for flag in kind.flags]
    return [
        click.option(
            "--noisytune", type=float, metavar="LAM", help="Perturb pretrained weights before they are trained."
        ),
        *numbers,
        *flags,
        click.option("--seed", type=int, metavar="N", help="Of the noise; masks follow torch.manual_seed."),
        options.include("Only these model classes or parameters."),
        options.exclude("Not these model classes or parameters."),
        click.option("--w-pre", type=click.Choice(["perturbed", "original"]), help="Weights with noise, or before it."),
        click.option("--report", metavar="FILE.json", help="Write what became of each model."),
        click.option("--allow-inactive", is_flag=True, help="Do not exit 3 when one of them had no effect."),
    ]


def _option(name: str, flag: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    if isinstance(flag.kind, tuple):
        return click.option(name, type=click.Choice(flag.kind), help=flag.help)
    return click.option(name, type=flag.kind, metavar="N", help=flag.help)


def regularizer_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose regularizers, what they act on, and what is reported."""
    for option in reversed(_options()):
        function = option(function)
    return function


def read_options(flags: dict[str, Any]) -> "Options":
    """Read what is asked for from the flags and, where they say nothing, from the variables."""
    from dataclasses import replace

    from surgery.hooks.run import options as run

    read = run.read_options(os.environ, flags) or run.make_options()  # which raises, for it asks for nothing
    return replace(read, report=_find_report(read.report)) if read.report else read


def _find_report(report: str) -> str:
    """Return the absolute path of the report. Refuse one that could not be written after hours of training."""
    path = Path(report).resolve()
    if path.exists() and not path.is_file():
        raise SettingError(f"--report: expected a file to write, got {report}, which is none. Choose another name.")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise SettingError(f"--report: expected a folder that can be written to, got {path.parent}. Make it first.")
    return str(path)
