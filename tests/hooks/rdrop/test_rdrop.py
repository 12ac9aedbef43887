"""R-Drop's loss and gradients against the paper's equation, where the model makes its own loss."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from heads import CAUSAL, HEADS, Head, grads_of, symmetric_kl
from torch import nn
from torch.nn import functional as F  # noqa: N812

from surgery import RDrop, patch_model, stats
from surgery.hooks.marks import PATCH

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHA = 1.5
SEED = 3
each_head = pytest.mark.parametrize("name", HEADS)


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in batch.items()
    }


def halves(output: Any) -> tuple[Any, Any]:
    """The outputs of the two halves of a doubled batch, as far as a divergence reads them."""
    kinds = [name for name in output if name.endswith("logits")]
    return tuple(type(output)(**{name: output[name].chunk(2)[half] for name in kinds}) for half in (0, 1))


def expect(head: Head, passes: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The paper's equation, halved, without surgery."""
    model = head.model()
    torch.manual_seed(SEED)
    if passes == "two":
        a, b = model(**head.batch), model(**head.batch)
        ce = (a.loss + b.loss) / 2
    else:
        both = model(**doubled(head.batch))
        a, b = halves(both)
        ce = both.loss / 2 if "num_items_in_batch" in head.batch else both.loss
    loss = ce + ALPHA / 2 * head.divergence(a, b)
    loss.backward()
    return loss.detach(), grads_of(model)


@pytest.mark.parametrize("passes", ["two", "doubled"])
@each_head
def test_rdrop_is_the_papers_equation(name: str, passes: Any) -> None:
    head = HEADS[name]
    loss, grads = expect(head, passes)
    model = patch_model(head.model(), rdrop=RDrop(ALPHA, passes=passes))
    torch.manual_seed(SEED)
    output = model(**head.batch)
    output.loss.backward()
    tolerance = 1e-6 if name in CAUSAL else 1e-12
    torch.testing.assert_close(output.loss, loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads_of(model), grads, rtol=tolerance, atol=tolerance)


@dataclass
class Made:
    """What a model of one's own may return."""

    scores: torch.Tensor
    cost: torch.Tensor


class Own(nn.Module):
    """A language model as nanoGPT's: its loss is made in forward, of flattened logits, where the target is not -1.

    Args:
        kind: of what it returns.
    """

    def __init__(self, kind: str = "tuple", *, smoothing: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.loss = nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=smoothing)
        self.body = nn.Sequential(nn.Embedding(40, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        logits = self.body(x)
        if y is None:
            return logits
        loss = self.loss(logits.view(-1, 5), y.view(-1))
        made = {
            "tuple": (logits, loss),
            "dict": {"logits": logits, "loss": loss},
            "alone": loss,
            "first": [loss, logits],
        }
        return Made(logits, loss) if self.kind == "dataclass" else made[self.kind]


def own_loss(output: Any) -> torch.Tensor:
    parts = {**output} if isinstance(output, dict) else vars(output) if isinstance(output, Made) else output
    leaves = parts.values() if isinstance(parts, dict) else parts if isinstance(parts, tuple | list) else [parts]
    return next(leaf for leaf in leaves if leaf.dim() == 0)


X = HEADS["token"].batch["input_ids"]
Y = HEADS["token"].batch["labels"].clamp(min=-1)


def expect_own(smoothing: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = Own("tuple", smoothing=smoothing)
    torch.manual_seed(SEED)
    (a, loss_a), (b, loss_b) = model(X, Y), model(X, Y)
    loss = (loss_a + loss_b) / 2 + ALPHA / 2 * symmetric_kl(a, b)[Y != -1].mean()
    loss.backward()
    return loss.detach(), grads_of(model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothed"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "alone", "first"])
def test_rdrop_joins_the_loss_of_a_model_of_ones_own(kind: str, smoothing: float) -> None:
    loss, grads = expect_own(smoothing)
    model = patch_model(Own(kind, smoothing=smoothing), rdrop=ALPHA)
    torch.manual_seed(SEED)
    output = model(X, Y)
    own_loss(output).backward()
    assert type(output) is type(Own(kind)(X, Y))
    torch.testing.assert_close(own_loss(output), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads_of(model), grads, rtol=1e-12, atol=1e-12)


class ByHand(Own):
    """As ProphetNet: log-probabilities first, their loss after."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        logits = self.body(x)
        assert y is not None
        return logits, F.nll_loss(F.log_softmax(logits.view(-1, 5), -1), y.view(-1), ignore_index=-1)


def test_rdrop_joins_log_softmax_and_nll_loss_in_forward() -> None:
    loss, grads = expect_own(0.0)
    model = patch_model(ByHand(), rdrop=ALPHA)
    torch.manual_seed(SEED)
    made = model(X, Y)[1]
    made.backward()
    torch.testing.assert_close(made, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads_of(model), grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "alone", "first"])
def test_rdrop_doubles_the_batch_of_a_model_of_ones_own(kind: str) -> None:
    plain = Own()
    torch.manual_seed(SEED)
    logits, ce = plain(torch.cat([X, X]), torch.cat([Y, Y]))
    a, b = logits.chunk(2)
    model = patch_model(Own(kind), rdrop=RDrop(ALPHA, passes="doubled"))
    torch.manual_seed(SEED)
    output = model(X, y=Y)
    loss = ce + ALPHA / 2 * symmetric_kl(a, b)[Y != -1].mean()
    torch.testing.assert_close(own_loss(output), loss, rtol=1e-12, atol=1e-12)
    if kind == "dataclass":
        assert torch.equal(output.scores, b)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [({"scale": "paper"}, (2, 2)), ({"kl_reduction": "sum"}, (1, int((Y != -1).sum())))],
    ids=["paper", "sum"],
)
@pytest.mark.parametrize("passes", ["two", "doubled"])
def test_rdrop_scales_as_the_authors_do(settings: Any, factors: tuple[int, int], passes: Any) -> None:
    plain, (ce, kl) = Own(), factors
    torch.manual_seed(SEED)
    if passes == "two":
        (a, loss_a), (b, loss_b) = plain(X, Y), plain(X, Y)
    else:
        logits, loss_a = plain(torch.cat([X, X]), torch.cat([Y, Y]))
        (a, b), loss_b = logits.chunk(2), loss_a
    model = patch_model(Own(), rdrop=RDrop(ALPHA, passes=passes, **settings))
    torch.manual_seed(SEED)
    expected = ce * (loss_a + loss_b) / 2 + kl * ALPHA / 2 * symmetric_kl(a, b)[Y != -1].mean()
    torch.testing.assert_close(model(X, Y)[1], expected, rtol=1e-12, atol=1e-12)


@each_head
def test_alpha_0_is_the_doubled_batch_to_the_bit(name: str) -> None:
    head = HEADS[name]
    model = head.model()
    torch.manual_seed(SEED)
    expected = model(**doubled(head.batch)).loss
    if name == "llama-items":
        expected = expected / 2  # the count is of one batch
    expected.backward()
    grads = grads_of(model)
    patch_model(model, rdrop=RDrop(0, passes="doubled"))
    torch.manual_seed(SEED)
    loss = model(**head.batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grads_of(model), grads, rtol=0, atol=0)


def test_weights_of_classes_are_not_halved_with_the_batch() -> None:
    class Tags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 8)).double()
            self.register_buffer("weight", torch.arange(1.0, 9.0).double())

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.binary_cross_entropy_with_logits(self.body(x), y, pos_weight=self.weight)

    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4, 8)).double()  # as many classes as doubled rows
    plain, model = Tags(), patch_model(Tags(), rdrop=RDrop(1e-9, passes="doubled"))
    torch.manual_seed(SEED)
    expected = plain(torch.cat([x, x]), torch.cat([y, y]))
    torch.manual_seed(SEED)
    torch.testing.assert_close(model(x, y), expected, rtol=1e-6, atol=1e-6)


class Choosing(nn.Module):
    """Chooses a layer at random, as losses over some of a model's layers do, by Python's generator or NumPy's."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(50))
        self.dropout = nn.Dropout(0.5)
        self.choose = choose
        self.chosen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.chosen.append(int(self.choose(50)))
        return self.layers[self.chosen[-1]](self.dropout(x))


@pytest.mark.parametrize("choose", [random.randrange, np.random.randint], ids=["python", "numpy"])
def test_both_passes_choose_alike_and_differ_in_dropout_alone(choose: Any) -> None:
    model = patch_model(Choosing(choose), rdrop=1.0)
    labels = torch.zeros(8, dtype=torch.long)
    random.seed(0)
    np.random.seed(0)
    for _ in range(5):
        F.cross_entropy(model(torch.randn(8, 4)), labels).backward()
    assert model.chosen[::2] == model.chosen[1::2]
    assert stats(model)["kl"] > 0
    random.seed(0)
    np.random.seed(0)
    assert model.chosen[::2] == [int(choose(50)) for _ in range(5)], "the script draws what it draws without R-Drop"


def test_rdrop_has_not_acted_while_both_passes_are_equal() -> None:
    """Mixout takes the place of dropout, and at the first step w is w_pre."""
    model = patch_model(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 3)), rdrop=1.0, mixout=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    own = model.__dict__[PATCH].regularizers[1]
    for has_acted in (False, True):
        F.cross_entropy(model(torch.randn(8, 64)), torch.zeros(8, dtype=torch.long)).backward()
        assert own.has_acted == has_acted
        optimizer.step()
