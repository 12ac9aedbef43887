"""What a run makes of trials that end all at once, are lost, or outlive what their engine knows of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
from plain_study import make_plan

from surgery.engines.engine import Engine, State
from surgery.engines.job import LOG, Job, Result, hold
from surgery.exit_codes import INACTIVE
from surgery.study import run
from surgery.study.plan import Plan
from surgery.study.run import StudyRun
from surgery.study.template import Template
from surgery.study.todo import read_results
from surgery.study.trial import Status


class Scripted(Engine):
    """Does to each job, when it is polled, what a test says, and knows no more of it then.

    Args:
        act: given the job, and how many were submitted before it.
    """

    name: ClassVar[str] = "scripted"

    def __init__(self, act) -> None:
        self.act = act
        self.jobs: dict[str, Job] = {}
        self.submissions: list[int] = []
        self.is_closed = False
        self._ids = map(str, itertools.count())

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        ids = [next(self._ids) for _ in jobs]
        self.jobs |= dict(zip(ids, jobs, strict=True))
        self.submissions.append(len(jobs))
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        return {id: self.act(self.jobs[id], int(id)) or State.ENDED for id in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(run, "_POLL", (0.01, 0.01))


def end(job: Job, code: int = 0) -> None:
    (job.folder / LOG).write_text("{'score': 0.5}\n")
    Result(code, 0.0, 1.0, None, "here").write(job.folder)


def test_trials_of_an_idle_arm_that_end_together_are_all_kept(tmp_path):
    template = Template(("sh", "{seed}"))
    plan = Plan(tmp_path / "study", template, tmp_path, ("mixout=0.7",), (), (0, 1, 2), "score")
    told = []
    engine = Scripted(lambda job, _: end(job, 0 if "/plain/" in str(job.folder) else INACTIVE))
    StudyRun(plan, engine, on_progress=told.append).run()
    assert [one.status for one in read_results(plan)] == [Status.DONE, Status.INACTIVE] * 3
    assert [(one.done, one.total) for one in told] == [(number, 6) for number in range(7)]
    assert engine.is_closed


def test_a_lost_trial_of_an_idle_arm_is_not_run_again(tmp_path):
    template = Template(("sh", "{seed}"))
    plan = Plan(tmp_path / "study", template, tmp_path, ("mixout=0.7",), (), (0, 1), "score")

    def act(job, _):
        if "/plain/" in str(job.folder):
            end(job)
        elif job.folder.name == "0":
            end(job, INACTIVE)

    engine = Scripted(act)
    StudyRun(plan, engine).run()
    assert engine.submissions == [4]
    statuses = [one.status for one in read_results(plan)]
    assert statuses == [Status.DONE, Status.INACTIVE, Status.DONE, Status.MISSING]


def test_lost_trials_are_submitted_again_together_and_three_times_at_most(tmp_path):
    plan = make_plan(tmp_path / "study", "true", 4)
    engine = Scripted(lambda job, _: None if job.folder.name in "01" else end(job))
    StudyRun(plan, engine).run()
    assert engine.submissions == [4, 2, 2]
    results = read_results(plan)
    assert [one.status for one in results] == [Status.CRASHED] * 2 + [Status.DONE] * 2
    assert [one.result.code for one in results] == [75, 75, 0, 0]


def test_a_lost_trial_is_run_again_in_an_empty_folder(tmp_path):
    plan = make_plan(tmp_path / "study", "true", 2)

    def act(job, number):
        if number < 2:
            (job.folder / "out/checkpoint").touch()
        else:
            end(job)

    StudyRun(plan, Scripted(act)).run()
    assert not list(plan.folder.rglob("checkpoint"))
    assert [one.status for one in read_results(plan)] == [Status.DONE] * 2


def test_what_outlives_its_engine_is_waited_for(tmp_path):
    plan = make_plan(tmp_path / "study", "true", 2)
    held = {}

    def act(job, number):
        if number not in held:
            held[number] = log = (job.folder / LOG).open("w")
            assert hold(log.fileno())
        elif not held[number].closed:
            held[number].close()
            end(job)

    engine = Scripted(act)
    StudyRun(plan, engine).run()
    assert engine.submissions == [2]
    assert [one.status for one in read_results(plan)] == [Status.DONE] * 2


@pytest.mark.parametrize(("is_remote", "submissions"), [(True, [2]), (False, [2, 2])], ids=["remote", "here"])
def test_a_result_that_shows_late_counts_where_disks_are_slow(tmp_path, monkeypatch, is_remote, submissions):
    monkeypatch.setattr(Scripted, "is_remote", is_remote)
    plan = make_plan(tmp_path / "study", "true", 2)
    looks = itertools.count()
    engine = Scripted(lambda job, _: end(job) if next(looks) >= 6 else None)
    StudyRun(plan, engine).run()
    assert engine.submissions[:2] == submissions


def test_a_run_that_fails_lets_go_of_its_engine(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/file").touch()
    engine = Scripted(lambda job, _: end(job))
    with pytest.raises(Exception, match="expected a new folder"):
        StudyRun(make_plan(tmp_path / "study", "true", 2), engine).run()
    assert engine.is_closed
