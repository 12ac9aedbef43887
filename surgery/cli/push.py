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
@click.option("--recipe-only", is_flag=True, help="Leave the weights out: `surgery materialize` makes them again.")
@options.dry_run("Print what would be pushed, and change nothing.")
@command
def push(folder: Path, repo: str, *, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Push the checkpoint in DIR to the model REPO on the Hub.

    DIR is a folder that `surgery perturb` wrote. A push that failed is resumed by the same command.
    """
    from surgery.push.push import PushOptions, refuse_without_token

    asked = PushOptions(folder, repo, **settings)
    if dry_run:
        rows = _print_plan(asked, is_quiet=as_json)
    else:
        refuse_without_token(asked)
        rows = push_and_print(asked, is_quiet=as_json)
    if as_json:
        echo_json(rows)


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
