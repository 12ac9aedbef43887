"""R-Drop beside Mixout, gradient checkpointing, mixed precision, accumulation, accelerate and PEFT."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import seeded
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import CheckpointError, checkpoint

from surgery import Mixout, RDrop, SourceError, describe, patch_model, stats, unpatch_model

ALPHA, SIZE, CLASSES, ROWS = 1.5, 8, 3, 6
TWO = RDrop(ALPHA, passes="two")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
reentrancy = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
placement = pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])


class Net(nn.Module):
    """Returns its loss if it is given labels; parts of it may be recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(SIZE, CLASSES)
        self.run: Callable[..., Any] = lambda part, *args: part(*args)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.run(self.body, x))
        return logits if y is None else F.cross_entropy(logits, y)


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def rows(dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def objective(a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Half of the paper's loss, from its equation."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    ce = -(log_p + log_q).gather(1, y[:, None])[:, 0] / 2
    return (ce + ALPHA / 2 * kl).mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def direct(model: nn.Module, logits: Callable[[], torch.Tensor], y: torch.Tensor) -> Any:
    """Two explicit passes of a model without R-Drop, their loss and its gradients."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = objective(logits(), logits(), y)
    loss.backward()
    return loss.item(), gradients(model)


def step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Any:
    model.zero_grad()
    torch.manual_seed(5)
    value = loss()
    value.backward()
    return value.item(), gradients(model)


def assert_equal(found: Any, expected: Any, *, tolerance: float = 1e-12) -> None:
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


def moved(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w) / 10)
    return model


# -- Mixout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("w_pre_device", ["same", "cpu"])
def test_mixout_masks_of_the_two_passes_differ_and_follow_the_order(granularity: str, w_pre_device: str) -> None:
    mixout, batch = Mixout(0.5, granularity=granularity), seeded.batch(4)
    plain, model = (seeded.bert(**NO_DROPOUT).double() for _ in range(2))
    patch_model(plain, mixout=mixout)
    patch_model(model, mixout=mixout, rdrop=ALPHA, w_pre_device=w_pre_device)
    for each in (plain, model):
        moved(each)
    expected = direct(plain, lambda: plain(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert_equal(step(model, lambda: model(**batch).loss), expected)
    assert_equal(
        step(model, lambda: F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])), expected
    )
    assert stats(model)["kl"] > 1e-6


def test_mixout_of_a_tied_weight_draws_one_mask_for_each_pass() -> None:
    ids = seeded.batch(4)["input_ids"]
    models = [seeded.gpt2().double() for _ in range(2)]
    for model, settings in zip(models, ({}, {"rdrop": ALPHA}), strict=True):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        patch_model(model, mixout=0.5, include="transformer.wte", **settings)
        moved(model)
    plain, model = models
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    y = ids[:, 1:].reshape(-1)
    expected = direct(plain, lambda: plain(input_ids=ids).logits[:, :-1].reshape(-1, seeded.VOCAB), y)
    found = step(model, lambda: model(input_ids=ids, labels=ids).loss)
    assert_equal(found, expected, tolerance=1e-5)  # the model casts its logits to float32
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_mixout_without_dropout_waits_for_the_second_step() -> None:
    model = patch_model(seeded.bert(**NO_DROPOUT), mixout=0.5, rdrop=ALPHA).train()
    optimizer, found = torch.optim.SGD(model.parameters(), 0.5), []
    for _ in range(4):
        step(model, lambda: model(**seeded.batch(4)).loss)
        optimizer.step()
        found.append(stats(model)["kl"])
    assert found[0] == 0  # every mask gives w_pre
    assert min(found[1:]) > 0


def test_mixout_of_probability_zero_takes_rdrop_for_what_it_is() -> None:
    model = patch_model(net(), mixout=Mixout(0.0, replace_dropout=False), rdrop=TWO)
    x, y = rows()
    plain = net()
    assert_equal(step(model, lambda: model(x, y)), direct(plain, lambda: plain(x), y))


# -- gradient checkpointing ---------------------------------------------------------------------------------------


@placement
@reentrancy
def test_checkpointed_part_recomputes_the_dropout_of_its_own_pass(use_reentrant: bool, is_inside: bool) -> None:
    (x, y), plain, model = rows(), net(), patch_model(net(), rdrop=TWO)
    x.requires_grad_()
    model.run = lambda part, *args: checkpoint(part, *args, use_reentrant=use_reentrant)
    found = step(model, (lambda: model(x, y)) if is_inside else lambda: F.cross_entropy(model(x), y))
    assert_equal(found, direct(plain, lambda: plain(x), y))


@placement
@reentrancy
@pytest.mark.parametrize("settings", [{}, {"mixout": 0.5}], ids=["alone", "mixout"])
def test_gradient_checkpointing_of_transformers_changes_nothing(
    settings: Any, use_reentrant: bool, is_inside: bool
) -> None:
    batch = seeded.batch(4)
    plain, model = (moved(patch_model(seeded.bert().double(), rdrop=TWO, **settings)).train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()

    def loss(each: Any) -> torch.Tensor:
        if is_inside:
            return each(**batch).loss
        return F.cross_entropy(each(input_ids=batch["input_ids"]).logits, batch["labels"])

    expected = step(plain, lambda: loss(plain))
    assert_equal(step(model, lambda: loss(model)), expected)
    assert stats(model)["kl"] == pytest.approx(stats(plain)["kl"]) != 0


class CheckpointedLoss(Net):
    use_reentrant = False

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        loss: torch.Tensor = checkpoint(super().forward, x, y, use_reentrant=self.use_reentrant)
        return loss


@pytest.mark.parametrize(("use_reentrant", "error"), [(True, SourceError), (False, CheckpointError)])
def test_loss_within_a_checkpointed_region_is_refused(use_reentrant: bool, error: type[Exception]) -> None:
    """Its recomputation is torch's own, and no loss in it is intercepted."""
    torch.manual_seed(0)
    model = patch_model(CheckpointedLoss().double(), rdrop=TWO)
    model.use_reentrant = use_reentrant
    x, y = rows()
    x.requires_grad_()
    with pytest.raises(error):
        step(model, lambda: model(x, y))


# -- precision ----------------------------------------------------------------------------------------------------


@placement
def test_autocast_casts_as_in_two_passes(is_inside: bool) -> None:
    (x, y), plain, model = rows(torch.float32), net(torch.float32), patch_model(net(torch.float32), rdrop=TWO)
    with torch.autocast("cpu", torch.bfloat16):
        expected = direct(plain, lambda: plain(x).float(), y)
        found = step(model, (lambda: model(x, y)) if is_inside else lambda: F.cross_entropy(model(x), y))
    assert_equal(found, expected, tolerance=0.01)
    assert found[1]["head.weight"].dtype == torch.float32


@placement
def test_scaled_float16_gives_scaled_gradients(is_inside: bool) -> None:
    (x, y), plain, model = rows(torch.float32), net(torch.float32), patch_model(net(torch.float32), rdrop=TWO)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            value = model(x, y) if is_inside else F.cross_entropy(model(x), y)
        return scaler.scale(value)

    value, _ = step(model, loss)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_equal((value / 2**10, gradients(model)), direct(plain, lambda: plain(x), y), tolerance=0.01)
    assert scaler.get_scale() == 2**10


@pytest.mark.parametrize("passes", ["two", "doubled"])
def test_accumulated_gradients_are_those_of_each_batch(passes: Any) -> None:
    model, other = (patch_model(seeded.bert().double(), rdrop=RDrop(ALPHA, passes=passes)).train() for _ in range(2))
    torch.manual_seed(5)
    for part in (0, 1):
        (model(**seeded.batch(4, seed=part)).loss / 2).backward()
    torch.manual_seed(5)
    losses = [other(**seeded.batch(4, seed=part)).loss for part in (0, 1)]
    expected = torch.autograd.grad(sum(losses) / 2, [w for w in other.parameters() if w.requires_grad])
    for found, wanted in zip(gradients(model).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert stats(model)["rdrop_fired"] == 2


@pytest.mark.parametrize("is_first", [True, False], ids=["patched before", "patched after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@placement
def test_accelerate_prepares_a_patched_model(is_first: bool, precision: str, is_inside: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    plain, model = net(torch.float32), net(torch.float32)
    if is_first:
        patch_model(model, rdrop=TWO)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    if not is_first:
        patch_model(prepared, rdrop=TWO)
    (x, y) = rows(torch.float32)
    model.zero_grad()
    torch.manual_seed(5)
    loss = prepared(x, y) if is_inside else F.cross_entropy(prepared(x), y)
    accelerator.backward(loss)
    found = loss.item(), gradients(model)
    optimizer.step()
    assert_equal(found, direct(plain, lambda: plain(x), y), tolerance=1e-6 if precision == "no" else 0.02)
    assert stats(prepared)["rdrop_fired"] == 1
    AcceleratorState._reset_state(reset_partial_state=True)


# -- PEFT and frozen layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False], ids=["patched before", "patched after"])
def test_lora_dropout_is_no_false_alarm_while_b_is_zero(is_first: bool) -> None:
    model = seeded.bert(**NO_DROPOUT).double()
    if is_first:
        patch_model(model, rdrop=ALPHA)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.2, target_modules=["query", "value"])
    wrapped = get_peft_model(model, lora).train()
    if not is_first:
        patch_model(wrapped, rdrop=ALPHA)
    optimizer, found = torch.optim.SGD(wrapped.parameters(), 0.5), []
    for _ in range(3):
        step(wrapped, lambda: wrapped(**seeded.batch(4)).loss)
        optimizer.step()
        found.append(stats(model if is_first else wrapped)["kl"])
    assert found[0] == 0
    assert min(found[1:]) > 0


def test_lora_trains_on_the_objective() -> None:
    batch, wrapped = seeded.batch(4), []
    for _ in range(2):
        torch.manual_seed(0)
        lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.2, target_modules=["query"])
        wrapped.append(moved(get_peft_model(seeded.bert().double(), lora)).train())
    plain, model = wrapped
    patch_model(model, rdrop=TWO)
    expected = direct(plain, lambda: plain(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert_equal(step(model, lambda: model(**batch).loss), expected)


def test_frozen_layers_stay_without_gradient() -> None:
    (x, y), plain, model = rows(), net(), net()
    for each in (plain, model):
        each.body.requires_grad_(requires_grad=False)
    patch_model(model, rdrop=TWO)
    found = step(model, lambda: model(x, y))
    assert found[1].keys() == {"head.weight", "head.bias"}
    assert_equal(found, direct(plain, lambda: plain(x), y))


def test_describe_names_rdrop_and_mixout() -> None:
    model = patch_model(net(), mixout=0.5, rdrop=RDrop(2.0, every=3))
    assert str(describe(model)).splitlines()[:2] == [
        "rdrop        alpha = 2, one step in 3, passes auto; in the loss of 0 forwards so far",
        "mixout       p = 0.5, one mask value per input feature, exact gradient",
    ]
    assert str(describe(unpatch_model(deepcopy(model)))) == "not patched"
