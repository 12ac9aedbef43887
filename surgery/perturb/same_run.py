"""Whether what an output folder holds, finished or not, is of the very run that a plan describes."""

from dataclasses import asdict
from functools import partial
from typing import Any

from surgery.checkpoint.digests import algorithm_of
from surgery.checkpoint.layout import RECIPE
from surgery.checkpoint.weight_file import digests_of_sources
from surgery.noise import CONTRACT
from surgery.noisytune import FLOATS
from surgery.perturb.compare_recipe import recipe_faults
from surgery.perturb.output import OutputFolder, is_finished
from surgery.perturb.plan import Plan
from surgery.perturb.shared import MEASURED
from surgery.perturb.tasks import GlobalMoments
from surgery.recipe import FileRecord, Recipe


def open_output(plan: Plan) -> OutputFolder:
    """Return the output folder of a run, which nothing is done to yet."""
    return OutputFolder(plan.out, _job(plan), plan.command, plan.sizes, partial(_is_record, plan))


def _job(plan: Plan) -> dict[str, Any]:
    """Describe the run, for a later one to tell whether it is the same; a local source counts by size and time."""
    checkpoint = plan.checkpoint
    files: dict[str, list[int]] = {}
    if checkpoint.commit is None:
        for name in (part for shard in plan.shards for part in checkpoint.parts(shard.source)):
            stat = checkpoint.path(name).stat()
            files[name] = [stat.st_size, stat.st_mtime_ns]
    source = {"id": checkpoint.id, "commit": checkpoint.commit, "variant": plan.variant, "files": files}
    chosen = {"key": checkpoint.key, "dequantize": checkpoint.dequantize}
    job = {
        "contract": CONTRACT,
        "source": source | {name: value for name, value in chosen.items() if value is not None},
        "settings": asdict(plan.settings),
    }
    return job | {"recipe_only": True} if plan.is_recipe_only else job


def _is_record(plan: Plan, name: str, entry: Any) -> bool:
    """Tell whether a journal's record of a shard is one that this run would make: it may be an older version's."""
    record = FileRecord.from_journal(entry)
    shard = next((shard for shard in plan.shards if shard.name == name), None)
    if record is None or shard is None:
        return False
    found = algorithm_of(record.digest), algorithm_of(record.source_digest)
    return found == (plan.algorithm(name), plan.source_algorithm(shard.source))


def kept_moments(plan: Plan, folder: OutputFolder) -> GlobalMoments | None:
    """Return what has been measured of scale="global", by a former run or by several processes; None if not all."""
    records = folder.shared.records
    return GlobalMoments.from_journal(folder.notes.get(MEASURED) or records.read(MEASURED), plan)


def already_done(plan: Plan) -> Recipe | None:
    """Return the recipe of `out` if this very run has finished there before."""
    if not is_finished(plan.out):
        return None
    recipe = Recipe.read(plan.out / RECIPE)
    source = plan.checkpoint
    mine = (source.id, source.commit, plan.variant, source.key, source.dequantize, plan.settings)
    if (recipe.source, recipe.commit, recipe.variant, recipe.key, recipe.dequantize, recipe.settings) != mine:
        return None
    if [file.name for file in recipe.files] != [shard.name for shard in plan.shards]:
        return None
    if not all((plan.out / name).is_file() for name in plan.sizes):
        return None
    for file, shard in zip(recipe.files, plan.shards, strict=True):
        floats = [tensor for tensor in file.tensors if tensor.dtype in FLOATS and tensor.name in shard.roles]
        if any(tensor.role.is_buffer != shard.roles[tensor.name].is_buffer for tensor in floats):
            return None  # an older version took other tensors for buffers
        path = plan.out / file.name
        if plan.is_recipe_only:
            continue
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
    known = recipe.source_digests
    if plan.checkpoint.commit is None and digests_of_sources(plan.checkpoint, known) != known:
        return None
    return None if plan.recorded and recipe_faults(plan.recorded, recipe) else recipe
