"""A Hub of our own on the loopback: the protocol of models, as huggingface_hub speaks it, and its faults.

    with Hub() as hub:
        repo = hub.add("org/name", {"config.json": b"{}"})
        token = hub.login("org")
        hub.fail("POST", "/commit/", "lost")
        ...                     # HF_ENDPOINT=hub.url
        hub.downloaded("org/name")

What each endpoint answers, and the X-Error-Code values, are documented in huggingface_hub's `hf_raise_for_status`,
`hf_hub_download`, `_commit_api.py` and `lfs.py`. This file has the server and what it lets read, `hub_write.py` what
it lets write, `hub_xet.py` its other storage, `hub_wire.py` the connection and its faults, `hub_store.py` what is kept.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any

from hub_store import Files, Repo, User, etag, folder_entries, is_large, sibling, tree_entry
from hub_wire import DROPPED as DROPPED
from hub_wire import FLIPPED as FLIPPED
from hub_wire import FLOODED as FLOODED
from hub_wire import LOST as LOST
from hub_wire import TRUNCATED as TRUNCATED
from hub_wire import Fault, Request
from hub_write import Writes
from hub_xet import Xet, xet_hash


@dataclass
class Hub:
    """The server.

    Args:
        users: by token.
        stored: content of large files by sha256, whether or not a commit has it.
        collections: by slug.
        chunk: if set, large files are asked for in parts of that many bytes.
        status: if set, what every request gets instead of an answer.
        headers: of files, in place of those they would have; None for none at all.
        ignores_range: files are sent whole.
        has_xet: large files are in Xet storage.
        flooded: how many bytes of zeros it got rid of.
        breaks_after: if set, the next file longer than that many bytes ends there, and so does the connection.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    users: dict[str, User] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    chunk: int | None = None
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    ignores_range: bool = False
    has_xet: bool = False
    flooded: int = 0
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

    def fail(
        self,
        method: str,
        part: str,
        kind: int | str | bytes | Callable[[], object],
        *,
        times: int = 1,
        retry_after: int | None = 0,
    ) -> None:
        """Let something befall the next requests; see `Fault`."""
        self.faults.append(Fault(method, part, kind, times, retry_after))

    def asked(self, method: str, part: str) -> list[str]:
        """Return the paths of requests of a method that hold `part`."""
        return [r.path for r in self.requests if r.method == method and part in r.path]

    def downloaded(self, id: str) -> set[str]:
        """Name the files of a repository whose content was sent."""
        start = f"/{id}/resolve/"
        return {path.removeprefix(start).partition("/")[2] for path in self.asked("GET", start)}


class _Handler(Writes, Xet):
    """Routes one connection's requests: /api/… and /{id}/resolve/{revision}/{path}, and those of `Writes`."""

    def route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            self._whoami()
        elif path.startswith("/xet/") or "-token/" in path:
            self.xet_route(path)
        elif self.command in ("POST", "PUT"):
            self.write_route(path)
        elif path.startswith("/api/collections"):
            self._collections(path.removeprefix("/api/collections").removeprefix("/"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            id, _, rest = path.removeprefix("/").partition("/resolve/")
            self._resolve(id, rest)
        else:
            self.refuse(404)

    def _whoami(self) -> None:
        if not self.user:
            self.refuse(401, message="Invalid credentials in Authorization header")
        else:
            orgs = [{"name": name, "type": "org"} for name in self.user.orgs]
            self.send_json({"type": "user", "name": self.user.name, "orgs": orgs, "auth": {"type": "access_token"}})

    # -- /api/collections[/{slug}]?owner=… ----------------------------------------------------------------------------

    def _collections(self, slug: str) -> None:
        if slug in self.state.collections:
            self.send_json(self.state.collections[slug])
        elif slug:
            self.refuse(404, message="Collection not found")
        else:
            owner = self.query.get("owner")
            rows = [one for one in self.state.collections.values() if one["owner"]["name"] == owner]
            self.send_json([{name: value for name, value in row.items() if name != "position"} for row in rows])

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
            self._send_file(id, found[1], name, files[name])

    def _send_file(self, id: str, commit: str, name: str, data: bytes) -> None:
        tag = f'"{etag(name, data)}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_large(name, len(data)):
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(data))}
            if self.state.has_xet:
                route = f"{self.state.url}/api/models/{id}/xet-read-token/{commit}"
                headers |= {"X-Xet-Hash": xet_hash(data), "X-Xet-Refresh-Route": route}
        start, stop = 0, len(data)
        ranged = None if self.state.ignores_range else self.headers["Range"]
        if ranged:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.send(206 if ranged else 200, data[start:stop], headers)
