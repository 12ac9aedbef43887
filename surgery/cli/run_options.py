"""What `surgery run` and `surgery env` share: the options that choose regularizers, and how they are read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.hooks.run.options import Order

_OPTIONS = (
    click.option("--noisytune", type=float, metavar="LAM", help="Perturb pretrained weights before they are trained."),
    click.option("--mixout", type=float, metavar="P", help="Mix pretrained weights back in at every forward pass."),
    click.option("--rdrop", type=float, metavar="ALPHA", help="Two passes; the loss holds their outputs together."),
    click.option("--anchor", type=float, metavar="WEIGHT", help="Decay weights toward the pretrained ones."),
    click.option("--rdrop-every", type=int, metavar="N", help="R-Drop at each N-th optimizer step only."),
    click.option("--mixout-granularity", type=click.Choice(["neuron", "element"]), help="What one mask value covers."),
    click.option("--seed", type=int, metavar="N", help="Of the noise; masks follow torch.manual_seed."),
    options.include("Only these model classes or parameters."),
    options.exclude("Not these model classes or parameters."),
    click.option("--w-pre", type=click.Choice(["perturbed", "original"]), help="Weights with noise, or before it."),
    click.option("--report", metavar="FILE.json", help="Write what became of each model."),
    click.option("--allow-inactive", is_flag=True, help="Do not exit 3 when one of them had no effect."),
)


def regularizer_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose regularizers, what they act on, and what is reported."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_options(flags: dict[str, Any]) -> "Order":
    """Read what is asked for from the flags and, where they say nothing, from the variables."""
    from dataclasses import replace

    from surgery.hooks.run.options import Order, read_order

    order = read_order(os.environ, flags) or Order()  # which raises, for it asks for nothing
    return replace(order, report=_find_report(order.report)) if order.report else order


def _find_report(report: str) -> str:
    """Return the absolute path of the report. Refuse one that could not be written after hours of training."""
    path = Path(report).resolve()
    if path.exists() and not path.is_file():
        raise SettingError(f"--report: expected a file to write, got {report}, which is none. Choose another name.")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise SettingError(f"--report: expected a folder that can be written to, got {path.parent}. Make it first.")
    return str(path)
