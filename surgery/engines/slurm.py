"""Engine: job arrays of Slurm through submitit, polled with one squeue, also where Slurm keeps no accounts.

Partition, account, time limit and the like are sbatch's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT,
SBATCH_TIMELIMIT. What a job does not say it needs is the cluster's default: in most, one core and no GPU.
"""

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from surgery.engines.engine import Engine, State
from surgery.engines.execute import run_job
from surgery.engines.job import Job, note
from surgery.errors import OutputError, SettingError
from surgery.escapes import printable

_log = logging.getLogger(__name__)
_THREADS = "OMP_NUM_THREADS"
_LONGEST_CALL = 120.0
_LONGEST_END = 90.0  # seconds: more than KillWait, the 30 that Slurm itself leaves between SIGTERM and SIGKILL
_LARGEST_ARRAY = 1001  # Slurm's own default of MaxArraySize, where it cannot be asked
_WAITING = ("PENDING", "CONFIGURING", "SUSPENDED", "STOPPED")
_DONE = "COMPLETED"
_ENDED = (_DONE, "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
          "REVOKED", "TIMEOUT")  # fmt: skip


class SlurmEngine(Engine):
    """Runs jobs as job arrays of the Slurm cluster whose sbatch is on PATH. They go on without this process.

    Args:
        logs: a folder for submitit's scripts and logs, which every node sees.
        jobs: how many at once of those that are submitted together; None: as many as Slurm lets.

    Raises:
        SettingError: submitit or Slurm is not installed, or Slurm's controller does not answer.
    """

    name: ClassVar[str] = "slurm"
    is_detached: ClassVar[bool] = True
    is_remote: ClassVar[bool] = True

    def __init__(self, logs: Path, jobs: int | None = None) -> None:
        self._submitit = _import_submitit()
        if shutil.which("sbatch") is None:
            raise SettingError(
                "--engine slurm: expected Slurm's sbatch on PATH, got none. Run this where jobs are submitted."
            )
        self._states: dict[str, str] = {}
        if why := self._look():
            raise SettingError(f"--engine slurm: expected a controller that answers, got none ({why}). Check `sinfo`.")
        self._logs, self._most = logs, jobs
        self._jobs: dict[str, Job] = {}
        self._is_silent = False

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        ids: dict[Path, str] = {}
        arrays = list(_split(jobs, self._largest_array))
        for array in arrays:
            most = len(array) if self._most is None else max(1, self._most // len(arrays))
            for id, job in zip(self._submit(array, most), array, strict=True):
                ids[job.folder], self._jobs[id], self._states[id] = id, job, "PENDING"
        return [ids[job.folder] for job in jobs]

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        why = self._look()
        if why and not self._is_silent:  # perhaps it is started again: what was so is taken to be so still
            _log.warning("Slurm's controller does not answer (%s): waiting for it", why)
        self._is_silent = bool(why)
        words = {id: self._states.get(id, _DONE) for id in ids}
        for id, word in words.items():
            # one that has run to its end has a result, though it may not show here yet
            if word in _ENDED and (job := self._jobs.pop(id, None)) and word != _DONE:
                note(job.folder, f"Slurm: job {id} ended as {word}")
        return {id: _state(word) for id, word in words.items()}

    def cancel(self, ids: Sequence[str]) -> None:
        if not ids or not (left := self._alive(ids)):
            return
        subprocess.run(["scancel", "--quiet", *left], capture_output=True, check=False, timeout=_LONGEST_CALL)
        until = time.monotonic() + _LONGEST_END
        while self._alive(left) and time.monotonic() < until:
            time.sleep(0.5)

    def _alive(self, ids: Sequence[str]) -> list[str]:
        self._look()
        return [id for id in ids if _state(self._states.get(id, _DONE)) is not State.ENDED]

    def _look(self) -> str:
        """Ask for the states of all of this user's jobs; return why there was no answer, if so."""
        command = ["squeue", f"--user={os.getuid()}", "--array", "--states=all", "--noheader", "--format=%i %T"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST_CALL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return printable(str(error))
        if done.returncode:
            return _reason(done.stderr)
        self._states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
        return ""

    def _submit(self, jobs: Sequence[Job], most: int) -> list[str]:
        # submitit's own requeueing, and Slurm's, would run a lost job again in the folder of its former try
        # exec: Slurm ends the script's shell before the job has, and may lose sight of what that has started
        executor = self._submitit.SlurmExecutor(self._logs, python=f"exec {shlex.quote(sys.executable)} -P")
        executor.update_parameters(
            job_name="surgery",
            time=None,
            wckey=None,
            array_parallelism=most,
            additional_parameters={"no_requeue": True},
            use_srun=False,  # the step of Slurm 22.05 and newer would get one core of those that the job has
            **_resources(jobs[0]),
        )
        for job in jobs:
            _with_threads(job).write()
        try:
            with executor.batch():
                handed_in = [executor.submit(_run, str(job.folder)) for job in jobs]
        except self._submitit.core.utils.FailedJobError as error:
            raise OutputError(f"sbatch: expected it to take the jobs, got: {_reason(str(error))}. Change --cpus or "
                              "--gpus, or set sbatch's variables, such as SBATCH_PARTITION.") from error  # fmt: skip
        return [str(each.job_id) for each in handed_in]

    @cached_property
    def _largest_array(self) -> int:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, check=False, timeout=_LONGEST_CALL
        )
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
        return max(1, int(found[1])) if found else _LARGEST_ARRAY


def _run(folder: str) -> int:
    """Run the job of a folder on a node, past submitit's signal before a time limit, which would end it earlier."""
    signal.signal(signal.SIGUSR2, lambda *_: None)
    return run_job(folder)


def _state(word: str) -> State:
    if word in _ENDED:
        return State.ENDED
    return State.WAITING if word in _WAITING else State.RUNNING


def _split(jobs: Sequence[Job], largest: int) -> Iterator[Sequence[Job]]:
    """Yield jobs that may stand in one array: no more than Slurm takes, and of the same needs."""
    by_needs: dict[tuple[int, int | None], list[Job]] = {}
    for job in jobs:
        by_needs.setdefault((job.cpus, job.gpus), []).append(job)
    for alike in by_needs.values():
        for first in range(0, len(alike), largest):
            yield alike[first : first + largest]


def _resources(job: Job) -> dict[str, int]:
    wanted = {"cpus_per_task": job.cpus, "gpus_per_node": job.gpus}
    return {name: count for name, count in wanted.items() if count}


def _with_threads(job: Job) -> Job:
    """Tell a job how many threads its cores are; the user's own count wins."""
    if not job.cpus or _THREADS in os.environ:
        return job
    return replace(job, variables={_THREADS: str(job.cpus)} | dict(job.variables))


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise SettingError(
            "--engine slurm: expected submitit to be installed, got none. Install it: pip install "
            "'model-surgery[slurm]'."
        ) from error
    return submitit


def _reason(text: str) -> str:
    """Return the last line of what a command of Slurm has said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(re.sub(r"^\w+: (error: |fatal: )?", "", lines[-1]) if lines else "no reason").rstrip(".")
