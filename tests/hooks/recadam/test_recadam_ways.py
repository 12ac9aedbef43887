"""RecAdam reaches every weight in every way of training: with lambda and gamma at 0, what is pretrained never moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from running import SCRIPTS, TORCHRUN, Run, run

HOLD = ("--recadam", "0", "--recadam-k", "10", "--recadam-t0", "1000000")  # lambda is 0 in float64
WAYS = "outside", "inside", "accumulated", "many optimizers", "closure"
COMPILED = "compiled first", "compiled after", "compiled in place", "compiled step"


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import nets

    return nets


def assert_held(found: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], ran: Run) -> None:
    assert found.keys() >= start.keys()
    assert [name for name, w in start.items() if not torch.equal(found[name], w)] == []
    assert all("recadam" in record["acts"] for record in ran.records if record["models"])


@pytest.mark.parametrize("ways", [WAYS, pytest.param(COMPILED, marks=pytest.mark.sweep)], ids=["eager", "compiled"])
def test_plain_loop_is_held(ways: tuple[str, ...], nets: Any, tmp_path: Path) -> None:
    ran = run(tmp_path, "plain.py", *HOLD, args=(tmp_path / "final.pt", *ways))
    plain = run(tmp_path, "plain.py", args=(tmp_path / "plain.pt", *ways))
    assert (ran.code, plain.code) == (0, 0), ran.err + plain.err
    start = nets.build().state_dict()
    for way, found in torch.load(tmp_path / "final.pt").items():
        assert_held(found, start, ran)
        moved = torch.load(tmp_path / "plain.pt")[way]
        assert all(not torch.equal(moved[name], w) for name, w in start.items())


def test_two_ranks_are_held(nets: Any, tmp_path: Path) -> None:
    ran = run(tmp_path, "on_ranks.py", *HOLD, args=(tmp_path,), launcher=TORCHRUN)
    assert ran.code == 0, ran.err
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt").values():
            assert_held(found, nets.build().state_dict(), ran)


@pytest.mark.sweep
def test_lightning_is_held(nets: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    ran = run(tmp_path, "with_lightning.py", *HOLD, args=(tmp_path / "final.pt",))
    assert ran.code == 0, ran.err
    assert_held(torch.load(tmp_path / "final.pt"), nets.build().state_dict(), ran)


@pytest.mark.parametrize("script", ["with_trainer.py", pytest.param("with_accelerate.py", marks=pytest.mark.sweep)])
def test_transformers_model_is_held_and_its_head_learns(script: str, tmp_path: Path) -> None:
    source = seeded.bert_folder(tmp_path / "source")
    (tmp_path / "out").mkdir()
    ran = run(tmp_path, script, *HOLD, args=(source, tmp_path / "out"))
    assert ran.code == 0, ran.err
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    start = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64).state_dict()
    found = torch.load(tmp_path / "out" / "final.pt")
    head = {name for name in start if name.startswith("classifier")}
    assert_held(found, {name: w for name, w in start.items() if name not in head}, ran)
    assert all(not torch.equal(found[name], start[name]) for name in head)


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_lora_has_nothing_to_recall_and_is_refused(tmp_path: Path) -> None:
    source = seeded.bert_folder(tmp_path / "source")
    ran = run(tmp_path, "with_peft.py", *HOLD, args=("lora", source, tmp_path / "final.pt"))
    assert ran.code == 3
    assert "expected a trainable weight to recall, got none" in ran.err
