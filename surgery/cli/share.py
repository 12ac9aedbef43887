"""The commands that share checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.group import command, main

if TYPE_CHECKING:
    from surgery.push.push import Order


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the model private, if it is new.")
@click.option("--revision", help="Branch to push to, made if need be.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request, or go on with the one a former push opened.")
@click.option("--commit-message", help="First line of the commit.  [default: names source, lam and seed]")
@click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")
@click.option("--recipe-only", is_flag=True, help="Leave the weights out: `surgery materialize` makes them again.")
@click.option("--dry-run", is_flag=True, help="Print what would be pushed, and change nothing.")
@command
def push(
    folder: Path,
    repo: str,
    *,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Push the checkpoint in DIR to the model REPO on the Hub.

    DIR is a folder that `surgery perturb` wrote. A push that failed is resumed by the same command.
    """
    from surgery.push.push import Order, refuse_without_token

    order = Order(folder, repo, **options)
    if dry_run:
        rows = _plan_order(order, is_quiet=as_json)
    else:
        refuse_without_token(order)
        rows = push_order(order, is_quiet=as_json)
    if as_json:
        from surgery.report.text import as_json as to_json

        click.echo(to_json(rows))


def check(order: "Order") -> None:
    """Refuse what can be told before there is anything to push, such as a repository without access."""
    from surgery.push.push import check as check_order

    check_order(order)


def push_order(order: "Order", *, is_quiet: bool) -> dict[str, Any]:
    """Push, print what was done unless quiet, and return it."""
    from surgery.push.contents import pack
    from surgery.push.push import execute
    from surgery.report import push as report
    from surgery.report.tables import look_of_stdout

    rows = report.result_rows(order, execute(order, pack(order.folder, recipe_only=order.recipe_only)))
    if not is_quiet:
        click.echo(report.result_table(rows, look_of_stdout()))
    return rows


def _plan_order(order: "Order", *, is_quiet: bool) -> dict[str, Any]:
    from surgery.push.contents import pack
    from surgery.push.push import plan
    from surgery.report import push as report
    from surgery.report.tables import look_of_stdout

    rows = report.plan_rows(order, plan(order, pack(order.folder, recipe_only=order.recipe_only)))
    if not is_quiet:
        click.echo(report.plan_table(rows, look_of_stdout()))
    return rows
