"""What R-Drop refuses, in one line each; the model is as it was after any of them."""

import re
from typing import Any

import pytest
import seeded
import torch
from heads import HEADS, IDS
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import _get_current_function_mode_stack
from transformers.cache_utils import DynamicCache

from surgery import Mixout, RDrop, SettingError, SourceError, patch_model, stats, unpatch_model

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")
X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


class Net(nn.Module):
    """Dropout between two layers, and a loss that a test gives."""

    def __init__(self, loss: Any = F.cross_entropy, *, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.dropout, self.head = nn.Linear(3, 6), nn.Dropout(p), nn.Linear(6, 3)
        self.passes = 0
        self.make_loss = loss

    def forward(self, x: torch.Tensor, y: Any = None, **_: Any) -> Any:
        self.passes += 1
        logits = self.head(self.dropout(self.body(x)))
        return {"loss": self.make_loss(logits, y), "logits": logits}


def states(model: Any) -> tuple[Any, Any]:
    model.passes = 0
    return seeded.fingerprint(model), list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def refuses(message: str, error: type[Exception], model: Any, *args: Any, **batch: Any) -> None:
    """Assert that a forward says exactly this, and that neither it nor the patch has left anything behind."""
    rdrop = batch.pop("rdrop", RDrop(1.0))
    before = states(model)
    patch_model(model, rdrop=rdrop)
    patched = states(model)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        model(*args, **batch)
    assert states(model) == patched
    unpatch_model(model)
    assert states(model) == before


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"alpha": alpha}, f"rdrop: expected an alpha of at least 0, got {alpha!r}. Give one such as 1.0.")
            for alpha in (-0.1, NAN, INF, True, "1", None)
        ),
        *(
            ({"every": every}, f"every: expected a whole number of at least 1, got {every!r}. Give one such as 1.")
            for every in (0, -1, 1.5, True, "2")
        ),
        ({"passes": "one"}, "passes: expected auto or doubled or two, got 'one'. Choose one of them."),
        ({"scale": "sum"}, "scale: expected mean or paper, got 'sum'. Choose one of them."),
        ({"kl_reduction": "mean"}, "kl_reduction: expected match or sum, got 'mean'. Choose one of them."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rdrop_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        RDrop(**{"alpha": 1.0} | settings)


@pytest.mark.parametrize("alpha", [-0.1, NAN, True], ids=str)
def test_patch_model_refuses_an_alpha_out_of_range(alpha: Any) -> None:
    model = Net()
    before = states(model)
    with pytest.raises(SettingError, match=re.escape(f"rdrop: expected an alpha of at least 0, got {alpha!r}.")):
        patch_model(model, rdrop=alpha)
    assert states(model) == before


def test_patch_model_refuses_weights_for_rdrop_alone() -> None:
    model = Net()
    before = states(model)
    message = "include: expected mixout, anchor or recadam, which act on weights, got rdrop alone. Leave include out."
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        patch_model(model, rdrop=1.0, include="head.*")
    assert states(model) == before


# -- batches -------------------------------------------------------------------------------------------------------

DOUBLED = RDrop(1.0, passes="doubled")
WAY_OUT = 'Use RDrop(alpha, passes="two").'
TO_DOUBLE = "passes: expected tensors of one first dimension to double, got"


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"position_ids": torch.arange(8)[None]}, "input_ids (4, 8), position_ids (1, 8), labels (4,)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "input_ids (4, 8), labels (3,)"),
        ({"past_key_values": DynamicCache()}, "input_ids (4, 8), labels (4,), past_key_values DynamicCache"),
    ],
    ids=["position-ids", "labels", "cache"],
)
def test_doubling_refuses_what_it_cannot_double(batch: dict[str, Any], got: str) -> None:
    given = {"input_ids": IDS, "labels": Y} | batch
    refuses(
        f'{TO_DOUBLE} {got}. Use passes="two".', SettingError, seeded.bert(num_labels=3).train(), rdrop=DOUBLED, **given
    )


def test_doubling_refuses_a_batch_of_no_tensors() -> None:
    refuses(f'{TO_DOUBLE} none. Use passes="two".', SettingError, Net(), 3, rdrop=DOUBLED)


def _transposed(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(2, -1, 3).transpose(0, 1).reshape(-1, 3), y.view(2, -1).t().flatten())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda logits, y: F.cross_entropy(logits[1:], y[1:]),
            "passes: expected the doubled batch in the first dimension of logits and labels, got shapes (7, 3) and "
            "(7,) in cross_entropy. ",
        ),
        (
            lambda logits, y: F.mse_loss(logits.mean(), y.float().mean()),
            "passes: expected the doubled batch in the first dimension of logits and labels, got shapes () and () in "
            "mse_loss. ",
        ),
        (
            _transposed,
            "passes: expected the labels of one batch twice over in cross_entropy, got halves that differ: the batch "
            "is not in the first dimension. ",
        ),
        (
            lambda logits, y: F.cross_entropy(logits, y, reduction="none").mean(),
            "passes: expected a loss that is reduced on a doubled batch, got cross_entropy without. ",
        ),
        (
            lambda logits, y: F.nll_loss(F.log_softmax(logits, -1), y),
            "passes: expected a loss that is reduced on a doubled batch, got log_softmax without. ",
        ),
    ],
    ids=["odd", "scalar", "second-dimension", "rows", "log_softmax"],
)
def test_doubling_refuses_losses_that_cannot_be_halved(loss: Any, message: str) -> None:
    refuses(message + WAY_OUT, SettingError, Net(loss), X, Y, rdrop=DOUBLED)


def test_labels_of_another_length_than_the_logits_are_refused() -> None:
    message = "labels: expected shape (4,) for logits of shape (4, 3), got (3,). Give one label for each row."
    refuses(message, SettingError, Net(), X, Y[:3])
    refuses(message, SettingError, seeded.bert(num_labels=3).train(), input_ids=IDS, labels=Y[:3])


# -- passes that do not fit ----------------------------------------------------------------------------------------


class Fickle(Net):
    """Takes another way in its second pass."""

    def __init__(self, second: Any) -> None:
        super().__init__()
        self.second = second

    def forward(self, x: torch.Tensor, y: Any = None, **more: Any) -> Any:
        if self.passes % 2:
            self.passes += 1
            return self.second(self.head(self.dropout(self.body(x))), y)
        return super().forward(x, y, **more)


@pytest.mark.parametrize(
    ("second", "message", "error"),
    [
        (
            lambda logits, _: logits,
            "rdrop: expected the same losses in both passes, got cross_entropy in the first only.",
            SourceError,
        ),
        (
            lambda logits, y: F.mse_loss(logits.sum(-1), y.float()),
            "rdrop: expected the same losses in both passes, got mse_loss in the second only.",
            SourceError,
        ),
        (
            lambda logits, y: F.cross_entropy(logits[1:], y[1:]),
            "rdrop: expected logits of one shape in both passes, got (4, 3) and (3, 3) in cross_entropy. "
            "The model must take the same way twice.",
            SettingError,
        ),
    ],
    ids=["first-only", "second-only", "shapes"],
)
def test_passes_that_do_not_fit_are_refused(second: Any, message: str, error: Any) -> None:
    refuses(message, error, Fickle(second), X, Y)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_pass_leaves_nothing_behind(error: type[BaseException], number: int) -> None:
    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if model.passes == number:
            raise error
        return F.cross_entropy(logits, y)

    model = Net(loss)
    before = states(model)
    patch_model(model, rdrop=1.0)
    with pytest.raises(error):
        model(X, Y)
    model.passes = 3
    model(X, Y)["loss"].backward()
    assert stats(model)["rdrop_fired"] == 1
    assert states(model)[1] == before[1]
    model.passes = 0
    with pytest.raises(error):
        model(X, Y)
    unpatch_model(model)
    assert states(model) == before


# -- randomness ----------------------------------------------------------------------------------------------------

NO_RANDOMNESS = (
    "rdrop: expected two passes that differ, got logits that are equal to the bit: no dropout is at work. "
    "Give the model dropout, or Mixout beside it, or train without rdrop."
)


@pytest.mark.parametrize("passes", ["two", "doubled"])
def test_a_model_without_randomness_is_refused_at_once(passes: Any) -> None:
    refuses(NO_RANDOMNESS, SourceError, Net(p=0.0), X, Y, rdrop=RDrop(1.0, passes=passes))


def test_llama_without_dropout_is_refused() -> None:
    model = HEADS["llama"].model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    refuses(NO_RANDOMNESS, SourceError, model, **HEADS["llama"].batch)


def train(model: Any, steps: int, **adam: Any) -> list[float]:
    """The KL of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **adam)
    found = []
    for _ in range(steps):
        model(X, Y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(stats(model)["kl"])
    return found


def test_a_head_that_starts_at_zero_is_no_false_alarm() -> None:
    model = Net()
    nn.init.zeros_(model.head.weight)
    kl = train(patch_model(model, rdrop=1.0), 3)
    assert kl[0] == 0 < min(kl[1:])


def test_weights_that_start_at_w_pre_are_no_false_alarm() -> None:
    kl = train(patch_model(Net(p=0.0), rdrop=1.0, mixout=Mixout(0.5)), 3)
    assert kl[0] == 0 < min(kl[1:])


def test_dropout_that_never_reaches_the_logits_is_refused_after_ten_steps() -> None:
    class Beside(Net):
        def forward(self, x: torch.Tensor, y: Any = None, **more: Any) -> Any:
            F.dropout(x, 0.5)
            return super().forward(x, y, **more)

    model = patch_model(Beside(p=0.0), rdrop=1.0)
    assert train(model, 10) == [0.0] * 10
    with pytest.raises(SourceError, match=f"^{re.escape(NO_RANDOMNESS)}$"):
        train(model, 1)
