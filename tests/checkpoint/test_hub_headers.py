"""Headers by range requests, in this process, from a Hub on the loopback that does not keep to its part."""

from collections.abc import Callable, Iterator

import pytest
from checkpoints import raw_safetensors, tensors
from hub import FLOODED, Hub
from safetensors.numpy import save

from surgery.checkpoint.hub_headers import read_remote_headers
from surgery.checkpoint.tensorfile import Header
from surgery.errors import SourceError

pytestmark = pytest.mark.transformers

MODEL = "org/model"
TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def hub(in_process: Callable[[Hub], None]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(MODEL, {"model.safetensors": save(tensors())}, token=TOKEN)
        in_process(hub)
        yield hub


def _read() -> Header:
    remote = read_remote_headers(MODEL, revision=None, variant=None, token=TOKEN)
    assert remote
    return remote[1]["model.safetensors"]


def test_remote_header_is_the_one_of_the_file(hub: Hub) -> None:
    data = hub.repos[MODEL].files["model.safetensors"]
    header = _read()
    assert data.startswith(header.raw)
    assert header.file_size == len(data)


def test_server_that_ignores_range_is_refused_before_it_has_sent_much(hub: Hub) -> None:
    hub.fail("GET", "/model.safetensors", FLOODED)
    with pytest.raises(SourceError) as caught:
        _read()
    assert str(caught.value) == (
        "org/model/model.safetensors: expected the first 100000 bytes, got a server that ignores Range and sends more. "
        "Run `hf download org/model`, and inspect the folder it prints."
    )
    assert hub.flooded < 20_000_000  # of 200 MB; what the sockets take


def test_server_that_ignores_range_may_send_a_small_file(hub: Hub) -> None:
    hub.ignores_range = True
    assert {tensor.name for tensor in _read().tensors} == set(tensors())


@pytest.mark.parametrize(
    ("content", "length"),
    [(raw_safetensors(b"{}", length=2**40), 2**40), (b"", 0), (b"\1\0", 1), (bytes(8), 0)],
    ids=["enormous", "empty file", "short file", "no header"],
)
def test_header_of_impossible_length_is_not_asked_for(content: bytes, length: int, hub: Hub) -> None:
    hub.repos[MODEL].files["model.safetensors"] = content
    with pytest.raises(SourceError) as caught:
        _read()
    assert str(caught.value) == (
        f"org/model/model.safetensors: expected a safetensors header of at most 100000000 bytes, got one of {length} "
        "bytes. The file is not safetensors, or damaged: report it."
    )
    assert len(hub.asked("GET", "/model.safetensors")) == 1


def test_header_that_repeats_a_name_is_refused(hub: Hub) -> None:
    entry = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    hub.repos[MODEL].files["model.safetensors"] = raw_safetensors(b"{%s,%s}" % (entry, entry), bytes(4))
    with pytest.raises(SourceError, match="expected each name once in the header, got 'w' twice"):
        _read()


def test_token_does_not_follow_a_redirect_to_another_host(hub: Hub) -> None:
    with Hub() as storage:
        storage.add("org/open", hub.repos[MODEL].files)
        hub.fail("GET", "/model.safetensors", f"{storage.url}/org/open/resolve/main/model.safetensors")
        assert {tensor.name for tensor in _read().tensors} == set(tensors())
        assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
        assert [request.authorization for request in storage.requests] == [None]
