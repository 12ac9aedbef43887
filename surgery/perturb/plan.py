"""Plan: which tensor of which shard is perturbed or copied, and every file to write, settled from headers alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from surgery.checkpoint.config_files import refuse_quantized, without_quantization
from surgery.checkpoint.digests import BLAKE3, SHA256, algorithm_of
from surgery.checkpoint.layout import CARD, WeightSet
from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.roles import find_roles, read_model_type
from surgery.checkpoint.tensorfile import Header
from surgery.checkpoint.value_rules import find_suspects, warn_of_suspects
from surgery.checkpoint.weight_file import open_weights
from surgery.errors import SettingError, SourceError
from surgery.escapes import shell_join
from surgery.noisytune import NoisyTune
from surgery.perturb.claims import refuse_url
from surgery.perturb.indexes import plan_index
from surgery.perturb.output import refuse_output
from surgery.perturb.shard_plan import ShardPlan, floats, is_packed
from surgery.recipe import Recipe
from surgery.roles import Role
from surgery.storage.url import Url, as_path, find_url


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it does anything.

    Args:
        indexes: to write, by name.
        configs: to write in the place of the source's, by name: weights that were dequantized are not quantized.
        command: the shell command that does this.
        recorded: the recipe that the run repeats, if it does; what it writes must be what that says.
        is_recipe_only: the weights and their indexes are computed, for the recipe, and not written.
    """

    checkpoint: Checkpoint
    settings: NoisyTune
    out: Path | Url
    shards: tuple[ShardPlan, ...]
    indexes: dict[str, bytes]
    variant: str | None
    command: str
    recorded: Recipe | None = None
    is_recipe_only: bool = False
    configs: dict[str, bytes] = field(default_factory=dict)

    @property
    def companions(self) -> tuple[str, ...]:
        """Files to copy: the source's own card describes other weights."""
        return tuple(name for name in self.checkpoint.layout.companions if name != CARD)

    @property
    def left_out(self) -> dict[str, str]:
        """Files of the source that are not copied, with the reason."""
        layout = self.checkpoint.layout
        replaced = {CARD: "replaced by a card of its own"} if CARD in layout.companions else {}
        return dict(layout.left_out) | replaced

    @property
    def shard_sizes(self) -> dict[str, int]:
        """Bytes of every shard that will be written, by name."""
        return {} if self.is_recipe_only else {shard.name: shard.nbytes for shard in self.shards}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that will be written, by name."""
        indexes = {} if self.is_recipe_only else {name: len(data) for name, data in self.indexes.items()}
        companions = {name: self.checkpoint.size(name) for name in self.companions}
        return self.shard_sizes | indexes | companions | {name: len(data) for name, data in self.configs.items()}

    def algorithm(self, name: str) -> str:
        """Return the algorithm of a written file's digest: BLAKE3, or that of the recipe that the run repeats."""
        if not self.recorded:
            return BLAKE3
        digest = self.recorded.card if name == CARD else self.recorded.digests.get(name)
        return algorithm_of(digest) if digest else BLAKE3

    def source_algorithm(self, name: str) -> str:
        """Return the algorithm of a source file's digest: the recipe's; else of one on the Hub its sha256."""
        if self.recorded:
            return algorithm_of(self.recorded.source_digests[name])
        return SHA256 if self.checkpoint.commit else BLAKE3

    def source_version(self, name: str) -> str | None:
        """Return what the store calls a source's object: the recipe's word, where the run repeats one."""
        if self.recorded:
            return next((file.source_version for file in self.recorded.files if file.source == name), None)
        return self.checkpoint.version(name)


def perturb_command(
    source: str,
    settings: NoisyTune,
    *,
    commit: str | None,
    variant: str | None,
    key: str | None = None,
    dequantize: str | None = None,
    out: Path | Url | None = None,
) -> str:
    """Return the shell command that perturbs a source."""
    s = settings
    lam = f"{s.lam:g}" if float(f"{s.lam:g}") == s.lam else repr(s.lam)
    words = ["surgery", "perturb", source, "--lam", lam, "--seed", str(s.seed)]
    words += ["--revision", commit] if commit else []
    words += ["--variant", variant] if variant else []
    words += [] if key is None else ["--key", key]
    words += [] if dequantize is None else ["--dequantize", dequantize]
    for option, value, default in (
        ("--noise", s.noise, "uniform"),
        ("--scale", s.scale, "matrix"),
        ("--rounding", s.rounding, "nearest"),
    ):
        words += [option, value] if value != default else []
    for option, globs in (("--include", s.include), ("--exclude", s.exclude)):
        words += [word for glob in globs for word in (option, glob)]
    return shell_join([*words, *(["-o", str(out)] if out else [])])


def make_plan(
    source: str | Path,
    out: str | Path | None,
    settings: NoisyTune,
    *,
    revision: str | None = None,
    variant: str | None = None,
    key: str | None = None,
    dequantize: str | None = None,
    token: str | None = None,
    recipe_only: bool = False,
) -> Plan:
    """Read the source's headers and settle what happens to every tensor. Writes nothing.

    Raises:
        SettingError, SourceError, OutputError: as perturb_checkpoint.
    """
    checkpoint = resolve(source, revision=revision, variant=variant, key=key, dequantize=dequantize, token=token)
    place = choose_out(out, checkpoint, settings, name=checkpoint.short_name)
    plan = plan_checkpoint(checkpoint, place, settings, variant=variant)
    return replace(plan, is_recipe_only=True, command=f"{plan.command} --recipe-only") if recipe_only else plan


def choose_out(out: str | Path | None, checkpoint: Checkpoint, settings: NoisyTune, *, name: str) -> Path | Url:
    """Return the folder or URL to write, by default a folder named after the source, lam and seed.

    Raises:
        OutputError: it may not be written to.
    """
    if out and (url := find_url(out)):
        refuse_url(url, find_url(checkpoint.id))
        return url
    out = as_path(out or f"{name}-noisytune-lam{settings.lam:g}-seed{settings.seed}")
    refuse_output(out, Path(checkpoint.id) if Path(checkpoint.id).is_file() else checkpoint.root)
    return out.absolute()


def plan_checkpoint(
    checkpoint: Checkpoint, out: Path | Url, settings: NoisyTune, *, variant: str | None, recorded: Recipe | None = None
) -> Plan:
    """Settle what happens to every tensor of a checkpoint.

    Args:
        recorded: the recipe that the run repeats, if it does: what it took for buffers are its buffers.
    Raises:
        SettingError, SourceError: as perturb_checkpoint.
    """
    refuse_quantized(checkpoint)
    configs = _plan_configs(checkpoint)
    shards: list[ShardPlan] = []
    indexes: dict[str, bytes] = {}
    for weight_set in checkpoint.layout.weights:
        members = _plan_set(checkpoint, weight_set, settings, recorded)
        indexes |= plan_index(checkpoint, weight_set, members)
        shards += members
    if not recorded:
        warn_of_suspects({name: role for shard in shards for name, role in shard.roles.items()})
    names = [tensor.name for shard in shards for tensor in shard.header.tensors]
    if not names:
        raise SourceError(f"{checkpoint.id}: expected tensors, got weight files without any. Fetch it again.")
    settings.check_globs(names)
    if settings.lam and not any(len(shard.copied) < len(shard.header.tensors) for shard in shards):
        reasons = sorted({reason for shard in shards for reason in shard.copied.values()})
        raise SettingError(
            f"{checkpoint.id}: expected a tensor to perturb, got {len(names)} to copy ({'; '.join(reasons)}). "
            "Correct `include` and `exclude`."
        )
    command = perturb_command(
        checkpoint.id,
        settings,
        commit=checkpoint.commit,
        variant=variant,
        key=checkpoint.key,
        dequantize=checkpoint.dequantize,
        out=out,
    )
    return Plan(checkpoint, settings, out, tuple(shards), indexes, variant, command, recorded, configs=configs)


def _plan_configs(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the configs to write in the place of the source's, which say that its weights are quantized."""
    if not checkpoint.dequantize:
        return {}
    configs = without_quantization(checkpoint)
    if not configs:
        raise SettingError(
            f"`dequantize`: expected a config.json with a quantization_config, got none in {checkpoint.id}. "
            "Leave it out, or fetch that file too."
        )
    return {name: data for name, data in configs.items() if name in checkpoint.layout.companions}


def _plan_set(
    checkpoint: Checkpoint, weight_set: WeightSet, settings: NoisyTune, recorded: Recipe | None
) -> list[ShardPlan]:
    """Plan the shards of one model, whose tensors together tell what each of them is."""
    files = {name: _read_header(checkpoint, name) for name in weight_set.files}
    shapes = {tensor.name: tensor.shape for header, _ in files.values() for tensor in header.tensors}
    model_type = read_model_type(checkpoint, weight_set.folder)
    found = find_roles(shapes, model_type)
    if not recorded:
        tensors = {name: floats(header) for name, (header, _) in files.items()}
        found |= find_suspects(tensors, found, partial(open_weights, checkpoint))
    roles = {name: settings.overrule(name, role) for name, role in found.items()}
    records = {file.source: file.tensors for file in recorded.files} if recorded else {}
    class_ties = model_type.find_ties(shapes) if model_type and model_type.is_tied else {}
    shards = []
    for name, (header, tied) in files.items():
        of_shard = {t.name: roles[t.name] for t in header.tensors} | {t.name: t.role for t in records.get(name, ())}
        if not recorded:  # else it was perturbed before this was known
            _refuse_packed(checkpoint.label(name), header)
        copied = _reasons_to_copy(header, settings, of_shard)
        shards.append(ShardPlan(name, _output_name(weight_set, name), header, copied, tied, of_shard, class_ties))
    return shards


def _read_header(checkpoint: Checkpoint, name: str) -> tuple[Header, dict[str, str]]:
    """Return a weight file's header, and the names in it that repeat another tensor."""
    source = open_weights(checkpoint, name)
    source.close()
    return source.header, source.tied


def _refuse_packed(file: str, header: Header) -> None:
    for tensor in header.tensors:
        if is_packed(tensor):
            raise SourceError(
                f"{file}: {tensor.name!r}: expected unquantized weights, got {tensor.dtype}. "
                "Perturb the original checkpoint and quantize the result."
            )


def _reasons_to_copy(header: Header, settings: NoisyTune, roles: Mapping[str, Role]) -> dict[str, str]:
    reasons = {t.name: settings.reason_to_copy(t.name, t.dtype, t.shape, roles[t.name]) for t in header.tensors}
    return {name: reason for name, reason in reasons.items() if reason}


def _output_name(weight_set: WeightSet, name: str) -> str:
    """Name the safetensors file as save_pretrained would."""
    if not weight_set.is_pickle:
        return name
    folder, slash, base = name.rpartition("/")
    stem = base.removesuffix(weight_set.suffix)
    if weight_set.suffix != ".bin":
        stem = weight_set.stem if weight_set.parts else "model"
    return f"{folder}{slash}{re.sub(r'^pytorch_model', 'model', stem)}.safetensors"
