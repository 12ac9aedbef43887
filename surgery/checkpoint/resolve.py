"""From a Hub id, folder or file to a Checkpoint: complete, safe to read, its shards those that the index names."""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.foreign_files import kind_of_file, kind_of_part, kind_of_shards
from surgery.checkpoint.layout import JOURNAL, Layout, WeightSet, arrange
from surgery.checkpoint.links import find_links
from surgery.display import Brief
from surgery.errors import SettingError, SourceError
from surgery.files import kind_of_mode, list_names, read_file

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, repr=False)
class Checkpoint(Brief):
    """A checkpoint on this machine.

    Args:
        id: the Hub id, or the absolute path of the folder or file.
        commit: the Hub commit's sha, or None for a local checkpoint.
        root: the folder that file names are relative to.
        layout: its files; every weight set names all of its shards.
        stamps: of the weights and companions when they were found, by name.
        repeating: names of tensors that stand for others, by PyTorch file, where a recipe has said which they are.
        key: which state_dict to take of PyTorch files that hold several.
        links: where those that are links out of the folder lead, by name.
        dequantize: "bf16": float8 and mxfp4 weights are read as bfloat16.
    Raises:
        SettingError: a key, and no PyTorch file; dequantize, and no safetensors or another dtype.
    """

    id: str
    commit: str | None
    root: Path
    layout: Layout
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False, repr=False)
    repeating: Mapping[str, Collection[str]] = field(default_factory=dict)
    key: str | None = None
    links: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    dequantize: str | None = None

    def __post_init__(self) -> None:
        if self.dequantize not in (None, "bf16"):
            raise SettingError(f"`dequantize`: expected bf16, got {self.dequantize}.")
        if self.dequantize and any(weight_set.is_pickle for weight_set in self.layout.weights):
            raise SettingError(
                f"`dequantize`: expected safetensors with it, got the PyTorch files of {self.id}. Leave it out."
            )
        if self.key is not None and not any(weight_set.is_pickle for weight_set in self.layout.weights):
            raise SettingError(
                f"`key`: expected PyTorch files with it, got the safetensors of {self.id}. Leave it out."
            )

    @property
    def short_name(self) -> str:
        name = self.id.rstrip("/").rpartition("/")[2]
        return name.removesuffix(Path(name).suffix) if Path(name).suffix in _SUFFIXES else name

    def path(self, name: str) -> Path:
        return self.root / name

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the files that a weight file is read from: itself, if it is not made up of several."""
        return next((s.parts for s in self.layout.weights if s.parts and name in s.files), (name,))

    def refuse_changed(self, name: str) -> None:
        """Refuse a file that is not the one that was found.

        Raises:
            SourceError: it was removed, replaced or written to since.
        """
        for part in self.parts(name):
            if then := self.stamps.get(part):
                refuse_changed(self.path(part), then)


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    key: str | None = None,
    dequantize: str | None = None,
    token: str | None = None,
) -> Checkpoint:
    """Find a checkpoint, fetching it from the Hub if it is an id, and check that it is complete and safe to read.

    Args:
        source: a folder, a .safetensors or PyTorch file, or a Hub id, which may end in `@revision`.
        revision: branch, tag or commit; Hub only.
        variant: as in from_pretrained.
        key: which state_dict to take of PyTorch files that hold several.
        dequantize: "bf16": read float8 and mxfp4 weights as bfloat16.
        token: Hub token; default: the one `hf auth login` stored, or HF_TOKEN.
    Raises:
        SettingError: a revision for a local checkpoint, or two of them; a key for safetensors; `dequantize` for
            PyTorch files.
        SourceError: not found, unsafe or incomplete.
    """
    return replace(_find(source, revision, variant, token), key=key, dequantize=dequantize)


def _find(source: str | Path, revision: str | None, variant: str | None, token: str | None) -> Checkpoint:
    found = locate(source, revision)
    if isinstance(found, Path):
        if found.is_file():
            return _from_file(found.absolute())
        return _from_folder(found.resolve(), str(found.resolve()), None, variant, None)
    from surgery.checkpoint.hub import fetch

    root, commit, names = fetch(found[0], revision=found[1], variant=variant, token=token)
    return _from_folder(root, found[0], commit, variant, names)


def locate(source: str | Path, revision: str | None) -> Path | tuple[str, str | None]:
    """Return the file or folder that `source` is, or a Hub id and the revision asked for. Raises as `resolve`."""
    if not str(source):
        raise SourceError("MODEL: expected a folder, a file or a Hub id, got an empty name. Name one.")
    path = Path(os.path.expanduser(source))  # noqa: PTH111  (Path's own fails for an unknown ~user)
    is_there = os.path.exists(path)  # noqa: PTH110  (Path's own fails for a name that is too long)
    if revision and is_there:
        raise SettingError(f"`revision`: expected a Hub id with it, got the local {source}. Leave one of them out.")
    if is_there and (path.is_file() or path.is_dir()):
        return _snapshot_of(path) if path.name.startswith("models--") and (path / "snapshots").is_dir() else path
    if is_there:
        kind = kind_of_mode(path.stat().st_mode)
        raise SourceError(f"{source}: expected a folder, a file or a Hub id, got {kind}. Copy what it holds to a file.")
    name, _, at = str(source).partition("@")
    if at and revision:
        raise SettingError(f"`revision`: expected it once, got {revision} and {source}. Leave one of them out.")
    if not REPO_ID.fullmatch(name) or name.endswith(_SUFFIXES) or isinstance(source, Path):
        raise SourceError(f"{source}: expected a folder, a file or a Hub id, got a path that does not exist. Check it.")
    return name, revision or at or None


def _snapshot_of(cached: Path) -> Path:
    """Return the snapshot of main in a model's folder of the Hub's cache, whose other files are blobs."""
    snapshots = sorted(path for path in (cached / "snapshots").iterdir() if path.is_dir())
    main = cached / "refs" / "main"
    commit = read_file(main).decode(errors="replace").strip() if main.is_file() else ""
    for snapshot in snapshots:
        if snapshot.name == commit or (not commit and len(snapshots) == 1):
            return snapshot
    raise SourceError(
        f"{cached}: expected a checkpoint, got a folder of the Hub's cache without main's snapshot, and with "
        f"{len(snapshots)} others. Name a folder of its snapshots/."
    )


def _from_file(path: Path) -> Checkpoint:
    kind = kind_of_part(path)
    if not kind and path.suffix not in _SUFFIXES:
        what, advice = kind_of_file(path) or (f"{path.suffix or 'no'} suffix", "Convert it to safetensors first.")
        raise SourceError(f"{path}: expected {', '.join(_SUFFIXES)}, got {what}. {advice}")
    if kind or ("zero_pp_rank_" in path.name and (kind := kind_of_shards([path.name]))):
        raise SourceError(f"{path}: expected a whole checkpoint, got {kind.what}. {kind.advice}")
    stem = path.name.removesuffix(path.suffix)
    weights = WeightSet("", stem, None, path.suffix, (path.name,))
    return Checkpoint(str(path), None, path.parent, Layout((weights,), (), ()), {path.name: Stamp.of(path)})


def _from_folder(root: Path, id: str, commit: str | None, variant: str | None, names: list[str] | None) -> Checkpoint:
    """Take what `arrange` chooses of the folder's files, or of `names`, some of which may not have been fetched."""
    refuse_unfinished(root)
    found = arrange(_list(root) if names is None else names, variant=variant, what=id)
    indexes = [weight_set.index for weight_set in found.weights if weight_set.index]
    listed = {*indexes, *_files(found)} if names is None else set()
    links = find_links(root, indexes, listed=listed)
    layout = _complete(root, found, names=None)
    files = _files(layout)
    links |= find_links(root, files, listed=listed - _named_elsewhere(layout))
    return Checkpoint(id, commit, root, layout, {name: Stamp.of(root / name) for name in files}, links=links)


def _list(root: Path) -> list[str]:
    """Name all files. A linked folder is not entered: it is listed as a file, and refused as one."""
    return list_names(root)


def _files(layout: Layout) -> list[str]:
    return [*(name for weight_set in layout.weights for name in weight_set.on_disk), *layout.companions]


def _named_elsewhere(layout: Layout) -> set[str]:
    """Return the shards that an index names in another folder than its own."""
    indexed = [(weight_set.folder or ".", weight_set.files) for weight_set in layout.weights if weight_set.index]
    return {name for folder, files in indexed for name in files if str(PurePosixPath(name).parent) != folder}


def from_listing(root: Path, id: str, commit: str, variant: str | None, names: Collection[str]) -> Checkpoint:
    """Return the checkpoint of a Hub repository's files, of which only the indexes need lie in `root`.

    Raises:
        SourceError: incomplete.
    """
    return Checkpoint(id, commit, root, _complete(root, arrange(names, variant=variant, what=id), names=names))


def _complete(root: Path, layout: Layout, *, names: Collection[str] | None) -> Layout:
    """Complete the weights with the shards that indexes name, which must be among `names`, or else in `root`."""
    weights = [_with_shards(root, weight_set, names) for weight_set in layout.weights]
    in_indexes = {name for weight_set in weights if weight_set.index for name in weight_set.files}
    # an index may name its shards as it likes, and `arrange` takes those for checkpoints of their own
    weights = [s for s in weights if s.index or not in_indexes.issuperset(s.files)]
    kept = {name for weight_set in weights for name in weight_set.files}
    stale = [name for weight_set in layout.weights for name in weight_set.files if name not in kept]
    left_out = layout.left_out + tuple((name, "a shard that no index names") for name in stale)
    return Layout(tuple(weights), layout.companions, left_out)


def refuse_unfinished(root: Path) -> None:
    """Refuse a folder that a run of ours has left unfinished.

    Raises:
        SourceError: it has.
    """
    if (root / JOURNAL).exists():
        raise SourceError(
            f"{root}: expected a finished checkpoint, got one that `surgery perturb` did not finish. "
            f"{JOURNAL} there has the command that finishes it."
        )


def _with_shards(root: Path, weight_set: WeightSet, names: Collection[str] | None) -> WeightSet:
    """Complete a set with the shards its index names, and check that all of them are there."""
    if weight_set.index:
        return replace(weight_set, files=tuple(_shards_of(root, weight_set, names)))
    files = weight_set.files
    counts = {match[1] for name in files if (match := re.search(r"-of-(\d{5})\.", name))}
    if counts and counts != {f"{len(files):05}"}:
        raise SourceError(
            f"{root / files[0]}: expected {int(max(counts))} shards, got {len(files)}. Fetch the missing ones."
        )
    return weight_set


def read_weight_map(path: Path) -> dict[str, str]:
    """Read the weight_map of an index: tensor name to shard, both as written."""
    try:
        weight_map: dict[str, str] = json.loads(read_file(path))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{path}: expected a JSON index with a weight_map, got another thing. Fetch it again."
        ) from error
    return weight_map


def _shards_of(root: Path, weight_set: WeightSet, names: Collection[str] | None) -> list[str]:
    index = root / str(weight_set.index)
    shards = []
    for shard in sorted(set(read_weight_map(index).values())):
        parts = PurePosixPath(shard).parts
        if (
            PurePosixPath(shard).is_absolute()
            or ".." in parts
            or any(character in shard for character in "\\\0")
            or not shard.endswith(weight_set.suffix)
        ):
            raise SourceError(
                f"{index}: expected shards of its own folder, got {shard!r}. Do not trust this checkpoint."
            )
        name = (PurePosixPath(weight_set.folder) / shard).as_posix()
        # Path's own fails for a name that is too long
        if not os.path.isfile(root / name) if names is None else name not in names:  # noqa: PTH113
            raise SourceError(f"{index}: expected shard {shard}, got no such file. Fetch the missing shard.")
        shards.append(name)
    return shards
