"""`surgery perturb`: write a perturbed copy of a checkpoint, and push it if asked to."""

import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options
from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.push import push_and_print
from surgery.cli.syntax import echo_json, echo_report
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.perturb.plan import Plan
    from surgery.push.push import PushOptions


@main.command(
    context_settings={"show_default": True},
    examples=(
        "surgery perturb bert-base-uncased",
        "surgery perturb ./model -o out --lam 0.1 --seed 1",
        "surgery perturb org/name --push me/noisy --private",
    ),
    card=PERTURB_CARD,
)
@click.argument("model", shell_complete=options.complete_path)
@options.out
@click.option("--lam", type=float, default=0.15, help="Noise intensity, from 0 to 1; the paper uses 0.1 to 0.15.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same bytes.")
@click.option("--noise", type=click.Choice(["uniform", "normal"]), default="uniform", help="Shape of the noise.")
@click.option("--scale", type=click.Choice(["matrix", "global"]), default="matrix", help="Whose std scales the noise.")
@click.option(
    "--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", help="How to round to 16 bits."
)
@options.include("Perturb only tensors whose name matches; `**` spans dots.")
@options.exclude("Copy tensors whose name matches.")
@options.revision
@options.variant()
@options.key
@options.token
@options.workers("three per core")
@options.overwrite
@options.plot("Draw what the noise did.")
@options.dry_run("Print what would be done, and write nothing.")
@click.option("--push", "repo", metavar="REPO", help="Push the result to this model on the Hub.")
@options.private("With --push: make the model private, if it is new.")
@options.create_pr("With --push: open a pull request.")
@options.commit_message("With --push: first line of the commit.")
@command
def perturb(
    model: str,
    out: Path | None,
    *,
    revision: str | None,
    variant: str | None,
    key: str | None,
    token: str | None,
    workers: int | None,
    overwrite: bool,
    plot: Path | None,
    dry_run: bool,
    repo: str | None,
    private: bool,
    create_pr: bool,
    commit_message: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a copy of MODEL with NoisyTune's noise in its weights.

    MODEL is a Hub id, a folder, or a .safetensors or PyTorch file. An interrupted run is resumed by the same command.
    """
    import surgery.perturb.execute  # noqa: F401  (takes time that is not the run's)
    from surgery.noisytune import NoisyTune
    from surgery.perturb.output import refuse_windows
    from surgery.perturb.plan import make_plan

    start = time.perf_counter()
    if not dry_run:
        refuse_windows("perturb")
    noisytune = NoisyTune(**settings)
    if plot:
        from surgery.report.pictures import check_noise_plot

        check_noise_plot(plot, noisytune, dry_run=dry_run)
    push = _push_options(repo, private=private, create_pr=create_pr, commit_message=commit_message, token=token)
    if push and not dry_run:
        from surgery.push.push import check

        check(push)
    plan = make_plan(model, out, noisytune, revision=revision, variant=variant, key=key, token=token)
    push = replace(push, folder=plan.out) if push else None
    if dry_run:
        _print_plan(plan, push, as_json=as_json)
    else:
        _write(plan, push, start=start, overwrite=overwrite, workers=workers, plot=plot, as_json=as_json)


def _push_options(repo: str | None, **settings: Any) -> "PushOptions | None":
    """Return what to push where, the folder yet unknown."""
    if repo:
        from surgery.push.push import PushOptions

        return PushOptions(Path(), repo, **settings)
    for name in ("private", "create_pr", "commit_message"):
        if settings[name]:
            option = f"--{name.replace('_', '-')}"
            raise SettingError(f"{option}: expected --push REPO with it, got none. Add it, or leave {option} out.")
    return None


def _print_plan(plan: "Plan", push: "PushOptions | None", *, as_json: bool) -> None:
    from surgery.report import perturb as report
    from surgery.report.tables import stdout_terminal

    rows = report.plan_rows(plan) | ({"push": push.command} if push else {})
    echo_report(rows, lambda: report.plan_table(rows, stdout_terminal()), as_json=as_json)


def _write(
    plan: "Plan",
    push: "PushOptions | None",
    *,
    start: float,
    overwrite: bool,
    workers: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Do what is planned, print what was done, and push it."""
    from surgery.perturb.execute import execute
    from surgery.perturb.output import is_finished
    from surgery.report import perturb as report
    from surgery.report.tables import stdout_terminal

    is_new = overwrite or not is_finished(plan.out)
    recipe = execute(plan, overwrite=overwrite, workers=workers)
    rows = report.rows(recipe, plan, time.perf_counter() - start, is_new=is_new)
    if plot:
        from surgery.report.pictures import noise_picture
        from surgery.report.plot import draw

        draw(noise_picture(recipe, plan), plot)
    if not as_json:
        # a reader that has gone does not keep the push from being made
        with suppress(BrokenPipeError) if push else nullcontext():
            click.echo(report.table(rows, stdout_terminal()))
    if push:
        rows["push"] = push_and_print(push, is_quiet=as_json)
    if as_json:
        echo_json(rows)
