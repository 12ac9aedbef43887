"""Which texts are URLs of a store, which are paths, and which are refused, without repeating what they hold."""

from pathlib import Path

import pytest

from surgery.errors import SettingError
from surgery.storage.url import Url, as_path, find_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/b", Url("s3", "bucket/a/b")),
        ("s3a://bucket/a/", Url("s3", "bucket/a")),
        ("gcs://bucket", Url("gs", "bucket")),
        ("abfs://container@account.dfs.core.windows.net/a", Url("abfs", "container@account.dfs.core.windows.net/a")),
        ("hf://datasets/org/name@main/a", Url("hf", "datasets/org/name@main/a")),
        ("memory://a", Url("memory", "a")),
    ],
    ids=["s3", "s3a", "gcs", "abfs", "hf", "memory"],
)
def test_a_url_is_found(text, url):
    assert find_url(text) == url
    assert find_url(str(url)) == url


@pytest.mark.parametrize("text", ["org/name", "./a", "/a/b", "C:\\a", "C://a", "file:///a/b", "file://a", "s3:/b/c"])
def test_anything_else_is_none(text):
    assert find_url(text) is None


def test_a_file_url_is_its_path():
    assert as_path("file:///a/b") == Path("/a/b")
    assert as_path("~/a") == Path.home() / "a"
    assert as_path("s3/a") == Path("s3/a")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://me:s3cret@bucket/a", "s3://...@bucket: expected a URL without a password, got one with."),
        ("s3://b/a?X-Amz-Signature=s3cret", "s3://b/a: expected a URL without a query, got one with."),
        ("simplecache::s3://b/s3cret", "simplecache::...: expected one place on one store, got a chain."),
        ("s3://", "s3://: expected a place on a store, got none. Write s3://PLACE."),
        (Path("s3://b/a"), "s3:/b/a: expected a URL as str, got a Path, which cannot hold one. Pass str."),
    ],
    ids=["password", "query", "chain", "nothing", "path"],
)
def test_what_may_hold_credentials_or_is_no_place_is_refused(place, message):
    with pytest.raises(SettingError) as refused:
        find_url(place)
    assert str(refused.value).startswith(message)
    assert "s3cret" not in str(refused.value)


def test_parts_of_a_url():
    url = Url("s3", "bucket/a")
    assert str(url / "b.json") == "s3://bucket/a/b.json"
    assert (url / "b.json").name == "b.json"
    assert (url / "b.json").parent == url


@pytest.mark.parametrize(
    ("one", "other", "holds"),
    [("b/a", "b/a", True), ("b/a", "b/a/c", True), ("b/a", "b/ac", False), ("b/a/c", "b/a", False)],
)
def test_one_place_holds_another(one, other, holds):
    assert Url("s3", one).holds(Url("s3", other)) is holds
    assert not Url("gs", one).holds(Url("s3", other))
