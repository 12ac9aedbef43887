"""Studies that were never run: the folder that `surgery study` leaves, with scores of our choosing."""

from collections.abc import Mapping
from pathlib import Path

from surgery.engines.job import LOG, Job, Result
from surgery.exit_codes import INACTIVE
from surgery.study.plan import Plan
from surgery.study.template import Template
from surgery.study.trial import Trial


def write_study(folder: Path, scores: Mapping[str, Mapping[int, float | None]]) -> Plan:
    """Write the folder of a study.

    Args:
        scores: of each arm's seeds, plain first; NaN for a trial that crashed, None for one without effect.
    """
    _, *arms = scores
    template = Template(("python", "train.py", "--seed", "{seed}", "--output_dir", "{out}"))
    seeds = tuple(sorted({seed for found in scores.values() for seed in found}))
    folder.mkdir(parents=True)
    plan = Plan(folder, template, folder.parent, tuple(arms), (), seeds, "eval_accuracy")
    plan.write()
    for trial in plan.trials():
        if trial.seed in scores[trial.arm.name]:
            _write_trial(trial, scores[trial.arm.name][trial.seed], template)
    return plan


def _write_trial(trial: Trial, score: float | None, template: Template) -> None:
    trial.clear()
    words = template.fill(trial.seed, trial.out).words
    Job(trial.folder, words, trial.study.parent).write()
    trial.write({"arm": trial.arm.name, "seed": trial.seed, "command": " ".join(words), "environment": {}})
    code = INACTIVE if score is None else 1 if score != score else 0
    (trial.folder / LOG).write_text("out of memory\n" if code == 1 else f"eval_accuracy={score!r}\n")
    Result(code, 1.75e9 + trial.seed, 60.0 + trial.seed, 300_000_000, "host").write(trial.folder)
