"""perturb_checkpoint: carry out a Plan shard by shard, then copy companions, and write model card and recipe."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.checkpoint.digests import algorithm_of, digest_of_bytes, new_digest
from surgery.checkpoint.layout import CARD
from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.weight_file import digests_of_sources, reading_workers
from surgery.errors import OutputError, SourceError
from surgery.files import open_file
from surgery.noise import CONTRACT
from surgery.noisytune import FLOATS, Moments, NoisyTune, as_globs
from surgery.perturb import stream
from surgery.perturb.compare_recipe import file_faults, recipe_faults
from surgery.perturb.destination import Destination, open_destination, read_finished
from surgery.perturb.output import refuse_windows
from surgery.perturb.plan import Plan, make_plan
from surgery.perturb.shard import ShardTask, Sink
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.tasks import GlobalMoments, make_record, make_task, measure, with_ties
from surgery.progress import bar
from surgery.recipe import FileRecord, Recipe, warn_of_vanished
from surgery.storage.url import Url
from surgery.threads import streaming_workers

_CHUNK = 1 << 20


def perturb_checkpoint(
    source: str | Path,
    out: str | Path | None = None,
    *,
    lam: float = 0.15,
    seed: int = 0,
    noise: str = "uniform",
    scale: str = "matrix",
    rounding: str = "nearest",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    revision: str | None = None,
    variant: str | None = None,
    key: str | None = None,
    dequantize: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    recipe_only: bool = False,
) -> Recipe:
    """Write a copy of a checkpoint with NoisyTune's noise in every floating-point parameter.

    The source is only read. `out` becomes a folder that transformers loads as it loads the source, with the same
    shards, names, dtypes and companion files, and `surgery.json`, the recipe. A run that was interrupted is resumed by
    the same call. w' = w + U(-lam/2, lam/2) * std(w): Wu et al., ACL 2022, arXiv 2202.12024, eq. 1.

    Args:
        source: Hub id, folder, URL, or .safetensors or PyTorch file.
        out: folder or URL to write; default: named after source, lam and seed, in the current directory.
        lam, seed, noise, scale, rounding, include, exclude: see NoisyTune.
        revision: branch, tag or commit; Hub only.
        variant: as in from_pretrained, such as "fp16".
        key: which state_dict to take of a PyTorch file that holds several.
        dequantize: "bf16": write float8 in blocks (DeepSeek, Qwen) and mxfp4 (gpt-oss) as bfloat16.
        token: Hub token; default: the one stored on this machine.
        overwrite: replace what a former run wrote to `out`.
        workers: threads; default: three per core, at most 16. The bytes written do not depend on it.
        recipe_only: write all but the weights and their indexes: materialize_checkpoint makes them from the recipe.
    Returns:
        What was done to every tensor.
    Raises:
        SettingError: a setting is out of range, or would do nothing.
        SourceError: the source is missing, malformed, unsafe, quantized, or holds NaN or Inf.
        OutputError: `out` cannot be used, or the disk is full.
    """
    refuse_windows("perturb")
    settings = NoisyTune(lam, seed, noise, scale, rounding, as_globs("include", include), as_globs("exclude", exclude))
    plan = make_plan(
        source,
        out,
        settings,
        revision=revision,
        variant=variant,
        key=key,
        dequantize=dequantize,
        token=token,
        recipe_only=recipe_only,
    )
    recipe = execute(plan, overwrite=overwrite, workers=workers)
    warn_of_vanished(recipe)
    return recipe


def execute(plan: Plan, *, overwrite: bool = False, workers: int | None = None) -> Recipe:
    """Do what the plan says, or finish it, and return the recipe that was written. Raises as perturb_checkpoint."""
    if not overwrite and (recipe := _already_done(plan)):
        return recipe
    workers = workers or reading_workers(streaming_workers(), plan.checkpoint)
    plan = with_ties(plan)
    folder = open_destination(plan.out, _job(plan), plan.command, plan.sizes, partial(_is_record, plan))
    with folder.claim(overwrite=overwrite):
        todo = [shard for shard in plan.shards if shard.name not in folder.finished]
        by_name = {shard.name: shard for shard in todo}
        kept = GlobalMoments.from_journal(folder.notes.get("measured"), plan)
        measured = kept or measure(plan, workers)
        if measured.moments and not kept:
            folder.note("measured", measured.to_json())
        with bar(sum(shard.nbytes for shard in todo), "perturbing") as on_bytes:
            stream.run(
                (make_task(plan, shard, measured, partial(_open_sink, plan, folder, shard.name)) for shard in todo),
                plan.settings,
                workers=workers,
                on_done=lambda task: _finish_shard(task, plan, by_name[task.name], folder, measured),
                on_bytes=on_bytes,
                meanwhile=partial(import_module, "surgery.perturb.card"),  # it takes a while
            )
        companions = _write_companions(plan, folder)
        recipe = _recipe(plan, folder, companions, measured.pooled)
        if plan.recorded:
            _refuse(recipe_faults(plan.recorded, recipe), plan.out)
        recipe = _write_card(recipe, plan, folder)
        folder.finish(recipe.to_json())
    return recipe


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


class _Discarded:
    """Where a shard goes of which only the digest is wanted."""

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]:  # noqa: ARG002
        """Take nothing."""
        return lambda: None

    def close(self) -> None:
        """Release nothing."""


def _open_sink(plan: Plan, folder: Destination, name: str) -> Sink:
    return _Discarded() if plan.is_recipe_only else folder.open_part(name)


def _finish_shard(task: ShardTask, plan: Plan, shard: ShardPlan, folder: Destination, measured: GlobalMoments) -> None:
    """Give a complete shard its name and note in the journal what was done to it."""
    record = make_record(task, shard, measured)
    if plan.recorded:
        recorded = next(file for file in plan.recorded.files if file.name == record.name)
        _refuse(file_faults(recorded, record), plan.out)
    if not plan.is_recipe_only:
        folder.finish_part(shard.name, task.sink)
    folder.record(shard.name, {"size": shard.nbytes, **record.to_json()})


def _refuse(faults: list[str], place: object) -> None:
    """Leave a repeated run unfinished whose recipe says something else than what comes out."""
    if faults:
        raise OutputError(f"{place}: {faults[0]} The recipe was altered or is damaged: fetch it again.")


def _write_companions(plan: Plan, folder: Destination) -> dict[str, str]:
    """Copy every companion, and write the indexes and configs of our own; return their digests, by name."""
    digests = {}
    for name in plan.companions:
        if name in plan.configs:
            continue
        plan.checkpoint.refuse_changed(name)
        digest = new_digest(plan.algorithm(name))
        part = folder.open_part(name)
        path = plan.checkpoint.path(name)
        with open_file(path) as source:  # what fails of the part has a name already
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                part.append(memoryview(chunk))
        plan.checkpoint.refuse_changed(name)
        folder.finish_part(name, part)
        digests[name] = digest.text()
    for name, data in {**plan.configs, **plan.indexes}.items():
        if name in plan.configs or not plan.is_recipe_only:
            folder.write(name, data)
        digests[name] = digest_of_bytes(data, plan.algorithm(name))
    return digests


def _write_card(recipe: Recipe, plan: Plan, folder: Destination) -> Recipe:
    """Write the card, and note it in the recipe."""
    from surgery.perturb.card import make_card, read_metadata

    own = plan.checkpoint.path(CARD) if CARD in plan.checkpoint.layout.companions else None
    companions = plan.checkpoint.root if isinstance(plan.out, Url) else plan.out
    card = make_card(recipe, read_metadata(own) if own else {}, companions).encode()
    folder.write(CARD, card)
    return replace(recipe, card=digest_of_bytes(card, plan.algorithm(CARD)))


def _recipe(plan: Plan, folder: Destination, companions: dict[str, str], pooled: Moments | None) -> Recipe:
    files = tuple(FileRecord.from_json(folder.finished[shard.name]) for shard in plan.shards)
    recipe = Recipe(
        source=plan.checkpoint.id,
        commit=plan.checkpoint.commit,
        variant=plan.variant,
        key=plan.checkpoint.key,
        dequantize=plan.checkpoint.dequantize,
        settings=plan.settings,
        pooled_std=pooled.std if pooled else None,
        files=files,
        companions=companions,
        left_out=plan.left_out,
        notes=plan.recorded.notes if plan.recorded else tuple(_link_notes(plan.checkpoint)),
    )
    if plan.settings.lam and not any(tensor.copied is None for tensor in recipe.tensors):
        raise SourceError(
            f"{plan.checkpoint.id}: expected a tensor with spread, got none. There is nothing to perturb."
        )
    return recipe


def _link_notes(checkpoint: Checkpoint) -> Iterator[str]:
    return (f"{name} is a link to {target}" for name, target in checkpoint.links.items())


def _already_done(plan: Plan) -> Recipe | None:
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
