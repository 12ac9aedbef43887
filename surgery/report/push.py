"""`surgery push` as rows and as a table: what was sent, or with --dry-run would be."""

from collections.abc import Mapping
from typing import Any

from surgery.errors import some
from surgery.escapes import printable
from surgery.push.push import Pushed, PushOptions
from surgery.push.remote import PushPlan
from surgery.report.tables import Terminal
from surgery.report.text import line
from surgery.sizes import as_bytes


def plan_rows(options: PushOptions, plan: PushPlan) -> dict[str, Any]:
    """Describe what a push would do: where to, what it sends, what is there already, what it deletes."""
    planned = {"collection": options.collection, "logged_in": options.is_logged_in, "command": options.command}
    return _rows(options, plan) | planned


def rows(options: PushOptions, pushed: Pushed) -> dict[str, Any]:
    """Describe what a push did, with the URL of the commit or the pull request."""
    result = {"url": pushed.url, "commit": pushed.commit, "collection": pushed.collection, "notes": list(pushed.notes)}
    return _rows(options, pushed.shipment) | result


def _rows(options: PushOptions, plan: PushPlan) -> dict[str, Any]:
    remote = plan.remote
    is_new = remote.head is None
    return {
        "repo": remote.repo_id,
        "revision": remote.revision,
        "new": is_new,
        "new_branch": remote.is_new_branch or (is_new and options.revision not in (None, "main")),
        "private": options.private if is_new else remote.is_private,
        "pull_request": options.create_pr,
        "resumed_pull_request": plan.pull_url,
        "files": [{"name": item.name, "bytes": item.size} for item in plan.changed],
        "bytes": sum(item.size for item in plan.changed),
        "unchanged": [{"name": item.name, "bytes": item.size} for item in plan.unchanged],
        "unchanged_bytes": sum(item.size for item in plan.unchanged),
        "deleted": list(plan.deleted),
        "recipe_only": plan.contents.is_recipe_only,
        "left_out": list(plan.contents.left_out),
    }


def plan_table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out plan_rows for people."""
    state = f"{'new' if rows['new'] else 'existing'}, {'private' if rows['private'] else 'public'}"
    lines = [f"would push {_amount(rows)}, to {_target(rows)}, {state}", *_lines(rows, "would go")]
    if rows["collection"]:
        lines.append(line("collection", f"{rows['collection']}: the model would be added"))
    if not rows["logged_in"]:
        unknown = "; if the model is there and private, it is not seen" if rows["new"] else ""
        lines.append(line("login", f"none: `hf auth login`, or give --token, to push{unknown}"))
    return "\n".join([*terminal.wrap_all(lines), f"run: {rows['command']}"])


def table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out rows for people."""
    if rows["files"] or rows["deleted"]:
        title = f"pushed {_amount(rows)}, to {_target(rows)}"
    else:
        title = f"nothing to push: all of it is in {_branch(rows)}"
    lines = [title, *_lines(rows, "are gone"), *(line("note", note) for note in rows["notes"])]
    urls = [printable(line(name, rows[name])) for name in ("url", "collection") if rows[name]]
    return "\n".join([*terminal.wrap_all(lines), *urls])


def _amount(rows: Mapping[str, Any]) -> str:
    return f"{_files(rows['files'])}, {as_bytes(rows['bytes'])}"


def _files(files: list[Any]) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)}"


def _target(rows: Mapping[str, Any]) -> str:
    if rows["pull_request"] and not rows["resumed_pull_request"]:
        return f"{_branch(rows)} as a pull request"
    return _branch(rows)


def _branch(rows: Mapping[str, Any]) -> str:
    branch = f"{rows['repo']}@{rows['revision']}"
    if rows["resumed_pull_request"]:
        return f"{branch} (the pull request that is open)"
    return f"{branch} (a new branch)" if rows["new_branch"] else branch


def _lines(rows: Mapping[str, Any], fate: str) -> list[str]:
    lines = []
    if rows["unchanged"]:
        amount = f"{_files(rows['unchanged'])}, {as_bytes(rows['unchanged_bytes'])}"
        lines.append(line("unchanged", f"{amount}, there already"))
    if rows["recipe_only"]:
        lines.append(line("recipe only", "no weights: `surgery materialize` makes them again"))
    if deleted := rows["deleted"]:
        lines.append(line("deleted", f"{len(deleted)} weights of a former push {fate} ({some(deleted)})"))
    if left_out := rows["left_out"]:
        lines.append(line("left out", f"{len(left_out)} ({some(left_out)}): not in surgery.json"))
    return lines
