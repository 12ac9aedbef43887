"""RecAdam under `surgery run`: what it says of a training that is too short, or that is resumed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import seeded
from commands import Ran

SCRIPT = """
import sys
import torch
from transformers import AutoModelForSequenceClassification
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).train()
optimizer = torch.optim.SGD(model.parameters(), 0.05)
if len(sys.argv) > 3:
    optimizer.load_state_dict(torch.load(sys.argv[3]))
for step in range(3):
    optimizer.zero_grad()
    model(input_ids=torch.arange(1, 17).view(2, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
model.save_pretrained(sys.argv[2])
torch.save(optimizer.state_dict(), sys.argv[2] + ".pt")
"""


@pytest.fixture
def train(tmp_path: Path, run_cli: Callable[..., Ran]) -> Callable[..., Ran]:
    seeded.bert_folder(tmp_path / "pre")
    (tmp_path / "train.py").write_text(SCRIPT)
    return lambda *flags, args: run_cli("run", *flags, "--", sys.executable, "train.py", *args)


def test_training_that_ends_before_t0_is_told(train: Callable[..., Ran]) -> None:
    ran = train("--recadam", 10, args=("pre", "out"))
    assert ran.code == 0, ran.err
    assert (
        "surgery: note: BertForSequenceClassification: recadam: the training ended at step 3, before t0 (250), so that "
        "pretrained weights were held where they were. Give a t0 of about half the steps\n"
    ) in ran.err
    assert ", distance 0" in ran.err


def test_plain_sgd_is_known_to_go_on_by_its_groups(train: Callable[..., Ran]) -> None:
    first = train("--recadam", 10, "--recadam-t0", 1, args=("pre", "out"))
    again = train("--recadam", 10, "--recadam-t0", 1, args=("out", "more", "out.pt"))
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert "RecAdam at step 6" in again.err
    assert "resumed, without the pretrained weights in sight" in again.err
    assert "resumed" not in first.err
