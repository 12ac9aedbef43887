"""What a run does not regularize, and how it says so: new heads, models in eval mode, globs without a match."""

from pathlib import Path

import pytest
import seeded
import torch
from running import run
from torch import nn

APART = """
import sys
import torch
from torch import nn
from transformers import AutoModel

torch.manual_seed(0)
head = nn.Linear(32, 2)
encoder = AutoModel.from_pretrained(sys.argv[1])
optimizer = torch.optim.SGD([*head.parameters(), *encoder.parameters()], lr=0.0)
encoder.train(sys.argv[2] == "train")
for _ in range(2):
    states = encoder(input_ids=torch.randint(1, 60, (4, 8))).last_hidden_state
    head(states[:, 0]).square().sum().backward()
    optimizer.step()
torch.save(head.state_dict(), "head.pt")
"""
UNSEEN = "BertModel: expected a call of the model in training mode before the optimizer's step, got none: "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded.bert_folder(tmp_path_factory.mktemp("source"))


def test_new_head_beside_a_pretrained_model_is_left_alone(source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, APART, "--noisytune", "0.15", "--mixout", "0.5", args=(source, "train"))
    assert ran.code == 0, ran.err
    assert "surgery: Linear: new, beside a pretrained BertModel: left as it is.\n" in ran.err
    assert [entry["class"] for entry in ran.models] == ["BertModel"]
    torch.manual_seed(0)
    wanted = nn.Linear(32, 2).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in torch.load(tmp_path / "head.pt").items())


@pytest.mark.parametrize(("flag", "is_said"), [("--noisytune", False), ("--mixout", True)])
def test_model_in_eval_mode(flag: str, is_said: bool, source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, APART, flag, "0.15", args=(source, "eval"))
    assert ran.code == 0, ran.err
    assert (UNSEEN in ran.err) == is_said
    assert ran.models[0]["steps"] == 2 - is_said
    assert ran.records[0]["acts"] == ([] if is_said else ["noisytune"])


@pytest.mark.parametrize(("option", "code"), [("--include", 3), ("--exclude", 0)])
def test_glob_without_a_match(option: str, code: int, source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, APART, "--mixout", "0.5", option, "Brt*", args=(source, "train"))
    assert ran.code == code, ran.err  # an include leaves nothing to do at the first step
    assert ran.records[0]["unmatched"] == [f"{option} 'Brt*'"]
    assert ("got those that are left out (BertModel)" in ran.err) == (option == "--include")
