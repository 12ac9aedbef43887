"""`surgery materialize`: write the checkpoint that a recipe describes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli import options
from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.parts import refuse_with, write_part
from surgery.cli.syntax import echo_json, echo_report

if TYPE_CHECKING:
    from surgery.perturb.parts import Part


@main.command(
    examples=("surgery materialize me/noisy -o again", "surgery materialize surgery.json --source ./model"),
    card=PERTURB_CARD,
)
@click.argument("recipe", shell_complete=options.complete_path)
@options.out
@options.source
@options.token
@options.workers("three per core")
@options.engine
@options.array
@options.overwrite
@command
def materialize(
    recipe: str,
    out: Path | str | None,
    *,
    source: str | None,
    token: str | None,
    workers: int | None,
    engine: str | None,
    array: "Part | None",
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint that RECIPE describes, from its source, byte for byte.

    RECIPE is a surgery.json, a folder that holds one, its URL, or a Hub id, which may end in @revision. An
    interrupted run is resumed by the same command.
    """
    from surgery.perturb.crew import LOCAL
    from surgery.perturb.execute import execute
    from surgery.perturb.materialize import plan_materialize
    from surgery.perturb.output import is_finished
    from surgery.report import perturb as report
    from surgery.report.tables import stdout_terminal

    start = time.perf_counter()
    refuse_with(array, {"--engine": engine})
    checks_source = array is None and engine in (None, LOCAL)
    plan = plan_materialize(recipe, out, source=source, token=token, checks_source=checks_source)
    if array:
        rows = write_part(plan, array, overwrite=overwrite, workers=workers, start=start, is_quiet=as_json)
        if as_json:
            echo_json(rows)
        return
    is_new = overwrite or not is_finished(plan.out)
    written = execute(plan, overwrite=overwrite, workers=workers, engine=engine or LOCAL)
    rows = report.rows(written, plan, time.perf_counter() - start, is_new=is_new)
    echo_report(rows, lambda: report.table(rows, stdout_terminal()), as_json=as_json)
