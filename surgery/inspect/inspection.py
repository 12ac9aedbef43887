"""inspect_checkpoint: every tensor of a checkpoint, and whether perturb would change it; from headers, or the bytes."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.config_files import DEQUANTIZED, quantized
from surgery.checkpoint.layout import RECIPE
from surgery.checkpoint.resolve import Checkpoint, locate, resolve
from surgery.checkpoint.roles import find_roles, read_model_type
from surgery.checkpoint.tensorfile import Header, Tensor
from surgery.checkpoint.value_rules import find_suspects
from surgery.checkpoint.weight_file import WeightFile, open_weights, reading_workers
from surgery.display import Brief, as_html, as_shape, at_commit, number
from surgery.errors import SourceError
from surgery.inspect.name_patterns import Group, group
from surgery.noisytune import NO_SPREAD, NoisyTune
from surgery.perturb.shard_plan import ShardPlan, floats, is_packed
from surgery.progress import bar
from surgery.recipe import Recipe
from surgery.roles import Role

if TYPE_CHECKING:
    from surgery.inspect.stats import Stats

PACKED = "quantized: perturb refuses it"
NOT_FINITE = "NaN or Inf: perturb refuses it"
REFUSED = (PACKED, NOT_FINITE)
"""Why a tensor keeps perturb from doing anything at all."""


@dataclass(frozen=True, repr=False)
class TensorInfo(Brief):
    """One tensor of a checkpoint.

    Args:
        file: that holds it, relative to the checkpoint.
        why: why perturb leaves it as it is, by default; None if it gets noise.
        known: how it is known to be a parameter or a buffer: by "class", "rule" or "name".
        stats: None if not asked for, or if its elements are not read as numbers.
    """

    file: str
    tensor: Tensor
    why: str | None
    known: str | None
    stats: "Stats | None" = None

    @property
    def name(self) -> str:
        return self.tensor.name


@dataclass(frozen=True, repr=False)
class Inspection(Brief):
    """What a checkpoint holds.

    Args:
        tensors: in the order of files and of their bytes.
        tied: by folder, names that repeat another tensor, and that one's name. Of safetensors only the bytes tell, so
            that they are looked for with the statistics only.
        quantized: why perturb refuses the checkpoint, or None.
        is_measured: whether statistics were asked for.
        recipe: what made it, if `surgery perturb` did.
    """

    checkpoint: Checkpoint
    tensors: tuple[TensorInfo, ...]
    tied: Mapping[str, Mapping[str, str]]
    quantized: str | None
    recipe: Recipe | None
    is_measured: bool = False

    def _repr_html_(self) -> str:
        changed = sum(info.why is None for info in self.tensors)
        elements = sum(info.tensor.size for info in self.tensors)
        lines = [
            at_commit(self.checkpoint.id, self.checkpoint.commit),
            f"{elements:,} parameters in {len(self.tensors):,} tensors; perturb changes {changed:,} of them",
        ]
        lines += [f"{self.quantized}: perturb refuses it"] if self.quantized else []
        lines += [f"its surgery.json says: NoisyTune of {self.recipe.source}"] if self.recipe else []
        component = components(self.checkpoint)
        groups = group(
            self.tensors,
            name=lambda info: f"{component[info.file]}/{info.name}".removeprefix("/"),
            kind=lambda info: (info.tensor.dtype, info.tensor.shape, info.why),
        )
        groups.sort(key=lambda one: one.members[0].why not in REFUSED)
        titles = _STATS if self.is_measured else ()
        return as_html(lines, ("tensor", "", "dtype", "shape", *titles, "perturb"), groups, self._cells)

    def _cells(self, group: Group[TensorInfo]) -> list[str]:
        first = group.members[0]
        stats = _figures(group) if self.is_measured else []
        count = f"x{len(group.members)}" if len(group.members) > 1 else ""
        shape = as_shape(first.tensor.shape)
        what = "perturbed" if first.why is None else first.why if first.why in REFUSED else f"copied: {first.why}"
        return [group.pattern, count, first.tensor.dtype.lower(), shape, *stats, what]


_STATS = ("mean", "std", "min", "max", "NaN", "Inf")


def _figures(group: Group[TensorInfo]) -> list[str]:
    """Return the statistics of a group's elements together, as _STATS has them."""
    from surgery.inspect.stats import pool_stats  # takes NumPy, which headers alone must not wait for

    parts = [info.stats for info in group.members if info.stats]
    if not parts:
        return [""] * len(_STATS)
    found = pool_stats(parts)
    figures = (found.moments.mean, found.moments.std, found.min, found.max)
    return [*map(number, figures), f"{found.nan:,}", f"{found.inf:,}"]


def inspect_checkpoint(
    source: str | Path,
    *,
    stats: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    key: str | None = None,
    token: str | None = None,
    workers: int | None = None,
) -> Inspection:
    """Tell what a checkpoint holds, from its headers; those of a model on the Hub are read without its weights.

    Args:
        source: Hub id, folder, URL, or .safetensors or PyTorch file.
        stats: read all weights too, which fetches those on the Hub: mean, std, extremes, NaN and Inf of each tensor.
        revision: branch, tag or commit; Hub only.
        variant: as in from_pretrained, such as "fp16".
        key: which state_dict to take of a PyTorch file that holds several.
        token: Hub token; default: the one stored on this machine.
        workers: threads; default: one per core, at most 16.
    Raises:
        SettingError, SourceError: the checkpoint is missing, malformed or unsafe.
    """
    found = locate(source, revision)
    if not stats and isinstance(found, tuple):
        from surgery.checkpoint.hub_headers import read_remote_headers

        if remote := read_remote_headers(found[0], revision=found[1], variant=variant, token=token):
            checkpoint, headers = replace(remote[0], key=key), remote[1]
            return _describe(checkpoint, _shards(checkpoint, {name: (header, {}) for name, header in headers.items()}))
    checkpoint = resolve(source, revision=revision, variant=variant, key=key, token=token)
    with open_all(checkpoint) as sources:
        files = {name: (source.header, source.tied) for name, source in sources.items()}
        shards = _shards(checkpoint, files, has_values=True)
        described = _describe(checkpoint, shards)
        return _measure(described, sources, shards, workers) if stats else described


@contextmanager
def open_all(checkpoint: Checkpoint) -> Iterator[dict[str, WeightFile]]:
    """Open every weight file of a checkpoint to read, by name; at the end, refuse those that changed, and close all."""
    with ExitStack() as stack:
        sources = {}
        for name in (name for weight_set in checkpoint.layout.weights for name in weight_set.files):
            sources[name] = open_weights(checkpoint, name)
            stack.callback(sources[name].close)
        yield sources
        for source in sources.values():
            source.refuse_changed()


def components(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the component of each weight file: its folder, and its stem where a folder holds several models."""
    sets = checkpoint.layout.weights
    folders = Counter(weight_set.folder for weight_set in sets)
    return {
        file: s.folder if folders[s.folder] == 1 else f"{s.folder}/{s.stem}".lstrip("/")
        for s in sets
        for file in s.files
    }


def _shards(
    checkpoint: Checkpoint, files: Mapping[str, tuple[Header, dict[str, str]]], *, has_values: bool = False
) -> list[ShardPlan]:
    """Say what perturb would do with each tensor of the weight files, given by name with what they repeat.

    Args:
        has_values: whether the files are here, to tell buffers by their values too.
    """
    shards = []
    for weight_set in checkpoint.layout.weights:
        shapes = {tensor.name: tensor.shape for name in weight_set.files for tensor in files[name][0].tensors}
        model_type = read_model_type(checkpoint, weight_set.folder)
        roles = find_roles(shapes, model_type)
        if has_values:
            tensors = {name: floats(files[name][0]) for name in weight_set.files}
            roles |= find_suspects(tensors, roles, partial(open_weights, checkpoint))
        ties = model_type.find_ties(shapes) if model_type and model_type.is_tied else {}
        shards += [_shard(name, *files[name], roles, ties) for name in weight_set.files]
    return shards


def _shard(
    name: str, header: Header, tied: dict[str, str], roles: dict[str, Role], class_ties: dict[str, str]
) -> ShardPlan:
    settings = NoisyTune()
    copied = {}
    for tensor in header.tensors:
        role = roles[tensor.name]
        why = PACKED if is_packed(tensor) else settings.reason_to_copy(tensor.name, tensor.dtype, tensor.shape, role)
        if why:
            copied[tensor.name] = why
    return ShardPlan(name, name, header, copied, tied, roles, class_ties)


def _describe(checkpoint: Checkpoint, shards: list[ShardPlan]) -> Inspection:
    tensors = tuple(
        TensorInfo(shard.name, tensor, shard.copied.get(tensor.name), shard.roles[tensor.name].known)
        for shard in shards
        for tensor in shard.header.tensors
    )
    methods = quantized(checkpoint)
    why = next((_say_quantized(config, settings["quant_method"]) for config, settings in methods.items()), None)
    if packed := next((info for info in tensors if info.why == PACKED), None):
        why = why or f"{packed.tensor.dtype} ({packed.name})"
    return Inspection(checkpoint, tensors, _by_folder(shards), why, read_recipe(checkpoint))


def _say_quantized(config: str, method: str) -> str:
    missing = ", and no --dequantize bf16" if method in DEQUANTIZED else ""
    return f"quantization_config ({method}) in {config}{missing}"


def read_recipe(checkpoint: Checkpoint) -> Recipe | None:
    """Return the recipe that a checkpoint carries, if it can be read: what cannot is none of this version."""
    if Path(checkpoint.id).is_file() or not checkpoint.holds(RECIPE):
        return None
    try:
        return Recipe.read(checkpoint.path(RECIPE))
    except SourceError:
        return None


def _by_folder(shards: list[ShardPlan]) -> dict[str, dict[str, str]]:
    tied: dict[str, dict[str, str]] = {}
    for shard in shards:
        if shard.tied:
            tied.setdefault(shard.name.rpartition("/")[0], {}).update(shard.tied)
    return tied


def _measure(
    described: Inspection, sources: dict[str, WeightFile], shards: list[ShardPlan], workers: int | None
) -> Inspection:
    """Add what only the bytes tell: statistics, and tensors that repeat another one."""
    from surgery.dtypes import is_measurable
    from surgery.inspect.scan import scan
    from surgery.inspect.stats import stats_measurement
    from surgery.perturb.ties import find_ties
    from surgery.threads import computing_workers

    infos = [info for info in described.tensors if is_measurable(info.tensor.dtype)]
    measurements = [stats_measurement(sources[info.file], info.tensor) for info in infos]
    with bar(sum(info.tensor.nbytes for info in infos), "reading") as on_bytes:
        scan(
            measurements,
            workers=workers or reading_workers(computing_workers(), described.checkpoint),
            on_bytes=on_bytes,
        )
    results = {id(info): measurement.result for info, measurement in zip(infos, measurements, strict=True)}
    ties = find_ties(shards, partial(open_weights, described.checkpoint))
    tied = _by_folder([replace(shard, tied=shard.tied | ties.get(shard.name, {})) for shard in shards])
    tensors = tuple(_with_stats(info, results.get(id(info))) for info in described.tensors)
    return replace(described, tensors=tensors, tied=tied, is_measured=True)


def _with_stats(info: TensorInfo, stats: "Stats | None") -> TensorInfo:
    """Add statistics to a tensor, and what they say of the noise it would get."""
    why = info.why
    if why is None and stats:
        why = NOT_FINITE if stats.nan or stats.inf else None if stats.moments.std else NO_SPREAD
    return replace(info, stats=stats, why=why)
