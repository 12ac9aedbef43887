"""A task: some shards of a plan, to be done by another process, which sees the source and the records' folder.

What it needs of the plan it gets as a pickle, in a file of the user's own that nobody else may write.
"""

import os
import pickle
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from surgery.checkpoint.resolve import Checkpoint
from surgery.engines.job import Job
from surgery.errors import OutputError, SettingError
from surgery.perturb import here
from surgery.perturb.output_errors import as_output_error
from surgery.perturb.plan import Plan
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.shared import FINISHED, MEASURED, Records, SharedFolder
from surgery.perturb.tasks import GlobalMoments
from surgery.threads import THREADS_PER_CORE

_FILE = "task.pickle"
_COMMAND = "surgery.perturb.run_task"


@dataclass(frozen=True)
class Task:
    """What to do with some shards.

    Args:
        kind: FINISHED, MEASURED or COMPARED: what a record says of a shard then.
        plan: of these shards alone.
        measured: of all shards.
        copy: what is compared, if anything is.
        records: the folder that takes a record of each.
        workers: threads.
    """

    kind: str
    plan: Plan
    measured: GlobalMoments
    copy: Checkpoint | None
    records: Path
    workers: int

    def of(self, shards: tuple[ShardPlan, ...]) -> "Task":
        """Return the task of some of its shards, which knows no more than it needs to."""
        names = {shard.name for shard in shards}
        recorded = self.plan.recorded
        if recorded:
            recorded = replace(recorded, files=tuple(file for file in recorded.files if file.name in names))
        plan = replace(self.plan, shards=shards, indexes={}, configs={}, recorded=recorded)
        return replace(self, plan=plan)

    def job(self, folder: Path) -> Job:
        """Write the task to a folder of its own, which is made, and return the job that does it."""
        folder.mkdir(parents=True)
        with os.fdopen(os.open(folder / _FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(f"{_version()}\n".encode())
            pickle.dump(self, file)
        command = (sys.executable, "-P", "-m", _COMMAND, str(folder))
        cpus = -(-self.workers // THREADS_PER_CORE)
        job = Job(folder, command, folder, cpus=cpus, gpus=0, function=f"{_COMMAND}:run_task")
        job.write()
        return job

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """Read what `job` has written.

        Raises:
            SettingError: it is of another version.
            OutputError: somebody else could have written it.
        """
        with (folder / _FILE).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise OutputError(f"{folder / _FILE}: expected a file that this user alone can write, got another.")
            theirs, mine = file.readline().decode().strip(), _version()
            if theirs != mine:
                raise SettingError(
                    f"{os.uname().nodename}: expected model-surgery {theirs}, which hands out the shards, got {mine}. "
                    "Install one version on all machines."
                )
            task = pickle.load(file)
        assert isinstance(task, cls)
        return task

    def run(self) -> None:
        """Do what is still to be done. Raises as perturb_checkpoint and verify_checkpoint."""
        records, names = Records(self.records), [shard.name for shard in self.plan.shards]
        if self.kind == FINISHED:
            assert isinstance(self.plan.out, Path)
            self._write(SharedFolder(self.plan.out, records, self.plan.shard_sizes), names)
            return
        keep, todo = partial(records.write, self.kind), self._of(records.missing(self.kind, names))
        if self.kind == MEASURED:
            here.measure(self.plan, todo, self.workers, keep)
        else:
            assert self.copy
            here.compare(self.plan, todo, self.measured, self.copy, self.workers, keep)

    def _write(self, shared: SharedFolder, names: Sequence[str]) -> None:
        try:
            with as_output_error(shared.path, self.plan.command):
                here.write(self.plan, self._of(shared.missing(names)), self.measured, self.workers, shared)
        finally:
            shared.abandon()

    def _of(self, names: Sequence[str]) -> list[ShardPlan]:
        return [shard for shard in self.plan.shards if shard.name in names]


def _version() -> str:
    return version("model-surgery")
