"""The engine of Slurm, on a real controller with two nodes on this machine."""

import json
import os
import re
import subprocess
import uuid

import pytest
from plain_study import finish, make_plan, running, scores, shell_jobs, start_study, wait_for
from slurm_cluster import CannotStartError, free_ports, slurm_cluster

from surgery.engines.engine import State
from surgery.engines.job import LOG, Job, Result
from surgery.engines.registry import open_engine
from surgery.engines.slurm import SlurmEngine, _split
from surgery.errors import OutputError, SettingError

pytest.importorskip("submitit", reason="submitit is not installed: make test-engines")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
            yield started
    except CannotStartError as error:
        pytest.skip(f"no Slurm here: {error}")


@pytest.fixture(autouse=True)
def here(cluster, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    cluster.output("scancel", "--quiet", f"--user={os.getuid()}")
    wait_for(lambda: not cluster.output("squeue", "-h").strip())


@pytest.fixture
def engine(tmp_path):
    return open_engine("slurm", logs=tmp_path / ".slurm")


@pytest.fixture
def silent_controller(cluster, tmp_path):
    """A configuration whose controller is down."""
    text = (cluster.folder / "slurm.conf").read_text()
    path = tmp_path / "slurm.conf"
    path.write_text(re.sub(r"(?m)^SlurmctldPort=.*", f"SlurmctldPort={free_ports(1)[0]}", text))
    return str(path)


@pytest.fixture
def mark():
    return f"mark-{uuid.uuid4().hex}"


def printed(jobs: list[Job]) -> list[list[str]]:
    return [(job.folder / LOG).read_text().split() for job in jobs]


def test_jobs_are_an_array_on_both_nodes(engine, tmp_path):
    script = "sleep 1; echo $SLURM_ARRAY_TASK_ID $SLURMD_NODENAME $OMP_NUM_THREADS"
    jobs = shell_jobs(tmp_path / "jobs", script, 3, cpus=2)
    ids = engine.submit(jobs)
    first = ids[0].partition("_")[0]
    assert ids == [f"{first}_{number}" for number in range(3)]
    assert set(engine.poll(ids).values()) <= {State.WAITING, State.RUNNING}
    finish(engine, ids)
    found = printed(jobs)
    assert [words[0] for words in found] == ["0", "1", "2"]
    assert {words[1] for words in found} == {"n1", "n2"}
    assert [words[2] for words in found] == ["2", "2", "2"]
    assert [Result.read(job.folder).code for job in jobs] == [0, 0, 0]


def test_a_job_alone_is_no_array(engine, tmp_path):
    jobs = shell_jobs(tmp_path / "jobs", "echo ${OMP_NUM_THREADS-unset}; exit 7")
    ids = engine.submit(jobs)
    assert ids[0].isdigit()
    finish(engine, ids)
    assert printed(jobs) == [["unset"]]
    assert Result.read(jobs[0].folder).code == 7


def test_so_many_run_at_once(tmp_path):
    engine = open_engine("slurm", logs=tmp_path / ".slurm", jobs=1)
    (tmp_path / "now").mkdir()
    script = "mkdir {0}/$$; ls {0} | wc -l; sleep 0.5; rmdir {0}/$$".format(tmp_path / "now")
    jobs = shell_jobs(tmp_path / "jobs", script, 3)
    finish(engine, engine.submit(jobs))
    assert printed(jobs) == [["1"]] * 3


def test_no_time_limit_is_asked_for_but_the_users_own(engine, tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "7")
    limited = engine.submit(shell_jobs(tmp_path / "limited", "sleep 600"))
    monkeypatch.delenv("SBATCH_TIMELIMIT")
    free = engine.submit(shell_jobs(tmp_path / "free", "sleep 600"))
    shown = [cluster.output("squeue", "-h", "-o", "%l", "-j", ids[0]).strip() for ids in (limited, free)]
    assert shown == ["7:00", "UNLIMITED"]


def test_a_job_that_slurm_lost_is_told_in_its_log(engine, tmp_path, cluster):
    (job,) = shell_jobs(tmp_path / "jobs", "sleep 600")
    (id,) = engine.submit([job])
    wait_for((job.folder / LOG).exists)
    cluster.output("scancel", id)
    finish(engine, [id])
    assert Result.read(job.folder) is None
    assert (job.folder / LOG).read_text() == f"Slurm: job {id} ended as CANCELLED\n"


def test_cancellation_ends_all_that_jobs_have_started(engine, tmp_path, mark):
    script = f"sh -c 'sleep 600; : {mark}' & trap '' TERM; sleep 600; sleep 600; : {mark}"
    jobs = shell_jobs(tmp_path / "jobs", script, 5)
    ids = engine.submit(jobs)
    wait_for(lambda: len(running(mark)) >= 8)
    engine.cancel(ids)
    assert not running(mark)
    assert set(engine.poll(ids).values()) == {State.ENDED}
    assert [Result.read(job.folder) for job in jobs] == [None] * 5


def test_the_states_of_all_jobs_are_one_question(engine, tmp_path, monkeypatch):
    ids = engine.submit(shell_jobs(tmp_path / "jobs", "true", 4))
    asked = []
    run = subprocess.run

    def count(command, **settings):
        asked.append(command[0])
        return run(command, **settings)

    monkeypatch.setattr(subprocess, "run", count)
    assert set(engine.poll([*ids, "999999", "1_99"])) == {*ids, "999999", "1_99"}
    assert asked == ["squeue"]
    assert engine.poll(["999999"]) == {"999999": State.ENDED}


def test_a_controller_that_does_not_answer_ends_no_job(engine, tmp_path, silent_controller, monkeypatch, caplog):
    ids = engine.submit(shell_jobs(tmp_path / "jobs", "sleep 600"))
    monkeypatch.setenv("SLURM_CONF", silent_controller)
    assert [engine.poll(ids) for _ in range(2)] == [{ids[0]: State.WAITING}] * 2
    assert caplog.messages == [
        "Slurm's controller does not answer (slurm_load_jobs error: Unable to contact slurm controller (connect "
        "failure)): waiting for it"
    ]


def test_what_slurm_refuses_is_one_line(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    with pytest.raises(OutputError) as refused:
        engine.submit(shell_jobs(tmp_path / "jobs", "true", 2))
    assert str(refused.value) == (
        "sbatch: expected it to take the jobs, got: Batch job submission failed: Invalid partition name specified. "
        "Change --cpus or --gpus, or set sbatch's variables, such as SBATCH_PARTITION."
    )


@pytest.mark.parametrize("missing", ["sbatch", "controller"])
def test_a_slurm_that_is_not_there_is_one_line(tmp_path, silent_controller, monkeypatch, missing):
    if missing == "sbatch":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_CONF", silent_controller)
    with pytest.raises(SettingError) as refused:
        SlurmEngine(tmp_path)
    expected = {
        "sbatch": "--engine slurm: expected Slurm's sbatch on PATH, got none. Run this where jobs are submitted.",
        "controller": "--engine slurm: expected a controller that answers, got none (slurm_load_jobs error: "
        "Unable to contact slurm controller (connect failure)). Check `sinfo`.",
    }
    assert str(refused.value) == expected[missing]


def test_arrays_are_no_larger_than_slurm_takes(tmp_path):
    jobs = [Job(tmp_path / str(n), ("true",), tmp_path, gpus=n % 2 or None) for n in range(7)]
    assert [[int(job.folder.name) for job in array] for array in _split(jobs, 3)] == [[0, 2, 4], [6], [1, 3, 5]]


def test_a_study_that_was_killed_finds_its_jobs_again(cluster, tmp_path):
    begun, go = tmp_path / "begun", tmp_path / "go"
    plan = make_plan(tmp_path / "study", f"echo $2 >> {begun}; until test -e {go}; do sleep 0.1; done", 5)
    study = start_study(plan, "slurm")
    # all are recorded, four run, one waits for a core
    wait_for(lambda: len(list(plan.folder.rglob("trial.json"))) == 5, 60)
    wait_for(lambda: begun.exists() and len(begun.read_text().split()) == 4, 60)
    study.kill()
    study.wait()
    before = [json.loads((trial.folder / "trial.json").read_text())["job"] for trial in plan.trials()]
    assert len(cluster.output("squeue", "-h", "--array").splitlines()) == 5
    again = start_study(plan, "slurm")
    go.touch()
    assert again.wait(90) == 0
    assert scores(plan) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert sorted(begun.read_text().split()) == ["0", "1", "2", "3", "4"]
    assert [json.loads((trial.folder / "trial.json").read_text())["job"] for trial in plan.trials()] == before


def test_a_study_runs_a_lost_nodes_trials_again(cluster, tmp_path):
    begun, go = tmp_path / "begun", tmp_path / "go"
    plan = make_plan(tmp_path / "study", f"echo $2 >> {begun}; until test -e {go}; do sleep 0.1; done", 4)
    study = start_study(plan, "slurm")
    try:
        wait_for(lambda: begun.exists() and len(begun.read_text().split()) == 4, 60)
        cluster.kill_node("n2")
        wait_for(lambda: "down" in cluster.output("sinfo", "-h", "-N", "-n", "n2", "-o", "%t"), 60)
        cluster.start_node("n2")
        wait_for(lambda: len(begun.read_text().split()) == 6, 60)
        go.touch()
        assert study.wait(60) == 0
    finally:
        study.kill()
        study.wait()
    assert scores(plan) == [0.0, 0.1, 0.2, 0.3]
