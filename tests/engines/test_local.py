"""The engine of this machine, with real processes."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from plain_study import finish, make_job, make_plan, running, scores, shell_jobs, start_study, wait_for

from surgery.engines.engine import State
from surgery.engines.execute import run_job
from surgery.engines.job import LOG, Job, Result, hold, is_held
from surgery.engines.local import LocalEngine, find_gpus
from surgery.errors import SettingError
from surgery.threads import cores

_NVIDIA_SMI = """#!/bin/sh
echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"
echo "GPU 1: NVIDIA H100 (UUID: GPU-2)"
"""
_OVERLAP = "mkdir {folder}/$$; ls {folder} | wc -l; sleep 0.5; rmdir {folder}/$$"
_ENVIRONMENT = "echo $OMP_NUM_THREADS/$CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(_NVIDIA_SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def mark():
    """Words that only the processes of one test have in their command line."""
    return f"mark-{uuid.uuid4().hex}"


def run(engine: LocalEngine, jobs: list[Job]) -> list[str]:
    """Run jobs to their end, and return what they printed."""
    finish(engine, engine.submit(jobs))
    return [(job.folder / LOG).read_text().strip() for job in jobs]


def test_so_many_run_at_once_and_never_more(tmp_path):
    (tmp_path / "now").mkdir()
    counts = run(LocalEngine(3), shell_jobs(tmp_path / "jobs", _OVERLAP.format(folder=tmp_path / "now"), 7))
    assert max(map(int, counts)) == 3


def test_one_runs_at_once_by_default(tmp_path):
    (tmp_path / "now").mkdir()
    counts = run(LocalEngine(), shell_jobs(tmp_path / "jobs", _OVERLAP.format(folder=tmp_path / "now"), 2))
    assert counts == ["1", "1"]


@pytest.mark.parametrize("jobs", [1, 2, 64])
def test_cores_are_shared_out(tmp_path, jobs):
    assert run(LocalEngine(jobs), shell_jobs(tmp_path, _ENVIRONMENT)) == [f"{max(1, cores() // jobs)}/"]


def test_the_users_own_count_of_threads_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run(LocalEngine(2), shell_jobs(tmp_path / "user", _ENVIRONMENT)) == ["5/"]
    assert run(LocalEngine(2), shell_jobs(tmp_path / "asked", _ENVIRONMENT, cpus=3)) == ["3/"]


@pytest.mark.usefixtures("two_gpus")
def test_each_job_has_a_gpu(tmp_path):
    found = run(LocalEngine(), shell_jobs(tmp_path / "jobs", f"sleep 0.3; {_ENVIRONMENT}", 4))
    assert sorted(found) == ["/0", "/0", "/1", "/1"]


@pytest.mark.usefixtures("two_gpus")
def test_jobs_share_gpus_evenly(tmp_path):
    found = run(LocalEngine(4), shell_jobs(tmp_path / "jobs", f"sleep 0.3; {_ENVIRONMENT}", 4))
    assert sorted(found) == ["/0", "/0", "/1", "/1"]


@pytest.mark.usefixtures("two_gpus")
def test_a_job_has_as_many_gpus_as_asked_for(tmp_path):
    assert run(LocalEngine(gpus_each=2), shell_jobs(tmp_path / "two", _ENVIRONMENT, cpus=2)) == ["2/0,1"]
    none = run(LocalEngine(gpus_each=0), shell_jobs(tmp_path / "none", "echo ${CUDA_VISIBLE_DEVICES-unset}."))
    assert none == ["."]


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_those_that_the_variable_names(monkeypatch):
    assert find_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2, 1")
    assert find_gpus() == ["GPU-2", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == []


@pytest.mark.parametrize(("gpus", "asked"), [(["0"], 2), ([], 1)], ids=["too-many", "none-here"])
def test_more_gpus_than_there_are_are_refused(gpus, asked):
    with pytest.raises(SettingError) as refused:
        LocalEngine(gpus=gpus, gpus_each=asked)
    assert str(refused.value) == f"--gpus: expected at most the {len(gpus)} that are here, got {asked}. Take fewer."


@pytest.mark.parametrize(
    ("script", "code", "why"),
    [
        ("exit 0", 0, "exit code 0"),
        ("exit 7", 7, "exit code 7"),
        ("kill -SEGV $$", -signal.SIGSEGV, "ended by SIGSEGV"),
        ("kill -TERM $$", -signal.SIGTERM, "ended by SIGTERM"),
    ],
    ids=["well", "failed", "crashed", "its-own-signal"],
)
def test_how_a_job_ended_is_told(tmp_path, script, code, why):
    jobs = shell_jobs(tmp_path, script)
    run(LocalEngine(), jobs)
    result = Result.read(jobs[0].folder)
    assert (result.code, result.why) == (code, why)


def test_a_program_that_is_not_there_is_named(tmp_path):
    jobs = [make_job(tmp_path / "one", "no-such-program")]
    assert run(LocalEngine(), jobs) == ["no-such-program: No such file or directory"]
    assert Result.read(jobs[0].folder).code == 127


def test_a_working_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    job = Job(tmp_path / "one", ("true",), tmp_path / "gone")
    assert run(LocalEngine(), [job]) == [f"{tmp_path / 'gone'}: No such file or directory"]


def test_peak_memory_and_time_are_measured(tmp_path):
    script = "import time; held = bytearray(200_000_000); time.sleep(0.5)"
    job = make_job(tmp_path / "one", sys.executable, "-c", script)
    run(LocalEngine(), [job])
    result = Result.read(job.folder)
    assert 200e6 < result.peak_memory < 300e6
    assert 0.5 < result.seconds < 10


def test_variables_are_set_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("GONE", "here")
    job = make_job(tmp_path / "one", "sh", "-c", "echo $MINE/$GONE", variables={"MINE": "a b"}, removed=("GONE",))
    assert run(LocalEngine(), [job]) == ["a b/"]


def test_cancellation_ends_all_that_a_job_has_started(tmp_path, mark):
    script = f"sh -c 'sleep 600; : {mark}' & sh -c 'trap : TERM; sleep 600; : {mark}' & wait; : {mark}"
    engine, jobs = LocalEngine(), shell_jobs(tmp_path, script, 2)
    ids = engine.submit(jobs)
    wait_for(lambda: len(running(mark)) >= 3)
    assert engine.poll(ids) == {ids[0]: State.RUNNING, ids[1]: State.WAITING}
    engine.cancel(ids)
    assert set(engine.poll(ids).values()) == {State.ENDED}
    assert not running(mark)
    assert [Result.read(job.folder) for job in jobs] == [None, None]


def test_what_does_not_heed_sigterm_is_killed(tmp_path, mark):
    engine = LocalEngine()
    ids = engine.submit(shell_jobs(tmp_path, f"trap '' TERM; while :; do sleep 1; done; : {mark}"))
    wait_for(lambda: running(f"done; : {mark}"))
    engine.cancel(ids)
    assert not running(mark)


def test_what_a_job_leaves_behind_ends_with_it(tmp_path, mark):
    jobs = shell_jobs(tmp_path, f"sh -c 'sleep 600; : {mark}' & true")
    run(LocalEngine(), jobs)
    wait_for(lambda: not running(mark), 5)
    assert Result.read(jobs[0].folder).code == 0


def test_jobs_end_with_the_process_that_submitted_them(tmp_path, mark):
    script = f"sleep 600; : {mark}"
    plan = make_plan(tmp_path / "study", script, 2)
    study = start_study(plan, "local")
    wait_for(lambda: running(f"sleep 600; : {mark}; echo"))
    study.kill()
    study.wait()
    wait_for(lambda: not running(mark), 10)
    assert not list(plan.folder.rglob("result.json"))


def test_a_study_whose_engine_process_was_killed_runs_its_trial_again(tmp_path):
    script = 'mkdir -p "$1/../../../seen"; if mkdir "$1/../../../seen/$2"; then kill -KILL $PPID; fi'
    plan = make_plan(tmp_path / "study", script, 2)
    assert start_study(plan, "local").wait(60) == 0
    assert scores(plan) == [0.0, 0.1]


def test_a_job_that_has_ended_is_not_run_again(tmp_path):
    (job,) = shell_jobs(tmp_path / "jobs", f"echo x >> {tmp_path / 'runs'}")
    assert [run_job(job.folder), run_job(job.folder)] == [0, 0]
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_job_that_another_process_runs_is_left_alone(tmp_path):
    (job,) = shell_jobs(tmp_path, "echo again")
    with (job.folder / LOG).open("w") as log:
        log.write("first\n")
        log.flush()
        assert hold(log.fileno())
        assert is_held(job.folder)
        assert run_job(job.folder) == 75
    assert (job.folder / LOG).read_text() == "first\n"
    assert Result.read(job.folder) is None


def test_modules_in_the_working_folder_are_not_ours(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    jobs = shell_jobs(tmp_path / "jobs", "echo well")
    assert run(LocalEngine(), jobs) == ["well"]


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -TERM $$", 143)], ids=["code", "signal"])
def test_a_line_of_another_scheduler_ends_as_its_job(tmp_path, script, code):
    (job,) = shell_jobs(tmp_path, script)
    line = [sys.executable, "-P", "-m", "surgery.engines.execute", str(job.folder)]
    assert subprocess.run(line, stdin=subprocess.DEVNULL, check=False, timeout=60).returncode == code
    assert json.loads((job.folder / "result.json").read_text())["code"] in (code, 128 - code)
