"""Studies as a run leaves them in a folder, of seeded scores: nothing is trained."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.engines.job import LOG, Result
from surgery.escapes import shell_join
from surgery.exit_codes import INACTIVE
from surgery.report.study.files import write_files
from surgery.report.study.rows import rows
from surgery.study.arms import make_arms
from surgery.study.collect import Study, collect
from surgery.study.command import make_job
from surgery.study.plan import Plan
from surgery.study.template import Template
from surgery.study.trial import REPORT, SCORE, Status, Trial

WORDS = ("python", "train.py", "--seed", "{seed}", "--output_dir", "{out}")
ENVIRONMENT = {
    "python": "3.11.2",
    "versions": {"model-surgery": "0.1.0", "torch": "2.13.0"},
    "platform": "Linux-6.1-x86_64",
    "processor": "A Processor",
    "cores": 8,
    "gpus": ["NVIDIA H100, 81559 MiB, 570.1"],
    "script": {"file": "train.py", "commit": "c0ffee" * 6 + "c0ff", "is_edited": True},
}
REASON = "mixout: no layer with dropout before it"
HOSTILE = "<script>alert(1)</script>&\"'\x1b[31mred\x1b[0m\u202e</pre></details>"
Score = float | Status
"""Of a trial: its metric, or how it ends without one."""


def make_study(
    folder: Path,
    scores: Mapping[str, Sequence[Score]],
    *,
    sweeps: Sequence[str] = (),
    metric: str = "eval_accuracy",
    words: Sequence[str] = WORDS,
    log: Callable[[Trial], str] = lambda trial: f"epoch 1\nseed {trial.seed} of {trial.arm.name} is done\n",
    **plan: Any,
) -> Study:
    """Write a study to a new folder, and read it.

    Args:
        scores: of each arm, plain first, seed by seed.
        sweeps: that make those arms which `scores` has beside them.
    """
    folder.mkdir(parents=True)
    seeds = tuple(range(max(map(len, scores.values()))))
    swept = {arm.name for arm in make_arms((), sweeps)} if sweeps else set()
    arms = tuple(name for name in scores if name != "plain" and name not in swept)
    made = Plan(folder, Template(tuple(words)), Path("/home/me"), arms, tuple(sweeps), seeds, metric, **plan)
    made.write()
    for trial in made.trials():
        of_arm = scores[trial.arm.name]
        write_trial(made, trial, of_arm[trial.seed] if trial.seed < len(of_arm) else Status.MISSING, log(trial))
    return collect(made)


def write_trial(plan: Plan, trial: Trial, score: Score, log: str) -> None:
    """Write what a trial leaves: job, environment, log, report, result, score."""
    if score is Status.MISSING:
        return
    trial.clear()
    job = make_job(trial, plan.template, plan.cwd)
    job.write()
    filled = plan.template.fill(trial.seed, trial.out)
    about = {
        "arm": trial.arm.name,
        "seed": trial.seed,
        "command": shell_join(filled.words),
        "run": shell_join(job.command),
    }
    about |= {"variables": dict(filled.variables), "cwd": str(plan.cwd), "engine": "local", "job": "1"}
    trial.write(about | {"environment": ENVIRONMENT})
    if score is Status.SUBMITTED:
        return
    (trial.folder / LOG).write_text(log, encoding="utf-8")
    if trial.arm.options:
        is_idle = score is Status.INACTIVE
        report = {"status": "inactive" if is_idle else "active", "reason": REASON if is_idle else None}
        report |= {"notes": ["drawn once a step"], "settings": {"mixout": {"p": 0.7}}, "seconds": 61.5}
        (trial.folder / REPORT).write_text(json.dumps(report))
    code = {Status.INACTIVE: INACTIVE, Status.CRASHED: 1}.get(score, 0) if isinstance(score, Status) else 0
    Result(code, 1.5e9, 61.5 + trial.seed, 2 * 10**9, "host").write(trial.folder)
    if not isinstance(score, Status):
        found = {"metric": plan.metric, "value": repr(float(score)), "file": "out/eval.json", "rule": "the last"}
        (trial.folder / SCORE).write_text(json.dumps(found))


def draw_scores(n: int, mean: float = 0.85, *, failed: float = 0.0, seed: int = 0) -> list[Score]:
    """Return seeded scores, of which a share is that of a model that always gives one answer."""
    rng = np.random.default_rng(seed)
    values = rng.normal(mean, 0.012, n).round(4)
    values[rng.random(n) < failed] = 0.5269
    return [float(value) for value in values]


def two_arms(folder: Path) -> Study:
    """Plain, of which 4 of 20 fail, and an arm of which none does."""
    plain = draw_scores(20, failed=0.2)
    return make_study(folder, {"plain": plain, "mixout=0.7": draw_scores(20, 0.87, seed=1)})


def twelve_arms(folder: Path, n: int = 20) -> Study:
    """Two sweeps and long names; an arm without effect, one not run, crashed trials, a NaN."""
    lams = ("0.05", "0.1", "0.15", "0.3")
    scores: dict[str, list[Score]] = {"plain": draw_scores(n, failed=0.25)}
    scores["mixout=0.7"] = [math.nan, *draw_scores(n - 1, 0.87, failed=0.05, seed=1)]
    scores["rdrop=1 mixout=0.7 'include=*.attention.*' 'exclude=*.bias'"] = draw_scores(n, 0.86, seed=2)
    scores["rdrop=1 mixout=0.7 'include=*.attention.*' 'exclude=*.norm'"] = draw_scores(n, 0.83, seed=3)
    scores["recadam=0.1"] = [Status.INACTIVE, *[Status.MISSING] * (n - 1)]
    scores["rdrop=2"] = [Status.CRASHED, Status.UNSCORED, *draw_scores(n - 2, 0.84, failed=0.3, seed=4)]
    scores["anchor=0.01"] = [Status.MISSING] * n
    scores |= {f"noisytune={lam}": draw_scores(n, 0.86, failed=i / 10, seed=5 + i) for i, lam in enumerate(lams)}
    scores["rdrop=5"] = draw_scores(n, 0.88, seed=10)
    return make_study(folder, scores, sweeps=[f"noisytune={','.join(lams)}"])


def hostile(folder: Path) -> Study:
    """Names and logs that would act on a page or a terminal."""
    scores = {"plain": draw_scores(3), f"rdrop=1 'include={HOSTILE.split(chr(34))[0]}'": draw_scores(3)}
    words = ("python", HOSTILE, "{seed}")
    return make_study(folder, scores, metric=HOSTILE, words=words, log=lambda _: f"{HOSTILE}\n{'x' * 3000}\n")


def write_page(study: Study) -> str:
    """Write a study's files, and return its page."""
    assert study.plan
    write_files(study, rows(study), study.plan.folder)
    return (study.plan.folder / "index.html").read_text(encoding="utf-8")
