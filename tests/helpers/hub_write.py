"""What the Hub of `helpers/hub.py` lets write: repositories, branches, large files, commits and pull requests."""

import base64
import json
from typing import Any
from urllib.parse import parse_qs

import yaml
from hub_store import Files, Pull, Repo, is_large, sha256, tree_entry
from hub_wire import Wire

_LFS = ".git/info/lfs/objects/batch"


class Writes(Wire):
    """Answers POST and PUT."""

    def write_route(self, path: str) -> None:
        model = path.removeprefix("/api/models/")
        if path.startswith("/api/collections"):
            self._collect(path.removeprefix("/api/collections").removesuffix("/items"), json.loads(self.body))
        elif path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(self.body)["content"])
        elif path.endswith(_LFS):
            self._batch(path.removeprefix("/").removesuffix(_LFS), json.loads(self.body)["objects"])
        elif path.startswith("/lfs/"):
            self._store(*path.removeprefix("/lfs/").split("/"))
        elif "/paths-info/" in model:
            self._paths_info(*model.split("/paths-info/"))
        elif "/preupload/" in model:
            self._preupload(*model.split("/preupload/"))
        elif "/branch/" in model:
            self._branch(*model.split("/branch/"))
        elif "/commit/" in model:
            self._commit(*model.split("/commit/"))
        else:
            self.refuse(404)

    def _writable(self, id: str, *, by_anyone: bool = False) -> Repo | None:
        repo = self.find(id)
        if repo and not (self.user and (by_anyone or repo.is_writable(self.user))):
            self.refuse(403 if self.user else 401, message="You don't have the rights to write to this repository")
            return None
        return repo

    def _is_pull(self, revision: str) -> bool:
        return "create_pr" in self.query or revision.startswith("refs/pr/")

    # -- repositories and branches ------------------------------------------------------------------------------------

    def _create(self, wanted: dict[str, Any]) -> None:
        if not self.user:
            self.refuse(401, message="Invalid username or password.")
            return
        namespace = wanted["organization"] or self.user.name
        id = f"{namespace}/{wanted['name']}"
        url = f"{self.state.url}/{id}"
        if namespace not in self.user.namespaces:
            self.refuse(403, message=f"You don't have the rights to create a model under the namespace {namespace}")
        elif id in self.state.repos:
            self.send_json({"error": "You already created this model repo", "url": url}, status=409)
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.state.add(id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
            self.send_json({"url": url, "name": id})

    def _branch(self, id: str, branch: str) -> None:
        repo = self._writable(id)
        if repo and branch in repo.heads:
            self.refuse(409, message="Reference already exists")
        elif repo:
            repo.heads[branch] = repo.commit
            self.send_json({})

    # -- collections --------------------------------------------------------------------------------------------------

    def _collect(self, slug: str, wanted: dict[str, Any]) -> None:
        """Make a collection, or add an item to the one of a slug."""
        namespace = slug.strip("/").partition("/")[0] or wanted["namespace"]
        if not self.user or namespace not in self.user.namespaces:
            self.refuse(403, message=f"You don't have the rights to write to collections of {namespace}")
            return
        if not slug:
            slug = f"/{namespace}/{wanted['title'].lower().replace(' ', '-')}-{len(self.state.collections):024x}"
            self.state.collections[slug[1:]] = {
                "slug": slug[1:], "title": wanted["title"], "owner": {"name": namespace}, "items": [],
                "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": wanted["private"],
                "theme": "blue", "upvotes": 0,
            }  # fmt: skip
        elif slug[1:] not in self.state.collections:
            self.refuse(404, message="Collection not found")
            return
        else:
            items = self.state.collections[slug[1:]]["items"]
            item = {"id": wanted["item"]["id"], "type": wanted["item"]["type"], "_id": str(len(items)), "position": 0}
            if any(one["id"] == item["id"] for one in items):
                self.refuse(409, message="Item is already in the collection")
                return
            items.append(item)
        self.send_json(self.state.collections[slug[1:]])

    # -- content ------------------------------------------------------------------------------------------------------

    def _validate(self, card: str) -> None:
        _, *front = card.split("---\n", 2)
        try:
            metadata = yaml.safe_load(front[0]) if card.startswith("---\n") else None
        except yaml.YAMLError as error:
            self.send_json({"errors": [{"message": str(error).splitlines()[0]}], "warnings": []}, status=400)
            return
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": [], "warnings": warnings})

    def _paths_info(self, id: str, revision: str) -> None:
        if found := self.find_at(id, revision):
            files = found[0].commits[found[1]]
            wanted = parse_qs(self.body.decode())["paths"]
            self.send_json([tree_entry(name, files[name]) for name in wanted if name in files])

    def _preupload(self, id: str, revision: str) -> None:
        found = self._writable(id, by_anyone=self._is_pull(revision)) and self.find_at(id, revision)
        if not found:
            return
        files = found[0].commits[found[1]]
        ignored = files.get(".gitignore", b"").decode().split()
        rows = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            row = {"path": name, "uploadMode": "lfs" if is_large(name, file["size"]) else "regular"}
            entry = tree_entry(name, files[name]) if name in files else {}
            oid = entry.get("lfs", entry).get("oid")
            rows.append(row | {"shouldIgnore": name in ignored, **({"oid": oid} if oid else {})})
        self.send_json({"files": rows})

    def _batch(self, id: str, objects: list[dict[str, Any]]) -> None:
        if not self._writable(id, by_anyone=True):
            return
        rows = []
        for wanted in objects:
            oid, size, url = wanted["oid"], wanted["size"], f"{self.state.url}/lfs/{wanted['oid']}"
            actions: dict[str, Any] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            if (chunk := self.state.chunk) and size > chunk:
                parts = {str(n + 1): f"{url}/{n + 1}" for n in range(-(-size // chunk))}
                actions["upload"] |= {"href": f"{url}/join", "header": {"chunk_size": str(chunk), **parts}}
            rows.append(wanted if oid in self.state.stored else wanted | {"actions": actions})
        self.send_json({"transfer": "basic", "objects": rows})

    def _store(self, oid: str, action: str = "whole") -> None:
        """Take a large file, or a part of it, join its parts, or say whether it has come."""
        content = self.body
        if action.isdigit():
            self.state.parts[oid, int(action)] = content
            self.send(200, b"", {"ETag": f'"{sha256(content)}"'})
            return
        if action == "verify":
            self.send_json({}) if oid in self.state.stored else self.refuse(404)
            return
        if action == "join":
            content = b"".join(self.state.parts[oid, part["partNumber"]] for part in json.loads(content)["parts"])
        if sha256(content) != oid:
            self.refuse(400, message="The content does not match its sha256")
        else:
            self.state.stored[oid] = content
            self.send_json({})

    # -- commits ------------------------------------------------------------------------------------------------------

    def _commit(self, id: str, revision: str) -> None:
        is_pull = "create_pr" in self.query
        found = self._writable(id, by_anyone=self._is_pull(revision)) and self.find_at(id, revision)
        if not found:
            return
        repo, head = found
        header, *operations = [(row["key"], row["value"]) for row in map(json.loads, self.body.splitlines())]
        message, parent = header[1]["summary"], header[1].get("parentCommit")
        if parent not in (None, head) and not is_pull:
            self.refuse(412, message="A commit has happened since. Please refresh and try again.")
            return
        if revision in repo.tags or revision not in repo.heads:
            self.refuse(400, message="Invalid reference for a branch")
            return
        files = self._apply(operations, dict(repo.commits[parent or head]))
        if files is None:
            return
        answer: dict[str, Any] = {"success": True}
        if is_pull:
            pull = Pull(len(repo.pulls) + 1, message, self.user.name if self.user else "")
            repo.pulls.append(pull)
            revision = f"refs/pr/{pull.number}"
            answer["pullRequestUrl"] = f"{self.state.url}/{id}/discussions/{pull.number}"
        answer["commitOid"] = repo.record(revision, files, message)
        answer["commitUrl"] = f"{self.state.url}/{id}/commit/{answer['commitOid']}"
        self.send_json(answer)

    def _apply(self, operations: list[tuple[str, dict[str, Any]]], files: Files) -> Files | None:
        """Return the files after a commit, or refuse it and return None."""
        for key, value in operations:
            name = value["path"]
            if key == "file":
                files[name] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.state.stored:
                files[name] = self.state.stored[value["oid"]]
            elif key == "deletedFile" and name in files:
                del files[name]
            else:
                self.refuse(404 if key == "deletedFile" else 400, message=f"{key} {name}: no such file")
                return None
        return files
