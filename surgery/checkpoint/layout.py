"""Which files are weights, which accompany them and which are left out, told from file names as loaders tell it.

The rules of transformers, diffusers, sentence-transformers and PEFT: safetensors before pickles, one file before
shards, and every folder with weights of its own is a component (`1_Dense/`, `unet/`, `vae/`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from surgery.checkpoint.foreign_files import kind_of_folder, kind_of_shards
from surgery.display import Brief
from surgery.errors import NoWeightsError, SourceError

METADATA = ".metadata"  # of a torch.distributed checkpoint
RECIPE, JOURNAL, CARD = "surgery.json", "surgery.unfinished.json", "README.md"
PLACE = "ORG/NAME"
"""What a card has in place of the id of the repository that it is pushed to."""

_DISTRIBUTED = ".distcp"
_ANOTHER = "weights in another format"
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHT = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?P<shard>-\d{5}-of-(?P<count>\d{5}))?"
    r"(?:\.(?P<late_variant>[A-Za-z0-9_]+))?(?P<suffix>\.safetensors|\.bin|\.pt|\.pth|\.ckpt)"
)
_INDEX = re.compile(
    r"(?P<stem>.+?)(?P<suffix>\.safetensors|\.bin)\.index(?:\.(?P<variant>[A-Za-z0-9_]+))?\.json|"
    r"(?P<stem2>.+?)\.(?P<variant2>[A-Za-z0-9_]+)(?P<suffix2>\.safetensors|\.bin)\.index\.json"
)
_OTHER_FORMATS = re.compile(
    r".*\.(h5|msgpack|ot|onnx|onnx_data|gguf|ggml|tflite|mlmodel|npz|nemo|engine|pdparams|llamafile|distcp)|.*\.ckpt\.(index|data.*)"
)
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|training_args|random_states.*)\.(pt|pth|bin|pkl)")
_RANK = re.compile(r"consolidated\.(\d\d)\.pth")
_COPY_FOLDERS = re.compile(r"onnx|openvino|coreml|original|gguf|flax|tf|checkpoint-\d+|global_step\d+|optimizer_\d+")
_IGNORED = re.compile(r"\.git|\.cache|\.locks|\.ipynb_checkpoints|\.DS_Store|__pycache__|\.surgery\.lock.*")


@dataclass(frozen=True, repr=False)
class WeightSet(Brief):
    """The weights of one component: one file, or shards with their index. Names are relative to the checkpoint.

    Args:
        parts: the files that are read as one weight file, which has the name of the first of them; else none.
    """

    folder: str
    stem: str
    variant: str | None
    suffix: str
    files: tuple[str, ...]
    index: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def on_disk(self) -> tuple[str, ...]:
        """Every file that holds weights."""
        return self.parts or self.files

    @property
    def is_pickle(self) -> bool:
        return self.suffix != ".safetensors"

    @property
    def is_distributed(self) -> bool:
        return self.suffix == _DISTRIBUTED


@dataclass(frozen=True, repr=False)
class Layout(Brief):
    """A checkpoint's files, sorted: weights, companions (copied as they are), and those left out with the reason."""

    weights: tuple[WeightSet, ...]
    companions: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def arrange(names: Iterable[str], *, variant: str | None, what: str) -> Layout:
    """Sort the files of a checkpoint.

    Args:
        names: paths relative to the checkpoint's folder, with forward slashes.
        variant: as in from_pretrained: "fp16" takes model.fp16.safetensors.
        what: the checkpoint's name in errors.
    Raises:
        SourceError: no weights, or none of the variant asked for, or several that are equally likely.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if not any(_IGNORED.fullmatch(part) for part in PurePosixPath(name).parts) and name not in (RECIPE, JOURNAL):
            by_folder[name.rpartition("/")[0]].append(name)
    weights: list[WeightSet] = []
    companions: list[str] = []
    left_out: list[tuple[str, str]] = []
    for folder in sorted(by_folder):
        if copy := next((part for part in PurePosixPath(folder).parts if _COPY_FOLDERS.fullmatch(part)), None):
            left_out += [(name, f"{copy}/ holds other copies or training state") for name in by_folder[folder]]
            continue
        is_pipeline = folder == "" and "model_index.json" in by_folder[folder]
        sets, plain = _collect(folder, by_folder[folder])
        chosen, reasons = _choose(sets, variant, is_pipeline=is_pipeline, what=what)
        weights += chosen
        _refuse_missing_ranks(chosen, what)
        left_out += reasons
        refused = [(name, why) for name in plain if (why := _reason_to_leave_out(name))]
        left_out += refused
        companions += [name for name in plain if name not in dict(refused)]
    if not all(s.is_distributed for s in weights):
        left_out += [(name, _ANOTHER) for s in weights if s.is_distributed for name in _members(s)]
        weights = [s for s in weights if not s.is_distributed]
    if not weights:
        raise _no_weights(what, [*companions, *(name for name, _ in left_out)])
    if variant and not any(chosen.variant == variant for chosen in weights):
        raise SourceError(
            f"{what}: expected weights of variant {variant!r}, got none. Leave `variant` out or correct it."
        )
    return Layout(tuple(weights), tuple(companions), tuple(left_out))


def _no_weights(what: str, names: list[str]) -> NoWeightsError:
    found, advice = (
        f"{len(names)} files without any" if names else "nothing",
        "Point at the folder that holds the weights.",
    )
    if kind := kind_of_folder(names):
        found, advice = kind
    return NoWeightsError(f"{what}: expected safetensors or PyTorch weights, got {found}. {advice}")


def _reason_to_leave_out(name: str) -> str | None:
    """Say why a file that holds no weights of the checkpoint is no companion either."""
    base = name.rpartition("/")[2]
    if _OTHER_FORMATS.fullmatch(base):
        return _ANOTHER
    return "training state" if _TRAINING.fullmatch(base) else None


def is_weight(name: str) -> bool:
    """Tell from a file's name whether a loader may take it for weights, or for their index."""
    *folders, base = PurePosixPath(name).parts
    if any(_COPY_FOLDERS.fullmatch(part) or _IGNORED.fullmatch(part) for part in folders):
        return False
    return not _TRAINING.fullmatch(base) and bool(_WEIGHT.fullmatch(base) or _INDEX.fullmatch(base))


def _collect(folder: str, names: list[str]) -> tuple[list[WeightSet], list[str]]:
    """Group one folder's weight files into sets; return these and the other files."""
    files: dict[tuple[str, str | None, str, bool], list[str]] = defaultdict(list)
    indexes: dict[tuple[str, str | None, str], str] = {}
    plain = []
    for name in names:
        base = name.rpartition("/")[2]
        if match := _INDEX.fullmatch(base):
            stem = match["stem"] or match["stem2"]
            indexes[stem, match["variant"] or match["variant2"], match["suffix"] or match["suffix2"]] = name
        elif (match := _WEIGHT.fullmatch(base)) and not _TRAINING.fullmatch(base):
            stem, variant = match["stem"], match["variant"] or match["late_variant"]
            if variant and stem not in _STEMS:  # a dot in a name of the user's own
                stem, variant = base[: match.start("suffix")].removesuffix(match["shard"] or ""), None
            files[stem, variant, match["suffix"], bool(match["shard"])].append(name)
        else:
            plain.append(name)
    sets = []
    for (stem, variant, suffix, is_sharded), members in files.items():
        index = indexes.pop((stem, variant, suffix), None) if is_sharded else None
        sets.append(WeightSet(folder, stem, variant, suffix, tuple(members), index))
    # an index without shards of the usual names still says where the weights are
    for (stem, variant, suffix), index in indexes.items():
        if not any(s.stem == stem and s.variant == variant and s.suffix == suffix for s in sets):
            sets.append(WeightSet(folder, stem, variant, suffix, (), index))
        else:
            plain.append(index)
    distributed, plain = _join_distributed(folder, plain)
    return _join_ranks(sets) + distributed, plain


def _join_distributed(folder: str, names: list[str]) -> tuple[list[WeightSet], list[str]]:
    """Make one set of a .metadata and the .distcp files beside it; return it, and the other files."""
    chunks = [name for name in names if name.endswith(_DISTRIBUTED)]
    metadata = [name for name in names if name.rpartition("/")[2] == METADATA]
    if not chunks or not metadata:
        return [], names
    parts = (*metadata, *chunks)
    joined = WeightSet(folder, "model", None, _DISTRIBUTED, parts[:1], parts=parts)
    return [joined], [name for name in names if name not in parts]


def _join_ranks(sets: list[WeightSet]) -> list[WeightSet]:
    """Make one set of consolidated.00.pth, consolidated.01.pth, ..., each of which has a part of every tensor."""
    ranks = [s for s in sets if s.suffix == ".pth" and _RANK.fullmatch(s.files[0].rpartition("/")[2])]
    if [_rank(s.files[0]) for s in ranks] in ([], [0]):
        return sets
    files = tuple(sorted(name for s in ranks for name in s.files))
    joined = WeightSet(ranks[0].folder, "consolidated", None, ".pth", files[:1], parts=files)
    return [*(s for s in sets if s not in ranks), joined]


def _rank(name: str) -> int:
    match = _RANK.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else 0


def _refuse_missing_ranks(chosen: Iterable[WeightSet], what: str) -> None:
    for weight_set in chosen:
        ranks = [] if weight_set.is_distributed else [_rank(name) for name in weight_set.parts]
        if ranks != list(range(len(ranks))):
            missing = next(rank for rank in range(len(ranks)) if ranks[rank] != rank)
            raise SourceError(
                f"{what}: expected consolidated.00.pth and its siblings up to {max(ranks):02}, got no "
                f"consolidated.{missing:02}.pth. Fetch the missing shard."
            )


def _choose(
    sets: list[WeightSet], variant: str | None, *, is_pipeline: bool, what: str
) -> tuple[list[WeightSet], list[tuple[str, str]]]:
    """Choose one folder's weights; the rest is left out, with the reason."""
    wanted = variant if any(s.variant == variant for s in sets) else None
    left: dict[WeightSet, str] = {}
    for s in sets:
        single = next((o for o in sets if _same(o, s) and not o.index and len(o.files) == 1), None)
        if s.variant != wanted:
            left[s] = f"variant {s.variant}" if s.variant else f"not variant {wanted}"
        elif s.is_pickle and any(not o.is_pickle and o.variant == wanted for o in sets):
            left[s] = "a second copy: safetensors is there"
        elif s.stem.startswith("consolidated") and any(o.stem in _STEMS for o in sets):
            left[s] = "a second copy of the weights"
        elif is_pipeline and s.stem not in _STEMS:
            left[s] = "a second copy: the pipeline's folders hold the weights"
        elif single not in (None, s):
            left[s] = f"a second copy: {single.files[0]} is what loaders prefer"
    chosen = [s for s in sets if s not in left]
    if sets and not chosen and not is_pipeline:
        variants = ", ".join(sorted({s.variant for s in sets if s.variant}))
        raise SourceError(
            f"{what}: expected weights without a variant, got only {variants}. Choose one with `variant`."
        )
    pickles = [s for s in chosen if s.is_pickle]
    if len(pickles) > 1:
        known = [s for s in pickles if s.stem in _STEMS]
        if len(known) != 1:
            names = ", ".join(s.files[0] for s in pickles[:3])
            if kind := kind_of_shards(name for s in pickles for name in s.files):
                raise SourceError(f"{what}: expected one PyTorch checkpoint, got {kind.what}. {kind.advice}")
            raise SourceError(
                f"{what}: expected one PyTorch checkpoint, got {len(pickles)} ({names}). Name the file itself."
            )
        left.update({s: "not the model's weights" for s in pickles if s is not known[0]})
        chosen = [s for s in chosen if s not in left]
    return chosen, [(name, why) for s, why in left.items() for name in _members(s)]


def _same(a: WeightSet, b: WeightSet) -> bool:
    return (a.stem, a.variant, a.suffix) == (b.stem, b.variant, b.suffix)


def _members(weight_set: WeightSet) -> Iterator[str]:
    yield from weight_set.on_disk
    if weight_set.index:
        yield weight_set.index
