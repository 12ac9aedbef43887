"""One connection to the Hub of `helpers/hub.py`: what comes in, who asks, what goes out, and what may go wrong."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Repo, User

if TYPE_CHECKING:
    from hub import Hub

DROPPED, LOST, TRUNCATED, FLIPPED, FLOODED = "dropped", "lost", "truncated", "flipped", "flooded"

FLOOD = 200_000_000  # bytes


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    authorization: str | None


@dataclass
class Fault:
    """What befalls the next `times` requests of a method whose path holds `part`.

    Args:
        kind: an HTTP status; or the connection is "dropped" before anything is done, or the answer is "lost" after
            it is done; or the body is "truncated", or one of its bits "flipped", or whatever range was asked for, it
            is "flooded" with zeros; or the answer is a redirect to the URL given, or the bytes given; or something
            else is done before it.
        retry_after: seconds, the header of that name.
    """

    method: str
    part: str
    kind: int | str | bytes | Callable[[], object]
    times: int
    retry_after: int | None


class Wire(BaseHTTPRequestHandler):
    """Takes requests and hands them to `route`."""

    state: "Hub"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def route(self, path: str) -> None:
        raise NotImplementedError

    def do_HEAD(self) -> None:
        self._take()

    def do_GET(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.body = self._read_body()
        self.state.requests.append(Request(self.command, path, self.headers["Authorization"]))
        self.fault = self._next_fault(path)
        if self.fault == DROPPED:
            self.close_connection = True
        elif self.state.status or isinstance(self.fault, int):
            self.refuse(self.state.status or int(self.fault))
        elif isinstance(self.fault, bytes):
            self.send(200, self.fault, {})
        elif self.fault.startswith(("http:", "/")):
            self.send(302, b"", {"Location": self.fault})
        else:
            with self.state.lock:
                self.route(path)

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _next_fault(self, path: str) -> int | str | bytes:
        self.retry_after = None
        for fault in self.state.faults:
            if fault.times and fault.method == self.command and fault.part in path:
                fault.times -= 1
                self.retry_after = fault.retry_after
                if not callable(fault.kind):
                    return fault.kind
                fault.kind()
        return ""

    # -- who asks -----------------------------------------------------------------------------------------------------

    @property
    def token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")

    @property
    def user(self) -> User | None:
        return self.state.users.get(self.token)

    def find(self, id: str) -> Repo | None:
        """Return the repository, or refuse as the Hub does and return None."""
        repo = self.state.repos.get(id)
        if repo and repo.is_visible(self.user, self.token):
            return repo
        known = {repo.token for repo in self.state.repos.values()} | set(self.state.users)
        if self.token and self.token not in known:
            self.refuse(401, message="Invalid credentials in Authorization header")
        else:  # the Hub does not tell a private repository from none
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return None

    def find_at(self, id: str, revision: str) -> tuple[Repo, str] | None:
        """Return the repository and the sha of one of its revisions, or refuse and return None."""
        repo = self.find(id)
        if not repo:
            return None
        if commit := repo.at(revision):
            return repo, commit
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # -- answers ------------------------------------------------------------------------------------------------------

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault == LOST:
            self.close_connection = True
            return
        if self.fault == FLOODED:
            status, headers = 200, {"Content-Length": str(len(body) + FLOOD)}
        self.send_response(status)
        if is_file := "ETag" in headers:
            headers |= self.state.headers
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self._spoil(body, is_file=is_file))
        if self.fault == FLOODED:
            self._flood()

    def _flood(self) -> None:
        """Write until the reader hangs up."""
        self.close_connection = True
        with suppress(ConnectionError):
            while self.state.flooded < FLOOD:
                self.wfile.write(bytes(2**16))
                self.state.flooded += 2**16

    def _spoil(self, body: bytes, *, is_file: bool) -> bytes:
        breaks_after = self.state.breaks_after
        if is_file and breaks_after and len(body) > breaks_after:
            self.state.breaks_after = None
        elif self.fault == TRUNCATED:
            breaks_after = len(body) // 2
        elif self.fault == FLIPPED:
            return body[:-1] + bytes([body[-1] ^ 1])
        else:
            return body
        self.close_connection = True
        return body[:breaks_after]

    def send_json(self, document: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(document).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        retry_after = "" if self.retry_after is None or status < 429 else str(self.retry_after)
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Retry-After": retry_after}
        self.send(status, b"", {name: value for name, value in headers.items() if value})
