"""`surgery study`: run a command over arms and seeds, and compare them; `study compare`: runs that are there."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options
from surgery.cli.group import STUDY_CARD, command, main
from surgery.cli.syntax import SurgeryCommand, echo_report
from surgery.engines import ENGINES
from surgery.errors import SettingError
from surgery.exit_codes import FAILED

if TYPE_CHECKING:
    from surgery.engines.engine import Engine
    from surgery.study.collect import Study
    from surgery.study.plan import Plan


_plot = options.plot("Draw all arms; each sweep beside it, as FILE-NAME.")


def _judging(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a metric is judged."""
    for option in (
        click.option(
            "--failed-below", type=float, help="A run has failed from here on.  [default: as plain runs show]"
        ),
        click.option("--minimize", is_flag=True, help="Less of the metric is better: a loss."),
        click.option("--metric", metavar="NAME", help="As the script writes it; best:NAME for the best of its log."),
    ):
        function = option(function)
    return function


class _StudyCommand(SurgeryCommand):
    """Options may come after STUDY; of a command to run they are its own, after --."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        has_mark = "--" in args
        rest = super().parse_args(ctx, args)
        if not has_mark and len(ctx.params.get("arguments", ())) > 1:
            raise click.UsageError("expected -- before COMMAND, got none. Write it there.", ctx)
        return rest


@main.command(
    cls=_StudyCommand,
    examples=(
        "surgery study -o study --seeds 20 --metric eval_accuracy --arm mixout=0.7 -- python train.py --seed {seed} "
        "--output_dir {out}",
        "surgery study study",
    ),
    card=STUDY_CARD,
)
@click.argument(
    "arguments",
    metavar="[STUDY | -- COMMAND...]",
    nargs=-1,
    type=click.UNPROCESSED,
    shell_complete=options.complete_path,
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    shell_complete=options.complete_folder,
    help="Folder of the study; the same command goes on with what is there.",
)
@options.seeds
@_judging
@click.option("--arm", "arms", multiple=True, metavar="'NAME=VALUE ...'", help="Flags of `surgery run`, for one arm.")
@click.option("--sweep", "sweeps", multiple=True, metavar="NAME=A,B,...", help="An arm for each value.")
@click.option(
    "--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable, perhaps with {seed} or {out}."
)
@click.option("--retry", is_flag=True, help="Run those again that ended without a metric.")
@click.option("--engine", type=click.Choice(ENGINES), help="Where trials run.  [default: local]")
@click.option("--jobs", type=click.IntRange(min=1), help="Trials at once.  [default: one for each GPU, or one]")
@click.option("--cpus", type=click.IntRange(min=1), help="Cores for each trial.")
@click.option("--gpus", type=click.IntRange(min=0), help="GPUs for each trial.")
@click.option("--print", "prints", is_flag=True, help="Print the commands, one a line, and run none.")
@_plot
@command
def study(arguments: tuple[str, ...], out: Path | None, *, plot: Path | None, as_json: bool, **asked: Any) -> None:
    """Run COMMAND over arms and seeds, and say whether the arms differ from plain, and how sure that is.

    {seed} and {out} in COMMAND are filled in for each trial. Without -o, print what a STUDY has found so far. Exits 1
    where a trial has no metric.
    """
    from surgery.study.statistics import check_scipy

    if out is not None and sys.platform == "win32":
        raise SettingError("surgery study: expected Linux or macOS, got Windows. Use WSL.")
    check_scipy()
    _check_plot(plot, prints=asked["prints"])
    if out is None:
        _refuse_options(asked)
        if len(arguments) != 1:
            raise click.UsageError("expected the folder of a STUDY, or -o OUT and a COMMAND after --.")
        _finish(_collect(Path(arguments[0])), plot=plot, as_json=as_json)
        return
    plan = _make_plan(arguments, out, asked)
    if asked["prints"]:
        _print_commands(plan, asked)
        return
    _run(plan, asked)
    _finish(_collect(out), plot=plot, as_json=as_json)


@main.command(
    "study compare",
    examples=("surgery study compare 'runs/plain/*' 'runs/rdrop/*' --metric eval_accuracy",),
    card=STUDY_CARD,
)
@click.argument("globs", nargs=-1, required=True, metavar="GLOB GLOB...")
@_judging
@_plot
@command
def compare(globs: tuple[str, ...], *, metric: str | None, plot: Path | None, as_json: bool, **judged: Any) -> None:
    """Compare runs that are there, whoever made them, and start nothing.

    Each GLOB names the runs of one arm, and is quoted; the others are compared with the first.
    """
    from surgery.study.others import compare_runs
    from surgery.study.statistics import check_scipy

    check_scipy()
    _check_plot(plot)
    _finish(compare_runs(globs, metric=_needed(metric), **judged), plot=plot, as_json=as_json)


def _check_plot(path: Path | None, *, prints: bool = False) -> None:
    """Refuse a figure that there will be none of, before anything is run."""
    if path is None:
        return
    from surgery.report.drawing import check_plot

    if prints:
        raise SettingError("--plot: expected runs to draw, got --print, which runs none. Leave one of them out.")
    check_plot(path)


def _refuse_options(asked: dict[str, Any]) -> None:
    """Refuse options that would do nothing without -o."""
    given = [name for name, value in asked.items() if value not in (None, (), False)]
    if given:
        flag = {"prints": "--print", "arms": "--arm", "sweeps": "--sweep", "variables": "--env"}.get(
            given[0], f"--{given[0].replace('_', '-')}"
        )
        raise SettingError(f"{flag}: expected -o OUT and a command with it, got none. Add them, or leave it out.")


def _needed(metric: str | None) -> str:
    if metric is None:
        raise SettingError("--metric: expected the name of a metric, such as eval_accuracy, got none. Name it.")
    return metric


def _make_plan(arguments: tuple[str, ...], out: Path, asked: dict[str, Any]) -> "Plan":
    from surgery.study.plan import Plan
    from surgery.study.template import make_template

    seeds: range | None = asked["seeds"]
    if seeds is None:
        raise SettingError("--seeds: expected how many, such as 20, got none. Add it.")
    return Plan(
        out.absolute(),
        make_template(arguments, asked["variables"]),
        Path.cwd(),
        asked["arms"],
        asked["sweeps"],
        tuple(seeds if len(seeds) > 1 else range(seeds.start)),
        _needed(asked["metric"]),
        asked["minimize"],
        asked["failed_below"],
    )


def _engine(out: Path, asked: dict[str, Any]) -> "Engine":
    from surgery.engines.registry import open_engine

    wanted = {name: asked[name] for name in ("jobs", "gpus")}
    return open_engine(asked["engine"] or "local", logs=out / ".slurm", **wanted)


def _run(plan: "Plan", asked: dict[str, Any]) -> None:
    from surgery.report.study.progress import following
    from surgery.study.run import StudyRun

    with following(plan.metric) as follow:
        StudyRun(
            plan,
            _engine(plan.folder, asked),
            cpus=asked["cpus"] or 0,
            gpus=asked["gpus"],
            retry=asked["retry"],
            on_progress=follow,
        ).run()


def _print_commands(plan: "Plan", asked: dict[str, Any]) -> None:
    from surgery.study.todo import shell_lines

    for name in ("engine", "jobs", "cpus", "gpus"):
        if asked[name] is not None:
            raise SettingError(f"--{name}: expected no --print with it, got both. Another scheduler decides that.")
    for line in shell_lines(plan, retry=asked["retry"]):
        click.echo(line)


def _collect(folder: Path) -> "Study":
    from surgery.report.study.files import write_files
    from surgery.report.study.rows import rows
    from surgery.study.collect import collect
    from surgery.study.plan import read_plan

    found = collect(read_plan(folder))
    write_files(found, rows(found), folder)
    return found


def _finish(study: "Study", *, plot: Path | None, as_json: bool) -> None:
    """Draw and print a study, and end with an error where a trial that is over has no metric."""
    from surgery.report.study.rows import rows
    from surgery.report.study.table import table
    from surgery.report.tables import stdout_terminal

    if plot:
        from surgery.report.study.figures import write_plots

        write_plots(study, plot)
    found = rows(study)
    echo_report(found, lambda: table(found, stdout_terminal()), as_json=as_json)
    if any(result.why for result in study.results):
        sys.exit(FAILED)
