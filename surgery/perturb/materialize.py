"""materialize_checkpoint: plan the run that a recipe records, check its source, and write the same bytes again."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from surgery.checkpoint.weight_file import digests_of_sources
from surgery.errors import OutputError
from surgery.escapes import shell_join
from surgery.perturb.crew import LOCAL
from surgery.perturb.execute import execute
from surgery.perturb.output import is_same_folder, refuse_windows
from surgery.perturb.plan import Plan, choose_out
from surgery.perturb.replay import find_recipe, find_source, plan_replay, refuse_other_source
from surgery.recipe import FileRecord, Recipe
from surgery.storage.url import as_path, find_url


def materialize_checkpoint(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    source: str | Path | None = None,
    token: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    engine: str = LOCAL,
) -> Recipe:
    """Write the checkpoint that a recipe describes, from the recipe and its source alone.

    The bytes are those that the recipe records: weights, indexes, companions, card, recipe. The source is compared with
    the recipe before anything is written; by the tasks of a cluster shard by shard, before it gets its name. A run that
    was interrupted is resumed by the same call.

    Args:
        recipe: a surgery.json, a folder that holds one, its URL, or a Hub id, of which nothing else is fetched.
        out: folder or URL to write; default: named as perturb_checkpoint names it.
        source: where the source is now, if not where it was: Hub id, folder, file or URL.
        token: Hub token; default: the one stored on this machine.
        overwrite: replace what a former run wrote to `out`.
        workers, engine: see perturb_checkpoint.
    Returns:
        The recipe, as it was written to `out`.
    Raises:
        SourceError: no recipe, one of a live model or a hostile one; or the source is missing or not the recipe's.
        OutputError: `out` cannot be used, or what comes out is not what the recipe says.
    """
    plan = plan_materialize(recipe, out, source=source, token=token, checks_source=engine == LOCAL)
    return execute(plan, overwrite=overwrite, workers=workers, engine=engine)


def plan_materialize(
    recipe: str | Path,
    out: str | Path | None,
    *,
    source: str | Path | None,
    token: str | None,
    checks_source: bool = True,
) -> Plan:
    """Plan what materialize_checkpoint does. Writes nothing; raises as it does.

    Args:
        checks_source: read all of the source, and compare it with the recipe; else each shard is, when it is written.
    """
    refuse_windows("materialize")
    found = find_recipe(recipe, token=token)
    recorded = found.recipe
    checkpoint = find_source(recorded, str(recipe), source=source, token=token)
    named = replace(checkpoint, id=recorded.source, commit=recorded.commit)
    folder = choose_out(out, checkpoint, recorded.settings, name=named.short_name)
    if is_same_folder(folder, found.path.parent):
        raise OutputError(
            f"{folder}: expected another folder than the recipe's, got that one. Choose another with `out`."
        )
    plan = plan_replay(recorded, checkpoint, folder)
    if checks_source:
        _refuse_other_weights(plan, recorded)
    is_local = not find_url(recipe) and as_path(recipe).exists()
    words = [
        "surgery",
        "materialize",
        str(found.path if is_local else recipe),
        *_source_option(source),
        "-o",
        str(folder),
    ]
    return replace(plan, command=shell_join(words))


def _source_option(source: str | Path | None) -> Iterable[str]:
    if source is None:
        return []
    if url := find_url(source):
        return ["--source", str(url)]
    path = as_path(source)
    return ["--source", str(path.absolute() if path.exists() else source)]


def _refuse_other_weights(plan: Plan, recorded: Recipe) -> None:
    """Hash the source before anything is written; what is hashed is remembered, so the run does not do it again.

    An object that the store still calls what the recipe does is not read for that: the run itself compares its bytes.
    """
    unchanged = {file.source for file in recorded.files if file.source_version and _is_at_rest(plan, recorded, file)}
    expected = {name: digest for name, digest in recorded.source_digests.items() if name not in unchanged}
    for name, digest in digests_of_sources(plan.checkpoint, expected).items():
        refuse_other_source(plan.checkpoint.label(name), digest, expected[name])


def _is_at_rest(plan: Plan, recorded: Recipe, file: FileRecord) -> bool:
    """Tell whether a source's object is where it was, under the tag that it had."""
    checkpoint = plan.checkpoint
    if checkpoint.remote is None or not checkpoint.remote.entries[file.source].is_tagged:
        return False
    is_there = find_url(recorded.source) in (checkpoint.remote.url, checkpoint.remote.url / file.source)
    return is_there and checkpoint.version(file.source) == file.source_version
