"""index.html: a study in one file that needs no network: verdicts, table, figures, how it was run, every trial."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.escapes import shell_join
from surgery.report.study.figures import ARMS, for_page
from surgery.report.study.html import Html, escape, items, join, table, tag
from surgery.report.study.runs import failed_rule
from surgery.report.study.style import style_sheet
from surgery.report.study.trials import trials_section
from surgery.study.trial import Status

if TYPE_CHECKING:
    from surgery.study.arms import Arm
    from surgery.study.collect import Study

PAGE = "index.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_NO_FIGURES = (
    "There are no figures, as matplotlib is not installed: pip install 'model-surgery[study]', and look again."
)
_MOST_ENVIRONMENTS = 4


def page(study: "Study", rows: Mapping[str, Any], cells: Sequence[Sequence[str]], figures: Mapping[str, bytes]) -> str:
    """Return the page.

    Args:
        rows: as `rows` makes them of the study.
        cells: the table, its header first; what can be said comes last, and stands at the top of the page.
        figures: as SVG, by name; none where nothing can be drawn.
    """
    title = f"{study.metric}: {study.summaries[0].name} and {len(study.arms) - 1} arm{'s' * (len(study.arms) > 2)}"
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(style_sheet())),
    )
    sections = (_table(study, rows, cells), _figures(study, figures), _how(study), trials_section(study))
    body = tag("body", tag("main", *_top(study, rows, title), *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _top(study: "Study", rows: Mapping[str, Any], title: str) -> Iterable[Html]:
    counts = Counter(result.status for result in study.results)
    states = ", ".join(f"{counts[status]} {status.value}" for status in Status if counts[status])
    seeds = len({result.trial.seed for result in study.results})
    yield tag("h1", title)
    better = "less" if study.minimize else "more"
    yield tag("p", f"{better} is better; {seeds} seeds; {len(study.results)} trials: {states}", class_="muted")
    yield tag("ul", *(_verdict(arm) for arm in rows["arms"][1:]), class_="verdicts")


def _verdict(arm: Mapping[str, Any]) -> Html:
    text = arm["verdict"]
    kind = "idle" if "no effect" in arm["trials"] else text.partition(" ")[0]
    return tag("li", tag("code", arm["name"]), ": ", tag("b", text), class_=kind)


def _table(study: "Study", rows: Mapping[str, Any], cells: Sequence[Sequence[str]]) -> Html:
    shown = [i for i in range(len(cells[0]) - 1) if any(row[i] for row in cells[1:])]
    head, *body = ([row[i] for i in shown] for row in cells)
    files = [tag("a", name, href=name) for name in ("table.md", "table.tex", "trials.csv")]
    return tag(
        "section",
        tag("h2", "Arms"),
        table(head, body, label="what is known of each arm", numbers=range(1, len(head))),
        tag("p", failed_rule(study)),
        *(tag("p", tag("b", "Note: "), note) for note in rows["notes"]),
        tag("p", "Also as ", join(files, ", "), class_="muted"),
    )


def _figures(study: "Study", figures: Mapping[str, bytes]) -> Html:
    title = tag("h2", "Figures")
    if not figures:
        return tag("section", title, tag("p", _NO_FIGURES))
    return tag("section", title, *(_figure(study, name, svg) for name, svg in figures.items()))


def _figure(study: "Study", name: str, svg: bytes) -> Html:
    what = "each run of each arm" if name == ARMS else f"over {name.removeprefix('sweep-').replace('+', ' and ')}"
    label = f"{study.metric}: {what}"
    prefix = "".join(c if c.isalnum() else "-" for c in name)
    drawn = for_page(svg, prefix).replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    box = tag("div", Html(drawn), class_="box", tabindex="0", role="region", aria_label=label)
    link = tag("a", f"{name}.svg", href=f"{name}.svg")
    return tag("figure", tag("figcaption", label, ". As a file: ", link), box)


def _how(study: "Study") -> Html:
    plan = study.plan
    assert plan
    variables = [f"{name}={text}" for name, text in plan.template.variables.items()]
    seeds = ", ".join(map(str, plan.seeds))
    return tag(
        "section",
        tag("h2", "How it was run"),
        tag("pre", tag("code", shell_join([*variables, *plan.template.words])), class_="command"),
        items([("folder", str(plan.cwd)), ("seeds", seeds)]),
        table(
            ("arm", "flags of surgery run", "settings that it reports"),
            [(arm.name, _flags(arm), _settings(study, arm)) for arm in study.arms],
            label="settings of each arm",
        ),
        *_environments(study),
    )


def _flags(arm: "Arm") -> Html:
    if arm.options is None:
        return escape("none: the command as it is")
    flags = arm.flags(0)
    if arm.options.noisytune is not None and not arm.has_own_seed:
        flags[-1] = "{seed}"  # of the noise: that of the trial
    return tag("code", shell_join(flags))


def _settings(study: "Study", arm: "Arm") -> Html:
    found = next((settings for one in study.of(arm.name) if (settings := one.trial.report().get("settings"))), None)
    return tag("code", json.dumps(found)) if found else Html()


def _environments(study: "Study") -> Iterable[Html]:
    """Tell of the machines and versions of the trials: each that differs once."""
    found: Counter[str] = Counter()
    for result in study.results:
        environment = result.trial.about().get("environment")
        if isinstance(environment, dict):
            found[json.dumps(environment, sort_keys=True)] += 1
    for text, count in list(found.items())[:_MOST_ENVIRONMENTS]:
        yield tag("h3", f"{count} trial{'s' * (count != 1)} ran with")
        yield items(_environment(json.loads(text)))
    if len(found) > _MOST_ENVIRONMENTS:
        yield tag("p", f"and {len(found) - _MOST_ENVIRONMENTS} other environments: see trial.json of each trial")


def _environment(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    versions, script = found.get("versions") or {}, found.get("script") or {}
    yield (
        "versions",
        ", ".join([f"Python {found.get('python')}", *(f"{name} {text}" for name, text in versions.items())]),
    )
    yield "processor", f"{found.get('processor')}, {found.get('cores')} cores, {found.get('platform')}"
    yield "GPUs", "; ".join(map(str, found.get("gpus") or [])) or "none"
    if script:
        edited = ", with edits that are not in it" if script.get("is_edited") else ""
        yield "script", f"{script.get('file')} at commit {script.get('commit')}{edited}"
