"""Whether what an output folder holds, finished or not, is of the very run that a plan describes."""

from dataclasses import asdict
from functools import partial
from typing import Any

from surgery.checkpoint.digests import algorithm_of
from surgery.checkpoint.weight_file import digests_of_sources
from surgery.errors import SettingError
from surgery.noise import CONTRACT
from surgery.noisytune import FLOATS
from surgery.perturb.compare_recipe import recipe_faults
from surgery.perturb.destination import Destination, open_destination, read_finished
from surgery.perturb.output import OutputFolder
from surgery.perturb.plan import Plan
from surgery.perturb.shared import MEASURED
from surgery.perturb.tasks import GlobalMoments
from surgery.recipe import FileRecord, Recipe


def open_output(plan: Plan) -> Destination:
    """Return where a run writes, which nothing is done to yet."""
    return open_destination(plan.out, _job(plan), plan.command, plan.sizes, partial(_is_record, plan))


def open_shared(plan: Plan, option: str) -> OutputFolder:
    """Return where several processes write one run, which nothing is done to yet.

    Raises:
        SettingError: it is on a store.
    """
    folder = open_output(plan)
    if not isinstance(folder, OutputFolder):
        raise SettingError(
            f"`{option}`: expected `out` on a disk that all machines see, got {plan.out}. Write it there, or leave "
            f"`{option}` out."
        )
    return folder


def _job(plan: Plan) -> dict[str, Any]:
    """Describe the run, for a later one to tell whether it is the same; a local source counts by size and time."""
    checkpoint = plan.checkpoint
    files: dict[str, list[int | str | None]] = {}
    if checkpoint.remote and checkpoint.commit is None:
        files = {s.source: [checkpoint.size(s.source), checkpoint.version(s.source)] for s in plan.shards}
    elif checkpoint.commit is None:
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


def kept_moments(plan: Plan, folder: Destination) -> GlobalMoments | None:
    """Return what has been measured of scale="global", by a former run or by several processes; None if not all."""
    entries = folder.notes.get(MEASURED)
    if entries is None and isinstance(folder, OutputFolder):
        entries = folder.shared.records.read(MEASURED)
    return GlobalMoments.from_journal(entries, plan)


def already_done(plan: Plan) -> Recipe | None:
    """Return the recipe of `out` if this very run has finished there before."""
    found = read_finished(plan.out, plan.sizes)
    if found is None:
        return None
    recipe, sizes = found
    source = plan.checkpoint
    mine = (source.id, source.commit, plan.variant, source.key, source.dequantize, plan.settings)
    if (recipe.source, recipe.commit, recipe.variant, recipe.key, recipe.dequantize, recipe.settings) != mine:
        return None
    if [file.name for file in recipe.files] != [shard.name for shard in plan.shards]:
        return None
    if not sizes.keys() >= plan.sizes.keys():
        return None
    for file, shard in zip(recipe.files, plan.shards, strict=True):
        floats = [tensor for tensor in file.tensors if tensor.dtype in FLOATS and tensor.name in shard.roles]
        if any(tensor.role.is_buffer != shard.roles[tensor.name].is_buffer for tensor in floats):
            return None  # an older version took other tensors for buffers
        if not plan.is_recipe_only and sizes.get(file.name) != shard.nbytes:
            return None
    known = recipe.source_digests
    if plan.checkpoint.commit is None and digests_of_sources(plan.checkpoint, known) != known:
        return None
    return None if plan.recorded and recipe_faults(plan.recorded, recipe) else recipe
