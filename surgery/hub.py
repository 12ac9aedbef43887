"""The Hugging Face Hub: fetch a checkpoint's weights and companions, and nothing else, into the Hub's own cache."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from surgery.errors import SourceError
from surgery.layout import RECIPE, Layout, arrange

# huggingface_hub raises its HTTP library's own errors when there is no connection; which library depends on its
# version, and its HTTP errors, an answer from the Hub, have the same base
_HttpLibraryError: Any = HfHubHTTPError.__mro__[1]
_HINTS = {
    401: "Correct --token, or `hf auth login` again.",
    429: "Wait, or `hf auth login` for a higher limit.",
}


def fetch(
    repo_id: str, *, revision: str | None, variant: str | None, token: str | None
) -> tuple[Path, str, list[str] | None]:
    """Download what `layout.arrange` chooses of a model repository.

    Without a network, the copy in the cache is used, if there is one.

    Args:
        revision: branch, tag or commit; default: the repository's main branch.
        token: default: the one stored on this machine, if any. It appears in no message.
    Returns:
        The snapshot's folder, its commit sha, and all of the repository's files, also those that were not fetched;
        None if the cache does not know them.
    Raises:
        SourceError: no such repository, revision or access, or offline without a cached copy.
    """
    what = f"{repo_id}@{revision}" if revision else repo_id
    url = f"{constants.ENDPOINT}/{repo_id}"
    try:
        return _download(repo_id, revision=revision, variant=variant, token=token)
    except GatedRepoError as error:
        raise SourceError(
            f"{what}: expected access, got a gated model. Ask for access at {url}, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{what}: expected a path or a model on {constants.ENDPOINT}, got neither. "
            "Check the name; if it is private, `hf auth login` first."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{what}: expected a branch, tag or commit, got none of that name. See {url}/commits."
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{what}: expected a path or a Hub id, got neither. Check the name.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        wanted = (
            f"a token that {constants.ENDPOINT} accepts" if status == 401 else f"an answer from {constants.ENDPOINT}"
        )
        hint = _HINTS.get(status, "Try again later, or set HF_HUB_OFFLINE=1 to use a cached copy.")
        raise SourceError(f"{what}: expected {wanted}, got HTTP {status}. {hint}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, _HttpLibraryError, ConnectionError) as error:
        raise SourceError(
            f"{what}: expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
            "Check the name, or connect once to fetch it."
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{what}: expected a complete download, got {error} Try again.") from error


def _download(
    repo_id: str, *, revision: str | None, variant: str | None, token: str | None
) -> tuple[Path, str, list[str] | None]:
    try:
        info = HfApi().model_info(repo_id, revision=revision, token=token)
    except HfHubHTTPError:
        raise
    except (OfflineModeIsEnabled, _HttpLibraryError):
        return _cached(repo_id, revision=revision, variant=variant)
    names = [file.rfilename for file in info.siblings or ()]
    for name in names:
        if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name:
            raise SourceError(f"{repo_id}: expected files of its own, got {name!r}. Do not trust this checkpoint.")
    wanted = _wanted(arrange(names, variant=variant, what=repo_id), names)
    # by its name rather than its sha, for the cache to know the branch or tag when there is no network
    folder = Path(
        snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_literal(wanted), tqdm_class=_Bar)
    )
    if folder.name != info.sha:
        raise SourceError(f"{repo_id}: expected one commit, got another while it was fetched. Run the command again.")
    return folder, folder.name, names


def _cached(repo_id: str, *, revision: str | None, variant: str | None) -> tuple[Path, str, list[str] | None]:
    """Find the copy in the cache; if the cache knows all of the repository's files, check that it is complete."""
    folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    names = _cached_names(repo_id, folder.name)
    for name in _wanted(arrange(names, variant=variant, what=repo_id), names) if names else ():
        if not (folder / name).exists():
            raise SourceError(
                f"{repo_id}: expected a complete copy in the Hub's cache while offline, got one without {name!r}. "
                "Connect once to fetch it."
            )
    return folder, folder.name, names


def _cached_names(repo_id: str, commit: str) -> list[str] | None:
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):  # new in huggingface_hub 2
        return None
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in huggingface_hub.get_cached_repo_tree(repo_id, revision=commit)]
    except CachedRepoTreeNotFoundError:  # fetched by an older version, or file by file
        return None


class _Bar(tqdm):
    """The Hub's progress bar, on a terminal only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"disable": None} | kwargs))  # type: ignore[no-untyped-call]


def _wanted(layout: Layout, names: Sequence[str]) -> list[str]:
    recipes = [RECIPE] if RECIPE in names else []
    indexes = [weight_set.index for weight_set in layout.weights if weight_set.index]
    return [
        *recipes,
        *layout.companions,
        *indexes,
        *(name for weight_set in layout.weights for name in weight_set.files),
    ]


def _literal(names: Sequence[str]) -> list[str]:
    """Escape names for fnmatch, which snapshot_download's patterns go through."""
    return [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names]
