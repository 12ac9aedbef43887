"""`surgery push`: put a perturbed checkpoint on the Hub. `surgery perturb --push` ends in the same function."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options
from surgery.cli.group import PUSH_CARD, command, main
from surgery.cli.syntax import echo_json

if TYPE_CHECKING:
    from surgery.push.push import PushOptions


@main.command(
    examples=("surgery push ./out me/noisy --dry-run", "surgery push ./out me/noisy --recipe-only"),
    card=PUSH_CARD,
)
@click.argument("folder", metavar="DIR", shell_complete=options.complete_folder, type=click.Path(path_type=Path))
@click.argument("repo")
@options.private("Make the model private, if it is new.")
@click.option("--revision", help="Branch to push to, made if need be.  [default: main]")
@options.create_pr("Open a pull request, or go on with the one a former push opened.")
@options.commit_message("First line of the commit.  [default: names source, lam and seed]")
@options.token
@options.recipe_only("Leave the weights out: `surgery materialize` makes them again.")
@options.collection("Add the model to this collection, made if need be.")
@options.seed("A range such as 0..9: push ten, with {seed} in DIR and REPO.")
@options.dry_run("Print what would be pushed, and change nothing.")
@command
def push(folder: Path, repo: str, *, seeds: range | None, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Push the checkpoint in DIR to the model REPO on the Hub.

    DIR is a folder that `surgery perturb` wrote. A push that failed is resumed by the same command.
    """
    from surgery.push.push import PushOptions, refuse_without_token

    several = seeds or range(1)
    asked = [
        PushOptions(
            options.fill_in(folder, "DIR", several, seed), options.fill_in(repo, "REPO", several, seed), **settings
        )
        for seed in seeds or (None,)
    ]
    if not dry_run:
        refuse_without_token(asked[0])
    do = _print_plan if dry_run else push_and_print
    every = [do(one, is_quiet=as_json) for one in asked]
    if as_json:
        echo_json(every[0] if len(every) == 1 else {"variants": every})


def push_and_print(asked: "PushOptions", *, is_quiet: bool) -> dict[str, Any]:
    """Push, print what was done unless quiet, and return it."""
    from surgery.push.contents import read_contents
    from surgery.push.push import execute
    from surgery.report import push as report
    from surgery.report.tables import stdout_terminal

    rows = report.rows(asked, execute(asked, read_contents(asked.folder, recipe_only=asked.recipe_only)))
    if not is_quiet:
        click.echo(report.table(rows, stdout_terminal()))
    return rows


def _print_plan(asked: "PushOptions", *, is_quiet: bool) -> dict[str, Any]:
    from surgery.push.contents import read_contents
    from surgery.push.push import make_plan
    from surgery.report import push as report
    from surgery.report.tables import stdout_terminal

    rows = report.plan_rows(asked, make_plan(asked, read_contents(asked.folder, recipe_only=asked.recipe_only)))
    if not is_quiet:
        click.echo(report.plan_table(rows, stdout_terminal()))
    return rows
