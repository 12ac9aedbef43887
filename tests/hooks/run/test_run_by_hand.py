"""A loop without an optimizer of torch is regularized after its first step, as a loop by hand that is so."""

from pathlib import Path
from typing import Any

import byhand
import pytest
import torch
from running import SCRIPTS, run
from torch import nn

from surgery import perturb_model
from surgery.hooks.run.messages import BY_HAND

LR = 0.1


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import nets

    return nets


def train(nets: Any, *, anchor: float = byhand.ANCHOR, lam: float = byhand.LAM) -> dict[str, torch.Tensor]:
    """One plain step, whose gradient is that of the weights without noise, and four with everything."""
    model = nets.build().train()
    mixed: byhand.Mixed | None = None
    for number, (x, labels) in enumerate(nets.batches()):
        torch.manual_seed(100 + number)
        loss = byhand.two_passes(model, x, labels) if mixed else byhand.plain(model, x, labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if mixed is None:
            perturb_model(model, lam=lam, seed=0)
            w_pre = byhand.Mixed(model).w_pre
        with torch.no_grad():
            for w, gradient in zip(model.parameters(), gradients, strict=True):
                pull = anchor * (w - w_pre[w]) if mixed and w in w_pre else torch.zeros(())
                w -= LR * (gradient + pull)
        mixed = mixed or byhand.Mixed(nets.build())  # only tells that the first step is over
    return {name: w.detach() for name, w in model.named_parameters()}


@pytest.mark.parametrize(
    "ways",
    [("backward", "own optimizer", "backward again"), pytest.param(("grad",), marks=pytest.mark.sweep)],
    ids=["backward", "grad"],
)
def test_loop_without_an_optimizer(ways: tuple[str, ...], nets: Any, tmp_path: Path) -> None:
    ran = run(tmp_path, "by_hand.py", *byhand.ALL, args=(tmp_path / "final.pt", *ways))
    assert ran.code == 0, ran.err
    found, wanted = torch.load(tmp_path / "final.pt"), train(nets)
    for way in ways:
        byhand.assert_equal(found[way], wanted)
    facts = [tuple(entry[name] for name in ("class", "steps", "perturbed", "mixed")) for entry in ran.models]
    assert facts == [("Net", 5, 6, 3)] * len(ways)
    assert [entry["rdrop_fired"] for entry in ran.models] == [4] * len(ways)
    assert f"surgery: Net: {BY_HAND}" in ran.err


def test_each_of_several_models_is_found(tmp_path: Path) -> None:
    script = """
        import torch
        from torch import nn

        class Critic(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

            def forward(self, x):
                return self.second(self.first(x).relu())

        torch.manual_seed(0)
        maker, critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4)), Critic()

        def descend(model):
            for w in model.parameters():
                w.data -= 0.1 * w.grad
                w.grad = None

        for step in range(5):
            made = maker(torch.randn(8, 2))
            critic(made.detach()).mean().backward()
            descend(critic)
            (-critic(maker(torch.randn(8, 2))).mean()).backward()
            descend(maker)
            for w in critic.parameters():
                w.grad = None
    """
    ran = run(tmp_path, "import textwrap\nexec(textwrap.dedent('''" + script + "'''))", *byhand.NOISE, *byhand.MIXOUT)
    assert ran.code == 0, ran.err
    assert [(entry["class"], entry["mixed"]) for entry in ran.models] == [("Critic", 2), ("Sequential", 2)]


def test_gradients_of_long_ago_are_no_training(tmp_path: Path) -> None:
    script = """
import torch
torch.manual_seed(0)
kept, model = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
kept.weight.grad = torch.ones(4, 4)
before = kept.weight.detach().clone()
for _ in range(3):
    model(torch.ones(2, 4)).square().mean().backward()
    for w in model.parameters():
        w.data -= 0.1 * w.grad
assert torch.equal(kept.weight, before)
"""
    ran = run(tmp_path, script, *byhand.NOISE, *byhand.MIXOUT)
    assert ran.code == 0, ran.err
    assert [entry["steps"] for entry in ran.models] == [3]


def test_weights_that_are_unfrozen_later_are_regularized(tmp_path: Path) -> None:
    script = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
model[0].requires_grad_(False)
for step in range(6):
    if step == 3:
        model[0].requires_grad_(True)
    model(torch.ones(2, 4)).square().mean().backward()
    for w in model.parameters():
        if w.grad is not None:
            w.data -= 0.1 * w.grad
"""
    ran = run(tmp_path, script, *byhand.NOISE, *byhand.MIXOUT, "--anchor", "0.01")
    assert ran.code == 0, ran.err
    (entry,) = ran.models
    assert (entry["perturbed"], entry["mixed"], entry["steps"]) == (4, 2, 6)


def test_recadam_says_that_it_needs_an_optimizer(tmp_path: Path) -> None:
    ran = run(tmp_path, "by_hand.py", "--recadam", "500", args=(tmp_path / "final.pt", "backward"))
    assert ran.code != 0
    assert "recadam: expected a step of a torch.optim.Optimizer that holds" in ran.err


def test_anchor_decays_in_steps_once_there_is_an_optimizer() -> None:
    from surgery import patch_model
    from surgery.hooks.patch import find_patch

    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    patch_model(model, anchor=0.1)
    patch = find_patch(model)
    assert patch is not None
    patch.act_on_gradients()
    w_pre = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    (gradient,) = torch.autograd.grad(model(torch.ones(1, 3).double()).sum(), [model.weight])
    torch.testing.assert_close(gradient, torch.ones_like(w_pre) + 0.1 * (model.weight.detach() - w_pre))
    assert patch.regularizers[0].steps == 1

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.ones(1, 3).double()).sum().backward()
    model.weight.grad = torch.zeros_like(w_pre)
    before = model.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * 0.1 * (before - w_pre))
    (gradient,) = torch.autograd.grad(model(torch.ones(1, 3).double()).sum(), [model.weight])
    torch.testing.assert_close(gradient, torch.ones_like(w_pre))
