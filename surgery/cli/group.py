"""The click group that all commands belong to, and how each ends: one line per error, --json, --debug, exit codes."""

import functools
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from surgery import interrupts
from surgery.cli import options
from surgery.cli.syntax import SurgeryGroup, echo_json
from surgery.errors import SurgeryError
from surgery.escapes import printable
from surgery.exit_codes import FAILED, INTERRUPTED
from surgery.io_errors import one_line

SECTIONS = {
    "Perturb a checkpoint": ("perturb", "verify", "materialize", "push"),
    "Look at checkpoints": ("inspect", "diff"),
    "Train with regularizers": ("run", "env"),
    "See whether it helps": ("study", "study compare"),
    "Report a problem": ("doctor",),
}
PERTURB_CARD, RUN_CARD = "surgery/perturb/README.md", "hooks/run/README.md"
PUSH_CARD, STUDY_CARD = "surgery/push/README.md", "surgery/study/README.md"
_LINKS = (
    f"{PERTURB_CARD}: the commands, completion",
    "surgery/cli/README.md: every key of --json, every exit code",
    f"{PUSH_CARD}: recipes and the Hub",
    f"{RUN_CARD}: what `surgery run` covers",
    f"{STUDY_CARD}: what `surgery study` says, and how sure it is",
    "hooks/mixout, hooks/rdrop, hooks/anchor, hooks/recadam: a README.md each",
)


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from surgery import __version__

        click.echo(f"surgery {__version__}")
        context.exit()


@click.group(
    cls=SurgeryGroup,
    sections=SECTIONS,
    examples=(
        "surgery perturb bert-base-uncased --lam 0.15",
        "surgery run --mixout 0.7 -- python train.py",
        "surgery inspect org/name --stats",
    ),
    links=_LINKS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main() -> None:
    """Published regularizers for any checkpoint and any training script."""


def command(function: Callable[..., None], *, code: int = FAILED, has_json: bool = True) -> Callable[..., None]:
    """Give a command --json and --debug, one line per error, and the exit codes `code` for errors and that of Ctrl-C.

    One without --json leaves stdout to another program.
    """

    @options.debug
    @functools.wraps(function)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> None:
        is_json = kwargs.get("as_json", False)
        try:
            with interrupts.Raising():
                function(*args, **kwargs)
        except BrokenPipeError:  # `| head`: click ends quietly
            raise
        except (SurgeryError, OSError, MemoryError) as error:
            if interrupts.has_raised():  # and became another error on its way
                _end_interrupted(is_json=is_json)
            _fail(one_line(error), code, is_json=is_json, debug=debug)
        except KeyboardInterrupt:
            _end_interrupted(is_json=is_json)

    return options.json(wrapped) if has_json else wrapped


def _with_flags(message: str) -> str:
    """Spell options as the command line has them: errors name them as Python does, `create_pr` and `out`."""
    known = [parameter for each in main.commands.values() for parameter in each.params]
    flags = {str(option.name): option.opts[0] for option in known if isinstance(option, click.Option)}
    return re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), message)


def _fail(message: str, code: int, *, is_json: bool, debug: bool) -> None:
    message = printable(_with_flags(message))
    if debug:
        traceback.print_exc()
    if is_json:
        echo_json({"error": message})
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _end_interrupted(*, is_json: bool) -> None:
    interrupts.ignore()
    if is_json and not interrupts.has_answered():
        echo_json({"error": interrupts.MESSAGE})
    click.echo(interrupts.MESSAGE, err=True)
    sys.exit(INTERRUPTED)
