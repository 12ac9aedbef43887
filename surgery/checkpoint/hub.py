"""Download from the Hub into its own cache: the weights and companions that `layout` chooses, checked by sha256."""

import re
from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, ModelInfo, hf_hub_download, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import tqdm

from surgery.checkpoint.digests import SHA256, digests_of_all, shorten
from surgery.checkpoint.hub_errors import BAD_ANSWER, FETCH, HttpLibraryError, one_line
from surgery.checkpoint.layout import RECIPE, Layout, arrange
from surgery.checkpoint.own_names import refuse_escaping
from surgery.errors import SourceError
from surgery.files import list_names
from surgery.progress import LATE, is_notebook, is_shown, notebook_settings

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(
    repo_id: str, *, revision: str | None, variant: str | None, token: str | None
) -> tuple[Path, str, list[str] | None]:
    """Download what `layout.arrange` chooses of a model repository, and check it against the Hub's sha256.

    Without a network, the copy in the cache is used, if there is one.

    Args:
        revision: branch, tag or commit; default: the repository's main branch.
        token: default: the one stored on this machine, if any. It appears in no message.
    Returns:
        The snapshot's folder, its commit sha, and all of the repository's files, also those that were not fetched;
        None if the cache does not know them.
    Raises:
        SourceError: no such repository, revision or access, offline without a cached copy, or damaged on the way.
    """
    with one_line(f"{repo_id}@{revision}" if revision else repo_id, repo_id, FETCH):
        return _download(repo_id, revision=revision, variant=variant, token=token)


def fetch_file(repo_id: str, name: str, *, revision: str | None, token: str | None) -> Path:
    """Download one file. Raises the client's own errors."""
    knows_bar = "tqdm_class" in signature(hf_hub_download).parameters  # since huggingface_hub 1
    bar: dict[str, Any] = {"tqdm_class": _Bar} if knows_bar else {}
    return Path(hf_hub_download(repo_id, name, revision=revision, token=token, **bar))


def _download(
    repo_id: str, *, revision: str | None, variant: str | None, token: str | None
) -> tuple[Path, str, list[str] | None]:
    try:
        info = HfApi().model_info(repo_id, revision=revision, token=token, files_metadata=True)
    except BAD_ANSWER:
        raise
    except (OfflineModeIsEnabled, HttpLibraryError):
        return _cached(repo_id, revision=revision, variant=variant)
    digests = {file.rfilename: str(file.lfs.sha256) if file.lfs else None for file in info.siblings or ()}
    refuse_escaping(repo_id, digests)
    commit = commit_of(repo_id, info)
    wanted = _wanted(arrange(digests, variant=variant, what=repo_id), digests)
    # by its name rather than its sha, for the cache to know the branch or tag when there is no network
    folder = Path(
        snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_literal(wanted), tqdm_class=_Bar)
    )
    if folder.name != commit or not all((folder / name).exists() for name in wanted):
        raise another_commit(repo_id)
    _refuse_damaged(repo_id, folder, {name: digests[name] for name in wanted})
    return folder, folder.name, list(digests)


def commit_of(repo_id: str, info: ModelInfo) -> str:
    """Return the sha of the commit that a model's info describes.

    Raises:
        SourceError: it has none.
    """
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise SourceError(f"{repo_id}: expected the sha of a commit from the Hub, got {info.sha!r}. Check HF_ENDPOINT.")
    return info.sha


def another_commit(repo_id: str) -> SourceError:
    """Return the error of files that belong to another commit than the one asked for."""
    return SourceError(f"{repo_id}: expected one commit, got another while it was fetched. Run the command again.")


def _cached(repo_id: str, *, revision: str | None, variant: str | None) -> tuple[Path, str, list[str] | None]:
    """Find the copy in the cache; if the cache knows all of the repository's files, check that it is complete."""
    folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    known = _cached_digests(repo_id, folder.name)
    present = {name: None for name in list_names(folder) if (folder / name).is_file()}
    digests = present if known is None else known
    wanted = _wanted(arrange(digests, variant=variant, what=repo_id), digests)
    for name in wanted:
        if name not in present:
            raise SourceError(
                f"{repo_id}: expected a complete copy in the Hub's cache while offline, got one without {name!r}. "
                "Connect once to fetch it."
            )
    _refuse_damaged(repo_id, folder, {name: digests[name] for name in wanted})
    return folder, folder.name, None if known is None else list(known)


def _cached_digests(repo_id: str, commit: str) -> Mapping[str, str | None] | None:
    """Return the repository's files with the sha256 of those that are large, if the cache knows them."""
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):  # new in huggingface_hub 2
        return None
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = huggingface_hub.get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:  # fetched by an older version, or file by file
        return None
    return {file.path: file.lfs.sha256 if file.lfs else None for file in tree}


def _refuse_damaged(repo_id: str, folder: Path, digests: Mapping[str, str | None]) -> None:
    """Compare files with the Hub's sha256: the client checks their size at most, and keeps what it got.

    Args:
        digests: sha256 by name. Where the Hub has not told, the cache may: a large file links to a name that is it,
            which for Xet's is a link again, to a name that is another hash.
    """
    expected = {}
    for name, sha256 in digests.items():
        path = folder / name
        etag = path.readlink().name if path.is_symlink() else ""
        if sha256 or _SHA256.fullmatch(etag):
            expected[path.resolve()] = (name, f"{SHA256}:{sha256 or etag}")
    for blob, found in digests_of_all({blob: [SHA256] for blob in expected}, "checking", at_rest=True).items():
        name, digest = expected[blob]
        if found[SHA256] != digest:
            raise SourceError(
                f"{repo_id}: {name}: expected {shorten(digest)}, as on the Hub, got {shorten(found[SHA256])}. "
                f"It was damaged on its way or in the cache: remove {blob} and run the command again."
            )


class _Bar(tqdm):
    """The Hub's progress bar: on a terminal, or in a notebook once the download has taken a second."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"disable": None} | kwargs
        if is_notebook():
            settings |= {"disable": bool(settings["disable"]) or not is_shown(), "delay": LATE, **notebook_settings()}
        super().__init__(*args, **settings)  # type: ignore[no-untyped-call]

    def refresh(self, *args: Any, **kwargs: Any) -> Any:
        """Draw it, if it is not too early: the Hub's client asks for that without a look at `delay`."""
        if self.disable or not self.delay or self._time() >= self.start_t + self.delay:
            return super().refresh(*args, **kwargs)
        return None


def _wanted(layout: Layout, names: Collection[str]) -> list[str]:
    recipes = [RECIPE] if RECIPE in names else []
    indexes = [weight_set.index for weight_set in layout.weights if weight_set.index]
    return [
        *recipes,
        *layout.companions,
        *indexes,
        *(name for weight_set in layout.weights for name in weight_set.on_disk),
    ]


def _literal(names: Sequence[str]) -> list[str]:
    """Escape names for fnmatch, which snapshot_download's patterns go through."""
    return [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names]
