"""The engines by the names that --engine calls them; each is imported when it is asked for."""

from pathlib import Path

from surgery.engines import ENGINES
from surgery.engines.engine import Engine
from surgery.errors import SettingError


def open_engine(
    name: str = "local",
    *,
    logs: Path,
    jobs: int | None = None,
    gpus: int | None = None,
) -> Engine:
    """Make an engine.

    Args:
        name: one of ENGINES.
        logs: a folder for what the engine itself writes; every node sees it.
        jobs: how many at once; None: as there is room for.
        gpus: how many each job is to have; None: the engine's default.

    Raises:
        SettingError: it is not installed, not reachable, or cannot do what is asked.
    """
    if name == "local":
        from surgery.engines.local import LocalEngine

        return LocalEngine(jobs, gpus_each=gpus)
    if name == "ray":
        from surgery.engines.ray import RayEngine

        if jobs is not None:
            raise SettingError(
                "--jobs: expected it with --engine local or slurm, got --engine ray, which runs as many at once as the "
                "cluster has room for. Say what each needs with --cpus and --gpus."
            )
        return RayEngine()
    if name == "slurm":
        from surgery.engines.slurm import SlurmEngine

        return SlurmEngine(logs, jobs=jobs)
    raise SettingError(f"--engine: expected {', '.join(ENGINES)}, got {name!r}. Choose one of them.")
