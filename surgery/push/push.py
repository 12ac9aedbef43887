"""push_checkpoint: send an output folder through HfApi in one commit, so that the Hub never holds half of it."""

import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from surgery.checkpoint.hub_errors import PUSH, HttpLibraryError, one_line, wait_before_retry
from surgery.display import Brief
from surgery.errors import OutputError, SettingError
from surgery.escapes import shell_join
from surgery.io_errors import naming
from surgery.progress import has_widgets, is_notebook, is_shown
from surgery.push.collection import add_to_collection
from surgery.push.contents import Contents, read_contents
from surgery.push.remote import PushPlan, RemoteRevision, plan_push, read_revision

_TRIES = 5


@dataclass(frozen=True)
class PushOptions:
    """What to push where, as asked for.

    Args:
        folder: an output folder.
        repo_id: of a model; without `name/`, one of the user's own.
        private: if the repository is new.
        revision: branch, made if need be.
        token: None for the one stored on this machine.
        recipe_only: without the weights.
        collection: title or slug of one to add the model to.
    """

    folder: Path
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    token: str | None = field(default=None, repr=False)
    recipe_only: bool = False
    collection: str | None = None

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, constants.DEFAULT_REVISION):
            raise SettingError(
                f"`create_pr`: expected no `revision` with it, got {self.revision}. "
                "A pull request is opened against main: leave one of them out."
            )

    @property
    def is_logged_in(self) -> bool:
        return bool(self.token or get_token())

    @property
    def command(self) -> str:
        """The command that does this, without the token."""
        valued = {
            "--revision": self.revision,
            "--commit-message": self.commit_message,
            "--collection": self.collection,
        }
        flags = {"--private": self.private, "--create-pr": self.create_pr, "--recipe-only": self.recipe_only}
        given = [part for option, value in valued.items() if value for part in (option, value)]
        parts = ["surgery", "push", str(self.folder), self.repo_id, *(flag for flag, on in flags.items() if on), *given]
        return shell_join(parts)


@dataclass(frozen=True, repr=False)
class Pushed(Brief):
    """What a push did.

    Args:
        url: of the commit or the pull request.
        commit: sha of the commit that holds the checkpoint.
        shipment: what was sent, and what was there already.
        notes: what the Hub remarked.
        collection: URL of the one that the model was added to, if it was.
    """

    url: str
    commit: str
    shipment: PushPlan
    notes: tuple[str, ...] = ()
    collection: str | None = None


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    recipe_only: bool = False,
    collection: str | None = None,
) -> Pushed:
    """Push what `perturb_checkpoint` wrote to a model repository on the Hub, in one commit.

    Sent are the files that surgery.json names, README.md and surgery.json itself, in which a local source keeps its
    name but not its path. Weights that a former push left there and this one does not replace are deleted in the same
    commit. What is there already is not sent again: the same call resumes a push that failed.

    Args:
        folder: an output folder, finished and unaltered; README.md may be edited.
        repo_id: `name/model`, made if need be.
        private: make it private, if it is new.
        revision: branch, made if need be; default: main.
        create_pr: open a pull request, or go on with the one that a former call opened.
        commit_message: default: names source, lam and seed.
        token: default: the one stored on this machine. It is kept nowhere.
        recipe_only: leave the weights out: `surgery materialize` makes them again.
        collection: add the model to it: a slug, or a title in the model's namespace, made if need be.
    Returns:
        The URL, the commit, and what was sent.
    Raises:
        SettingError: create_pr with a branch.
        SourceError: surgery.json is no recipe.
        OutputError: the folder is altered or unfinished, other weights are there, no access, or the Hub failed.
    """
    options = PushOptions(
        Path(folder),
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        recipe_only=recipe_only,
        collection=collection,
    )
    refuse_without_token(options)
    return execute(options, read_contents(options.folder, recipe_only=recipe_only))


def make_plan(options: PushOptions, contents: Contents) -> PushPlan:
    """Return what would be sent, from what is there; changes nothing on the Hub. Raises as push_checkpoint."""
    with _quiet(), one_line(options.repo_id, options.repo_id, PUSH):
        return _plan(HfApi(token=options.token), options, contents)


def check(options: PushOptions) -> None:
    """Refuse what can be told before there is anything to push: no access, no branch. Raises as push_checkpoint."""
    refuse_without_token(options)
    with _quiet(), one_line(options.repo_id, options.repo_id, PUSH):
        _remote(HfApi(token=options.token), options)


def refuse_without_token(options: PushOptions) -> None:
    """Refuse to push with no token at all, before any work is done."""
    if not options.is_logged_in:
        raise OutputError("`token`: expected a token to push with, got none. `hf auth login`, or give `token`.")


def execute(options: PushOptions, contents: Contents) -> Pushed:
    """Push, trying again where that may help. Raises as push_checkpoint; the message has the command that resumes."""
    try:
        with _quiet() as remarks, one_line(options.repo_id, options.repo_id, PUSH):
            pushed = _try_often(options, contents)
    except OutputError as error:
        again = ", and `token` again" if options.token else ""
        raise OutputError(f"{error} Resume with `{options.command}`{again}.") from error
    return replace(pushed, notes=tuple(dict.fromkeys(remarks)))


def _try_often(options: PushOptions, contents: Contents) -> Pushed:
    """Terminal and send, again after a failure that passes.

    Each try looks at the Hub anew, so one whose answer was lost is found there, and neither committed nor opened as a
    pull request twice.
    """
    api = HfApi(token=options.token)
    first: PushPlan | None = None
    for attempt in range(_TRIES):
        try:
            plan = _plan(api, options, contents)
            first = first or plan
            pushed = replace(_send(api, options, plan), shipment=first)
            return replace(pushed, collection=_collect(api, options, pushed))
        except (OSError, ValueError, RuntimeError, HttpLibraryError) as error:
            wait = wait_before_retry(error, attempt)
            if wait is None or attempt == _TRIES - 1:
                raise
            time.sleep(wait)
    raise AssertionError


def _collect(api: HfApi, options: PushOptions, pushed: Pushed) -> str | None:
    if options.collection is None:
        return None
    remote = pushed.shipment.remote
    private = options.private or bool(remote.is_private)
    return add_to_collection(api, remote.repo_id, options.collection, private=private)


def _remote(api: HfApi, options: PushOptions) -> RemoteRevision:
    return read_revision(api, options.repo_id, revision=options.revision, private=options.private)


def _plan(api: HfApi, options: PushOptions, contents: Contents) -> PushPlan:
    title = options.commit_message or contents.title
    return plan_push(api, _remote(api, options), contents, pull_title=title if options.create_pr else None)


def _send(api: HfApi, options: PushOptions, plan: PushPlan) -> Pushed:
    """Make what is missing: repository, branch, large files, then one commit.

    Not upload_folder: it takes files as they lie in a folder, where the recipe to push differs, and with hf_xet it
    makes several commits, between which the repository holds half a checkpoint.
    """
    if plan.remote.head is None:
        api.create_repo(plan.remote.repo_id, private=options.private or None, exist_ok=True)
        plan = _plan(api, options, plan.contents)
    remote = plan.remote
    if remote.is_new_branch:
        api.create_branch(remote.repo_id, branch=remote.revision, exist_ok=True)
    if not plan.changed and not plan.deleted:
        return Pushed(plan.url, str(remote.head), plan)
    return _commit(api, options, plan)


def _commit(api: HfApi, options: PushOptions, plan: PushPlan) -> Pushed:
    remote = plan.remote
    additions = [_Addition(item.name, item.content) for item in plan.changed]
    for addition, item in zip(additions, plan.changed, strict=True):
        addition.upload_info.sha256 = bytes.fromhex(item.sha256)  # it was checked, and need not be read once more
    opens_pull = options.create_pr and remote.pull is None
    where: dict[str, Any] = {"revision": remote.revision, "create_pr": opens_pull}
    api.preupload_lfs_files(remote.repo_id, additions, free_memory=False, **where)
    done = api.create_commit(
        remote.repo_id,
        [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.deleted)],
        commit_message=options.commit_message or plan.contents.title,
        parent_commit=remote.head,
        **where,
    )
    there = remote.at(api, done.oid)
    if ignored := [item.name for item in plan.changed if not there.holds(item)]:
        raise OutputError(
            f"{remote.repo_id}: expected {ignored[0]} in the commit, got it left out by the .gitignore there. "
            "Correct that file."
        )
    return Pushed(str(done.pr_url or plan.pull_url or done.commit_url), done.oid, plan)


class _Addition(CommitOperationAdd):
    """A file to commit, which is named in what a disk says while huggingface_hub reads it."""

    def __post_init__(self) -> None:
        with self._naming():
            super().__post_init__()

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with self._naming(), super().as_file(with_tqdm) as file:
            yield file

    def _naming(self) -> AbstractContextManager[None]:
        is_path = isinstance(self.path_or_fileobj, str | Path)
        return naming(str(self.path_or_fileobj) if is_path else self.path_in_repo)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep what huggingface_hub logs and warns of from stderr, and its bars but on a terminal or as widgets.

    Yields:
        What it warned of, such as a card without metadata, as the body goes on.
    """
    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of its HTTP library, to itself
        if level == logging.WARNING:  # its default; HF_DEBUG=1 is left alone
            logger.setLevel(logging.ERROR)
        if had_bars and not (is_shown() and (has_widgets() or not is_notebook())):
            disable_progress_bars()
        try:
            yield remarks
        finally:
            logger.setLevel(level)
            if had_bars:
                enable_progress_bars()
            lines = (str(warning.message) for warning in caught if warning.category is UserWarning)
            remarks += (" ".join(re.sub(r"\s-\s", " ", line).split()) for line in lines)
