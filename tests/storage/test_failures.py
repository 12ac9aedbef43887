"""What clients of stores raise: one line with the object's name, and nothing that lets others in."""

import sys

import pytest

from surgery.errors import OutputError, SettingError, SourceError
from surgery.storage.failures import as_error, is_passing, redact
from surgery.storage.store import Store
from surgery.storage.url import Url


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"An error occurred ({code}) when calling the GetObject operation: {message}")
        self.response = {"Error": {"Code": code, "Message": message}}


class NoCredentialsError(Exception):
    """As botocore's."""


class EndpointConnectionError(ConnectionError):
    """As botocore's."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("b/a"), "s3://b/a: expected it on the store, got no such object or bucket. Check the URL."),
        (
            PermissionError("Access Denied"),
            "s3://b/a: expected access to it, got PermissionError (Access Denied). Check the credentials that the "
            "store's client finds.",
        ),
        (
            NoCredentialsError("Unable to locate credentials"),
            "s3://b/a: expected access to it, got NoCredentialsError (Unable to locate credentials). Check the "
            "credentials that the store's client finds.",
        ),
        (
            EndpointConnectionError('Could not connect to the endpoint URL: "http://h/b?X-Amz-Signature=s3cret"'),
            "s3://b/a: expected a store that answers, got EndpointConnectionError (Could not connect to the endpoint "
            'URL: "http://h/b"). Check its endpoint and the network.',
        ),
        (
            ClientError("SlowDown", "Please reduce your request rate.\nsecond line"),
            "s3://b/a: expected an answer of the store, got SlowDown (An error occurred (SlowDown) when calling the "
            "GetObject operation: Please reduce your request rate). Run the same command again.",
        ),
    ],
    ids=["missing", "denied", "no credentials", "no route", "slow down"],
)
def test_an_error_is_one_line(error, message):
    for kind in (SourceError, OutputError):
        found = as_error(error, "s3://b/a", kind)
        assert type(found) is kind
        assert str(found) == message


@pytest.mark.parametrize(
    "text",
    [
        "https://h/b?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret",
        "https://me:s3cret@h/b",
        "Authorization: Bearer s3cret",
        "aws_secret_access_key = s3cret",
        "sig=s3cret",
        "the key AKIAS3CRETS3CRETS3CR is unknown".replace("S3CRET", "ABCDEF"),
        "token hf_s3crets3cret",
        "sessionToken: s3cret, region",
    ],
)
def test_credentials_are_taken_out(text):
    found = redact(text)
    assert "s3cret" not in found
    assert "ABCDEF" not in found


def test_what_is_none_is_left():
    assert redact("the object s3://b/a of 12 bytes: no key of that name") == (
        "the object s3://b/a of 12 bytes: no key of that name"
    )


def test_what_passes_is_tried_again():
    assert is_passing(ClientError("SlowDown", "slow"))
    assert is_passing(OSError(5, "EIO"))
    assert is_passing(TimeoutError())
    for error in (FileNotFoundError(), PermissionError(), NoCredentialsError(), EndpointConnectionError(), TypeError()):
        assert not is_passing(error)
    assert not is_passing(KeyboardInterrupt())


def test_a_missing_client_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SettingError) as refused:
        Store(Url("gs", "b/a"), SourceError)
    assert str(refused.value) == (
        "gs://b/a: expected gcsfs to be installed, got none. Install it: pip install 'model-surgery[gcs]'."
    )


def test_an_unknown_scheme_is_named():
    with pytest.raises(SettingError) as refused:
        Store(Url("nothing", "b/a"), SourceError)
    assert str(refused.value) == (
        "nothing://b/a: expected s3://, gs://, az://, hf:// or another of fsspec's, got nothing://."
    )
