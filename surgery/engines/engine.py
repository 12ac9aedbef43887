"""The interface of an engine: submit jobs, poll them, cancel them. What a job did is read from its folder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import ClassVar

from surgery.engines.job import Job


class State(Enum):
    """What an engine knows of a job.

    ENDED says only that it is over. Whether it was run to its end, its folder tells: without a result it was lost, with
    its machine or by a cancellation.
    """

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Engine(ABC):
    """Runs jobs somewhere, as many at once as there is room for.

    Attributes:
        name: what --engine calls it.
        is_detached: jobs go on when the process that submitted them is gone, and are found again by their ids.
        is_remote: jobs run on other machines, whose files may take a while to show on this one.
    """

    name: ClassVar[str]
    is_detached: ClassVar[bool] = False
    is_remote: ClassVar[bool] = False

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand in jobs, whose job.json is written, and return an id for each."""

    @abstractmethod
    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """Return the state of jobs, and let go on what is waiting. An unknown id is ENDED."""

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, with all processes that they started, and return when they have ended or cannot be reached."""

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Let go of what the engine holds beside its jobs."""
