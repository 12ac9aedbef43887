"""The click group that all commands belong to, and how each ends: one line per error, --json, --debug, exit codes."""

import functools
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from surgery.cli import options
from surgery.errors import SurgeryError
from surgery.exit_codes import FAILED, INTERRUPTED
from surgery.io_errors import one_line


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


def command(function: Callable[..., None], *, code: int = FAILED, has_json: bool = True) -> Callable[..., None]:
    """Give a command --json and --debug, one line per error, and the exit codes `code` for errors and that of Ctrl-C.

    One without --json leaves stdout to another program.
    """

    @options.debug
    @functools.wraps(function)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:  # `| head`: click ends quietly
            raise
        except (SurgeryError, OSError, MemoryError) as error:
            _fail(one_line(error), code, as_json=kwargs.get("as_json", False), debug=debug)
        except KeyboardInterrupt:
            click.echo("interrupted: run the same command again.", err=True)
            sys.exit(INTERRUPTED)

    return options.json(wrapped) if has_json else wrapped


def _with_flags(message: str) -> str:
    """Spell options as the command line has them: errors name them as Python does, `create_pr` and `out`."""
    known = [parameter for each in main.commands.values() for parameter in each.params]
    flags = {str(option.name): option.opts[0] for option in known if isinstance(option, click.Option)}
    return re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), message)


def _fail(message: str, code: int, *, as_json: bool, debug: bool) -> None:
    message = _with_flags(message)
    if debug:
        traceback.print_exc()
    if as_json:
        from surgery.report.text import as_json as to_json

        click.echo(to_json({"error": message}))
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)
