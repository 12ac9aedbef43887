"""`surgery verify`: whether a checkpoint is what its recipe says, as a table or JSON, and as an exit code."""

import sys
import time
from functools import partial

import click

from surgery.cli import options
from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.syntax import echo_report
from surgery.exit_codes import DIFFERS, UNVERIFIED


@main.command(
    examples=("surgery verify ./out", "surgery verify me/noisy --source ./model --json"),
    card=PERTURB_CARD,
)
@click.argument("folder", metavar="DIR", shell_complete=options.complete_folder)
@options.source
@options.token
@options.workers("three per core")
@options.engine
@partial(command, code=UNVERIFIED)
def verify(
    folder: str, *, source: str | None, token: str | None, workers: int | None, engine: str | None, as_json: bool
) -> None:
    """Compute DIR again from its source and its recipe, and compare it bit for bit.

    DIR is a folder that `surgery perturb` wrote, its URL, or a Hub id, which may end in @revision. Writes nothing. Exit
    code 0: equal; 1: not; 4: an error, so that it is not known.
    """
    from surgery.perturb.crew import LOCAL
    from surgery.perturb.verify import verify_checkpoint
    from surgery.report import verify as report
    from surgery.report.tables import stdout_terminal

    start = time.perf_counter()
    found = verify_checkpoint(folder, source=source, token=token, workers=workers, engine=engine or LOCAL)
    rows = report.rows(found, time.perf_counter() - start)
    echo_report(rows, lambda: report.table(rows, stdout_terminal()), as_json=as_json)
    if not found.is_equal:
        sys.exit(DIFFERS)
