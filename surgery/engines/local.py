"""Engine: processes of this machine, N at once, each with a GPU or a share of the cores."""

import itertools
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar

from surgery.engines.engine import Engine, State
from surgery.engines.execute import LIFELINE
from surgery.engines.job import Job
from surgery.errors import SettingError
from surgery.threads import cores

_GPUS = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"
_LONGEST_END = 15.0


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    slot: int


class LocalEngine(Engine):
    """Runs jobs as child processes. They end with this process, however it ends.

    Args:
        jobs: how many at once; None: one for each GPU, or one.
        gpus: the GPUs to share out, as CUDA_VISIBLE_DEVICES names them; None: those that are here.
        gpus_each: how many of them a job gets; None: one, if there are any.

    Raises:
        SettingError: there are fewer than a job is to get.
    """

    name: ClassVar[str] = "local"

    def __init__(
        self, jobs: int | None = None, gpus: Sequence[str] | None = None, *, gpus_each: int | None = None
    ) -> None:
        found = find_gpus() if gpus is None else list(gpus)
        each = min(1, len(found)) if gpus_each is None else gpus_each
        if each > len(found):
            raise SettingError(f"--gpus: expected at most the {len(found)} that are here, got {each}. Take fewer.")
        self._shares = [",".join(found[i : i + each]) for i in range(0, len(found) - each + 1, each)] if each else []
        self._hides_gpus = bool(found) and not each
        self.slots = jobs or len(self._shares) or 1
        self._free = list(range(self.slots))
        self._waiting: deque[tuple[str, Job]] = deque()
        self._running: dict[str, _Running] = {}
        self._ids = map(str, itertools.count())

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        ids = [next(self._ids) for _ in jobs]
        self._waiting.extend(zip(ids, jobs, strict=True))
        self._start()
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        for id, running in list(self._running.items()):
            if running.process.poll() is not None:
                self._free_slot(id)
        self._start()
        waiting = {id for id, _ in self._waiting}
        return {
            id: State.RUNNING if id in self._running else State.WAITING if id in waiting else State.ENDED for id in ids
        }

    def cancel(self, ids: Sequence[str]) -> None:
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in ids)
        ended = [id for id in ids if id in self._running]
        for id in ended:
            self._running[id].process.terminate()
        until = time.monotonic() + _LONGEST_END
        for id in ended:
            with suppress(subprocess.TimeoutExpired):
                self._running[id].process.wait(max(0.0, until - time.monotonic()))
            self._running[id].process.kill()
            self._running[id].process.wait()
            self._free_slot(id)

    def _start(self) -> None:
        while self._free and self._waiting:
            id, job = self._waiting.popleft()
            slot = self._free.pop(0)
            replace(job, variables=self._share(job, slot) | dict(job.variables)).write()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "surgery.engines.execute", str(job.folder), LIFELINE],
                stdin=subprocess.PIPE,  # whose end tells the child that we are gone
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is ours to answer
            )
            self._running[id] = _Running(process, slot)

    def _share(self, job: Job, slot: int) -> dict[str, str]:
        """Return the variables that give a job its GPU or its share of the cores; the user's own count wins."""
        share = {}
        if self._shares or self._hides_gpus:
            share[_GPUS] = self._shares[slot % len(self._shares)] if self._shares else ""
        if job.cpus or not (self._shares or _THREADS in os.environ):
            share[_THREADS] = str(job.cpus or max(1, cores() // self.slots))
        return share

    def _free_slot(self, id: str) -> None:
        running = self._running.pop(id)
        if running.process.stdin:
            running.process.stdin.close()
        self._free.append(running.slot)


def find_gpus() -> list[str]:
    """Return this machine's GPUs as CUDA_VISIBLE_DEVICES names them: those of that variable, or all."""
    if (chosen := os.environ.get(_GPUS)) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    listed = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(listed))] if done.returncode == 0 else []
