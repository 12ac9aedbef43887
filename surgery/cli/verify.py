"""`surgery verify`: whether a checkpoint is what its recipe says, as a table or JSON, and as an exit code."""

import sys
import time

import click

from surgery.cli import options
from surgery.cli.group import command, main
from surgery.exit_codes import FAILED


@main.command()
@click.argument("folder", metavar="DIR")
@options.source
@options.token
@options.workers("three per core")
@command
def verify(folder: str, *, source: str | None, token: str | None, workers: int | None, as_json: bool) -> None:
    """Compute DIR again from its source and its recipe, and compare it bit for bit.

    DIR is a folder that `surgery perturb` wrote, or a Hub id, which may end in @revision. Writes nothing. Exit code 0:
    equal; 1: not.
    """
    from surgery.perturb.verify import verify_checkpoint
    from surgery.report import verify as report
    from surgery.report.tables import stdout_terminal
    from surgery.report.text import as_json as to_json

    start = time.perf_counter()
    found = verify_checkpoint(folder, source=source, token=token, workers=workers)
    rows = report.rows(found, time.perf_counter() - start)
    click.echo(to_json(rows) if as_json else report.table(rows, stdout_terminal()))
    if not found.is_equal:
        sys.exit(FAILED)
