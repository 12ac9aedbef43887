"""NoisyTune on checkpoint files: plan from headers alone, then stream every shard into the output folder."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from surgery import stream
from surgery.checkpoint import Checkpoint, read_weight_map, resolve
from surgery.errors import SettingError, SourceError
from surgery.layout import RECIPE, WeightSet
from surgery.noise import CONTRACT
from surgery.noisytune import Moments, NoisyTune, pool
from surgery.output import OutputFolder, is_finished, refuse_output
from surgery.progress import bar
from surgery.recipe import FileRecord, Recipe, TensorRecord
from surgery.tensorfile import Header, TensorFile

NO_SPREAD = "all elements equal, no spread"


@dataclass(frozen=True)
class ShardPlan:
    """One weight file: where it comes from, what it becomes, and why tensors are copied.

    Args:
        source: name relative to the source.
        name: name relative to the output.
        header: of the file to write.
        copied: reason by tensor name, for the tensors that will be copied.
        tied: names in a pickle that repeat another tensor's storage, and that tensor's name; they are not written.
    """

    source: str
    name: str
    header: Header
    copied: dict[str, str]
    tied: dict[str, str]

    @property
    def nbytes(self) -> int:
        return self.header.file_size


@dataclass(frozen=True)
class Plan:
    """What `surgery perturb` will do, before it does anything."""

    checkpoint: Checkpoint
    settings: NoisyTune
    out: Path
    shards: tuple[ShardPlan, ...]
    indexes: dict[str, bytes]
    variant: str | None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that will be written, by name."""
        sizes = {shard.name: shard.nbytes for shard in self.shards}
        sizes |= {name: len(data) for name, data in self.indexes.items()}
        return sizes | {name: self.checkpoint.path(name).stat().st_size for name in self.checkpoint.layout.companions}

    @property
    def command(self) -> str:
        """The shell command that does this."""
        s, c = self.settings, self.checkpoint
        words = ["surgery", "perturb", c.id, "--lam", f"{s.lam:g}", "--seed", str(s.seed)]
        words += ["--revision", c.commit] if c.commit else []
        words += ["--variant", self.variant] if self.variant else []
        for option, value, default in (
            ("--noise", s.noise, "uniform"),
            ("--scale", s.scale, "matrix"),
            ("--rounding", s.rounding, "nearest"),
        ):
            words += [option, value] if value != default else []
        for option, globs in (("--include", s.include), ("--exclude", s.exclude)):
            words += [word for glob in globs for word in (option, glob)]
        return shlex.join([*words, "-o", str(self.out)])


def perturb_checkpoint(
    source: str | Path,
    out: str | Path | None = None,
    *,
    lam: float = 0.15,
    seed: int = 0,
    noise: str = "uniform",
    scale: str = "matrix",
    rounding: str = "nearest",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Recipe:
    """Write a copy of a checkpoint with NoisyTune's noise in every floating-point parameter.

    The source is only read. `out` becomes a folder that transformers loads as it loads the source, with the same
    shards, names, dtypes and companion files, and `surgery.json`, the recipe. A run that was interrupted is resumed by
    the same call. w' = w + U(-lam/2, lam/2) * std(w): Wu et al., ACL 2022, arXiv 2202.12024, eq. 1.

    Args:
        source: Hub id, folder, or .safetensors or PyTorch file.
        out: folder to write; default: named after source, lam and seed, in the current directory.
        lam, seed, noise, scale, rounding, include, exclude: see NoisyTune.
        revision: branch, tag or commit; Hub only.
        variant: as in from_pretrained, such as "fp16".
        token: Hub token; default: the one stored on this machine.
        overwrite: replace what a former run wrote to `out`.
        workers: threads; default: one per core, at most 16. The bytes written do not depend on it.
    Returns:
        What was done to every tensor.
    Raises:
        SettingError: a setting is out of range, or would do nothing.
        SourceError: the source is missing, malformed, unsafe, quantized, or holds NaN or Inf.
        OutputError: `out` cannot be used, or the disk is full.
    """
    settings = NoisyTune(lam, seed, noise, scale, rounding, tuple(include), tuple(exclude))
    plan = make_plan(source, out, settings, revision=revision, variant=variant, token=token)
    return execute(plan, overwrite=overwrite, workers=workers)


def make_plan(
    source: str | Path,
    out: str | Path | None,
    settings: NoisyTune,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
) -> Plan:
    """Read the source's headers and settle what happens to every tensor. Writes nothing.

    Raises:
        SettingError, SourceError, OutputError: as perturb_checkpoint.
    """
    checkpoint = resolve(source, revision=revision, variant=variant, token=token)
    out = Path(os.path.expanduser(out or f"{checkpoint.short_name}-noisytune-lam{settings.lam:g}-seed{settings.seed}"))  # noqa: PTH111  (Path fails for an unknown ~user)
    if Path(checkpoint.id).is_file():
        refuse_output(out, Path(checkpoint.id))
    else:
        refuse_output(out, checkpoint.root)
    shards: list[ShardPlan] = []
    indexes: dict[str, bytes] = {}
    for weight_set in checkpoint.layout.weights:
        members = [_plan_shard(checkpoint, weight_set, name, settings) for name in weight_set.files]
        indexes |= _plan_index(checkpoint, weight_set, members)
        shards += members
    names = [tensor.name for shard in shards for tensor in shard.header.tensors]
    if not names:
        raise SourceError(f"{checkpoint.id}: expected tensors, got weight files without any. Fetch it again.")
    settings.check_globs(names)
    if settings.lam and not any(len(shard.copied) < len(shard.header.tensors) for shard in shards):
        reasons = sorted({reason for shard in shards for reason in shard.copied.values()})
        raise SettingError(
            f"{checkpoint.id}: expected a tensor to perturb, got {len(names)} to copy ({'; '.join(reasons)}). "
            "Correct --include and --exclude."
        )
    return Plan(checkpoint, settings, out.absolute(), tuple(shards), indexes, variant)


def execute(plan: Plan, *, overwrite: bool = False, workers: int | None = None) -> Recipe:
    """Do what the plan says, or finish it, and return the recipe that was written. Raises as perturb_checkpoint."""
    if not overwrite and (recipe := _already_done(plan)):
        return recipe
    workers = workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    folder = OutputFolder(plan.out, _job(plan), plan.command, plan.sizes)
    with folder.claim(overwrite=overwrite):
        todo = [shard for shard in plan.shards if shard.name not in folder.finished]
        by_name = {shard.name: shard for shard in todo}
        pooled: Moments | None = None
        measured: dict[str, Any] = {}
        if plan.settings.scale == "global":
            measured = folder.notes.get("measured") or _measure(plan, workers)
            folder.note("measured", measured)
            spreads = [Moments(*m) for shard in measured.values() for m in shard["moments"].values()]
            pooled = pool([moments for moments in spreads if moments.std])
        with bar(sum(shard.nbytes for shard in todo), "perturbing") as on_bytes:
            stream.run(
                (_task(plan, shard, folder, measured.get(shard.name), pooled) for shard in todo),
                plan.settings,
                workers=workers,
                on_done=lambda task: _finish_shard(task, by_name[task.name], folder, measured.get(task.name)),
                on_bytes=on_bytes,
            )
        companions = _write_companions(plan, folder)
        recipe = _recipe(plan, folder, companions, pooled)
        folder.finish(recipe.to_json())
    return recipe


# -- planning -----------------------------------------------------------------------------------------------------


def _open(checkpoint: Checkpoint, name: str) -> stream.Source:
    path = checkpoint.path(name)
    try:
        if path.suffix == ".safetensors":
            return TensorFile(path, label=str(path))
        from surgery.pickles import PickleFile

        return PickleFile(path, label=str(path))
    except OSError as error:
        raise SourceError(f"{path}: expected a file to read, got {error.strerror}. Check its permissions.") from error


def _plan_shard(checkpoint: Checkpoint, weight_set: WeightSet, name: str, settings: NoisyTune) -> ShardPlan:
    source = _open(checkpoint, name)
    source.close()
    header = source.header
    copied: dict[str, str] = {}
    for tensor in header.tensors:
        if tensor.dtype.startswith(("F8", "F6", "F4")) or tensor.name.endswith((".qweight", ".absmax", ".weight_packed")):
            raise SourceError(
                f"{checkpoint.path(name)}: {tensor.name!r}: expected unquantized weights, got {tensor.dtype}. "
                "Perturb the original checkpoint and quantize the result."
            )
        if reason := settings.reason_to_copy(tensor.name, tensor.dtype, tensor.shape):
            copied[tensor.name] = reason
    return ShardPlan(name, _output_name(weight_set, name), header, copied, source.tied)


def _output_name(weight_set: WeightSet, name: str) -> str:
    """Name the safetensors file as save_pretrained would."""
    if not weight_set.is_pickle:
        return name
    folder, slash, base = name.rpartition("/")
    stem = base.removesuffix(weight_set.suffix)
    if weight_set.suffix != ".bin":
        stem = "model"
    return f"{folder}{slash}{re.sub(r'^pytorch_model', 'model', stem)}.safetensors"


def _plan_index(checkpoint: Checkpoint, weight_set: WeightSet, members: list[ShardPlan]) -> dict[str, bytes]:
    """Check a set's index against its shards, and return the index to write, by name."""
    where: dict[str, ShardPlan] = {}
    for shard in members:
        for tensor in shard.header.tensors:
            if other := where.get(tensor.name):
                raise SourceError(
                    f"{checkpoint.path(shard.source)}: expected each tensor in one shard, got {tensor.name!r} also in "
                    f"{other.source}. Remove the stale one."
                )
            where[tensor.name] = shard
    if not weight_set.index:
        return {}
    index = checkpoint.path(weight_set.index)
    weight_map = read_weight_map(index)
    tied = {name for shard in members for name in shard.tied}
    for name, file in weight_map.items():
        shard = where.get(name)
        if name not in tied and (shard is None or shard.source.rpartition("/")[2] != file.rpartition("/")[2]):
            raise SourceError(f"{index}: expected tensor {name!r} in {file}, got no such tensor. Fetch the checkpoint again.")
    if not weight_set.is_pickle:
        return {weight_set.index: index.read_bytes()}
    document = json.loads(index.read_bytes())
    document["weight_map"] = {name: shard.name.rpartition("/")[2] for name, shard in sorted(where.items())}
    name = re.sub(r"pytorch_model(.*)\.bin\.index", r"model\1.safetensors.index", weight_set.index)
    return {name: (json.dumps(document, indent=2) + "\n").encode()}


# -- execution ----------------------------------------------------------------------------------------------------


def _job(plan: Plan) -> dict[str, Any]:
    """Describe the run, for a later one to tell whether it is the same; a local source counts by size and time."""
    checkpoint = plan.checkpoint
    files: dict[str, list[int]] = {}
    if checkpoint.commit is None:
        for shard in plan.shards:
            stat = checkpoint.path(shard.source).stat()
            files[shard.source] = [stat.st_size, stat.st_mtime_ns]
    return {
        "contract": CONTRACT,
        "source": {"id": checkpoint.id, "commit": checkpoint.commit, "variant": plan.variant, "files": files},
        "settings": _settings_to_json(plan.settings),
    }


def _settings_to_json(settings: NoisyTune) -> dict[str, Any]:
    return {"lam": settings.lam.hex()} | {k: v for k, v in vars(settings).items() if k != "lam"}


def _task(
    plan: Plan, shard: ShardPlan, folder: OutputFolder | None, measured: dict[str, Any] | None, pooled: Moments | None
) -> stream.Task:
    moments = measured["moments"] if measured else {}
    flat = {name for name, numbers in moments.items() if not Moments(*numbers).std}
    return stream.Task(
        name=shard.name,
        label=str(plan.checkpoint.path(shard.source)),
        open_source=partial(_open, plan.checkpoint, shard.source),
        open_target=partial(folder.open_part, shard.name) if folder else None,
        copied=frozenset(shard.copied.keys() | flat),
        pooled_std=pooled.std if pooled else None,
    )


def _measure(plan: Plan, workers: int) -> dict[str, Any]:
    """Read everything once for scale="global": each shard's digest, and each tensor's count, mean and spread."""
    measured: dict[str, Any] = {}

    def keep(task: stream.Task) -> None:
        moments = {name: [m.n, m.mean, m.m2] for name, m in task.moments.items()}
        measured[task.name] = {"source_sha256": task.source_sha256, "moments": moments}

    with bar(sum(shard.nbytes for shard in plan.shards), "measuring") as on_bytes:
        tasks = (_task(plan, shard, None, None, None) for shard in plan.shards)
        stream.run(tasks, plan.settings, workers=workers, on_done=keep, on_bytes=on_bytes)
    return measured


def _finish_shard(task: stream.Task, shard: ShardPlan, folder: OutputFolder, measured: dict[str, Any] | None) -> None:
    """Give a complete shard its name and note in the journal what was done to it."""
    moments = {name: Moments(*m) for name, m in measured["moments"].items()} if measured else task.moments
    tensors = []
    for tensor in shard.header.tensors:
        std = moments[tensor.name].std if tensor.name in moments else None
        reason = shard.copied.get(tensor.name) or (None if std else NO_SPREAD)
        effect = task.effects.get(tensor.name)
        tensors.append(TensorRecord(tensor.name, tensor.dtype, tensor.shape, std, reason, effect))
    source_sha256 = measured["source_sha256"] if measured else task.source_sha256
    record = FileRecord(shard.name, task.sha256, shard.source, source_sha256, tuple(tensors), shard.tied)
    size = folder.finish_part(shard.name, task.target)
    folder.record(shard.name, {"size": size, **record.to_json()})


def _write_companions(plan: Plan, folder: OutputFolder) -> dict[str, str]:
    """Copy every companion and write the indexes; return their digests, by name."""
    digests = {}
    for name in plan.checkpoint.layout.companions:
        digest = hashlib.sha256()
        fd = folder.open_part(name)
        with plan.checkpoint.path(name).open("rb") as source, os.fdopen(os.dup(fd), "wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
        folder.finish_part(name, fd)
        digests[name] = digest.hexdigest()
    for name, data in plan.indexes.items():
        folder.write(name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def _recipe(plan: Plan, folder: OutputFolder, companions: dict[str, str], pooled: Moments | None) -> Recipe:
    files = tuple(FileRecord.from_json(folder.finished[shard.name]) for shard in plan.shards)
    recipe = Recipe(
        source=plan.checkpoint.id,
        commit=plan.checkpoint.commit,
        variant=plan.variant,
        settings=plan.settings,
        pooled_std=pooled.std if pooled else None,
        files=files,
        companions=companions,
        left_out=dict(plan.checkpoint.layout.left_out),
    )
    if plan.settings.lam and not any(tensor.copied is None for tensor in recipe.tensors):
        raise SourceError(f"{plan.checkpoint.id}: expected a tensor with spread, got none. There is nothing to perturb.")
    return recipe


def _already_done(plan: Plan) -> Recipe | None:
    """Return the recipe of `out` if this very run has finished there before."""
    if not is_finished(plan.out):
        return None
    recipe = Recipe.read(plan.out / RECIPE)
    mine = (plan.checkpoint.id, plan.checkpoint.commit, plan.variant, plan.settings)
    if (recipe.source, recipe.commit, recipe.variant, recipe.settings) != mine:
        return None
    if [file.name for file in recipe.files] != [shard.name for shard in plan.shards]:
        return None
    for file, shard in zip(recipe.files, plan.shards, strict=True):
        path = plan.out / file.name
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        if plan.checkpoint.commit is None and sha256_of(plan.checkpoint.path(file.source)) != file.source_sha256:
            return None
    return recipe


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
