"""The commands that write checkpoints."""

import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import share
from surgery.cli.group import command, main
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.push.push import Order


@main.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: MODEL-noisytune-lam…-seed…]"
)
@click.option("--lam", type=float, default=0.15, help="Noise intensity, from 0 to 1; the paper uses 0.1 to 0.15.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same bytes.")
@click.option("--noise", type=click.Choice(["uniform", "normal"]), default="uniform", help="Shape of the noise.")
@click.option("--scale", type=click.Choice(["matrix", "global"]), default="matrix", help="Whose std scales the noise.")
@click.option(
    "--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", help="How to round to 16 bits."
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Perturb only tensors whose name matches; `**` spans dots."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Copy tensors whose name matches.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--variant", help="Weights' variant, such as fp16.")
@click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: two per core, at most 16]")
@click.option("--overwrite", is_flag=True, help="Replace what a former run wrote to the folder.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw what the noise did.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@click.option("--push", "repo", metavar="REPO", help="Push the result to this model on the Hub.")
@click.option("--private", is_flag=True, help="With --push: make the model private, if it is new.")
@click.option("--create-pr", is_flag=True, help="With --push: open a pull request.")
@click.option("--commit-message", help="With --push: first line of the commit.")
@command
def perturb(
    model: str,
    out: Path | None,
    *,
    revision: str | None,
    variant: str | None,
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
    from surgery.noisytune import NoisyTune
    from surgery.perturb.execute import execute
    from surgery.perturb.output import is_finished
    from surgery.perturb.plan import make_plan
    from surgery.report import perturb as report
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json

    start = time.perf_counter()
    noisytune = NoisyTune(**settings)
    if plot:
        from surgery.report.pictures import check_noise_plot, noise_picture
        from surgery.report.plot import draw

        check_noise_plot(plot, noisytune, dry_run=dry_run)
    order = _order(repo, private=private, create_pr=create_pr, commit_message=commit_message, token=token)
    if order and not dry_run:
        share.check(order)
    plan = make_plan(model, out, noisytune, revision=revision, variant=variant, token=token)
    order = replace(order, folder=plan.out) if order else None
    if dry_run:
        rows = report.plan_rows(plan) | ({"push": order.command} if order else {})
        click.echo(to_json(rows) if as_json else report.plan_table(rows, look_of_stdout()))
        return
    is_new = overwrite or not is_finished(plan.out)
    recipe = execute(plan, overwrite=overwrite, workers=workers)
    rows = report.result_rows(recipe, plan, time.perf_counter() - start, is_new=is_new)
    if plot:
        draw(noise_picture(recipe, plan), plot)
    if not as_json:
        # a reader that has gone does not keep the push from being made
        with suppress(BrokenPipeError) if order else nullcontext():
            click.echo(report.result_table(rows, look_of_stdout()))
    if order:
        rows["push"] = share.push_order(order, is_quiet=as_json)
    if as_json:
        click.echo(to_json(rows))


def _order(repo: str | None, **options: Any) -> "Order | None":
    """Return what to push where, the folder yet unknown."""
    if repo:
        from surgery.push.push import Order

        return Order(Path(), repo, **options)
    for name in ("private", "create_pr", "commit_message"):
        if options[name]:
            option = f"--{name.replace('_', '-')}"
            raise SettingError(f"{option}: expected --push REPO with it, got none. Add it, or leave {option} out.")
    return None


@main.command()
@click.argument("recipe")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: MODEL-noisytune-lam…-seed…]"
)
@click.option("--source", help="Where the source is now: Hub id, folder or file.  [default: where it was]")
@click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: two per core, at most 16]")
@click.option("--overwrite", is_flag=True, help="Replace what a former run wrote to the folder.")
@command
def materialize(
    recipe: str,
    out: Path | None,
    *,
    source: str | None,
    token: str | None,
    workers: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint that RECIPE describes, from its source, byte for byte.

    RECIPE is a surgery.json, a folder that holds one, or a Hub id, which may end in @revision. An interrupted run is
    resumed by the same command.
    """
    from surgery.perturb.materialize import execute_again, plan_recipe
    from surgery.perturb.output import is_finished
    from surgery.report import perturb as report
    from surgery.report.tables import look_of_stdout
    from surgery.report.text import as_json as to_json

    start = time.perf_counter()
    plan = plan_recipe(recipe, out, source=source, token=token)
    is_new = overwrite or not is_finished(plan.out)
    written = execute_again(plan, overwrite=overwrite, workers=workers)
    rows = report.result_rows(written, plan, time.perf_counter() - start, is_new=is_new)
    click.echo(to_json(rows) if as_json else report.result_table(rows, look_of_stdout()))
