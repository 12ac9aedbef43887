"""Losses put together from log_softmax: R-Drop against the paper's equation, in the model and outside of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from surgery.errors import SourceError
from surgery.hooks import patch_model

ALPHA = 1.5
B, T, C = 6, 4, 5
Loss = Callable[[torch.Tensor], torch.Tensor]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


X, TEACHER, SCALE = draw(B, T, 3), draw(B, T, C, seed=3), draw(B, T, seed=4).exp()
Y = torch.randint(C, (B, T), generator=torch.Generator().manual_seed(1))
HOLES = torch.where(torch.arange(B * T).reshape(B, T) % 3 == 0, -100, Y)
KEPT = HOLES != -100
ROWS = torch.arange(B * T)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 [KL(p||q) + KL(q||p)] of each row."""
    p, q = a.softmax(-1), b.softmax(-1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2


class Net(nn.Module):
    """Returns log-probabilities, or what `head` makes of the logits."""

    def __init__(self, head: Callable[[torch.Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, C)).double()
        self.head = head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x))


def grads(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check(script: Callable[[Any], torch.Tensor], divergence: Any, head: Any, *, rtol: float = 1e-9) -> None:
    """Compare the step of `script` on what the model's head returns with the paper's objective."""
    model = Net()
    torch.manual_seed(5)
    a, b = model(X), model(X)
    expected = (script(head(a)) + script(head(b))) / 2 + ALPHA / 2 * divergence(a, b)
    wanted = grads(expected, model)
    patch_model(model, rdrop=ALPHA).head = head
    torch.manual_seed(5)
    loss = script(model(X))
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=rtol, atol=rtol / 1000)
    assert len(wanted) == 4
    torch.testing.assert_close(grads(loss, model), wanted, rtol=10 * rtol, atol=rtol / 1000)


def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return kl(a, b).mean()


def kept(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return kl(a, b)[KEPT].mean()


def smooth(logp: torch.Tensor) -> torch.Tensor:
    nll = -logp.gather(-1, Y[..., None]).squeeze(-1)
    return (0.9 * nll + 0.1 * -logp.mean(-1)).mean()


MADE: dict[str, tuple[Loss, Callable[[Any, Any], torch.Tensor]]] = {
    "gather": (lambda logp: -logp.gather(-1, Y[..., None]).mean(), mean),
    "index": (lambda logp: -logp.view(-1, C)[ROWS, Y.flatten()].mean(), mean),
    "take_along_dim": (lambda logp: torch.take_along_dim(-logp, Y[..., None], -1).mean(), mean),
    "one_hot": (lambda logp: -(F.one_hot(Y, C) * logp).sum(-1).mean(), mean),
    "one_hot first": (lambda logp: torch.sum(-F.one_hot(Y, C).double() * logp, dim=-1).mean(), mean),
    "einsum": (lambda logp: -torch.einsum("btc,btc->bt", F.one_hot(Y, C).double(), logp).mean(), mean),
    "masked": (
        lambda logp: -(logp.gather(-1, Y[..., None]).squeeze(-1) * KEPT).sum() / KEPT.sum(),
        kept,
    ),
    "masked_fill": (
        lambda logp: (-logp.gather(-1, Y[..., None]).squeeze(-1)).masked_fill(~KEPT, 0.0).sum() / KEPT.sum(),
        kept,
    ),
    "weighted": (
        lambda logp: -(SCALE * logp.gather(-1, Y[..., None])[..., 0]).sum(),
        lambda a, b: (SCALE * kl(a, b)).sum(),
    ),
    "smooth": (smooth, mean),
    "nll": (lambda logp: F.nll_loss(logp.view(-1, C), HOLES.flatten()), kept),
    "nll module": (lambda logp: nn.NLLLoss()(logp.permute(0, 2, 1), HOLES), kept),
    "nll at once": (lambda logp: F.nll_loss(logp[:, 0], Y[:, 0]), lambda a, b: kl(a, b)[:, 0].mean()),
    "nll of a sum": (
        lambda logp: nn.NLLLoss(reduction="sum")(logp.flatten(0, 1), Y.flatten()),
        lambda a, b: kl(a, b).sum(),
    ),
    "teacher": (
        lambda logp: F.kl_div(logp.flatten(0, 1), TEACHER.softmax(-1).flatten(0, 1), reduction="batchmean"),
        mean,
    ),
    "teacher by name": (
        lambda logp: F.kl_div(target=TEACHER.softmax(-1), input=logp, reduction="sum"),
        lambda a, b: kl(a, b).sum(),
    ),
    "teacher's logarithms": (
        lambda logp: nn.KLDivLoss(reduction="sum", log_target=True)(logp, TEACHER.log_softmax(-1)),
        lambda a, b: kl(a, b).sum(),
    ),
    "teacher by hand": (
        lambda logp: (TEACHER.softmax(-1) * (TEACHER.log_softmax(-1) - logp)).sum(-1).mean(),
        mean,
    ),
    "divided": (
        lambda logp: -logp.gather(-1, Y[..., None]).sum() / KEPT.sum(),
        lambda a, b: kl(a, b).sum() / KEPT.sum(),
    ),
}
WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "function": lambda z: F.log_softmax(z, dim=-1),
    "method": lambda z: z.log_softmax(-1),
    "torch": lambda z: torch.log_softmax(z, dim=-1),
    "module": lambda z: nn.LogSoftmax(dim=2)(z),
}


@pytest.mark.parametrize("where", ["outside", "in the model"])
@pytest.mark.parametrize(("script", "divergence"), MADE.values(), ids=MADE)
def test_hand_made_loss_minimizes_the_papers_objective(script: Loss, divergence: Any, where: str) -> None:
    if where == "outside":
        check(lambda z: script(F.log_softmax(z, -1)), divergence, lambda z: z)
    else:
        check(script, divergence, lambda z: F.log_softmax(z, -1))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_log_softmax_is_intercepted(way: Any) -> None:
    check(lambda z: -way(z).gather(-1, Y[..., None]).mean(), mean, lambda z: z)
    check(lambda logp: F.nll_loss(logp.transpose(1, 2), Y), mean, way)


@pytest.mark.parametrize("labels", [Y, HOLES], ids=["all", "padded"])
def test_label_smoother_of_transformers(labels: torch.Tensor) -> None:
    smoother = LabelSmoother(epsilon=0.1)
    check(
        lambda out: smoother(out, labels.clone()),
        mean if labels is Y else kept,
        lambda z: TokenClassifierOutput(logits=z),
        rtol=1e-6,  # it adds up in float32
    )


def test_distillation_with_a_temperature_beside_cross_entropy() -> None:
    def script(z: torch.Tensor) -> torch.Tensor:
        teacher = F.kl_div(
            F.log_softmax(z / 2, -1).flatten(0, 1), (TEACHER / 2).softmax(-1).flatten(0, 1), reduction="batchmean"
        )
        return 0.3 * F.cross_entropy(z.flatten(0, 1), Y.flatten()) + 0.7 * 4 * teacher

    check(script, lambda a, b: 0.3 * kl(a, b).mean() + 2.8 * kl(a / 2, b / 2).mean(), lambda z: z)


NOT_AFFINE: dict[str, tuple[Loss, str]] = {
    "squared": (lambda logp: -logp.gather(-1, Y[..., None]).pow(2).mean(), "pow"),
    "focal": (
        lambda logp: -((1 - logp.gather(-1, Y[..., None]).exp()) ** 2 * logp.gather(-1, Y[..., None])).mean(),
        "exp",
    ),
    "focal of all": (lambda logp: -((1 - logp.exp()) ** 2 * logp)[..., 0].mean(), None),
    "logsumexp": (lambda logp: (logp + 1).logsumexp(-1).mean(), "logsumexp"),
    "preferences": (lambda logp: -F.logsigmoid(logp[..., 0] - logp[..., 1]).mean(), "log_sigmoid"),
    "divisor": (lambda logp: (SCALE[..., None] / logp).mean(), None),
    "divisor by name": (lambda logp: torch.div(SCALE[..., None], other=logp).mean(), None),
    "product by name": (lambda logp: torch.mul(logp, other=logp).mean(), None),
    "reverse by name": (
        lambda logp: F.kl_div(target=logp, input=TEACHER.log_softmax(-1), log_target=True, reduction="sum"),
        None,
    ),
    "reverse": (
        lambda logp: F.kl_div(TEACHER.log_softmax(-1), logp, log_target=True, reduction="sum"),
        None,
    ),
}


@pytest.mark.parametrize(("script", "name"), NOT_AFFINE.values(), ids=NOT_AFFINE)
@pytest.mark.parametrize("where", ["outside", "in the model"])
def test_loss_that_is_no_sum_of_log_probabilities_is_refused(script: Loss, name: str | None, where: str) -> None:
    model = patch_model(Net(WAYS["function"] if where != "outside" else lambda z: z), rdrop=ALPHA)
    made = script if where != "outside" else lambda z: script(F.log_softmax(z, -1))
    with pytest.raises(SourceError) as error:
        made(model(X)).backward()
    if name:
        assert str(error.value) == (
            f"rdrop: expected a loss that is a weighted sum of its rows, or of log-probabilities, got {name} of them: "
            "R-Drop has no formula for it, as for all losses of pairs or groups (DPO, GRPO, reward). Leave rdrop out; "
            "noise, Mixout and the anchor work there."
        )


def test_entropy_beside_the_loss_is_of_the_second_pass() -> None:
    def entropy(logp: torch.Tensor) -> torch.Tensor:
        return -(logp.exp() * logp).sum(-1).mean()

    model = Net()
    torch.manual_seed(5)
    a, b = model(X), model(X)
    nll = sum(F.nll_loss(z.log_softmax(-1).transpose(1, 2), Y) for z in (a, b)) / 2
    wanted = grads(nll + ALPHA / 2 * kl(a, b).mean() - 0.1 * entropy(b.log_softmax(-1)), model)
    patch_model(model, rdrop=ALPHA)
    torch.manual_seed(5)
    logp = model(X).log_softmax(-1)
    loss = F.nll_loss(logp.transpose(1, 2), Y) - 0.1 * entropy(logp)
    torch.testing.assert_close(grads(loss, model), wanted, rtol=1e-8, atol=1e-12)


def test_metrics_of_log_probabilities_are_of_the_second_pass() -> None:
    model = patch_model(Net(WAYS["function"]), rdrop=ALPHA)
    torch.manual_seed(5)
    logp = model(X)
    torch.manual_seed(5)
    logits = model.body(X), model.body(X)
    assert logp.detach().equal(logits[1].log_softmax(-1))
    assert logp.exp().sum(-1).allclose(torch.ones(B, T, dtype=torch.double))
    assert logp.argmax(-1).equal(logits[1].argmax(-1))
    with torch.no_grad():
        assert F.nll_loss(logp.transpose(1, 2), Y).equal(F.nll_loss(logits[1].log_softmax(-1).transpose(1, 2), Y))
