"""index.html: one file that asks for nothing, says everything of a study, and fits a narrow window and a wide one."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from studies import ENVIRONMENT, HOSTILE, REASON, draw_scores, make_study, write_page

from surgery.report.study import logs
from surgery.report.study.html import Html, escape, table, tag
from surgery.study.collect import collect
from surgery.study.trial import Status

_VOID = {"meta"}


@pytest.fixture(scope="module")
def pages(folders: dict[str, Path]) -> dict[str, str]:
    return {name: (folder / "index.html").read_text(encoding="utf-8") for name, folder in folders.items()}


class Outline(HTMLParser):
    """Elements of a page, each of which must be closed where it belongs; ids and what refers to them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in _VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


# -- what it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "twelve", "hostile"])
def test_page_asks_for_nothing_and_runs_nothing(name, pages):
    outline = Outline(pages[name])
    assert not {found for found, _ in outline.elements} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not [key for _, attributes in outline.elements for key in attributes if key.startswith("on")]
    addresses = [value for _, a in outline.elements for key in ("href", "src") if (value := a.get(key))]
    assert addresses
    assert all(value.startswith("#") or not re.match(r"[a-z]+:|/", value) for value in addresses)
    assert not re.search(r"https?://", pages[name])
    assert outline.all("meta")[1] == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    }


@pytest.mark.parametrize("name", ["two", "twelve", "hostile"])
def test_page_can_be_read_without_seeing_it(name, pages):
    outline = Outline(pages[name])
    assert outline.all("html") == [{"lang": "en"}]
    assert [found for found, _ in outline.elements if re.fullmatch("h[1-6]", found)][:2] == ["h1", "h2"]
    assert {attributes.get("scope") for attributes in outline.all("th")} == {"col", "row"}
    assert all(attributes.get("aria-label") for attributes in outline.all("svg"))
    assert all(attributes.get("aria-label") for attributes in outline.all("table"))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_links_of_a_page_lead_to_files(folders, pages):
    from urllib.parse import unquote

    for name, folder in folders.items():
        links = [attributes["href"] for attributes in Outline(pages[name]).all("a")]
        assert {"table.md", "table.tex", "trials.csv", "arms.svg"} <= set(links)
        assert all((folder / unquote(link)).is_file() for link in links if link)


def test_same_study_gives_the_same_page(folders, pages):
    from surgery.study.plan import read_plan

    study = collect(read_plan(folders["twelve"]))
    assert write_page(study) == pages["twelve"]


# -- what it says -----------------------------------------------------------------------------------------------------


def test_page_begins_with_what_can_be_said(pages):
    text = Outline(pages["twelve"]).text
    top = text[: text.index("95 % of the mean")]
    assert "eval_accuracy: plain and 11 arms" in top
    assert "more is better; 20 seeds; 240 trials: 39 not run, 198 done, 1 crashed, 1 no effect, 1 no metric" in top
    assert "rdrop=5: better by " in top
    assert f"recadam=0.1: NO EFFECT: {REASON}" in top
    assert "anchor=0.01: nothing to compare yet" in top
    assert "failed: eval_accuracy of 0.527 or less (3 runs of plain have exactly this)" in text


def test_page_says_how_it_was_run(pages):
    text = Outline(pages["twelve"]).text
    assert "python train.py --seed '{seed}' --output_dir '{out}'" in text
    assert "--noisytune 0.05 --noise-seed '{seed}'" in text
    assert '{"mixout": {"p": 0.7}}' in text
    script = ENVIRONMENT["script"]
    for part in ("/home/me", "torch 2.13.0", "A Processor, 8 cores", "NVIDIA H100", script["commit"], "with edits"):
        assert part in text


@pytest.mark.parametrize("name", ["two", "twelve"])
def test_every_trial_is_there_with_its_command_and_log(name, folders, pages):
    text = Outline(pages[name]).text
    trials = sorted(folders[name].glob("trials/*/*/trial.json"))
    assert len(trials) == {"two": 40, "twelve": 201}[name]
    for path in trials:
        about = json.loads(path.read_text())
        assert text.count(about["run"]) == 1
        assert f"epoch 1\nseed {about['seed']} of {about['arm']} is done" in text
    assert text.count("epoch 1\n") == len(trials)


def test_trial_says_how_it_ended_and_why(pages):
    text = Outline(pages["twelve"]).text
    assert "seed 0: crashed" in text
    assert "exit code 1: seed 0 of rdrop=2 is done" in text
    assert "expected eval_accuracy in the results" in text
    assert "seed 0: nan (a failed run)" in text
    assert "nan, the last, in out/eval.json" in text
    assert "61.5 s on host" in text
    assert "2.00 GB at most" in text
    assert "not run: seeds 0, 1, 2, 3" in text
    assert f"inactive: {REASON}" in text


def test_what_is_not_known_is_left_out(tmp_path):
    study = make_study(tmp_path / "s", {"plain": draw_scores(3), "rdrop=1": draw_scores(3, seed=1)})
    score = tmp_path / "s" / "trials" / "plain" / "0" / "score.json"
    score.write_text(score.read_text().replace("the last", ""))
    assert study.plan
    page = write_page(collect(study.plan))
    assert ">n</th>" in page
    assert ">failed</th>" not in page
    assert f"{study.summaries[0].values[0]!r}, in out/eval.json" in Outline(page).text


def test_trial_under_way_has_its_command(tmp_path):
    text = Outline(
        write_page(make_study(tmp_path / "s", {"plain": [0.1, Status.SUBMITTED], "rdrop=1": [0.2, 0.3]}))
    ).text
    assert "seed 1: under way" in text
    assert "train.py --seed 1" in text
    assert "no log yet" in text


def test_hostile_names_and_logs_are_text(pages):
    page, text = pages["hostile"], Outline(pages["hostile"]).text
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "<script" not in page
    assert text.count(f"{shown}\n{'x' * 3000}") == 6  # logs
    assert f"{shown}: plain and 1 arm" in text


def test_page_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_page(make_study(tmp_path / "s", {"plain": draw_scores(3), "rdrop=1": draw_scores(3)}))
    assert "There are no figures, as matplotlib is not installed" in Outline(page).text
    assert "<svg" not in page
    assert (tmp_path / "s" / "table.md").is_file()
    assert not (tmp_path / "s" / "arms.svg").exists()


def test_figures_lie_beside_the_page(folders):
    assert {path.name for path in folders["twelve"].glob("*.svg")} == {"arms.svg", "sweep-noisytune.svg"}
    assert {path.name for path in folders["two"].glob("*.svg")} == {"arms.svg"}


# -- how large it is --------------------------------------------------------------------------------------------------


def test_page_of_many_trials_with_large_logs_is_small(tmp_path):
    scores = {f"rdrop={i}": draw_scores(20, seed=i) for i in range(1, 12)}
    line = "<&>\"'\x1b[0m\u202e" * 20
    study = make_study(tmp_path / "s", {"plain": draw_scores(20)} | scores, log=lambda _: f"{line}\n" * 400 + "end\n")
    page = write_page(study)
    assert len(page.encode()) < 3_000_000
    assert page.count("\nend</pre>") == 240
    assert "the last 200 lines or 6.2 kB are here" in page


@pytest.mark.parametrize(
    ("log", "shown", "is_whole"),
    [
        ("", "", True),
        ("a\nb\n", "a\nb", True),
        ("a\n\nb", "a\n\nb", True),
        (" 0%\r 50%\r100%\r\nb\n", "100%\nb", True),
        ("a\tb", "a       b", True),
        ("<b>\x1b[1m", "&lt;b&gt;\\x1b[1m", True),
        ("\n".join(map(str, range(500))), "\n".join(map(str, range(300, 500))), False),
        ("x" * 90 + "\nlast", "last", False),
        ("x" * 5000, "", False),
        ("é" * 45, "é" * 45, True),
    ],
    ids=["empty", "short", "blank line", "bar", "tab", "markup", "many lines", "long line", "one long line", "utf-8"],
)
def test_end_of_a_log(log, shown, is_whole, tmp_path):
    (tmp_path / "log.txt").write_text(log, encoding="utf-8", newline="")
    room = logs.MOST_BYTES if "\n499" in log else 94
    tail = logs.read_tail(tmp_path / "log.txt", room)
    assert (str(tail.html), tail.is_whole) == (shown, is_whole)
    assert logs.read_tail(tmp_path / "none.txt", 100) is None


def test_end_of_a_log_of_other_bytes_is_text(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe\x00ok")
    assert logs.read_tail(tmp_path / "log.txt", 100).html == "\ufffd\ufffd\\x00ok"


@pytest.mark.parametrize(("trials", "bytes_each"), [(0, 20_000), (40, 20_000), (240, 6250), (3000, 500)])
def test_many_trials_share_the_room_for_logs(trials, bytes_each):
    assert logs.share(trials) == bytes_each


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_tags_escape_what_they_hold():
    assert tag("p", "<b>", Html("<i>"), class_="a\"b'", hidden=True, id=None) == (
        '<p class="a&quot;b&#x27;" hidden>&lt;b&gt;<i></p>'
    )
    assert escape("a\n\x1b<") == "a\\n\\x1b&lt;"
    shown = table(("a", "b"), [("x", "1")], label="l", numbers=[1])
    assert '<th scope="row">x</th><td class="number">1</td>' in shown
