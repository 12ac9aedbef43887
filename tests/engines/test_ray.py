"""The engine of Ray, on a real cluster of two nodes on this machine."""

import socket
import subprocess
import uuid

import psutil
import pytest
from plain_study import finish, make_plan, running, scores, shell_jobs, start_study, wait_for

from surgery.engines.engine import State
from surgery.engines.job import LOG, Job, Result
from surgery.engines.ray import _needs
from surgery.engines.registry import open_engine
from surgery.errors import SettingError

pytest.importorskip("ray", reason="Ray is not installed: make test-engines")


@pytest.fixture
def engine(cluster_of_ray, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", cluster_of_ray.address)
    made = open_engine("ray", logs=tmp_path)
    yield made
    made.close()


@pytest.fixture
def mark():
    return f"mark-{uuid.uuid4().hex}"


def test_jobs_run_on_all_nodes_at_once(engine, tmp_path):
    script = f"mkdir {tmp_path}/now/$$; sleep 1; ls {tmp_path}/now | wc -l; sleep 1; rmdir {tmp_path}/now/$$"
    (tmp_path / "now").mkdir()
    jobs = shell_jobs(tmp_path / "jobs", f"{script}", 3)
    ids = engine.submit(jobs)
    wait_for(lambda: list(engine.poll(ids).values()).count(State.RUNNING) == 2)
    assert list(engine.poll(ids).values()).count(State.WAITING) == 1
    finish(engine, ids)
    counts = [(job.folder / LOG).read_text().split()[0] for job in jobs]
    assert max(map(int, counts)) == 2
    assert [Result.read(job.folder).code for job in jobs] == [0, 0, 0]


def test_cancellation_ends_all_that_a_job_has_started(engine, tmp_path, mark):
    script = f"sh -c 'sleep 600; : {mark}' & sleep 600; : {mark}"
    jobs = shell_jobs(tmp_path, script, 3)
    ids = engine.submit(jobs)
    wait_for(lambda: len(running(mark)) >= 4)
    engine.cancel(ids)
    assert not running(mark)
    assert set(engine.poll(ids).values()) == {State.ENDED}
    assert [Result.read(job.folder) for job in jobs] == [None] * 3


def test_a_job_has_the_cores_that_it_needs(engine, tmp_path, caplog):
    ids = engine.submit(shell_jobs(tmp_path, "true", cpus=2))
    assert "no node of the Ray cluster has 2 CPUs now, but 1 at most: waiting for one" in caplog.text
    assert set(engine.poll(ids).values()) == {State.WAITING}
    engine.cancel(ids)


@pytest.mark.parametrize(
    ("node", "asked", "needs"),
    [
        ({"CPU": 8.0, "GPU": 4.0}, {}, {"CPU": 1.0, "GPU": 1.0}),
        ({"CPU": 8.0, "GPU": 4.0}, {"cpus": 3, "gpus": 0}, {"CPU": 3.0, "GPU": 0.0}),
        ({"CPU": 8.0, "GPU": 4.0}, {"gpus": 2}, {"CPU": 1.0, "GPU": 2.0}),
        ({"CPU": 8.0}, {}, {"CPU": 1.0, "GPU": 0.0}),
    ],
    ids=["a-gpu-by-default", "none", "two", "none-there"],
)
def test_what_a_job_is_given(tmp_path, node, asked, needs):
    assert _needs(Job(tmp_path, ("true",), tmp_path, **asked), [node]) == needs


def test_a_study_runs_a_lost_nodes_trial_again(cluster_of_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster_of_ray.address)
    begun, go = tmp_path / "begun", tmp_path / "go"
    plan = make_plan(tmp_path / "study", f"echo $2 >> {begun}; until test -e {go}; do sleep 0.1; done", 2)
    study = start_study(plan, "ray")
    try:
        wait_for(lambda: begun.exists() and begun.read_text().split() in (["0", "1"], ["1", "0"]), 60)
        cluster_of_ray.tell("remove")
        cluster_of_ray.tell("add")
        wait_for(lambda: len(begun.read_text().split()) == 3, 60)
        go.touch()
        assert study.wait(60) == 0
    finally:
        study.kill()
        study.wait()
    assert scores(plan) == [0.0, 0.1]


def test_why_a_trial_was_lost_is_told(engine, tmp_path):
    """Ray's own reason, here of a worker that was killed, is the last line of the log."""
    (job,) = shell_jobs(tmp_path / "lost", "sleep 600")
    (id,) = engine.submit([job])
    wait_for((job.folder / LOG).exists)
    (worker,) = [each for each in psutil.process_iter() if each.name().startswith("ray::surgery")]
    worker.kill()
    finish(engine, [id])
    assert Result.read(job.folder) is None
    assert (job.folder / LOG).read_text().splitlines()[-1].startswith("Ray: WorkerCrashedError: ")


def test_a_study_that_is_killed_takes_its_jobs_with_it(cluster_of_ray, tmp_path, monkeypatch, mark):
    monkeypatch.setenv("RAY_ADDRESS", cluster_of_ray.address)
    plan = make_plan(tmp_path / "study", f"sleep 600; : {mark}", 2)
    study = start_study(plan, "ray")
    wait_for(lambda: len(running(f"sleep 600; : {mark}; echo")) >= 2, 60)
    study.kill()
    study.wait()
    wait_for(lambda: not running(mark), 30)
    assert scores(plan) == [None, None]


def test_ray_says_nothing_on_the_terminal(cluster_of_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster_of_ray.address)
    plan = make_plan(tmp_path / "study", "echo well", 2)
    study = start_study(plan, "ray", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = study.communicate(timeout=120)
    assert (study.returncode, said) == (0, b"")
    assert scores(plan) == [0.0, 0.1]


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SettingError) as refused:
            open_engine("ray", logs=tmp_path)
    assert str(refused.value) == (
        f"--engine ray: expected a cluster at RAY_ADDRESS={address}, got none ([Errno 111] Connection refused). Start "
        "one with `ray start --head`, or set RAY_ADDRESS to its HOST:PORT."
    )
