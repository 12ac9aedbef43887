"""An S3 server on the loopback, moto's, and its faults: what it answers is what S3 documents, over real connections.

with S3() as s3:
    s3.upload("bucket", folder, "model")
    s3.fail("PUT", "partNumber=2", 503, times=3)
    ...                     # with s3.env
    s3.keys("bucket")
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="needs s3fs: pip install 'model-surgery[s3]'")
pytest.importorskip("moto.server", reason="needs moto: make test-storage")

import boto3
import boto3.session
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

DROPPED = "dropped"
"""A fault: half of the answer is sent, and the connection ends."""
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
)
SECRET = "s3cr3tS3cr3tS3cr3tS3cr3tS3cr3tS3cr3tS3cr"


@dataclass
class Fault:
    """What befalls requests of a method whose path and query hold `part`: a status, DROPPED, or a call before them."""

    method: str
    part: str
    kind: int | str | Callable[[], object]
    times: int


class S3:
    """The server.

    Args:
        requests: all that were made: method, path and query, and the range that was asked for.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)

    def __enter__(self) -> "S3":
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        session = boto3.session.Session("AKIAIOSFODNN7EXAMPLE", SECRET, region_name="us-east-1")
        self.client: Any = session.client("s3", endpoint_url=self.url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """What a command needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def fail(self, method: str, part: str, kind: int | str | Callable[[], object], *, times: int = 1) -> None:
        """Let something befall the next requests; see `Fault`."""
        self.faults.append(Fault(method, part, kind, times))

    def asked(self, method: str, part: str) -> list[str]:
        """Return the requests of a method that hold `part`."""
        return [path for found, path, _ in self.requests if found == method and part in path]

    def upload(self, bucket: str, folder: Path, prefix: str = "") -> None:
        """Make a bucket, if there is none, and put a folder's files there."""
        self.client.create_bucket(Bucket=bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/")
                self.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return sorted(entry["Key"] for entry in found)

    def read(self, bucket: str, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def uploads(self, bucket: str) -> list[str]:
        """Name the objects whose multipart upload is neither complete nor given up."""
        found = self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return sorted(upload["Key"] for upload in found)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        with self._lock:
            self.requests.append((environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE")))
            fault = self._fault(environ["REQUEST_METHOD"], path)
        if fault and callable(fault.kind):
            fault.kind()
        elif fault and fault.kind != DROPPED:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = _SLOW_DOWN if fault.kind == 503 else _DENIED
            start(f"{fault.kind} Fault", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer: Iterable[bytes] = self._app(environ, start)
        return _half(answer) if fault and fault.kind == DROPPED else answer

    def _fault(self, method: str, path: str) -> Fault | None:
        fault = next((f for f in self.faults if f.method == method and f.part in path and f.times), None)
        if fault:
            fault.times -= 1
        return fault


def _half(answer: Iterable[bytes]) -> Iterator[bytes]:
    data = b"".join(answer)
    yield data[: len(data) // 2]
    raise ConnectionAbortedError


class _Quiet(WSGIRequestHandler):
    """Logs nothing, and holds no connection open when a fault ends it."""

    def log(self, *_: Any) -> None:
        pass
