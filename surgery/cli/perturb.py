"""`surgery perturb`: write a perturbed copy of a checkpoint, and push it if asked to."""

import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options
from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.parts import refuse_with, write_part
from surgery.cli.push import push_and_print
from surgery.cli.syntax import echo_json
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.noisytune import NoisyTune
    from surgery.perturb.parts import Part
    from surgery.perturb.plan import Plan
    from surgery.push.push import PushOptions
    from surgery.storage.url import Url


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
@options.seed("The same seed gives the same bytes. 0..9: ten checkpoints.", default="0")
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
@click.option("--dequantize", type=click.Choice(["bf16"]), help="Write float8 in blocks, and mxfp4, in this dtype.")
@options.token
@options.workers("three per core")
@options.engine
@options.array
@options.overwrite
@options.plot("Draw what the noise did.")
@options.recipe_only("Write no weights: `surgery materialize` makes them.")
@options.dry_run("Print what would be done, and write nothing.")
@click.option("--push", "repo", metavar="REPO", help="Push the result to this model on the Hub.")
@options.private("With --push: make the model private, if it is new.")
@options.create_pr("With --push: open a pull request.")
@options.commit_message("With --push: first line of the commit.")
@options.collection("With --push: add the model to this collection, made if need be.")
@command
def perturb(
    model: str,
    out: Path | str | None,
    *,
    seeds: range,
    revision: str | None,
    variant: str | None,
    key: str | None,
    dequantize: str | None,
    token: str | None,
    workers: int | None,
    engine: str | None,
    array: "Part | None",
    overwrite: bool,
    plot: Path | None,
    recipe_only: bool,
    dry_run: bool,
    repo: str | None,
    private: bool,
    create_pr: bool,
    commit_message: str | None,
    collection: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a copy of MODEL with NoisyTune's noise in its weights.

    MODEL is a Hub id, a folder, a URL, or a .safetensors or PyTorch file. An interrupted run is resumed by the same
    command. With several seeds, {seed} stands for each in the values of -o, --push and --plot.
    """
    import surgery.perturb.execute  # noqa: F401  (takes time that is not the run's)
    from surgery.noisytune import NoisyTune
    from surgery.perturb.crew import LOCAL
    from surgery.perturb.output import refuse_windows
    from surgery.perturb.plan import make_plan

    if not dry_run:
        refuse_windows("perturb")
    refuse_with(array, {"--plot": plot, "--push": repo, "--dry-run": dry_run, "--engine": engine})
    asked = []
    for seed in seeds:
        noisytune = NoisyTune(seed=seed, **settings)
        picture = options.fill_in(plot, "--plot", seeds, seed)
        if picture:
            from surgery.report.pictures import check_noise_plot

            check_noise_plot(picture, noisytune, dry_run=dry_run, recipe_only=recipe_only)
        push = _push_options(
            options.fill_in(repo, "--push", seeds, seed),
            private=private,
            create_pr=create_pr,
            commit_message=commit_message,
            collection=collection,
            token=token,
            recipe_only=recipe_only,
        )
        asked.append(_Asked(noisytune, options.fill_in(out, "--out", seeds, seed), picture, push))
    if not dry_run:
        _check_pushes(one.push for one in asked)
    every = []
    for i, one in enumerate(asked):
        start = time.perf_counter()
        plan = make_plan(
            model,
            one.out,
            one.settings,
            revision=revision,
            variant=variant,
            key=key,
            dequantize=dequantize,
            token=token,
            recipe_only=recipe_only,
        )
        one = replace(one, push=_from(plan.out, one.push) if one.push else None)
        if i and not as_json:
            click.echo()
        if dry_run:
            every.append(_print_plan(plan, one.push, engine=engine or LOCAL, is_quiet=as_json))
        else:
            how = _How(array, overwrite, workers, engine or LOCAL)
            every.append(_write(plan, one, how, start=start, is_quiet=as_json))
    if as_json:
        echo_json(every[0] if len(seeds) == 1 else {"variants": every})


@dataclass(frozen=True)
class _Asked:
    """What is asked for of one seed."""

    settings: "NoisyTune"
    out: Path | str | None
    plot: Path | None
    push: "PushOptions | None"


@dataclass(frozen=True)
class _How:
    """How it is to be done."""

    array: "Part | None"
    overwrite: bool
    workers: int | None
    engine: str


def _check_pushes(pushes: "Iterable[PushOptions | None]") -> None:
    """Refuse what cannot be pushed before anything is written."""
    for push in pushes:
        if push:
            from surgery.push.push import check

            check(push)


def _push_options(repo: str | None, **settings: Any) -> "PushOptions | None":
    """Return what to push where, the folder yet unknown."""
    if repo:
        from surgery.push.push import PushOptions

        return PushOptions(Path(), repo, **settings)
    for name in ("private", "create_pr", "commit_message", "collection"):
        if settings[name]:
            option = f"--{name.replace('_', '-')}"
            raise SettingError(f"{option}: expected --push REPO with it, got none. Add it, or leave {option} out.")
    return None


def _from(out: "Path | Url", push: "PushOptions") -> "PushOptions":
    """Return what to push where, now that the folder is known."""
    if not isinstance(out, Path):
        raise SettingError(f"--push: expected a folder of this machine to push, got {out}. Leave one of them out.")
    return replace(push, folder=out)


def _print_plan(plan: "Plan", push: "PushOptions | None", *, engine: str, is_quiet: bool) -> dict[str, Any]:
    from surgery.perturb.crew import count_tasks
    from surgery.report import perturb as report
    from surgery.report.tables import stdout_terminal

    tasks = count_tasks(engine, plan)
    rows = report.plan_rows(plan) | ({"tasks": tasks} if tasks else {}) | ({"push": push.command} if push else {})
    if not is_quiet:
        click.echo(report.plan_table(rows, stdout_terminal()))
    return rows


def _write(plan: "Plan", asked: _Asked, how: _How, *, start: float, is_quiet: bool) -> dict[str, Any]:
    """Do what is planned, print what was done unless quiet, push it, and return what was done."""
    from surgery.perturb.execute import execute
    from surgery.perturb.output import is_finished
    from surgery.report import perturb as report
    from surgery.report.tables import stdout_terminal

    is_new = how.overwrite or not is_finished(plan.out)
    if how.array:
        return write_part(plan, how.array, overwrite=how.overwrite, workers=how.workers, start=start, is_quiet=is_quiet)
    recipe = execute(plan, overwrite=how.overwrite, workers=how.workers, engine=how.engine)
    rows = report.rows(recipe, plan, time.perf_counter() - start, is_new=is_new)
    if asked.plot:
        from surgery.checkpoint.resolve import resolve
        from surgery.inspect.diff import compare
        from surgery.report.pictures import noise_picture
        from surgery.report.plot import draw

        copy = resolve(str(plan.out), variant=plan.variant)
        draw(noise_picture(compare(plan.checkpoint, copy, workers=how.workers), recipe.settings), asked.plot)
    if not is_quiet:
        # a reader that has gone does not keep the push from being made
        with suppress(BrokenPipeError) if asked.push else nullcontext():
            click.echo(report.table(rows, stdout_terminal()))
    if asked.push:
        rows["push"] = push_and_print(asked.push, is_quiet=is_quiet)
    return rows
