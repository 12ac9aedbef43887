"""Engine: tasks of a Ray cluster that is there already, one for each job, on whichever node has room for it.

A job that does not say what it needs gets one core, and one GPU where the cluster has any. One that has a function is
run in Ray's own worker, which another one finds warm; any other in a process that the worker starts.
"""

import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar
from urllib.parse import urlsplit

from surgery.engines.engine import Engine, State
from surgery.engines.execute import APART, LIFELINE
from surgery.engines.inside import run_inside
from surgery.engines.job import LOG, Job, is_held, note
from surgery.errors import SettingError
from surgery.escapes import printable

_log = logging.getLogger(__name__)
_LONGEST_CONNECT = 10.0
_LONGEST_END = 20.0  # seconds: more than a job that does not heed SIGTERM takes


class RayEngine(Engine):
    """Runs jobs as tasks of the Ray cluster of RAY_ADDRESS, or of this machine. They end with this process.

    Each node needs this package in the Python of its Ray, and the folders of the jobs at the same paths.

    Raises:
        SettingError: Ray is not installed, or no cluster answers.
    """

    name: ClassVar[str] = "ray"
    is_remote: ClassVar[bool] = True

    def __init__(self) -> None:
        self._ray = _import_ray()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray)
        self._tasks: dict[str, Any] = {}
        self._jobs: dict[str, Job] = {}
        self._ids = map(str, itertools.count())

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        ids = [next(self._ids) for _ in jobs]
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        # Ray itself would run a lost one again in the folder of the former try; whoever submits it clears that first
        run, call = (self._ray.remote(max_retries=0)(each) for each in (_run, run_inside))
        for id, job in zip(ids, jobs, strict=True):
            needs = _needs(job, nodes)
            task = call if job.function else run
            self._jobs[id] = job
            self._tasks[id] = task.options(num_cpus=needs["CPU"], num_gpus=needs["GPU"], name="surgery").remote(
                str(job.folder)
            )
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        tasks = [self._tasks[id] for id in ids if id in self._tasks]
        ended = set(self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]) if tasks else set()
        for id in [id for id in ids if self._tasks.get(id) in ended]:
            self._end(id)
        return {id: self._state(id) for id in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        known = [id for id in ids if id in self._tasks]
        for id in known:
            with suppress(Exception):  # of a task that has ended
                self._ray.cancel(self._tasks.pop(id), force=True)
        until = time.monotonic() + _LONGEST_END
        for id in known:  # their workers have ended, and the jobs end with them
            while is_held(self._jobs[id].folder) and time.monotonic() < until:
                time.sleep(0.1)

    def close(self) -> None:
        if self._is_ours:
            self._ray.shutdown()

    def _state(self, id: str) -> State:
        if id not in self._tasks:
            return State.ENDED
        return State.RUNNING if (self._jobs[id].folder / LOG).exists() else State.WAITING

    def _end(self, id: str) -> None:
        try:
            self._ray.get(self._tasks.pop(id))
        except Exception as error:  # of Ray, or of what it ran: without a result it says why there is none
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
            note(self._jobs[id].folder, printable(f"Ray: {type(error).__name__}: {reason.strip()}"))


def _run(folder: str) -> None:
    """Run the job of a folder on a node, and end it when this worker ends, be it by SIGKILL."""
    arguments = [sys.executable, "-P", "-m", "surgery.engines.execute", folder, LIFELINE, APART]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout
        child.stdout.read()  # which the process that has left `child` closes at its end


def _needs(job: Job, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what a job is to have; say so where no node has that much now, for a task would wait without a word."""
    most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
    needs = {"CPU": float(job.cpus or 1), "GPU": float(min(1.0, most["GPU"]) if job.gpus is None else job.gpus)}
    for kind, count in needs.items():
        if count > most[kind]:
            _log.warning("no node of the Ray cluster has %g %ss now, but %g at most: waiting for one", count, kind,
                         most[kind])  # fmt: skip
    return needs


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise SettingError(
            "--engine ray: expected Ray to be installed, got none. Install it: pip install 'model-surgery[ray]'."
        ) from error
    return ray


def _connect(ray: Any) -> None:
    """Connect to a cluster, and start none.

    Raises:
        SettingError: there is none, or it does not answer.
    """
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"--engine ray: expected a cluster at RAY_ADDRESS={address}, got none ({reason}). Start one with `ray "
            "start --head`, or set RAY_ADDRESS to its HOST:PORT."
        ) from error


def _reach(address: str) -> None:
    """Connect to an address and hang up: Ray would try for two minutes, and then end this process."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=_LONGEST_CONNECT).close()
