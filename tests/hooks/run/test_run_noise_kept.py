"""Noise is reported where weights have it when they are trained, whatever wrote to them, and for resumed runs too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run, run
from torch import nn

from surgery import perturb_state_dict
from surgery.hooks.run.inside.probes import Probes
from surgery.hooks.run.messages import LOADED_OVER, NOISE_OFF, RESUMED_WITHOUT

NOISE = ("--noisytune", "0.15")

SCRIPT = """
import torch
from torch import nn

def build():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)

def train(model, optimizer, between=lambda own: None):
    for step in range(3):
        nn.functional.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 4, (8,))).backward()
        optimizer.step()
        between(model.state_dict())
    return {name: value.clone() for name, value in model.state_dict().items()}

loaded, left = torch.load("pretrained.pt"), {}
"""
IN_PLACE = {
    "copy_": "for name, value in loaded.items(): own[name].copy_(value)",
    "data": "for name, w in model.named_parameters(): w.data = loaded[name].clone()",
    "data.copy_": "for name, w in model.named_parameters(): w.data.copy_(loaded[name])",
    "vector": "nn.utils.vector_to_parameters(torch.cat([loaded[n].reshape(-1) for n in own]), model.parameters())",
    "load_state_dict": "model.load_state_dict(loaded)",
}
_LOAD = """
model, optimizer = build()
own = model.state_dict()
{load}
left["{name}"] = train(model, optimizer)
"""


def run_on_pretrained(tmp_path: Path, script: str) -> tuple[Run, dict[str, Any]]:
    """Run a script on a net's pretrained weights; return what it did, and those with the noise that they should get."""
    pretrained = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()
    torch.save(pretrained, tmp_path / "pretrained.pt")
    ran = run(tmp_path, SCRIPT + script + 'torch.save(left, "left.pt")\n', *NOISE)
    perturb_state_dict(pretrained, lam=0.15, seed=0)
    return ran, dict(pretrained)


def test_noise_is_on_what_was_written_after_the_optimizer_was_made(tmp_path: Path) -> None:
    loads = {"one weight": "own['0.weight'].mul_(2)"} | IN_PLACE
    script = "".join(_LOAD.format(name=name, load=load) for name, load in loads.items())
    ran, wanted = run_on_pretrained(tmp_path, script)
    assert (ran.code, ran.records[0]["faults"], ran.records[0]["acts"]) == (0, [], ["noisytune"]), ran.err
    left = torch.load(tmp_path / "left.pt")
    scaled = left.pop("one weight")
    for name, found in left.items():
        assert all(torch.equal(found[one], wanted[one]) for one in wanted), name
    assert ran.err.count("noisytune: Sequential: 1 of 4 weights have other values than the noise gave them") == 1
    assert scaled.keys() == wanted.keys()


BACK = """
model, optimizer = build()
model.load_state_dict(loaded)
train(model, optimizer, lambda own: [own[name].copy_(value) for name, value in loaded.items()])
"""


def test_noise_that_is_taken_off_in_training_is_not_called_active(tmp_path: Path) -> None:
    ran, _ = run_on_pretrained(tmp_path, BACK)
    (record,) = ran.records
    assert (record["acts"], record["faults"]) == ([], [f"noisytune: Sequential: {NOISE_OFF}"])


UNSEEN = """
torch.manual_seed(0)
model = nn.Linear(8, 4)
model.load_state_dict(torch.load("linear.pt"))
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

def closure():
    optimizer.zero_grad()
    loss = model.forward(torch.ones(2, 8)).square().sum()
    loss.backward()
    return loss

optimizer.step(closure)
left = model.state_dict()
"""


def test_weights_trained_by_a_closure_unseen_get_no_second_noise(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    torch.save(model.state_dict(), tmp_path / "linear.pt")
    ran, _ = run_on_pretrained(tmp_path, UNSEEN)
    assert (ran.code, ran.records[0]["acts"]) == (0, ["noisytune"]), ran.err
    perturb_state_dict(dict(model.state_dict()), lam=0.15, seed=0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    left = torch.load(tmp_path / "left.pt")
    assert all(torch.equal(left[name], value) for name, value in model.state_dict().items())


RESUMED = """
import sys
import torch
from torch import nn

kind, *loads = sys.argv[1:]
torch.manual_seed(1)
model = nn.Linear(8, 4)
model.load_state_dict(torch.load("pretrained.pt"))
if "model" in loads:
    model.load_state_dict(torch.load("checkpoint.pt")["model"])
optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
if "state" in loads:
    optimizer.load_state_dict(torch.load("checkpoint.pt")["optimizer"])
for step in range(2):
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
torch.save(state, "left.pt" if loads else "checkpoint.pt")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save(nn.Linear(8, 4).state_dict(), tmp_path / "pretrained.pt")
    return tmp_path


def train(folder: Path, kind: str, checkpoint: str) -> dict[str, Any]:
    """Do what the script does, without noise, from a checkpoint's weights; return what it leaves."""
    model = nn.Linear(8, 4)
    model.load_state_dict(torch.load(folder / checkpoint).get("model", torch.load(folder / checkpoint)))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [("AdamW", RESUMED_WITHOUT), pytest.param("SGD", LOADED_OVER, id="SGD-has-no-state-that-tells")],
)
def test_plain_run_that_is_resumed_is_refused(optimizer: str, reason: str, folder: Path) -> None:
    torch.save(train(folder, optimizer, "pretrained.pt"), folder / "checkpoint.pt")
    ran = run(folder, RESUMED, *NOISE, args=(optimizer, "model", "state"))
    assert (ran.code, ran.records[0]["faults"]) == (3, [f"noisytune: Linear: {reason}"])
    assert not (folder / "left.pt").exists()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_w_pre_of_a_plain_run_that_is_resumed_has_no_noise(optimizer: str, folder: Path) -> None:
    torch.save(train(folder, optimizer, "pretrained.pt"), folder / "checkpoint.pt")
    flags = (*NOISE, "--anchor", "0.0", "--allow-inactive")
    ran = run(folder, RESUMED, *flags, args=(optimizer, "model", "state"))
    assert ran.code == 0, ran.err
    left, pretrained = torch.load(folder / "left.pt")["model"], torch.load(folder / "pretrained.pt")
    assert ran.models[0]["distance"] == pytest.approx(float((left["weight"] - pretrained["weight"]).norm()), rel=1e-5)


def test_noisy_run_that_is_resumed_has_its_noise(folder: Path) -> None:
    """Plain SGD, of which nothing but its param_groups tells that the run is resumed."""
    assert run(folder, RESUMED, *NOISE, args=("SGD",)).code == 0
    checkpoint = torch.load(folder / "checkpoint.pt")
    group = checkpoint["optimizer"]["param_groups"][0]
    assert (group["surgery_lam"], group["surgery_seed"]) == (0.15, 0)
    ran = run(folder, RESUMED, "--noisytune", "0.1", "--noise-seed", "3", args=("SGD", "model", "state"))
    assert (ran.code, ran.records[0]["acts"], ran.records[0]["faults"]) == (0, ["noisytune"], [])
    note = "noisytune: resumed with lam 0.1 and seed 3, but the run began with lam 0.15 and seed 0: its noise is what"
    assert note in ran.err
    left, wanted = torch.load(folder / "left.pt")["model"], train(folder, "SGD", "checkpoint.pt")["model"]
    assert all(torch.equal(left[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_know_weights_that_were_moved_or_cast(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64).to(dtype)
    probes = Probes()
    with probes.taken(layer.parameters()):
        perturb_state_dict(dict(layer.named_parameters()), lam=0.15, seed=0)
    assert probes.lost(layer.parameters()) == (0, 2)
    layer.to(torch.float16)
    assert probes.lost(layer.parameters()) == (0, 2)
    with torch.no_grad():
        layer.weight.add_(1)
    assert probes.lost(layer.parameters()) == (1, 2)
    assert not probes.is_any_as_before(layer.parameters())
