"""Every trial of a study in HTML: how it ended, its metric, the command to copy, why it failed, the end of its log."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from surgery.engines.job import LOG
from surgery.report.study import logs
from surgery.report.study.html import Html, items, join, tag
from surgery.sizes import as_bytes
from surgery.study.summary import figure
from surgery.study.trial import Status

if TYPE_CHECKING:
    from surgery.study.collect import Study
    from surgery.study.trial import TrialResult

_LONGEST = 2000  # characters of a report's settings or notes


def trials_section(study: "Study") -> Html:
    """Return all trials, arm by arm."""
    begun = sum(one.status is not Status.MISSING for one in study.results)
    room = logs.share(begun)
    cut = f"Of each log, the last {logs.MOST_LINES} lines or {as_bytes(room)} are here; log.txt is the whole."
    arms = [_arm(study, arm.name, room) for arm in study.arms]
    return tag("section", tag("h2", "Trials", id="trials"), tag("p", cut, class_="muted"), *arms)


def _arm(study: "Study", arm: str, room: int) -> Html:
    results = study.of(arm)
    counts = Counter(result.status for result in results)
    states = ", ".join(f"{counts[status]} {status.value}" for status in Status if counts[status])
    missing = [str(one.trial.seed) for one in results if one.status is Status.MISSING]
    not_run = tag("p", f"not run: seeds {', '.join(missing)}", class_="muted") if missing else Html()
    shown = [_trial(study, one, room) for one in results if one.status is not Status.MISSING]
    return tag("details", tag("summary", f"{arm}: {states}"), *shown, not_run)


def _trial(study: "Study", result: "TrialResult", room: int) -> Html:
    about, ended = result.trial.about(), result.result
    value = result.metric.value if result.metric else None
    is_failed = value is not None and study.is_failed(value)
    facts = [
        ("status", result.status.value + (", a failed run" if is_failed else "")),
        ("why", tag("span", result.why, class_="alarm") if result.why else ""),
        (study.metric, _place(result, value)),
        ("time", f"{ended.seconds:.1f} s" + (f" on {ended.host}" if ended.host else "") if ended else ""),
        ("memory", as_bytes(ended.peak_memory) + " at most" if ended and ended.peak_memory else ""),
        ("folder", str(about.get("cwd", ""))),
        ("variables", _join(f"{name}={text}" for name, text in dict(about.get("variables") or {}).items())),
        *_report(result.trial.report()),
    ]
    command = str(about.get("run", ""))
    copy = tag("pre", tag("code", command), class_="command") if command else Html()
    inner = tag("div", items(facts), copy, _log(result, room), class_="trial")
    return tag("details", tag("summary", _title(result, value, is_failed=is_failed)), inner)


def _place(result: "TrialResult", value: float | None) -> str:
    """Say what the metric is, to every digit, and where it was found."""
    found = result.metric
    return ", ".join(filter(None, (repr(value), found.rule, f"in {found.file}"))) if found else ""


def _title(result: "TrialResult", value: float | None, *, is_failed: bool) -> Html:
    what = result.status.value if value is None else figure(value)
    is_alarm = is_failed or bool(result.why)
    return join((f"seed {result.trial.seed}: ", tag("span", what, class_="alarm") if is_alarm else what,
                 " (a failed run)" if is_failed else ""))  # fmt: skip


def _join(texts: Any) -> str:
    return " ".join(texts)


def _report(report: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Say in short what `surgery run` has reported."""
    if not report:
        return []
    notes = report.get("notes")
    settings = report.get("settings")
    return [
        ("report", str(report.get("status", "")) + (f": {report['reason']}" if report.get("reason") else "")),
        ("settings", tag("code", _cut(json.dumps(settings))) if settings else ""),
        ("notes", _cut("; ".join(map(str, notes))) if isinstance(notes, list) else ""),
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _log(result: "TrialResult", room: int) -> Html:
    trial = result.trial
    path = (trial.folder / LOG).relative_to(trial.study).as_posix()
    tail = logs.read_tail(trial.folder / LOG, room)
    if tail is None:
        return tag("p", "no log yet", class_="muted")
    link = tag("a", LOG, href=quote(path))
    how = (
        ", whole:"
        if tail.is_whole
        else f", the last {plural(tail.lines)}:"
        if tail.lines
        else ", with lines too long for this page"
    )
    label = f"end of the log of {trial.arm.name}, seed {trial.seed}"
    shown = tag("pre", tail.html, class_="log", tabindex="0", role="region", aria_label=label) if tail.lines else Html()
    return join((tag("p", link, how, class_="muted"), shown))


def plural(lines: int) -> str:
    """Count lines."""
    return f"{lines} line{'s' * (lines != 1)}"
