"""A Hub of our own on the loopback: the read side of the protocol, as huggingface_hub speaks it.

    with Hub() as hub:
        repo = hub.add("org/name", {"config.json": b"{}"})
        ...                     # HF_ENDPOINT=hub.url
        hub.downloaded("org/name")

What each endpoint answers, and the X-Error-Code values, are documented in huggingface_hub's `hf_raise_for_status` and
`hf_hub_download`.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = 512  # bytes from which a file is "LFS": linked headers, and a redirect as the Hub's own


@dataclass
class Repo:
    """A model repository with one commit per revision.

    Args:
        files: content by path.
        commit: sha of the commit that `main` and every other revision point to.
        revisions: branch and tag names.
        token: if given, the only token that may see the repository.
        gated: metadata is public, files are not.
    """

    files: dict[str, bytes]
    commit: str
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    gated: bool = False


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    authorization: str | None


@dataclass
class Hub:
    """The server.

    Args:
        status: if set, what every request gets instead of an answer.
        breaks_after: if set, the next file longer than that many bytes ends there, and so does the connection.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    status: int | None = None
    breaks_after: int | None = None

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, id: str, files: dict[str, bytes], **settings: Any) -> Repo:
        commit = hashlib.sha1(repr((id, sorted(files.items()))).encode()).hexdigest()
        self.repos[id] = Repo(files, commit, **settings)
        return self.repos[id]

    def downloaded(self, id: str) -> set[str]:
        """Name the files of a repository whose content was sent."""
        start = f"/{id}/resolve/"
        paths = [r.path for r in self.requests if r.method == "GET" and r.path.startswith(start)]
        return {path.removeprefix(start).partition("/")[2] for path in paths}


class _Handler(BaseHTTPRequestHandler):
    """Routes one connection's requests: /api/models/… and /{id}/resolve/{revision}/{path}."""

    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(Request(self.command, path, self.headers["Authorization"]))
        if self.state.status:
            self._refuse(self.state.status)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            id, _, rest = path.removeprefix("/").partition("/resolve/")
            self._resolve(id, *rest.split("/", 1))
        else:
            self._refuse(404)

    # -- /api/models/{id}[/revision/{revision} | /tree/{revision}] ----------------------------------------------------

    def _api(self, path: str) -> None:
        id, _, revision = path.partition("/revision/")
        id, _, tree = id.partition("/tree/")
        repo = self._find(id, revision or tree or "main")
        if repo is None:
            return
        if tree:
            self._send_json([_entry(name, data) for name, data in repo.files.items()])
        else:
            siblings = [{"rfilename": name} for name in repo.files]
            gated = "manual" if repo.gated else False
            self._send_json({"_id": "0", "id": id, "sha": repo.commit, "gated": gated, "siblings": siblings})

    def _find(self, id: str, revision: str) -> Repo | None:
        """Return the repository, or refuse as the Hub does and return None."""
        repo = self.state.repos.get(id)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if repo is None or (repo.token and token != repo.token):
            known = {repo.token for repo in self.state.repos.values()}
            if token and token not in known:
                self._refuse(401, message="Invalid credentials in Authorization header")
            else:  # the Hub does not tell a private repository from none
                self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in (repo.commit, *repo.revisions):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    # -- /{id}/resolve/{revision}/{path} ------------------------------------------------------------------------------

    def _resolve(self, id: str, revision: str, name: str) -> None:
        repo = self._find(id, revision)
        if repo is None:
            return
        if repo.gated:
            self._refuse(403, "GatedRepo", f"Access to model {id} is restricted.")
        elif name not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send_file(repo, repo.files[name])

    def _send_file(self, repo: Repo, data: bytes) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if len(data) >= _LARGE:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        start, stop = 0, len(data)
        if ranged := self.headers["Range"]:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206 if ranged else 200, data[start:stop], headers)

    # -- answers ------------------------------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "ETag" in headers and self.state.breaks_after and len(body) > self.state.breaks_after:
            body, self.close_connection = body[: self.state.breaks_after], True
            self.state.breaks_after = None
        self.wfile.write(body)

    def _send_json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"", {name: value for name, value in headers.items() if value})


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """One row of a tree listing."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if len(data) >= _LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
