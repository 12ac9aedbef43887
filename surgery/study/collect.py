"""What a study's folder tells: every trial that there is to be, the runs of each arm, and their summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from surgery.errors import some
from surgery.study.arms import PLAIN, Arm
from surgery.study.plan import Plan
from surgery.study.summary import ArmSummary, FailedBelow, Run, summarize
from surgery.study.trial import Status, TrialResult, read_trial


@dataclass(frozen=True)
class Study:
    """A study as far as it is.

    Args:
        metric: its name.
        minimize: less of it is better.
        arms: plain first.
        summaries: of the arms.
        failed_below: from where on a run has failed; None where that is not known.
        notes: what else should be known before anything is believed.
        results: of all trials, arm by arm; none of runs that somebody else made.
        plan: of which it is; None of such runs.
    """

    metric: str
    minimize: bool
    arms: tuple[Arm, ...]
    summaries: tuple[ArmSummary, ...]
    failed_below: FailedBelow | None
    notes: tuple[str, ...]
    results: tuple[TrialResult, ...] = ()
    plan: Plan | None = None

    def is_failed(self, value: float) -> bool:
        """Tell whether a run with this score has failed; only where `failed_below` is known."""
        return self.failed_below is not None and self.failed_below.covers(value, minimize=self.minimize)

    def of(self, arm: str) -> list[TrialResult]:
        """Return the results of an arm's trials."""
        return [result for result in self.results if result.trial.arm.name == arm]


def collect(plan: Plan) -> Study:
    """Read all trials of a study; what is missing or under way is among the results.

    Raises:
        OSError: a folder cannot be read.
    """
    arms = plan.made_arms()
    results = [read_trial(trial, plan.metric, minimize=plan.minimize) for trial in plan.trials()]
    results.sort(key=lambda result: [arm.name for arm in arms].index(result.trial.arm.name))
    runs = {arm.name: [_run(one) for one in results if one.trial.arm == arm and one.metric] for arm in arms}
    idle = {one.trial.arm.name for one in results if one.status is Status.INACTIVE}
    runs = {name: [] if name in idle else found for name, found in runs.items()}  # never compared
    summaries, threshold = summarize(runs, metric=plan.metric, minimize=plan.minimize, failed_below=plan.failed_below)
    notes = (*_same_scores(runs[PLAIN], threshold), *_several_places(results), *_edited(results))
    return Study(plan.metric, plan.minimize, arms, summaries, threshold, notes, tuple(results), plan)


def _run(result: TrialResult) -> Run:
    assert result.metric
    assert result.result
    return Run(result.trial.seed, result.metric.value, result.result.seconds, result.result.peak_memory)


def _same_scores(plain: Sequence[Run], threshold: FailedBelow | None) -> list[str]:
    """Point out seeds with the same score to the last digit, but for those of failed runs, which are alike."""
    failed = None if threshold is None else threshold.value
    scored = sorted((run for run in plain if run.value != failed), key=lambda run: repr(run.value))
    notes = []
    for value, same in groupby(scored, key=lambda run: repr(run.value)):
        seeds = sorted(run.seed for run in same)
        if len(seeds) > 1:
            named = some([str(seed) for seed in seeds])
            notes.append(
                f"seeds {named} of plain give the same score, {value}: does the script ignore its seed, or is the "
                "score too coarse?"
            )
    return notes


def _several_places(results: Sequence[TrialResult]) -> list[str]:
    """Point out that the metric was found in files of different names: these may mean different things."""
    places = {result.metric.file.rpartition("/")[2] for result in results if result.metric}
    if len(places) < 2:
        return []
    return [f"the metric was found in different files: {some(sorted(places))}. See trials.csv"]


def _edited(results: Sequence[TrialResult]) -> list[str]:
    """Point out that not all trials are of the same code."""
    scripts = [_script(result.trial.about()) for result in results if result.status.is_over]
    known = {script["commit"]: script for script in scripts if script}
    notes = [f"the script's repository was at {len(known)} commits during the study"] if len(known) > 1 else []
    versions = {str(sorted(_environment(result).items())) for result in results if result.status.is_over}
    return notes + (["not all trials ran with the same versions of packages"] if len(versions) > 1 else [])


def _script(about: Mapping[str, object]) -> Mapping[str, str] | None:
    environment = about.get("environment")
    found = environment.get("script") if isinstance(environment, dict) else None
    return found if isinstance(found, dict) else None


def _environment(result: TrialResult) -> Mapping[str, str]:
    environment = result.trial.about().get("environment")
    found = environment.get("versions") if isinstance(environment, dict) else None
    return found if isinstance(found, dict) else {}
