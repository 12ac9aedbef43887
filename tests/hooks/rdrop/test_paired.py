"""Losses outside of the model: R-Drop against the paper's equation, written out with two passes of the plain model."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import TokenClassifierOutput

from surgery.hooks import RDrop, patch_model

ALPHA = 1.5
B, T, C = 6, 4, 5
Loss = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Maps (B, T, 3) to logits (B, T, C), or whatever `wrap` makes of them."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, C)).double()
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.body(x))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int) -> torch.Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(1))


X, Y, BITS, REALS = draw(B, T, 3), classes(B, T), draw(B, T, C).gt(0).double(), draw(B, T, C, seed=2)
HOLES = torch.where(torch.arange(B * T).reshape(B, T) % 3 == 0, -100, Y)
SOFT = draw(B * T, C, seed=3).softmax(-1)
SCALE = draw(C, C, seed=4)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 [KL(p||q) + KL(q||p)] of each row."""
    p, q = a.softmax(-1), b.softmax(-1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2


def kl_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same of each Bernoulli variable."""
    return kl(torch.stack([a, torch.zeros_like(a)], -1), torch.stack([b, torch.zeros_like(b)], -1))


def grads(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    loss.backward()
    taken = [p.grad for p in model.parameters() if p.grad is not None]
    assert taken
    model.zero_grad()
    return taken


def check(script: Loss, divergence: Callable[[Any, Any], torch.Tensor], model: nn.Module | None = None) -> None:
    """Compare the script's step on a patched model with the paper's objective, loss and gradient."""
    model = model or Net()
    torch.manual_seed(5)
    a, b = model(X), model(X)
    expected = (script(a) + script(b)) / 2 + ALPHA / 2 * divergence(a, b)
    wanted = grads(expected, model)
    patch_model(model, rdrop=ALPHA)
    torch.manual_seed(5)
    loss = script(model(X))
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads(loss, model), wanted, rtol=1e-8, atol=1e-12)


def flat(z: torch.Tensor) -> torch.Tensor:
    return z.reshape(-1, z.shape[-1])


def mean_kl(of: Loss = lambda z: z) -> Callable[[Any, Any], torch.Tensor]:
    return lambda a, b: kl(of(a), of(b)).mean()


KEPT = HOLES != -100
CROSS_ENTROPY: dict[str, tuple[Loss, Loss]] = {
    "flat": (lambda z: nn.CrossEntropyLoss()(z.reshape(-1, C), Y.reshape(-1)), flat),
    "classes in dim 1": (lambda z: F.cross_entropy(z.transpose(1, 2), Y), flat),
    "permuted twice": (lambda z: F.cross_entropy(z.permute(1, 2, 0), Y.T), flat),
    "one row": (lambda z: F.cross_entropy(z[0, 0], Y[0, 0]), lambda z: z[0, 0]),
    "shifted": (lambda z: F.cross_entropy(flat(z[:, :-1].contiguous()), Y[:, 1:].flatten()), lambda z: z[:, :-1]),
    "last token": (lambda z: F.cross_entropy(z[:, -1], Y[:, -1]), lambda z: z[:, -1]),
    "ignored": (lambda z: F.cross_entropy(flat(z), HOLES.flatten()), lambda z: z[KEPT]),
    "masked before": (lambda z: F.cross_entropy(z[KEPT], Y[KEPT]), lambda z: z[KEPT]),
    "masked_select": (
        lambda z: F.cross_entropy(z.masked_select(KEPT[..., None]).view(-1, C), Y[KEPT]),
        lambda z: z[KEPT],
    ),
    "squeezed": (lambda z: F.cross_entropy(z[:, :1].squeeze(1), Y[:, 0]), lambda z: z[:, 0]),
    "temperature": (lambda z: F.cross_entropy(flat(z / 0.7), Y.flatten()), lambda z: z / 0.7),
    "in place": (lambda z: F.cross_entropy(flat(z.mul(2).add_(SCALE[0])), Y.flatten()), lambda z: 2 * z + SCALE[0]),
    "masked in place": (
        lambda z: F.cross_entropy(flat(z.masked_fill(BITS[0] > 2, -1e9)), Y.flatten()),
        lambda z: z,
    ),
    "matmul after": (lambda z: F.cross_entropy(flat(z @ SCALE), Y.flatten()), lambda z: z @ SCALE),
    "cat": (lambda z: F.cross_entropy(torch.cat([z[0], z[2]]), Y[[0, 2]].flatten()), lambda z: z[[0, 2]]),
    "stack of parts": (
        lambda z: F.cross_entropy(torch.stack(z.unbind(1)).flatten(0, 1), Y.T.flatten()),
        flat,
    ),
    "split": (lambda z: F.cross_entropy(z.split([2, 3], -1)[1][:, 0], Y[:, 0] % 3), lambda z: z[:, 0, 2:]),
    "einsum": (
        lambda z: F.cross_entropy(torch.einsum("btc,cd->btd", z, SCALE).transpose(1, 2), Y),
        lambda z: z @ SCALE,
    ),
    "soft labels": (lambda z: F.cross_entropy(flat(z), SOFT), flat),
    "smoothed": (lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(flat(z), Y.flatten()), flat),
    "nll": (lambda z: nn.NLLLoss()(nn.LogSoftmax(-1)(flat(z)), Y.flatten()), flat),
    "nll dim 1": (lambda z: F.nll_loss(z.log_softmax(-1).transpose(1, 2), Y), flat),
    "nll ignored": (lambda z: F.nll_loss(z.log_softmax(-1).view(-1, C), HOLES.flatten()), lambda z: z[KEPT]),
    "softmax, log, nll": (lambda z: F.nll_loss(torch.log(z.softmax(-1)).view(-1, C), Y.flatten()), flat),
    "mean of none": (lambda z: F.cross_entropy(flat(z), Y.flatten(), reduction="none").mean(), flat),
    "keywords": (lambda z: F.cross_entropy(input=flat(z), target=Y.flatten()), flat),
}


@pytest.mark.parametrize(("script", "rows"), CROSS_ENTROPY.values(), ids=CROSS_ENTROPY)
def test_cross_entropy_outside_minimizes_the_papers_objective(script: Loss, rows: Loss) -> None:
    check(script, mean_kl(rows))


OTHERS: dict[str, tuple[Loss, Callable[[Any, Any], torch.Tensor]]] = {
    "sum": (
        lambda z: F.cross_entropy(flat(z), HOLES.flatten(), reduction="sum") / 7,
        lambda a, b: kl(a, b)[KEPT].sum() / 7,
    ),
    "own mean": (
        lambda z: F.cross_entropy(flat(z), HOLES.flatten(), reduction="none").sum() / KEPT.sum(),
        lambda a, b: kl(a, b)[KEPT].mean(),
    ),
    "weighted rows": (
        lambda z: (F.cross_entropy(flat(z), Y.flatten(), reduction="none") * SOFT[:, 0]).sum(),
        lambda a, b: (kl(a, b).flatten() * SOFT[:, 0]).sum(),
    ),
    "several": (
        lambda z: F.cross_entropy(z[:, 0], Y[:, 0]) + 3 * F.cross_entropy(z[:, 1], Y[:, 1]),
        lambda a, b: kl(a, b)[:, 0].mean() + 3 * kl(a, b)[:, 1].mean(),
    ),
    "bce": (lambda z: nn.BCEWithLogitsLoss()(z, BITS), lambda a, b: kl_bits(a, b).mean()),
    "bce summed": (
        lambda z: F.binary_cross_entropy_with_logits(z[..., 0], BITS[..., 0], reduction="sum"),
        lambda a, b: kl_bits(a, b)[..., 0].sum(),
    ),
    "bce of sigmoid": (lambda z: nn.BCELoss()(torch.sigmoid(z), BITS), lambda a, b: kl_bits(a, b).mean()),
    "mse": (lambda z: nn.MSELoss()(z, REALS), lambda a, b: (a - b).pow(2).mean()),
    "mse turned round": (lambda z: F.mse_loss(REALS, z), lambda a, b: (a - b).pow(2).mean()),
    "mse squeezed": (
        lambda z: F.mse_loss(z[..., :1].squeeze(), REALS[..., 0], reduction="sum"),
        lambda a, b: (a - b)[..., 0].pow(2).sum(),
    ),
}


@pytest.mark.parametrize(("script", "divergence"), OTHERS.values(), ids=OTHERS)
def test_other_losses_outside_minimize_the_papers_objective(script: Loss, divergence: Any) -> None:
    check(script, divergence)


@dataclass
class Record:
    """What a model may return."""

    logits: torch.Tensor
    name: str = "record"


Pair = namedtuple("Pair", ["count", "logits"])


class Own(dict):  # type: ignore[type-arg]
    """A dict of one's own, with attributes."""

    __getattr__ = dict.__getitem__


WRAPS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "dict": (lambda z: {"logits": z, "more": [z]}, lambda out: out["logits"]),
    "nested": (lambda z: {"more": [(z, 1)]}, lambda out: out["more"][0][0]),
    "tuple": (lambda z: (None, z, 3), lambda out: out[1]),
    "dataclass": (lambda z: Record(z), lambda out: out.logits),
    "named tuple": (lambda z: Pair(3, z), lambda out: out.logits),
    "OrderedDict": (lambda z: OrderedDict(logits=z), lambda out: out["logits"]),
    "UserDict": (lambda z: UserDict(logits=z), lambda out: out["logits"]),
    "dict of one's own": (lambda z: Own(logits=z), lambda out: out.logits),
    "namespace": (lambda z: SimpleNamespace(logits=z), lambda out: out.logits),
    "ModelOutput": (lambda z: TokenClassifierOutput(logits=z), lambda out: out.logits),
    "ModelOutput by index": (lambda z: TokenClassifierOutput(logits=z), lambda out: out[0]),
}


@pytest.mark.parametrize(("wrap", "take"), WRAPS.values(), ids=WRAPS)
def test_outputs_of_any_structure_are_paired(wrap: Any, take: Any) -> None:
    model = Net(wrap)
    check(lambda out: F.cross_entropy(flat(take(out)), Y.flatten()), lambda a, b: kl(take(a), take(b)).mean(), model)
    assert type(model(X)) is type(wrap(X))


def test_layers_outside_the_model_are_trained_on_both_passes() -> None:
    model, whole = Net(), nn.Module()
    norm, head = nn.BatchNorm1d(C).double(), nn.Linear(C, 3).double()
    whole.model, whole.norm, whole.head = model, norm, head
    whole.forward = lambda x: head(norm(flat(model(x))))  # type: ignore[method-assign]
    a, b = None, None
    torch.manual_seed(5)
    first, second = model(X), model(X)
    a, b = head(norm(flat(first))), head(norm(flat(second)))
    expected = (F.cross_entropy(a, Y.flatten() % 3) + F.cross_entropy(b, Y.flatten() % 3)) / 2
    wanted = grads(expected + ALPHA / 2 * kl(a, b).mean(), whole)
    patch_model(model, rdrop=ALPHA)
    torch.manual_seed(5)
    loss = F.cross_entropy(whole(X), Y.flatten() % 3)
    torch.testing.assert_close(grads(loss, whole), wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("passes", ["doubled", "two"])
def test_doubled_batch_trains_losses_outside(passes: str) -> None:
    model = patch_model(Net(), rdrop=RDrop(ALPHA, passes=passes))  # type: ignore[arg-type]
    logits = model(X)
    assert logits.shape == (B, T, C)
    ce, both = F.cross_entropy(flat(logits), Y.flatten()), (logits.first, logits.as_subclass(torch.Tensor))
    plain = sum(F.cross_entropy(flat(z), Y.flatten()) for z in both) / 2
    torch.testing.assert_close(ce, plain + ALPHA / 2 * kl(*both).mean(), rtol=1e-9, atol=1e-12)


def test_two_calls_in_one_loss_join_both() -> None:
    """MultipleNegativesRankingLoss: a cross-entropy of the similarities of two encodings."""

    def scores(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 20 * F.normalize(u[:, 0], dim=-1) @ F.normalize(v[:, 0], dim=-1).T

    model, others, target = Net(), draw(B, T, 3, seed=9), torch.arange(B)
    torch.manual_seed(5)
    u = model(X), model(X)
    v = model(others), model(others)
    a, b = scores(u[0], v[0]), scores(u[1], v[1])
    expected = (F.cross_entropy(a, target) + F.cross_entropy(b, target)) / 2 + ALPHA / 2 * kl(a, b).mean()
    wanted = grads(expected, model)
    patch_model(model, rdrop=ALPHA)
    torch.manual_seed(5)
    loss = F.cross_entropy(scores(model(X), model(others)), target)
    torch.testing.assert_close(grads(loss, model), wanted, rtol=1e-8, atol=1e-12)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.drop, self.head = nn.GRU(3, 8).double(), nn.Dropout(0.4), nn.Linear(8, C).double()

    def forward(self, x: torch.Tensor, hidden: Any = None) -> Any:
        states, hidden = self.rnn(self.drop(x), hidden)
        return self.head(states), hidden


@pytest.mark.parametrize("chain", ["detached", "attached", "loss at the end"])
def test_hidden_state_goes_from_call_to_call(chain: str) -> None:
    """Each pass has its own, unless the script detaches it: then both go on from the second's."""
    model, x = Recurrent(), draw(3, T, B, 3)

    def run(call: Any) -> Any:
        hidden, outputs = None, []
        for chunk in x:
            logits, hidden = call(chunk, hidden)
            outputs.append(logits)
        return outputs[-1:] if chain == "loss at the end" else outputs

    def twice(chunk: torch.Tensor, hidden: Any) -> Any:
        if hidden is not None and chain == "detached":
            hidden = (hidden[1].detach(), hidden[1].detach())
        (a, h), (b, g) = (model(chunk, hidden and hidden[i]) for i in (0, 1))
        return (a, b), (h, g)

    def once(chunk: torch.Tensor, hidden: Any) -> Any:
        return model(chunk, hidden.detach() if hidden is not None and chain == "detached" else hidden)

    torch.manual_seed(5)
    terms = [
        sum(F.cross_entropy(flat(z), Y.T.flatten()) for z in (a, b)) / 2 + ALPHA / 2 * kl(a, b).mean()
        for a, b in run(twice)
    ]
    wanted = grads(sum(terms), model)
    patch_model(model, rdrop=ALPHA)
    torch.manual_seed(5)
    loss = sum(F.cross_entropy(flat(z), Y.T.flatten()) for z in run(once))
    torch.testing.assert_close(grads(loss, model), wanted, rtol=1e-8, atol=1e-12)
