"""safetensors headers read from the Hub by range requests, to inspect a model without downloading its weights."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from surgery.checkpoint.hub import another_commit, commit_of, fetch_file
from surgery.checkpoint.hub_errors import BAD_ANSWER, FETCH, HttpLibraryError, one_line
from surgery.checkpoint.layout import RECIPE, arrange
from surgery.checkpoint.own_names import refuse_escaping
from surgery.checkpoint.resolve import Checkpoint, from_listing
from surgery.checkpoint.tensorfile import MAX_HEADER, Header, parse_header, read_header
from surgery.errors import SourceError

_REQUESTS = 8  # at once
_FIRST = 100_000  # bytes; most headers are shorter, and take one request
_PIECE = 65_536  # bytes at once


def read_remote_headers(
    repo_id: str, *, revision: str | None, variant: str | None, token: str | None
) -> tuple[Checkpoint, dict[str, Header]] | None:
    """Return a checkpoint whose weights need not be here, and the header of each of its weight files.

    Files that are in the Hub's cache are read there.

    Returns:
        None without a network.
    Raises:
        SourceError: no such repository, revision or access; weights that are pickles, which have no header.
    """
    what = f"{repo_id}@{revision}" if revision else repo_id
    with one_line(what, repo_id, FETCH):
        try:
            info = HfApi().model_info(repo_id, revision=revision, token=token)
        except BAD_ANSWER:
            raise
        except (OfflineModeIsEnabled, HttpLibraryError):
            return None
        names = [file.rfilename for file in info.siblings or ()]
        refuse_escaping(repo_id, names)
        commit = commit_of(repo_id, info)
        cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
        for name in _small(names, variant, repo_id):
            if commit not in fetch_file(repo_id, name, revision=commit, token=token).parts:
                raise another_commit(repo_id)
        checkpoint = from_listing(cache / "snapshots" / commit, repo_id, commit, variant, names)
        files = [name for weight_set in checkpoint.layout.weights for name in weight_set.files]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            headers = pool.map(lambda name: _header(checkpoint, name, token), files)
            return checkpoint, dict(zip(files, headers, strict=True))


def _small(names: Collection[str], variant: str | None, repo_id: str) -> list[str]:
    """Name the files that tell which shards there are, whether they are quantized, and where they came from."""
    weights = arrange(names, variant=variant, what=repo_id).weights
    indexes = [weight_set.index for weight_set in weights if weight_set.index]
    configs = {(PurePosixPath(weight_set.folder) / "config.json").as_posix() for weight_set in weights}
    return [*indexes, *(name for name in names if name in configs or name == RECIPE)]


def _header(checkpoint: Checkpoint, name: str, token: str | None) -> Header:
    label = f"{checkpoint.id}/{name}"
    path = checkpoint.path(name)
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{label}: expected safetensors, whose header can be read alone, got a PyTorch pickle. "
            f"Run `hf download {checkpoint.id}`, and inspect the folder it prints."
        )
    if path.is_file():
        return read_header(path, label=label)
    raw = _read_raw(checkpoint, name, token, label=label)
    return Header(raw, parse_header(raw, label=label))


def _read_raw(checkpoint: Checkpoint, name: str, token: str | None, *, label: str) -> bytes:
    """Return the bytes of a header, length prefix included."""
    raw = _read_first(checkpoint, name, token, _FIRST, label=label)
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 0 < length <= MAX_HEADER:
        raise SourceError(
            f"{label}: expected a safetensors header of at most {MAX_HEADER} bytes, got one of {length} bytes. "
            "The file is not safetensors, or damaged: report it."
        )
    if len(raw) < 8 + length:
        raw = _read_first(checkpoint, name, token, 8 + length, label=label)
    return raw[: 8 + length]


def _read_first(checkpoint: Checkpoint, name: str, token: str | None, size: int, *, label: str) -> bytes:
    """Return a file's first `size` bytes, or all of a shorter one.

    Streamed, where HfApi's own would take all that is sent. The client keeps the token from other hosts in redirects.
    """
    url = hf_hub_url(checkpoint.id, name, revision=checkpoint.commit)
    headers = build_hf_headers(token=token) | {"Range": f"bytes=0-{size - 1}", "Accept-Encoding": "identity"}
    found = bytearray()
    with _stream(url, headers) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(_PIECE):
            found += piece
            if len(found) > size:
                raise SourceError(
                    f"{label}: expected the first {size} bytes, got a server that ignores Range and sends more. "
                    f"Run `hf download {checkpoint.id}`, and inspect the folder it prints."
                )
    return bytes(found)


def _stream(url: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
    """Begin a GET, in httpx or, before huggingface_hub 1, in requests, whose `stream` is a setting."""
    session: Any = get_session()
    get = partial(session.stream, "GET") if callable(session.stream) else partial(session.get, stream=True)
    return cast(AbstractContextManager[Any], get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT))
