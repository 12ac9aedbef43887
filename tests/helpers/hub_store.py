"""What the Hub of `helpers/hub.py` keeps: repositories of commits, branches and pull requests, and large files."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Files = dict[str, bytes]

_LARGE = 10_000_000
_LARGE_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".pt", ".model")


@dataclass(frozen=True)
class User:
    """Whom a token stands for, and the organisations whose repositories that user may write to."""

    name: str
    orgs: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.orgs)


@dataclass(frozen=True)
class Pull:
    """A pull request; its commits are on `refs/pr/{number}`."""

    number: int
    title: str
    author: str
    status: str = "open"


@dataclass
class Repo:
    """A model repository.

    Args:
        commits: files by path, by the commit's sha.
        heads: commit's sha by the name of a branch, tag or pull request.
        tags: which of them are no branches.
        token: if given, the only token that may see the repository.
        private: only those who may write to it may see it.
        gated: metadata is public, files are not.
        messages: of the commits, oldest first.
    """

    id: str
    commits: dict[str, Files] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    token: str | None = None
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return self.heads["main"]

    @property
    def files(self) -> Files:
        """Those of the main branch."""
        return self.commits[self.commit]

    def at(self, revision: str) -> str | None:
        """Return the sha of the commit that a revision names."""
        return self.heads.get(revision) or (revision if revision in self.commits else None)

    def record(self, branch: str, files: Files, message: str) -> str:
        """Put a commit on a branch, and return its sha."""
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
        seed = json.dumps([self.id, len(self.commits), branch, content])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.heads[branch] = sha
        self.messages.append(message)
        return sha

    def is_writable(self, user: User | None) -> bool:
        return bool(user and self.id.split("/")[0] in user.namespaces)

    def is_visible(self, user: User | None, token: str) -> bool:
        if self.token:
            return token == self.token
        return not self.private or self.is_writable(user)


def is_large(name: str, size: int) -> bool:
    """Tell whether the Hub keeps a file as LFS."""
    return size >= _LARGE or (name.endswith(_LARGE_SUFFIXES) and size > 0)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def etag(name: str, data: bytes) -> str:
    """Return what the Hub knows a file's content by: its sha256, or the sha1 of its git blob."""
    return sha256(data) if is_large(name, len(data)) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return the pointer's blob, and what the pointer says."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
    return _blob(pointer), {"sha256": sha256(data), "size": len(data), "pointerSize": len(pointer)}


def tree_entry(name: str, data: bytes) -> dict[str, Any]:
    """One row of a tree listing."""
    if not is_large(name, len(data)):
        return {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    blob, lfs = _lfs(data)
    return {"type": "file", "path": name, "size": len(data), "oid": blob, "lfs": lfs | {"oid": lfs["sha256"]}}


def sibling(name: str, data: bytes) -> dict[str, Any]:
    """One file of a model's info with `blobs=true`."""
    row = tree_entry(name, data)
    return {"rfilename": name, "size": len(data), "blobId": row["oid"], **({"lfs": row["lfs"]} if "lfs" in row else {})}


def folder_entries(files: Files) -> list[dict[str, Any]]:
    """The folders of a recursive tree listing."""
    folders = sorted({name.rpartition("/")[0] for name in files} - {""})
    return [{"type": "directory", "path": name, "size": 0, "oid": _blob(name.encode())} for name in folders]
