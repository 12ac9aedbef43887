"""The commands that look at checkpoints, and write nothing."""

import sys
import time

import click

from surgery.cli.group import command, main


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--source", help="Where the source is now: Hub id, folder or file.  [default: where it was]")
@click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: two per core, at most 16]")
@command
def verify(folder: str, *, source: str | None, token: str | None, workers: int | None, as_json: bool) -> None:
    """Compute DIR again from its source and its recipe, and compare it bit for bit.

    DIR is a folder that `surgery perturb` wrote, or a Hub id, which may end in @revision. Writes nothing. Exit code 0:
    equal; 1: not.
    """
    from surgery.report.text import as_json as to_json
    from surgery.report.verify import verify_rows, verify_table
    from surgery.verify import verify_checkpoint

    start = time.perf_counter()
    found = verify_checkpoint(folder, source=source, token=token, workers=workers)
    rows = verify_rows(found, time.perf_counter() - start)
    click.echo(to_json(rows) if as_json else verify_table(rows))
    if not found.is_equal:
        sys.exit(1)
