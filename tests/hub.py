"""A Hub of our own on the loopback: the protocol of models, as huggingface_hub speaks it, and its faults.

    with Hub() as hub:
        repo = hub.add("org/name", {"config.json": b"{}"})
        token = hub.login("org")
        hub.fail("POST", "/commit/", "lost")
        ...                     # HF_ENDPOINT=hub.url
        hub.downloaded("org/name")

What each endpoint answers, and the X-Error-Code values, are documented in huggingface_hub's `hf_raise_for_status`,
`hf_hub_download`, `_commit_api.py` and `lfs.py`. This file has the server and what it lets read, `hub_write.py` what
it lets write.
"""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Files, Repo, User, etag, folder_entries, is_large, sibling, tree_entry
from hub_write import Writes

DROPPED, LOST, TRUNCATED, FLIPPED = "dropped", "lost", "truncated", "flipped"


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
            it is done; or the body is "truncated", or one of its bits "flipped".
        retry_after: seconds, the header of that name.
    """

    method: str
    part: str
    kind: int | str
    times: int
    retry_after: int | None


@dataclass
class Hub:
    """The server.

    Args:
        users: by token.
        stored: content of large files by sha256, whether or not a commit has it.
        chunk: if set, large files are asked for in parts of that many bytes.
        status: if set, what every request gets instead of an answer.
        breaks_after: if set, the next file longer than that many bytes ends there, and so does the connection.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    users: dict[str, User] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    chunk: int | None = None
    status: int | None = None
    breaks_after: int | None = None

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            state = hub

        self.lock = threading.Lock()
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

    def add(self, id: str, files: Files, *, revisions: tuple[str, ...] = ("main",), **settings: Any) -> Repo:
        """Make a repository of one commit, which all revisions name; those that are not `main` are tags."""
        repo = self.repos[id] = Repo(id, tags=set(revisions) - {"main"}, **settings)
        commit = repo.record("main", files, "initial commit")
        repo.heads |= dict.fromkeys(revisions, commit)
        return repo

    def login(self, name: str, *orgs: str) -> str:
        """Make a user, and return the token."""
        token = f"hf_{name}{'s3cret' * 5}"
        self.users[token] = User(name, orgs)
        return token

    def fail(self, method: str, part: str, kind: int | str, *, times: int = 1, retry_after: int | None = 0) -> None:
        self.faults.append(Fault(method, part, kind, times, retry_after))

    def asked(self, method: str, part: str) -> list[str]:
        """Return the paths of requests of a method that hold `part`."""
        return [r.path for r in self.requests if r.method == method and part in r.path]

    def downloaded(self, id: str) -> set[str]:
        """Name the files of a repository whose content was sent."""
        start = f"/{id}/resolve/"
        return {path.removeprefix(start).partition("/")[2] for path in self.asked("GET", start)}


class _Handler(Writes, BaseHTTPRequestHandler):
    """Routes one connection's requests: /api/… and /{id}/resolve/{revision}/{path}, and those of `Writes`."""

    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

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
        else:
            with self.state.lock:
                self._route(path)

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _next_fault(self, path: str) -> int | str:
        self.retry_after = None
        for fault in self.state.faults:
            if fault.times and fault.method == self.command and fault.part in path:
                fault.times -= 1
                self.retry_after = fault.retry_after
                return fault.kind
        return ""

    def _route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            self._whoami()
        elif self.command in ("POST", "PUT"):
            self.write_route(path)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            id, _, rest = path.removeprefix("/").partition("/resolve/")
            self._resolve(id, rest)
        else:
            self.refuse(404)

    # -- who asks -----------------------------------------------------------------------------------------------------

    @property
    def token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")

    @property
    def user(self) -> User | None:
        return self.state.users.get(self.token)

    def _whoami(self) -> None:
        if not self.user:
            self.refuse(401, message="Invalid credentials in Authorization header")
        else:
            orgs = [{"name": name, "type": "org"} for name in self.user.orgs]
            self.send_json({"type": "user", "name": self.user.name, "orgs": orgs, "auth": {"type": "access_token"}})

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

    # -- /api/models/{id}[/revision/{revision} | /tree/{revision} | /refs | /discussions] ------------------------------

    def _api(self, path: str) -> None:
        if path.endswith("/refs"):
            self._refs(path.removesuffix("/refs"))
        elif path.endswith("/discussions"):
            self._discussions(path.removesuffix("/discussions"))
        else:
            id, _, revision = path.partition("/revision/")
            id, _, tree = id.partition("/tree/")
            if found := self.find_at(id, revision or tree or "main"):
                files = found[0].commits[found[1]]
                if tree:
                    self.send_json([*folder_entries(files), *(tree_entry(*file) for file in files.items())])
                else:
                    self._info(*found)

    def _info(self, repo: Repo, commit: str) -> None:
        files = repo.commits[commit]
        siblings = [sibling(*file) if self.query.get("blobs") else {"rfilename": file[0]} for file in files.items()]
        gated = "manual" if repo.gated else False
        info = {"_id": "0", "id": repo.id, "sha": commit, "gated": gated, "private": repo.private, "siblings": siblings}
        self.send_json(info)

    def _refs(self, id: str) -> None:
        if repo := self.find(id):
            rows = [{"name": name, "ref": name, "targetCommit": commit} for name, commit in repo.heads.items()]
            branches = [row for row in rows if row["name"] not in repo.tags and not row["name"].startswith("refs/")]
            tags = [row for row in rows if row["name"] in repo.tags]
            self.send_json({"branches": branches, "tags": tags, "converts": []})

    def _discussions(self, id: str) -> None:
        if repo := self.find(id):
            rows = [
                {
                    "num": pull.number, "title": pull.title, "status": pull.status, "isPullRequest": True,
                    "author": {"name": pull.author}, "createdAt": "2026-01-01T00:00:00.000Z",
                    "repo": {"name": id, "type": "model"},
                }
                for pull in repo.pulls
                if self.query.get("status") in (None, pull.status) and self.query.get("author") in (None, pull.author)
            ]  # fmt: skip
            self.send_json({"discussions": rows, "count": len(rows), "start": 0})

    # -- /{id}/resolve/{revision}/{path} ------------------------------------------------------------------------------

    def _resolve(self, id: str, rest: str) -> None:
        repo = self.find(id)
        if not repo:
            return
        names = [name for name in (*repo.heads, *repo.commits) if rest.startswith(f"{name}/")]
        revision = max(names, key=len, default=rest.partition("/")[0])
        name = rest.removeprefix(f"{revision}/")
        found = self.find_at(id, revision)
        if not found:
            return
        files = repo.commits[found[1]]
        if repo.gated and not repo.is_writable(self.user):
            self.refuse(403, "GatedRepo", f"Access to model {id} is restricted.")
        elif name not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send_file(found[1], name, files[name])

    def _send_file(self, commit: str, name: str, data: bytes) -> None:
        tag = f'"{etag(name, data)}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_large(name, len(data)):
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(data))}
        start, stop = 0, len(data)
        if ranged := self.headers["Range"]:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.send(206 if ranged else 200, data[start:stop], headers)

    # -- answers ------------------------------------------------------------------------------------------------------

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault == LOST:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self._spoil(body, is_file="ETag" in headers))

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

    def send_json(self, document: Any, *, status: int = 200) -> None:
        self.send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        retry_after = "" if self.retry_after is None or status < 429 else str(self.retry_after)
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Retry-After": retry_after}
        self.send(status, b"", {name: value for name, value in headers.items() if value})
