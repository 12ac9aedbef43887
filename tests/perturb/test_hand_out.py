"""Shards that are handed out to an engine, here one of this machine: the bytes of one process, come what may."""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from checkpoints import tree_digest, write_json, write_sharded
from safetensors.numpy import load_file, save_file

from surgery import materialize_checkpoint, perturb_checkpoint, verify_checkpoint
from surgery.engines import registry
from surgery.engines.engine import State
from surgery.engines.inside import run_inside
from surgery.engines.job import LOG, Job, Result, is_held
from surgery.engines.local import LocalEngine
from surgery.errors import OutputError, SourceError
from surgery.noisytune import NoisyTune
from surgery.perturb import hand_out, task
from surgery.perturb.hand_out import grouped
from surgery.perturb.plan import Plan, make_plan
from surgery.perturb.run_task import run_task
from surgery.perturb.shared import FINISHED, Records
from surgery.perturb.task import Task
from surgery.perturb.tasks import GlobalMoments, with_ties

SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


class InThreads(LocalEngine):
    """Runs the functions of jobs in this process, as Ray's warm workers do; a test may lose some."""

    def __init__(self, loses: Callable[[int], bool] = lambda _: False) -> None:
        super().__init__()
        self.jobs: list[Job] = []
        self._loses = loses

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        self.jobs += jobs
        return [str(job.folder) for job in jobs]

    def poll(self, ids: Sequence[str]) -> dict[str, State]:
        for id in ids:
            if not self._loses([str(job.folder) for job in self.jobs].index(id)):
                run_inside(id)
        return dict.fromkeys(ids, State.ENDED)

    def cancel(self, ids: Sequence[str]) -> None:
        """Nothing goes on by itself."""


@pytest.fixture(autouse=True)
def a_task_for_each_shard(monkeypatch):
    monkeypatch.setattr(hand_out, "_LEAST", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards, of which two hold one table."""
    folder = tmp_path / "source"
    write_sharded(folder)
    table = np.random.default_rng(7).standard_normal((32, 16)).astype(np.float32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, shard in (("embed.weight", SHARDS[0]), ("head.weight", SHARDS[2])):
        save_file(load_file(folder / shard) | {name: table}, folder / shard, metadata={"format": "pt"})
        index["weight_map"][name] = shard
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", {"model_type": "bert"})
    return folder


@pytest.fixture
def engine(monkeypatch) -> Callable[[LocalEngine], str]:
    """Have `engine="slurm"` mean another engine."""

    def use(made: LocalEngine) -> str:
        monkeypatch.setattr(registry, "open_engine", lambda *_, **__: made)
        return "slurm"

    return use


# -- the bytes of one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"scale": "global"}, {"recipe_only": True}], ids=["matrix", "global", "recipe"]
)
def test_tasks_end_in_the_bytes_of_one_process(source, tmp_path, engine, settings):
    perturb_checkpoint(source, tmp_path / "whole", **settings)
    used = InThreads()
    perturb_checkpoint(source, tmp_path / "out", engine=engine(used), **settings)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert len(used.jobs) == (6 if "scale" in settings else 3)


def test_tasks_of_other_processes_do_too(source, tmp_path, engine):
    perturb_checkpoint(source, tmp_path / "whole")
    perturb_checkpoint(source, tmp_path / "out", engine=engine(LocalEngine(2)), workers=2)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_tasks_materialize(source, tmp_path, engine, scale):
    perturb_checkpoint(source, tmp_path / "whole", scale=scale)
    materialize_checkpoint(tmp_path / "whole", tmp_path / "out", engine=engine(InThreads()))
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize("scale", ["matrix", "global"])
@pytest.mark.parametrize("is_altered", [False, True], ids=["equal", "altered"])
def test_tasks_verify(source, tmp_path, engine, scale, is_altered, monkeypatch):
    perturb_checkpoint(source, tmp_path / "out", scale=scale)
    if is_altered:
        tensors = load_file(tmp_path / "out" / SHARDS[1])
        save_file({name: w + 1 for name, w in tensors.items()}, tmp_path / "out" / SHARDS[1])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = verify_checkpoint(tmp_path / "out", engine=engine(InThreads()))
    assert found == verify_checkpoint(tmp_path / "out")
    assert found.is_equal is not is_altered
    assert not list((tmp_path / "here").iterdir())


def test_tasks_read_a_store(source, tmp_path, engine):
    for path in source.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    url = f"memory://{tmp_path.name}"
    perturb_checkpoint(url, tmp_path / "whole")
    used = engine(InThreads())
    perturb_checkpoint(url, tmp_path / "out", engine=used)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert verify_checkpoint(tmp_path / "out", engine=used).is_equal


def test_a_store_to_write_to_is_refused(source, tmp_path, run_here):
    for option, value in (("--engine", "ray"), ("--array", "0/2")):
        ran = run_here("perturb", source, "-o", f"memory://{tmp_path.name}/out", option, value)
        assert ran.err == (
            f"error: {option}: expected -o on a disk that all machines see, got memory://{tmp_path.name}/out. Write it "
            f"there, or leave {option} out.\n"
        )


# -- what is lost -----------------------------------------------------------------------------------------------------


def test_what_is_lost_is_done_again(source, tmp_path, engine, caplog):
    perturb_checkpoint(source, tmp_path / "whole")
    used = InThreads(loses=lambda number: number == 1)
    perturb_checkpoint(source, tmp_path / "out", engine=engine(used))
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert len(used.jobs) == 4
    assert caplog.messages == [f"{SHARDS[1]}: lost with its task (no word of it): doing it again"]


def test_what_is_lost_over_and_over_is_an_error(source, tmp_path, engine, monkeypatch):
    monkeypatch.setattr(hand_out, "_PAUSES", (0.0, 0.01, 0.02))
    used = InThreads(loses=lambda number: number > 1)
    with pytest.raises(OutputError) as refused:
        perturb_checkpoint(source, tmp_path / "out", engine=engine(used))
    assert str(refused.value) == (
        f"{SHARDS[2]}: expected a task to end, got it lost 4 times: no word of it. Check the machines, and run the "
        "same command again."
    )
    perturb_checkpoint(source, tmp_path / "whole")
    used = InThreads()
    perturb_checkpoint(source, tmp_path / "out", engine=engine(used))
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert len(used.jobs) == 1


def test_a_record_without_its_shard_is_no_finished_one(source, tmp_path, engine, monkeypatch):
    """As a node leaves it that goes down between the two."""
    perturb_checkpoint(source, tmp_path / "whole")
    give_name = task.SharedFolder._give_name

    def lose(*_: object) -> None:
        monkeypatch.setattr(task.SharedFolder, "_give_name", give_name)

    monkeypatch.setattr(task.SharedFolder, "_give_name", lose)
    used = InThreads()
    perturb_checkpoint(source, tmp_path / "out", engine=engine(used))
    assert len(used.jobs) == 4
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_a_driver_that_is_interrupted_goes_on(source, tmp_path, engine):
    perturb_checkpoint(source, tmp_path / "whole")

    def interrupt(number: int) -> bool:
        if number == 1:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        perturb_checkpoint(source, tmp_path / "out", engine=engine(InThreads(interrupt)))
    before = (tmp_path / "out" / SHARDS[0]).stat().st_ino
    used = InThreads()
    perturb_checkpoint(source, tmp_path / "out", engine=engine(used))
    assert len(used.jobs) == 2
    assert (tmp_path / "out" / SHARDS[0]).stat().st_ino == before
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_jobs_of_a_former_driver_are_ended(source, tmp_path, engine, monkeypatch):
    ended: list[str] = []
    monkeypatch.setattr(InThreads, "is_detached", True)
    monkeypatch.setattr(InThreads, "cancel", lambda _, ids: ended.extend(ids))
    monkeypatch.setattr(InThreads, "poll", lambda *_: 1 / 0)  # the driver dies
    with pytest.raises(ZeroDivisionError):
        perturb_checkpoint(source, tmp_path / "out", engine=engine(used := InThreads()))
    monkeypatch.undo()
    monkeypatch.setattr(hand_out, "_LEAST", 1)
    monkeypatch.setattr(InThreads, "is_detached", True)
    again: list[list[str]] = []
    monkeypatch.setattr(InThreads, "cancel", lambda _, ids: again.append(list(ids)))
    monkeypatch.setattr(registry, "open_engine", lambda *_, **__: InThreads())
    perturb_checkpoint(source, tmp_path / "out", engine="slurm")
    assert again[0] == [str(job.folder) for job in used.jobs]


# -- what a task says -------------------------------------------------------------------------------------------------


def test_an_error_of_a_task_is_the_drivers(source, tmp_path, engine):
    tensors = load_file(source / SHARDS[1])
    tensors["layer.2.weight"][0, 0] = np.nan
    save_file(tensors, source / SHARDS[1], metadata={"format": "pt"})
    with pytest.raises(SourceError) as here:
        perturb_checkpoint(source, tmp_path / "here")
    with pytest.raises(SourceError) as there:
        perturb_checkpoint(source, tmp_path / "out", engine=engine(InThreads()))
    assert str(there.value) == str(here.value)
    assert (tmp_path / "out/surgery.unfinished.json").exists()


def test_a_source_that_is_not_the_recipes_is_refused(source, tmp_path, engine):
    perturb_checkpoint(source, tmp_path / "whole")
    data = bytearray((source / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (source / SHARDS[1]).write_bytes(data)
    with pytest.raises(SourceError, match="expected the recipe's source"):
        materialize_checkpoint(tmp_path / "whole", tmp_path / "out", engine=engine(InThreads()))
    assert not (tmp_path / "out" / SHARDS[1]).exists()


def test_what_a_task_did_not_expect_is_its_last_line(source, tmp_path, engine, monkeypatch):
    monkeypatch.setattr(task.Task, "run", lambda _: 1 / 0)
    with pytest.raises(OutputError, match="expected a task to end, got: ZeroDivisionError: division by zero"):
        perturb_checkpoint(source, tmp_path / "out", engine=engine(InThreads()))


def test_what_tasks_warn_of_is_told_once(source, tmp_path, engine, monkeypatch, caplog):
    run = task.Task.run
    monkeypatch.setattr(task.Task, "run", lambda self: (print("kernels: slow"), run(self)))
    perturb_checkpoint(source, tmp_path / "out", engine=engine(InThreads()))
    assert caplog.messages == ["kernels: slow"]


def plan_of(source: Path, out: Path) -> Plan:
    return with_ties(make_plan(source, out, NoisyTune()))


def write_task(source: Path, tmp_path: Path) -> Path:
    records = Records(tmp_path / "records")
    records.prepare()
    Task(FINISHED, plan_of(source, tmp_path / "out"), GlobalMoments(), None, records.folder, 2).job(tmp_path / "task")
    return tmp_path / "task"


def test_a_task_of_another_version_is_refused(source, tmp_path, monkeypatch, capsys):
    folder = write_task(source, tmp_path)
    monkeypatch.setattr(task, "version", lambda _: "9.9")
    monkeypatch.setattr(pickle, "load", None)  # not even looked at
    assert run_task(folder) == 78
    assert capsys.readouterr().err == (
        f"{os.uname().nodename}: expected model-surgery 0.1.0, which hands out the shards, got 9.9. Install one "
        "version on all machines.\n"
    )


def test_a_task_that_others_could_have_written_is_refused(source, tmp_path, monkeypatch):
    folder = write_task(source, tmp_path)
    (folder / "task.pickle").chmod(0o620)
    monkeypatch.setattr(pickle, "load", None)
    with pytest.raises(OutputError, match="expected a file that this user alone can write, got another"):
        Task.read(folder)


def test_a_task_knows_no_more_than_its_shards(source, tmp_path):
    recipe = perturb_checkpoint(source, tmp_path / "out")
    plan = replace(plan_of(source, tmp_path / "out"), recorded=recipe)
    part = Task(FINISHED, plan, GlobalMoments(), None, tmp_path, 2).of(plan.shards[1:2]).plan
    assert [file.name for file in part.recorded.files] == [shard.name for shard in part.shards] == [SHARDS[1]]
    assert not part.indexes
    assert pickle.loads(pickle.dumps(part)) == part


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([10_000_000] * 64, [14, 14, 14, 14, 8]),
        ([5_000_000_000] * 200, [1] * 200),
        ([1_000] * 3, [3]),
        ([2_000_000_000, 1_000, 1_000, 200_000_000], [1, 3]),
        ([100_000_000] * 100, [7] * 14 + [2]),
        ([], []),
    ],
    ids=["small", "large", "tiny", "mixed", "many", "none"],
)
def test_small_shards_share_a_task(monkeypatch, sizes, groups):
    monkeypatch.undo()
    assert [len(group) for group in grouped([SimpleNamespace(nbytes=size) for size in sizes])] == groups


# -- the function of a job --------------------------------------------------------------------------------------------


def test_a_function_is_run_as_a_command_is(tmp_path, monkeypatch):
    def work(folder: Path) -> int:
        print("at it")
        assert is_held(folder)
        return 7

    monkeypatch.setattr(hand_out, "work", work, raising=False)
    Job(tmp_path, ("true",), tmp_path, function="surgery.perturb.hand_out:work").write()
    run_inside(tmp_path)
    assert (tmp_path / LOG).read_text() == "at it\n"
    assert Result.read(tmp_path).code == 7
    assert not is_held(tmp_path)
