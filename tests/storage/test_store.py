"""A folder of a store: listed, read by ranges, written whole; and uploads that are there whole or not at all."""

import threading

import pytest

from surgery.errors import OutputError, SourceError
from surgery.storage import store as module
from surgery.storage.store import Entry, Store
from surgery.storage.upload import open_upload
from surgery.storage.url import Url


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(Url("memory", f"{tmp_path.name}/folder"), OutputError)


def test_objects_are_listed_by_their_names(store):
    store.write("a", b"12")
    store.write("b/c", b"123")
    Store(store.url.parent / "folder2", OutputError).write("d", b"1")
    assert {name: entry.size for name, entry in store.list().items()} == {"a": 2, "b/c": 3}
    assert store.list()["a"].is_same(store.entry("a"))


def test_nothing_is_an_empty_list(store):
    assert store.list() == {}
    assert store.entry("a") is None
    store.remove("a")


def test_ranges_are_read(store):
    store.write("a", bytes(range(100)))
    assert store.read("a", 10, 20) == bytes(range(10, 20))
    assert store.read("a", 5, 5) == b""


def test_a_new_content_is_another_entry(store):
    store.write("a", b"12")
    before = store.entry("a")
    store.write("a", b"21")
    assert not store.entry("a").is_same(before)


def test_a_listing_may_say_less_than_a_look():
    looked, listed = Entry(2, {"ETag": "x", "LastModified": "1.0"}), Entry(2, {"ETag": "x", "LastModified": "1.5"})
    assert looked.is_same(listed)
    assert not looked.is_same(Entry(2, {"ETag": "y", "LastModified": "1.0"}))
    assert not looked.is_same(Entry(3, {"ETag": "x"}))
    assert looked.version == "ETag x"
    assert Entry(2, {}).version is None


def test_an_object_is_made_only_if_there_is_none(store):
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a", 0, 1) == b"1"


def test_less_than_was_asked_for_is_tried_again_and_an_error(store, monkeypatch):
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))
    store.write("a", b"12")
    answers = [b"1", b"", b"12", b"1", b"1", b"1"]
    monkeypatch.setattr(store.fs, "cat_file", lambda *_, **__: answers.pop(0))
    assert store.read("a", 0, 2) == b"12"
    with pytest.raises(OutputError, match=r"got _ShortError .1 of 2 bytes.\. Run the same command again"):
        store.read("a", 0, 2)


def test_what_is_not_there_is_not_asked_for_again(store, monkeypatch):
    monkeypatch.setattr(module, "_PAUSES", (60.0,))
    with pytest.raises(OutputError, match="expected it on the store, got no such object or bucket"):
        store.read("a", 0, 2)


def test_a_client_file_is_written_whole(store):
    upload = open_upload(store, "a", 6)
    for part in (b"123", b"456"):
        upload.append(memoryview(part))()
    upload.finish()
    upload.close()
    assert store.read("a", 0, 6) == b"123456"


def test_a_client_file_that_is_given_up_leaves_nothing(store):
    upload = open_upload(store, "a", 6)
    upload.append(memoryview(b"123"))()
    upload.close()
    upload.close()
    assert store.list() == {}


class Multipart:
    """A store's client of which only S3's multipart upload is used, kept in memory."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.calls: list[str] = []

    def split_path(self, path):
        return "bucket", path, None

    def call_s3(self, method, **arguments):
        self.calls.append(method)
        if method == "upload_part":
            self.parts[arguments["PartNumber"]] = bytes(arguments["Body"])
        return {"UploadId": "1", "ETag": str(arguments.get("PartNumber"))}


def test_parts_may_be_sent_in_any_order_and_by_any_thread(store, monkeypatch):
    monkeypatch.setattr("surgery.storage.upload._PART", 10)
    client = store.fs = Multipart()
    upload = open_upload(store, "a", 95)
    data = bytes(range(95))
    calls = [upload.append(memoryview(data[start : start + 7])) for start in range(0, 95, 7)]
    threads = [threading.Thread(target=call) for call in reversed(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    upload.finish()
    assert b"".join(client.parts[number] for number in sorted(client.parts)) == data
    assert {len(part) for number, part in client.parts.items() if number < 10} == {10}
    assert client.calls.count("create_multipart_upload") == client.calls.count("complete_multipart_upload") == 1
    upload.close()
    assert "abort_multipart_upload" not in client.calls


def test_an_upload_that_is_given_up_is_aborted(store, monkeypatch):
    monkeypatch.setattr("surgery.storage.upload._PART", 10)
    client = store.fs = Multipart()
    upload = open_upload(store, "a", 95)
    upload.append(memoryview(bytes(25)))()
    upload.close()
    upload.close()
    assert client.calls.count("abort_multipart_upload") == 1
    assert "complete_multipart_upload" not in client.calls


def test_parts_are_as_large_as_their_number_needs(store, monkeypatch):
    monkeypatch.setattr("surgery.storage.upload._PART", 10)
    monkeypatch.setattr("surgery.storage.upload._MOST_PARTS", 5)
    client = store.fs = Multipart()
    upload = open_upload(store, "a", 100)
    upload.append(memoryview(bytes(100)))()
    upload.finish()
    assert len(client.parts) <= 5


def test_errors_are_of_the_kind_that_was_asked_for():
    with pytest.raises(SourceError):
        Store(Url("memory", "nowhere"), SourceError).read("a", 0, 1)
