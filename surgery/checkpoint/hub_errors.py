"""Exceptions of huggingface_hub as one line each, with what to do; a new error of the Hub is worded here."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any, TypeGuard

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from surgery import io_errors
from surgery.errors import OutputError, SourceError, SurgeryError

HttpLibraryError: Any = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__ != "builtins"][-1]
"""What huggingface_hub raises when there is no connection: its HTTP library's own errors; which library depends on its
version. HTTP errors, an answer from the Hub, have the same base."""

BAD_ANSWER = (HfHubHTTPError, json.JSONDecodeError)
"""An answer, if another than was asked for. In requests, errors of JSON are HttpLibraryErrors, too."""

NO_ANSWER = (OfflineModeIsEnabled, LocalEntryNotFoundError, HttpLibraryError, ConnectionError)
_NOT_THE_HUB = (FileMetadataError, json.JSONDecodeError, UnicodeDecodeError)
_PASSING = (412, 429, 500, 502, 503, 504)
_MAX_WAIT = 60.0  # seconds
_CUT = "ChunkedEncodingError"  # of requests: a transfer that ended early, which huggingface_hub 0 does not try again


@dataclass(frozen=True)
class Wording:
    """What differs between the ways to use the Hub: the error to raise, and `expected X, got Y. <What to do>.`

    Args:
        missing: there is no such repository, or it is private.
        malformed: its name cannot be one.
        offline: there is no connection.
        broken: the transfer failed; `{error}` says how.
        garbled: what answers is not the Hub.
        xet: the transfer failed in Xet storage, where most large files are; `{error}` says how.
        later: what to do about an HTTP status that has no hint of its own.
        hints: what to do, by HTTP status.
    """

    kind: type[SurgeryError]
    missing: str
    malformed: str
    offline: str
    broken: str
    garbled: str
    xet: str
    later: str
    hints: Mapping[int, str] = field(default_factory=dict)


_HINTS = {
    401: "Correct `token`, or `hf auth login` again.",
    403: "Ask for access at {url}, or `hf auth login` with a token that has it.",
    429: "Wait{wait}, or `hf auth login` for a higher limit.",
}
_GARBLED = (
    "expected answers of the Hub from {hub}, got others. "
    "Check HF_ENDPOINT, and that no proxy or login page is in between."
)
FETCH = Wording(
    kind=SourceError,
    missing="expected a path or a model on {hub}, got neither. "
    "Check the name; if it is private, `hf auth login` first.",
    malformed="expected a path or a Hub id, got neither. Check the name.",
    offline="expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
    "Check the name, or connect once to fetch it.",
    broken="expected a complete download, got {error}. Try again.",
    garbled=_GARBLED,
    xet="expected a complete download from Xet storage, got {error}. "
    "Try again, or with HF_HUB_DISABLE_XET=1, which downloads over plain HTTP.",
    later="Try again later, or set HF_HUB_OFFLINE=1 to use a cached copy.",
    hints=_HINTS,
)
PUSH = Wording(
    kind=OutputError,
    missing="expected a model on {hub} that you may write to, got none. Check the name; `hf auth login`, or `token`.",
    malformed="expected a Hub id such as me/my-model, got another name. Correct it.",
    offline="expected a connection to {hub}, got none. Connect, and unset HF_HUB_OFFLINE.",
    broken="expected a complete upload, got {error}. Try again.",
    garbled=_GARBLED,
    xet="expected a complete upload to Xet storage, got {error}. "
    "Try again, or with HF_HUB_DISABLE_XET=1, which uploads over plain HTTP.",
    later="Try again later.",
    hints=_HINTS
    | {
        400: "Change what it names.",
        403: "Use a token that may write there, another name, or `create_pr`.",
        412: "Somebody else has pushed meanwhile: look at {url}/commits, then try again.",
        429: "Wait{wait}, then try again.",
    },
)


@contextmanager
def one_line(what: str, repo_id: str, wording: Wording) -> Iterator[None]:
    """Raise what the body gets from the Hub as one line that begins with `what`. No token is in any of them."""
    try:
        yield
    except (AssertionError, AttributeError, KeyError, RecursionError, TypeError) as error:
        if "huggingface_hub" not in [package for package, _ in _callers(error)]:
            raise
        # JSON of another shape than the client takes for granted
        raise wording.kind(f"{what}: {wording.garbled.format(hub=constants.ENDPOINT)}") from error
    except (OSError, ValueError, RuntimeError, HttpLibraryError) as error:
        root = _root_of(error)
        if isinstance(root, RuntimeError) and not _is_xet(root):  # not the Hub's
            raise
        if wording is PUSH and isinstance(root, OSError) and root.filename is not None:  # a disk's, not the Hub's
            raise wording.kind(io_errors.one_line(root)) from error
        raise wording.kind(f"{what}: {_explain(root, repo_id, wording)}") from error


def _root_of(error: BaseException) -> BaseException:
    """Return what is behind an upload's error: the client wraps it in a RuntimeError that only names the file."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _is_xet(error: BaseException) -> bool:
    """Tell the errors of hf_xet, RuntimeErrors and OSErrors without a frame of their own, by who called it."""
    callers = _callers(error)  # none of one that was only made, to be the cause of another
    return bool(callers) and callers[-1][0] == "huggingface_hub" and "xet" in callers[-1][1]


def _callers(error: BaseException) -> list[tuple[str, str]]:
    """Return package and function of each frame that an error has passed, innermost last."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return [(frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name) for frame in frames]


def wait_before_retry(error: BaseException, attempt: int) -> float | None:
    """Return how many seconds to wait before trying again, or None where that does not help.

    It does not after an error of Xet storage: its client has tried again by itself, for minutes.

    Args:
        attempt: how many times it has failed before.
    """
    error = _root_of(error)
    backoff = float(2**attempt)
    if _is_status(error):
        asked = _retry_after(error)
        wait = backoff if asked is None else asked
        return wait if error.response.status_code in _PASSING and wait <= _MAX_WAIT else None
    # an answer that is no JSON is a proxy's
    is_passing = isinstance(error, (HttpLibraryError, json.JSONDecodeError)) and not isinstance(
        error, OfflineModeIsEnabled
    )
    return backoff if is_passing else None


def _is_status(error: BaseException) -> TypeGuard[HfHubHTTPError]:
    """Tell an answer of the Hub from huggingface_hub 0's error of a file that is not in the cache, which has none."""
    return isinstance(error, HfHubHTTPError) and error.response is not None


def _retry_after(error: HfHubHTTPError) -> float | None:
    """Read the header Retry-After in seconds, or the Hub's own, `RateLimit: "api";r=0;t=55`."""
    headers = error.response.headers
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    if not found and error.response.status_code == 429:
        found = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(found[1]) if found else None


def _explain(error: BaseException, repo_id: str, wording: Wording) -> str:
    hub = constants.ENDPOINT
    url = f"{hub}/{repo_id}"
    if isinstance(error, GatedRepoError):
        return f"expected access, got a gated model. Ask for access at {url}, then `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return wording.missing.format(hub=hub)
    if isinstance(error, RevisionNotFoundError):
        return f"expected a branch, tag or commit, got none of that name. See {url}/commits."
    if isinstance(error, HFValidationError):
        return wording.malformed
    if _is_status(error):
        status, said = error.response.status_code, error.server_message
        wanted = f"a token that {hub} accepts" if status == 401 else f"an answer from {hub}"
        seconds = _retry_after(error)
        hint = wording.hints.get(status, wording.later).format(url=url, wait=f" {seconds:.0f} s" if seconds else "")
        return f"expected {wanted}, got HTTP {status}{f' ({said})' if said and status != 401 else ''}. {hint}"
    if _is_xet(error):
        said = re.sub(r"\?[^\s)]*", "", " ".join(str(error).split()))  # queries of URLs hold signatures
        return wording.xet.format(error=said.rstrip("."))
    if isinstance(error, _NOT_THE_HUB) or isinstance(error.__cause__, _NOT_THE_HUB):
        return wording.garbled.format(hub=hub)
    if isinstance(error, NO_ANSWER) and type(error).__name__ != _CUT:
        return wording.offline.format(hub=hub)
    first_line = str(error).strip().partition("\n")[0]
    return wording.broken.format(error=first_line.rstrip("."))
