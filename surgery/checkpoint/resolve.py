"""From a Hub id, folder or file to a Checkpoint: complete, safe to read, its shards those that the index names."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.foreign_files import kind_of_file, kind_of_part, kind_of_shards
from surgery.checkpoint.layout import Layout, WeightSet, arrange
from surgery.checkpoint.links import find_links
from surgery.checkpoint.shards import complete
from surgery.checkpoint.unfinished import refuse_unfinished
from surgery.display import Brief
from surgery.errors import SettingError, SourceError
from surgery.files import kind_of_mode, list_names, read_file
from surgery.storage.url import Url, as_path, find_url

if TYPE_CHECKING:
    from surgery.checkpoint.remote import RemoteFiles

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, repr=False)
class Checkpoint(Brief):
    """A checkpoint on this machine, or on a store.

    Args:
        id: the Hub id, the absolute path of the folder or file, or its URL.
        commit: the Hub commit's sha, or None for another checkpoint.
        root: the folder that file names are relative to.
        layout: its files; every weight set names all of its shards.
        stamps: of the weights and companions when they were found, by name.
        repeating: names of tensors that stand for others, by PyTorch file, where a recipe has said which they are.
        key: which state_dict to take of PyTorch files that hold several.
        links: where those that are links out of the folder lead, by name.
        dequantize: "bf16": float8 and mxfp4 weights are read as bfloat16.
        remote: the files of one on a store.
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
    remote: "RemoteFiles | None" = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.dequantize not in (None, "bf16"):
            raise SettingError(f"`dequantize`: expected bf16, got {self.dequantize}.")
        if self.dequantize and any(weight_set.is_pickle for weight_set in self.layout.weights):
            raise SettingError(
                f"`dequantize`: expected safetensors with it, got the PyTorch files of {self.id}. Leave it out."
            )
        if self.dequantize and self.remote:
            raise SettingError(f"`dequantize`: expected a folder or a file with it, got {self.id}. Copy it to a disk.")
        if self.key is not None and not any(weight_set.is_pickle for weight_set in self.layout.weights):
            raise SettingError(
                f"`key`: expected PyTorch files with it, got the safetensors of {self.id}. Leave it out."
            )

    @property
    def short_name(self) -> str:
        name = self.id.rstrip("/").rpartition("/")[2]
        return name.removesuffix(Path(name).suffix) if Path(name).suffix in _SUFFIXES else name

    def path(self, name: str) -> Path:
        """Return where a file is on this machine. Of a checkpoint on a store, small files come, and weights do not."""
        if self.remote and not any(name in weight_set.files for weight_set in self.layout.weights):
            return self.remote.path(name)
        return self.root / name

    def label(self, name: str) -> str:
        """Return a file's name in errors."""
        return str(self.remote.url / name if self.remote else self.root / name)

    def holds(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        return name in self.remote.entries if self.remote else self.path(name).is_file()

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return self.remote.entries[name].size if self.remote else self.path(name).stat().st_size

    def version(self, name: str) -> str | None:
        """Return what a store calls this very content of a file, such as its ETag; None of a file of this machine."""
        return self.remote.entries[name].version if self.remote else None

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the files that a weight file is read from: itself, if it is not made up of several."""
        return next((s.parts for s in self.layout.weights if s.parts and name in s.files), (name,))

    def refuse_changed(self, name: str) -> None:
        """Refuse a file that is not the one that was found.

        Raises:
            SourceError: it was removed, replaced or written to since.
        """
        if self.remote:
            self.remote.refuse_changed(name)
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
        source: a folder, a .safetensors or PyTorch file, a URL, or a Hub id, which may end in `@revision`.
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
    if isinstance(found, Url):
        from surgery.checkpoint.remote import find_remote

        files, layout = find_remote(found, variant=variant, suffixes=_SUFFIXES)
        return Checkpoint(str(found), None, files.root, layout, remote=files)
    if isinstance(found, Path):
        if found.is_file():
            return _from_file(found.absolute())
        return _from_folder(found.resolve(), str(found.resolve()), None, variant, None)
    from surgery.checkpoint.hub import fetch

    root, commit, names = fetch(found[0], revision=found[1], variant=variant, token=token)
    return _from_folder(root, found[0], commit, variant, names)


def locate(source: str | Path, revision: str | None) -> Path | Url | tuple[str, str | None]:
    """Return the file, folder or URL that `source` is, or a Hub id and the revision asked for. Raises as `resolve`."""
    if not str(source):
        raise SourceError("MODEL: expected a folder, a file or a Hub id, got an empty name. Name one.")
    if url := find_url(source):
        if revision:
            raise SettingError(f"`revision`: expected a Hub id with it, got {url}. Leave one of them out.")
        return url
    path = as_path(source)
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
    layout = complete(root, found, names=None)
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
    return Checkpoint(id, commit, root, complete(root, arrange(names, variant=variant, what=id), names=names))
