"""Models that are trained in phases or beside others: new heads stay as they are, frozen pretrained weights wait."""

from pathlib import Path

import byhand
import pytest
import seeded
import torch
from running import run
from torch import nn

HEAD = """
import sys
import torch
from torch import nn
from transformers import AutoModel

torch.manual_seed(0)
encoder = AutoModel.from_pretrained(sys.argv[1]).train()
head = nn.Linear(32, 2)


def train(count, *optimizers):
    for _ in range(count):
        states = encoder(input_ids=torch.randint(1, 60, (4, 8))).last_hidden_state
        head(states[:, 0]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def sgd(*modules):
    return torch.optim.SGD([w for module in modules for w in module.parameters()], lr=0.0)


order = sys.argv[2]
if order == "head first":
    train(2, sgd(head), sgd(encoder))
elif order == "body first":
    train(2, sgd(encoder), sgd(head))
elif order == "then head":
    train(2, sgd(encoder))
    train(2, sgd(head))
else:
    train(2, sgd(head))
    train(2, sgd(encoder, head))
torch.save(head.state_dict(), "head.pt")
"""


@pytest.mark.parametrize(
    "order", ["head first", pytest.param("body first", marks=pytest.mark.sweep), "then head", "then body"]
)
def test_new_head_with_an_optimizer_or_a_phase_of_its_own_is_left_alone(order: str, tmp_path: Path) -> None:
    source = seeded.bert_folder(tmp_path / "source")
    ran = run(tmp_path, HEAD, *byhand.NOISE, *byhand.MIXOUT, "--anchor", "0.01", args=(source, order))
    assert ran.code == 0, ran.err
    assert "surgery: Linear: new, beside a pretrained BertModel: left as it is.\n" in ran.err
    assert [entry["class"] for entry in ran.models] == ["BertModel"]
    assert ran.records[0]["acts"] == ["anchor", "mixout", "noisytune"]
    torch.manual_seed(0)
    nn.Linear(32, 2)
    left = torch.load(tmp_path / "head.pt")
    assert left["weight"].std() > 0.01
    assert not torch.equal(left["weight"], torch.zeros(2, 32))


LATE = """
import sys
import torch
from torch import nn

torch.manual_seed(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


model = Net().train()
pretrained = {name: w.clone() for name, w in model.body.state_dict().items()}
model.body.load_state_dict(pretrained)
model.body.requires_grad_(False)
way = sys.argv[1]
optimizer = torch.optim.SGD(model.parameters() if way == "in place" else model.head.parameters(), lr=0.0)
for step in range(6):
    if step == 3 and way != "never":
        model.body.requires_grad_(True)
        if way == "group":
            optimizer.add_param_group({"params": list(model.body.parameters())})
        elif way == "optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    nn.functional.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 4, (8,))).backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save((pretrained, model.body.state_dict(), model.head.state_dict()), "final.pt")
"""
WAITING = "surgery: Net: its pretrained weights are frozen: no effect of {} until they are trained.\n"


@pytest.mark.parametrize("way", ["group", pytest.param("optimizer", marks=pytest.mark.sweep), "in place"])
def test_pretrained_weights_that_are_frozen_at_first_are_regularized_later(way: str, tmp_path: Path) -> None:
    ran = run(tmp_path, LATE, *byhand.NOISE, *byhand.MIXOUT, "--anchor", "0.01", args=(way,))
    assert ran.code == 0, ran.err
    assert WAITING.format("noisytune and mixout and anchor") in ran.err
    assert ran.records[0]["acts"] == ["anchor", "mixout", "noisytune"]
    (entry,) = ran.models
    assert (entry["mixed"], entry["perturbed"], entry["new"]) == (2, 4, ["head.bias", "head.weight"])
    pretrained, body, _ = torch.load(tmp_path / "final.pt")
    from surgery import perturb_state_dict

    perturb_state_dict(pretrained, lam=byhand.LAM, seed=0)
    for name, w in body.items():
        torch.testing.assert_close(w, pretrained[name], rtol=1e-5, atol=1e-7)
    assert entry["distance"] == 0, "w_pre is what the noise has made of the weights"


def test_pretrained_weights_that_are_never_trained_are_a_reason(tmp_path: Path) -> None:
    ran = run(tmp_path, LATE, *byhand.NOISE, *byhand.MIXOUT, args=("never",))
    assert ran.code == 0, ran.err
    assert ran.records[0]["acts"] == []
    pretrained, body, _ = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(w, pretrained[name]) for name, w in body.items())
