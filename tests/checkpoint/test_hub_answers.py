"""Answers that no Hub gives, but proxies, login pages and servers that take after it: one line each."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tensors
from commands import Ran
from hub import Hub
from safetensors.numpy import save

from surgery.checkpoint.hub import fetch
from surgery.checkpoint.hub_headers import read_remote_headers
from surgery.errors import SourceError

pytestmark = pytest.mark.transformers

MODEL = "org/model"
WEIGHTS = "model.safetensors"
_PAGE = b"<!DOCTYPE html><html>Log in to this network</html>"
_GARBLED = (
    "org/model: expected answers of the Hub from {url}, got others. "
    "Check HF_ENDPOINT, and that no proxy or login page is in between."
)
_ANOTHER = "org/model: expected one commit, got another while it was fetched. Run the command again."
_NO_SHA = "org/model: expected the sha of a commit from the Hub, got {}. Check HF_ENDPOINT."
_NO_NAME = "org/model: expected files of its own, got {}. Do not trust this checkpoint."

Use = Callable[[], object]


@pytest.fixture
def hub(in_process: Callable[[Hub], None]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(MODEL, {WEIGHTS: save(tensors()), "config.json": b"{}"})
        in_process(hub)
        yield hub


def _fetch() -> object:
    return fetch(MODEL, revision=None, variant=None, token=None)


def _inspect() -> object:
    return read_remote_headers(MODEL, revision=None, variant=None, token=None)


def _refused(use: Use, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        use()
    assert str(caught.value) == message


def _info(**fields: Any) -> bytes:
    return json.dumps({"id": MODEL, "sha": "a" * 40, "siblings": [{"rfilename": WEIGHTS}]} | fields).encode()


def _file(**fields: Any) -> bytes:
    return _info(siblings=[{"rfilename": "config.json"}, fields])


_INFOS = {
    "page": (_PAGE, _GARBLED),
    "empty": (b"", _GARBLED),
    "not UTF-8": (b"\xff\xfe{", _GARBLED),
    "list": (b"[]", _GARBLED),
    "null": (b"null", _GARBLED),
    "no fields": (b"{}", _GARBLED),
    "nested": (b"[" * 100_000, _GARBLED),
    "no sha": (_info(sha=None), _NO_SHA.format(None)),
    "number for a sha": (_info(sha=7), _NO_SHA.format(7)),
    "path for a sha": (_info(sha="../x"), _NO_SHA.format("'../x'")),
    "no files": (_info(siblings=None), f"{MODEL}: expected safetensors or PyTorch weights, got nothing. "
                 "Point at the folder that holds the weights."),
    "text for files": (_info(siblings="abc"), _GARBLED),
    "number for a file": (_info(siblings=[3]), _GARBLED),
    "file without a name": (_file(size=3), _GARBLED),
    "null for a name": (_file(rfilename=None), _NO_NAME.format(None)),
    "number for a name": (_file(rfilename=3), _NO_NAME.format(3)),
    "empty name": (_file(rfilename=""), _NO_NAME.format("''")),
    "NUL in a name": (_file(rfilename="a\0"), _NO_NAME.format(repr("a\0"))),
    "LFS without sha256": (_file(rfilename=WEIGHTS, lfs={"size": 3}), _GARBLED),
    "text for LFS": (_file(rfilename=WEIGHTS, lfs="x"), _GARBLED),
}  # fmt: skip


@pytest.mark.parametrize("use", [_fetch, _inspect], ids=["fetch", "inspect"])
@pytest.mark.parametrize(("answer", "message"), _INFOS.values(), ids=_INFOS)
def test_odd_info_is_one_line(answer: bytes, message: str, use: Use, hub: Hub) -> None:
    hub.fail("GET", f"/api/models/{MODEL}", answer, times=9)
    _refused(use, message.format(url=hub.url))


@pytest.mark.parametrize("use", [_fetch, _inspect], ids=["fetch", "inspect"])
@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"ETag": None, "X-Linked-Etag": None}, _GARBLED),
        ({"X-Repo-Commit": None}, _GARBLED),
        ({"X-Repo-Commit": "f" * 40}, _ANOTHER),
    ],
    ids=["no ETag", "no commit", "another commit"],
)
def test_odd_headers_of_a_file_are_one_line(headers: dict[str, str | None], message: str, use: Use, hub: Hub) -> None:
    hub.headers = headers
    _refused(use, message.format(url=hub.url))


@pytest.mark.parametrize("size", ["999999", "-5"], ids=["more", "negative"])
def test_size_that_is_not_the_files_is_one_line(size: str, hub: Hub) -> None:
    hub.headers = {"X-Linked-Size": size}
    with pytest.raises(SourceError) as caught:
        _fetch()
    message = str(caught.value)
    assert message.startswith(f"{MODEL}: expected a complete download, got Consistency check failed: file should be")
    assert message.endswith("). Try again.")
    assert "\n" not in message


def test_sha256_that_is_none_is_a_difference(hub: Hub) -> None:
    lfs = {"sha256": 7, "size": 3, "pointerSize": 3}
    commit = hub.repos[MODEL].commit
    hub.fail("GET", f"/api/models/{MODEL}", _info(sha=commit, siblings=[{"rfilename": WEIGHTS, "lfs": lfs}]))
    with pytest.raises(SourceError, match=r"model\.safetensors: expected sha256 7\.\.\., as on the Hub, got "):
        _fetch()


def test_login_page_leaves_nothing_behind(hub: Hub, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    for method in ("HEAD", "GET"):
        hub.fail(method, "/resolve/", _PAGE, times=9)
    ran = run_cli("perturb", MODEL, "-o", "out", env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
    assert (ran.code, ran.out, ran.err) == (1, "", f"error: {_GARBLED.format(url=hub.url)}\n")
    assert not (tmp_path / "out").exists()
