"""What one revision of a repository on the Hub holds, and the PushPlan: what to send there, and what to delete."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from surgery.checkpoint.digests import SHA256, algorithm_of, hex_of
from surgery.checkpoint.layout import RECIPE, is_weight
from surgery.display import Brief
from surgery.errors import OutputError, SourceError
from surgery.push.contents import Contents, LocalFile
from surgery.recipe import Recipe

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, repr=False)
class RemoteRevision(Brief):
    """One revision of a model repository, as it was when looked at.

    Args:
        repo_id: with its namespace.
        revision: branch, or `refs/pr/N`.
        head: the sha of its last commit, of main if the branch is new; None if there is no such repository.
        is_private: None if there is none.
        pull: number of the pull request, if it is one that a former push opened.
    """

    repo_id: str
    revision: str
    head: str | None = None
    is_private: bool | None = None
    is_new_branch: bool = False
    pull: int | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict, repr=False)

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"

    def holds(self, item: LocalFile) -> bool:
        """Tell whether it holds the very content of a file."""
        there = self.files.get(item.name)
        if there is None:
            return False
        if there.lfs:
            return bool(there.lfs.sha256 == item.sha256)
        return there.size == item.size and there.blob_id == item.blob_id

    def at(self, api: HfApi, commit: str) -> "RemoteRevision":
        """Return another commit of the repository."""
        tree = api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        files = {file.path: file for file in tree if isinstance(file, RepoFile)}
        return replace(self, head=commit, files=files)


@dataclass(frozen=True, repr=False)
class PushPlan(Brief):
    """What a push sends.

    Args:
        changed: files that the repository does not hold, or holds with another content.
        unchanged: those it holds.
        deleted: weights there that a former push wrote and loaders might prefer to these.
    """

    remote: RemoteRevision
    contents: Contents
    changed: tuple[LocalFile, ...]
    unchanged: tuple[LocalFile, ...]
    deleted: tuple[str, ...]

    @property
    def pull_url(self) -> str | None:
        return f"{self.remote.url}/discussions/{self.remote.pull}" if self.remote.pull else None

    @property
    def url(self) -> str:
        """Where to read_revision at what is there."""
        return self.pull_url or f"{self.remote.url}/commit/{self.remote.head}"


def read_revision(api: HfApi, repo_id: str, *, revision: str | None, private: bool) -> RemoteRevision:
    """Terminal at a repository. Raises the Hub's errors as they come.

    Args:
        private: it is to be private.
    Raises:
        OutputError: it is public, or the revision is no branch.
    """
    if "/" not in repo_id:
        repo_id = f"{_user(api, repo_id)}/{repo_id}"
    remote = RemoteRevision(repo_id, revision or constants.DEFAULT_REVISION)
    try:
        info = api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return remote
    if private and not info.private:
        raise OutputError(
            f"{repo_id}: expected a private model, as `private` asks, got a public one. "
            f"Make it private at {remote.url}/settings, or leave `private` out."
        )
    remote = replace(remote, is_private=bool(info.private))
    head = str(info.sha)
    if remote.revision.startswith("refs/"):
        head = str(api.model_info(repo_id, revision=remote.revision).sha)
    elif remote.revision != constants.DEFAULT_REVISION:
        branch = _branch(api, remote)
        head, remote = branch or head, replace(remote, is_new_branch=branch is None)
    return remote.at(api, head)


def _user(api: HfApi, what: str) -> str:
    if not (api.token or get_token()):
        raise OutputError(f"{what}: expected name/model while not logged in, got no name. Add it, or `hf auth login`.")
    caching = {"cache": True} if "cache" in signature(api.whoami).parameters else {}  # not before huggingface_hub 1
    return str(api.whoami(**caching)["name"])  # the Hub limits how often one may ask


def _branch(api: HfApi, remote: RemoteRevision) -> str | None:
    """Return the sha of the branch's last commit, None if there is no such branch, and refuse what cannot be one."""
    refs = api.list_repo_refs(remote.repo_id)
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    if remote.revision not in heads:
        is_tag = remote.revision in {tag.name for tag in refs.tags}
        if is_tag or _COMMIT.fullmatch(remote.revision):
            found = "a tag" if is_tag else "a commit"
            raise OutputError(
                f"`revision`: expected a branch to push to, got {found}, {remote.revision}. Name a branch."
            )
    return heads.get(remote.revision)


def plan_push(api: HfApi, remote: RemoteRevision, contents: Contents, *, pull_title: str | None) -> PushPlan:
    """Choose what to send to a repository, and what to delete there. Raises the Hub's errors as they come.

    Args:
        pull_title: title of the pull request to open, or to go on with if a former push opened it; None for none.
    Raises:
        OutputError: it holds other weights.
    """
    contents = _with_former_sha256(api, remote, contents.addressed(remote.repo_id))
    if pull_title and remote.head and (pull := _find_pull(api, remote, contents, pull_title)):
        revision = f"refs/pr/{pull}"
        head = str(api.model_info(remote.repo_id, revision=revision).sha)
        remote = replace(remote, revision=revision, pull=pull).at(api, head)
    items = contents.items
    changed = tuple(item for item in items if not remote.holds(item))
    unchanged = tuple(item for item in items if remote.holds(item))
    return PushPlan(remote, contents, changed, unchanged, _stale(api, remote, contents))


def _find_pull(api: HfApi, remote: RemoteRevision, contents: Contents, title: str) -> int | None:
    """Find an open pull request of this user that holds this recipe; of this title, where main holds it as well."""
    if not (api.token or get_token()):
        return None
    recipe, user = contents.recipe_file, _user(api, remote.repo_id)
    pulls = api.get_repo_discussions(
        remote.repo_id, author=user, discussion_type="pull_request", discussion_status="open"
    )
    for pull in pulls:
        there = api.get_paths_info(remote.repo_id, [RECIPE], revision=f"refs/pr/{pull.num}")
        files = {file.path: file for file in there if isinstance(file, RepoFile)}
        if replace(remote, files=files).holds(recipe) and (pull.title == title or not remote.holds(recipe)):
            return pull.num
    return None


def _with_former_sha256(api: HfApi, remote: RemoteRevision, contents: Contents) -> Contents:
    """Take what is not read for a recipe alone, the sha256 of weights held back, from the recipe of a former push."""
    former = _former_recipe(api, remote) if contents.is_recipe_only else None
    if former is None:
        return contents
    recipe = contents.recipe
    kept = {name for name in contents.held_back if former.digests.get(name) == recipe.digests[name]}
    known = {name: digits for name, digits in former.sha256.items() if name in kept} | recipe.sha256
    sha256 = {name: known[name] for name in recipe.digests if name in known}
    return replace(contents, recipe=replace(recipe, sha256=sha256))


def _stale(api: HfApi, remote: RemoteRevision, contents: Contents) -> tuple[str, ...]:
    """Name the weights that a former push left and this one does not replace; refuse any others.

    Loaders would take a stale model.safetensors rather than the shards that are pushed beside it.
    """
    weights = {name: file for name, file in remote.files.items() if is_weight(name)}
    known = _sha256_by_name(contents.recipe)
    fitting = {file.name for file in contents.files}
    fitting |= {name for name in contents.held_back if name in weights and _is_known(weights[name], known)}
    stray = sorted(weights.keys() - fitting)
    former = _former_recipe(api, remote) if stray and not contents.is_recipe_only else None
    former_known = _sha256_by_name(former) if former else {}
    foreign = [name for name in stray if not _is_known(weights[name], former_known)]
    if foreign:
        count = f"{len(foreign)} such as {foreign[0]}" if len(foreign) > 1 else foreign[0]
        raise OutputError(
            f"{remote.repo_id}@{remote.revision}: expected no weights but those of this recipe, got {count}, which "
            "loaders might take instead. Delete them there, or push elsewhere."
        )
    return tuple(stray)


def _is_known(file: RepoFile, sha256: Mapping[str, str]) -> bool:
    """Tell whether a file there is the one that a recipe names; of what git itself keeps, the name has to do."""
    known = sha256.get(file.path)
    return known is not None and (file.lfs is None or file.lfs.sha256 == known)


def _former_recipe(api: HfApi, remote: RemoteRevision) -> Recipe | None:
    """Return the recipe in the repository, if there is one."""
    if RECIPE not in remote.files:
        return None
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(remote.repo_id, RECIPE, revision=remote.head, local_dir=folder)
        try:
            return Recipe.read(Path(path))
        except SourceError:  # not ours
            return None


def _sha256_by_name(recipe: Recipe) -> dict[str, str]:
    """Return what the Hub knows a recipe's files by; what sha256 records, old recipes for one, is that."""
    recorded = {name: hex_of(digest) for name, digest in recipe.digests.items() if algorithm_of(digest) == SHA256}
    return recorded | recipe.sha256
