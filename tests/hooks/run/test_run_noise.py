"""To which parts of a model a run adds noise."""

from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from running import run
from torch import nn
from transformers import AutoModel

from surgery import perturb_model, perturb_state_dict
from surgery.hooks.run.inside.noise import Noise
from surgery.hooks.run.inside.snapshots import Snapshots
from surgery.hooks.run.messages import NOISE_OFF

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def add(top: nn.Module, trained: nn.Module, *loaded: nn.Module) -> None:
    Noise(0.15, 0, Snapshots()).add(top, trained.parameters(), loaded, (), ())


def values(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(got: nn.Module, wanted: dict[str, Any]) -> None:
    for name, value in got.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_noise_leaves_a_teacher_beside_its_student(tmp_path: Path) -> None:
    source = seeded.bert_folder(tmp_path)
    both = nn.ModuleDict({name: AutoModel.from_pretrained(source) for name in ("teacher", "student")})
    wanted = values(both["teacher"])
    add(both, both["student"])
    assert_equal(both["teacher"], wanted)
    perturb_model(both["teacher"], lam=0.15, seed=0)
    assert_equal(both["student"], values(both["teacher"]))


def test_noise_leaves_what_is_new_beside_a_part_that_was_loaded() -> None:
    both = nn.ModuleDict({"teacher": nn.Linear(4, 4), "student": nn.Linear(4, 4)})
    wanted = values(both)
    add(both, both["student"], both["teacher"])
    assert_equal(both, wanted)


def test_noise_is_on_each_part_that_was_loaded() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    wanted = values(model)
    for part in ("encoder", "decoder"):
        perturb_state_dict({name: wanted[f"{part}.{name}"] for name in ("weight", "bias")}, lam=0.15, seed=0)
    add(model, model, model["decoder"], model["encoder"])
    assert_equal(model, wanted)


FOLDS = """
import copy
import torch
from torch import nn

model = nn.Linear(4, 2)
first = copy.deepcopy(model.state_dict())
for fold in range(2):
    model.load_state_dict(first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
"""


def test_a_load_that_takes_the_noise_off_is_blamed(tmp_path: Path) -> None:
    ran = run(tmp_path, FOLDS, "--noisytune", "0.15")
    assert ran.code == 0, ran.err
    (record,) = ran.records
    assert record["acts"] == []
    assert record["faults"] == [f"noisytune: Linear: {NOISE_OFF}"]


def test_a_load_of_what_was_trained_is_not_blamed(tmp_path: Path) -> None:
    script = FOLDS.replace("model.load_state_dict(first)", "pass")
    ran = run(tmp_path, f"{script}    model.load_state_dict(model.state_dict())\n", "--noisytune", "0.15")
    (record,) = ran.records
    assert (record["acts"], record["faults"]) == (["noisytune"], [])


SCRATCH = """
import sys
import torch
from torch import nn

model = nn.Linear(4, 2)
if sys.argv[1:]:
    model.load_state_dict(nn.Linear(4, 2).state_dict())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(4, 4)).sum().backward()
optimizer.step()
"""


@pytest.mark.parametrize(("args", "is_warned"), [((), True), (("loaded",), False)])
def test_model_from_scratch_is_warned_of(args: tuple[str, ...], is_warned: bool, tmp_path: Path) -> None:
    ran = run(tmp_path, SCRATCH, "--mixout", "0.7", "--anchor", "0.01", "--noisytune", "0.1", args=args)
    assert ran.code == 0
    line = "Linear: no load of pretrained weights was seen: by mixout and anchor it is held near its random start"
    assert (line in ran.err) == is_warned


NO_GRADIENT = "has no effect, for no gradient has come to them."
UNREAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.late, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
    def forward(self, x, step):
        x = self.frozen(self.body(x))
        return self.late(x) if step else x

def main():
    model = Net()
    model.load_state_dict(Net().state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        {call}.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

main()
"""


def test_noise_on_weights_that_no_gradient_comes_to_is_named(tmp_path: Path) -> None:
    ran = run(tmp_path, UNREAD.replace("{call}", "model(torch.ones(2, 4), step)"), "--noisytune", "0.15")
    assert ran.code == 0, ran.err
    (note,) = ran.records[0]["notes"]
    assert note == f"noisytune: Net: noise on 2 weights (pooler.weight, pooler.bias) {NO_GRADIENT}"
    assert [(entry["perturbed"], entry["steps"]) for entry in ran.models] == [(6, 2)]


def test_noise_that_no_gradient_comes_to_at_all_has_not_acted(tmp_path: Path) -> None:
    script = UNREAD.replace(
        "self.frozen = nn.Linear(4, 4).requires_grad_(False)", "self.scale = nn.Parameter(torch.ones(1))"
    )
    script = script.replace("x = self.frozen(self.body(x))", "return self.scale * x")
    ran = run(tmp_path, script.replace("{call}", "model(torch.ones(2, 4), step)"), "--noisytune", "0.15")
    assert ran.code == 0, ran.err
    assert ran.records[0]["acts"] == []
    assert ran.records[0]["faults"] == [
        f"noisytune: Net: noise on 6 weights (body.weight, body.bias, ...) {NO_GRADIENT}"
    ]
