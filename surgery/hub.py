"""The Hugging Face Hub: fetch a checkpoint's weights and companions, and nothing else, into the Hub's own cache."""

from pathlib import Path

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

from surgery.errors import SourceError
from surgery.layout import Layout, arrange

# huggingface_hub raises its HTTP library's own errors when there is no connection; which library depends on its version
_ConnectionFailed = HfHubHTTPError.__mro__[1]


def fetch(repo_id: str, *, revision: str | None, variant: str | None, token: str | None) -> tuple[Path, str]:
    """Download what `layout.arrange` chooses of a model repository.

    Without a network, the copy in the cache is used, if there is one.

    Args:
        revision: branch, tag or commit; default: the repository's main branch.
        token: default: the one stored on this machine, if any. It appears in no message.
    Returns:
        The snapshot's folder and its commit sha.
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
        hint = "Wait, or `hf auth login` for a higher limit." if status == 429 else "Try again later."
        raise SourceError(f"{what}: expected an answer from {constants.ENDPOINT}, got HTTP {status}. {hint}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, _ConnectionFailed, ConnectionError) as error:
        raise SourceError(
            f"{what}: expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
            "Check the name, or connect once to fetch it."
        ) from error


def _download(repo_id: str, *, revision: str | None, variant: str | None, token: str | None) -> tuple[Path, str]:
    try:
        info = HfApi().model_info(repo_id, revision=revision, token=token)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (OfflineModeIsEnabled, _ConnectionFailed):
        # whatever of it is in the cache: resolve() tells whether that is enough
        folder = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[])
        return Path(folder), Path(folder).name
    layout = arrange([file.rfilename for file in info.siblings or ()], variant=variant, what=repo_id)
    folder = snapshot_download(repo_id, revision=info.sha, token=token, allow_patterns=_literal(_wanted(layout)))
    return Path(folder), Path(folder).name


def _wanted(layout: Layout) -> list[str]:
    indexes = [weight_set.index for weight_set in layout.weights if weight_set.index]
    return [*layout.companions, *indexes, *(name for weight_set in layout.weights for name in weight_set.files)]


def _literal(names: list[str]) -> list[str]:
    """Escape names for fnmatch, which snapshot_download's patterns go through."""
    return [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names]
