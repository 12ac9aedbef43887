"""Models that are trained in phases or beside others: new heads stay as they are, frozen pretrained weights wait."""

from pathlib import Path

import byhand
import pytest
import seeded
import torch
from running import run
from torch import nn

from surgery import perturb_state_dict
from surgery.hooks.run.options import make_options
from surgery.hooks.run.outcome import judge
from surgery.hooks.run.record import Record

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


PROBE = """
import sys
import torch
from torch import nn
from transformers import AutoModel

torch.manual_seed(0)
encoder = AutoModel.from_pretrained(sys.argv[1]).eval().requires_grad_(False)
head = nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.3), nn.Linear(8, 2)).train()
optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
for _ in range(3):
    with torch.no_grad():
        states = encoder(input_ids=torch.randint(1, 60, (4, 8))).last_hidden_state[:, 0]
    nn.functional.cross_entropy(head(states), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_head_alone_has_what_does_not_act_on_its_weights(tmp_path: Path) -> None:
    source = seeded.bert_folder(tmp_path / "source")
    ran = run(tmp_path, PROBE, *byhand.NOISE, *byhand.MIXOUT, *byhand.RDROP, args=(source,))
    assert ran.code == 0, ran.err
    assert "Sequential: new, beside a pretrained BertModel that is not trained: nothing acts on its weights." in ran.err
    assert "expected an optimizer" not in ran.err
    assert (ran.records[0]["acts"], ran.models[0]["rdrop_fired"]) == (["rdrop"], 3)
    options = make_options(noisytune=byhand.LAM, mixout=byhand.P, rdrop=1.0)
    assert judge([Record(**ran.records[0])], options).reason == (
        "noisytune: no pretrained weights were trained, so that none were perturbed; "
        "mixout: no layer with pretrained weights was trained, so that none was mixed."
    )


UNFROZEN = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).train()
model.load_state_dict(torch.load("pretrained.pt"))
model[0].requires_grad_(False)
optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
for step in range(4):
    if step == 2:
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
    nn.functional.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 4, (8,))).backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(model.state_dict(), "left.pt")
"""


def test_original_w_pre_of_weights_that_are_unfrozen_later_is_without_noise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()
    torch.save(pretrained, tmp_path / "pretrained.pt")
    ran = run(tmp_path, UNFROZEN, *byhand.NOISE, "--anchor", "0.0", "--w-pre", "original")
    assert ran.code == 0, ran.err
    left = torch.load(tmp_path / "left.pt")
    moved = [left[name] - pretrained[name] for name in ("0.weight", "2.weight")]
    assert all(one.norm() > 0 for one in moved)
    assert ran.models[0]["distance"] == pytest.approx(float(torch.cat([one.flatten() for one in moved]).norm()))


AMID = """
import torch
from torch import nn


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Bilinear(4, 4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.layer(x, x)).flatten(0, 1)


model = Squared().train()
model.training = False  # as Lightning's wrapper is around what is trained
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    nn.functional.cross_entropy(model(torch.randn(3, 2, 4)), torch.zeros(6, dtype=torch.long)).backward()
    optimizer.step()
"""


def test_refusal_that_is_found_amid_a_forward_ends_no_script(tmp_path: Path) -> None:
    ran = run(tmp_path, AMID, *byhand.MIXOUT, *byhand.RDROP, "--allow-inactive")
    assert ran.code == 0, ran.err
    assert ran.records[0]["refused"] == ["mixout"]


CLOSURE = """
import sys
import torch
from torch import nn

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).train()
model.load_state_dict(torch.load("pretrained.pt"))
model[0].requires_grad_(False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def closure():
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 4, (8,)))
    loss.backward()
    return loss


for step in range(4):
    if step == 2:
        model[0].requires_grad_(True)
    if sys.argv[1] == "closure":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
torch.save(model.state_dict(), "left.pt")
"""


@pytest.mark.parametrize("way", ["closure", pytest.param("gradients first", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("has_noise", [pytest.param(False, marks=pytest.mark.sweep), True], ids=["plain", "noise"])
@pytest.mark.parametrize(
    "method", [("--anchor", "0.0"), ("--mixout", "0.5"), ("--recadam", "0.0")], ids=lambda one: one[0]
)
def test_w_pre_of_weights_that_are_unfrozen_in_place_is_from_before_their_first_step(
    method: tuple[str, str], has_noise: bool, way: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()
    torch.save(pretrained, tmp_path / "pretrained.pt")
    flags = (*method, *(byhand.NOISE if has_noise else ()))
    ran = run(tmp_path, CLOSURE, *flags, args=(way,))
    assert ran.code == 0, ran.err
    if has_noise:
        perturb_state_dict(pretrained, lam=byhand.LAM, seed=0)
    left = torch.load(tmp_path / "left.pt")
    names = pretrained if method[0] == "--recadam" else ("0.weight", "2.weight")
    moved = [(left[name] - pretrained[name]).flatten() for name in names]
    assert ran.models[0]["distance"] == pytest.approx(float(torch.cat(moved).norm()), rel=1e-4)
