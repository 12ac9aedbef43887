"""`surgery run`: regularize what a command trains, without an edit to its script."""

import sys
from functools import partial
from typing import Any

import click

from surgery.cli import options
from surgery.cli.group import RUN_CARD, command, main
from surgery.cli.run_options import RegularizerCommand, read_options
from surgery.exit_codes import USAGE


@main.command(
    cls=RegularizerCommand,
    context_settings={"allow_interspersed_args": False},
    examples=(
        "surgery run --mixout 0.7 -- python train.py",
        "surgery run --noisytune 0.15 --rdrop 1.0 --report report.json -- torchrun --nproc-per-node 2 train.py",
    ),
    card=RUN_CARD,
)
@click.argument(
    "arguments", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED, shell_complete=options.complete_path
)
@partial(command, code=USAGE, has_json=False)
def run(arguments: tuple[str, ...], **flags: Any) -> None:
    """Run COMMAND, and regularize what it trains.

    COMMAND is python, torchrun, accelerate launch or another program of this environment; what it starts is covered.
    Each option can be given by a variable: SURGERY_MIXOUT=0.7 for --mixout 0.7. The exit code is the command's, or 3 if
    it is 0 and one of the regularizers had no effect.
    """
    from surgery.hooks.run.launch import launch

    debug = click.get_current_context().params["debug"]
    sys.exit(launch(arguments, read_options(flags | {"debug": debug})))
