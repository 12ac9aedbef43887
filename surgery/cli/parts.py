"""`--array I/N` of perturb and materialize: do one part, and print it, or the whole checkpoint if it is the last."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.perturb.parts import Part
    from surgery.perturb.plan import Plan


def refuse_with(array: "Part | None", others: Mapping[str, object]) -> None:
    """Refuse what takes all shards in one process, beside a part.

    Raises:
        SettingError: one of them is given.
    """
    for option, given in others.items():
        if array and given:
            raise SettingError(f"--array: expected no {option} with it, got both. Use {option} without --array.")


def write_part(
    plan: "Plan", part: "Part", *, overwrite: bool, workers: int | None, start: float, is_quiet: bool
) -> dict[str, Any]:
    """Do a part of what is planned, print what was done unless quiet, and return it."""
    from surgery.perturb.output import is_finished
    from surgery.perturb.parts import execute_part
    from surgery.report import part as of_part
    from surgery.report import perturb as of_all
    from surgery.report.tables import stdout_terminal

    is_new = not is_finished(plan.out)
    done = execute_part(plan, part, overwrite=overwrite, workers=workers)
    seconds = time.perf_counter() - start
    if done.recipe:
        rows = of_all.rows(done.recipe, plan, seconds, is_new=is_new, part=part)
        table = of_all.table
    else:
        rows, table = of_part.rows(done, plan, seconds), of_part.table
    if not is_quiet:
        click.echo(table(rows, stdout_terminal()))
    return rows
