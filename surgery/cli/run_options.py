"""The flags of `surgery run` and `surgery env` as click options; those of methods are made of their Settings."""

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import complete_path
from surgery.cli.syntax import SurgeryCommand
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.hooks.run.options import Options


class RegularizerCommand(SurgeryCommand):
    """A command with the options that choose regularizers, what they act on, and what is reported.

    Those of the methods come from the registry, which is imported when they are asked for: `surgery --help` is not to
    wait for it.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_options(), *super().get_params(ctx)]

    def key_of(self, option: click.Option) -> str:
        return "noise_seed" if option.name == "seed" else super().key_of(option)


@cache
def _options() -> tuple[click.Option, ...]:
    from surgery.hooks.registry import METHODS

    numbers = [(kind.name, kind.number.upper(), float, kind.help) for kind in METHODS]
    flags = [(f"{kind.name}-{flag.field}", "N", flag.kind, flag.help) for kind in METHODS for flag in kind.flags]
    return (
        _option("noisytune", "LAM", float, "Perturb pretrained weights before they are trained."),
        *(_option(*number) for number in numbers),
        *(_option(*flag) for flag in flags),
        _option("noise-seed", "N", int, "Of the noise; masks follow torch.manual_seed."),
        click.Option(["--seed"], type=int, hidden=True),
        click.Option(["--include"], multiple=True, metavar="GLOB", help="Only these model classes or parameters."),
        click.Option(["--exclude"], multiple=True, metavar="GLOB", help="Not these model classes or parameters."),
        _option("w-pre", None, ("perturbed", "original"), "Weights with noise, or before it."),
        click.Option(
            ["--report"],
            metavar="FILE.json",
            shell_complete=complete_path,
            help="Write what became of each model.",
        ),
        click.Option(["--allow-inactive"], is_flag=True, help="Do not exit 3 when one of them had no effect."),
    )


def _option(name: str, metavar: str | None, kind: type[Any] | tuple[str, ...], help: str) -> click.Option:
    if isinstance(kind, tuple):
        return click.Option([f"--{name}"], type=click.Choice(kind), help=help)
    return click.Option([f"--{name}"], type=kind, metavar=metavar, help=help)


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
