"""Losses outside of the model that R-Drop cannot reach raise, and outputs can be handled as before."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
import seeded
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from surgery.errors import SettingError, SourceError
from surgery.hooks import RDrop, describe, patch_model, stats

UNMET = "a loss that calls none of them, or something in between that loses a pass, as an autograd function does"

KNOWN = "rdrop: expected a loss by cross_entropy, nll_loss, log_softmax, binary_cross_entropy or mse_loss of torch, "
WAY_OUT = ". Train without rdrop, or with one of these."
X, Y = torch.linspace(-1, 1, 24).reshape(8, 3), torch.arange(8) % 5


def net(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return patch_model(nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 5), *more), rdrop=1.0)


def focal(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1).gather(1, Y[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


def triplet(logits: torch.Tensor) -> torch.Tensor:
    return F.triplet_margin_loss(logits[:2], logits[2:4], logits[4:6])


def ctc(logits: torch.Tensor) -> torch.Tensor:
    lengths = torch.tensor([8]), torch.tensor([2])
    return F.ctc_loss((3 * logits)[:, None], torch.tensor([[1, 2]]), *lengths)


UNKNOWN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "l1": (lambda z: nn.L1Loss()(z, torch.zeros_like(z)), "l1_loss"),
    "smooth l1": (lambda z: F.smooth_l1_loss(z[:, 0], X[:, 0]), "smooth_l1_loss"),
    "huber": (lambda z: nn.HuberLoss()(z[:, 0], X[:, 0]), "huber_loss"),
    "ctc": (ctc, "ctc_loss"),
    "triplet": (triplet, "triplet_margin_loss"),
    "poisson": (lambda z: nn.PoissonNLLLoss()(z[:, 0], Y.float()), "poisson_nll_loss"),
    "cosine": (lambda z: F.cosine_embedding_loss(z[:4], z[4:], torch.ones(4)), "cosine_embedding_loss"),
    "kl_div of logarithms": (lambda z: F.kl_div(z.softmax(-1).log(), torch.full((8, 5), 0.2)), "kl_div"),
    "two": (lambda z: F.l1_loss(z[:, 0], X[:, 0]) + F.huber_loss(z[:, 0], X[:, 0]), "l1_loss and huber_loss"),
    "one of them twice": (lambda z: F.l1_loss(z[:, 0], X[:, 0]) + F.l1_loss(z[:, 1], X[:, 1]), "l1_loss"),
    "squares": (lambda z: ((z[:, 0] - X[:, 0]) ** 2).mean(), UNMET),
    "focal": (focal, UNMET),
    "numbers": (lambda z: z.logsumexp(-1).mean() - z[torch.arange(8), Y].mean(), UNMET),
}
PAIRWISE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "reward": (lambda z: -F.logsigmoid(z[:4, 0] - z[4:, 0]).mean(), "logsigmoid"),
    "preferences": (
        lambda z: -F.logsigmoid((z[:4].logsumexp(-1) - z[:4, 0]) - (z[4:].logsumexp(-1) - z[4:, 0])).mean(),
        "logsigmoid",
    ),
    "softplus": (lambda z: F.softplus(z[4:, 0] - z[:4, 0]).mean(), "softplus"),
}
BACKWARDS: dict[str, Callable[[torch.Tensor, nn.Module], Any]] = {
    "method": lambda loss, _: loss.backward(),
    "function": lambda loss, _: torch.autograd.backward(loss),
    "grad": lambda loss, model: torch.autograd.grad(loss, list(model.parameters())),
    "scaled": lambda loss, _: torch.amp.GradScaler("cpu").scale(loss).backward(),
    "accelerate": lambda loss, _: Accelerator(cpu=True).backward(loss),
    "accumulated": lambda loss, _: (torch.zeros(()) + loss / 4).backward(),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize(("script", "got"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_loss_is_refused_by_name(script: Callable[[torch.Tensor], torch.Tensor], got: str) -> None:
    model = net()
    with pytest.raises(SourceError) as error:
        script(model(X)).backward()
    assert str(error.value) == KNOWN + "got " + got + WAY_OUT
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("script", "got"), PAIRWISE.values(), ids=PAIRWISE)
def test_loss_of_pairs_is_refused_with_what_to_leave_out(
    script: Callable[[torch.Tensor], torch.Tensor], got: str
) -> None:
    with pytest.raises(SourceError) as error:
        script(net()(X)).backward()
    assert str(error.value) == (
        f"rdrop: expected a loss with a formula, got one by {got}: R-Drop has no formula for it, as for all losses of "
        "pairs or groups (DPO, GRPO, reward). Leave rdrop out; noise, Mixout and the anchor work there."
    )


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS)
def test_unknown_loss_is_refused_however_the_script_goes_backward(backward: Any) -> None:
    model = net()
    with pytest.raises(SourceError, match="got huber_loss"):
        backward(F.huber_loss(model(X)[:, 0], X[:, 0]), model)


class Scaled(torch.autograd.Function):
    """Somebody's own kernel."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, how: Any) -> torch.Tensor:  # noqa: ARG004
        return how(logits)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004
        return -grad.expand(8, 5), None


HOWS = {"clone": lambda z: z.clone(), "view": lambda z: z.view_as(z), "itself": lambda z: z, "sum": torch.sum}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_autograd_function_of_logits_is_refused(how: Any) -> None:
    out = Scaled.apply(net()(X), how)  # type: ignore[no-untyped-call]
    with pytest.raises(SourceError, match="got a loss that calls none of them"):
        (F.cross_entropy(out, Y) if out.dim() else out).backward()


def test_unknown_loss_beside_a_joined_one_is_of_the_second_pass() -> None:
    model = net()
    torch.manual_seed(1)
    logits = model(X)
    aux = 3 * logits.pow(2).mean()
    joined = F.cross_entropy(logits, Y)
    (joined + aux).backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(1)
    logits = model(X)
    plain = logits.as_subclass(torch.Tensor)
    (F.cross_entropy(logits, Y) + 3 * plain.pow(2).mean()).backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()])


def test_total_of_losses_takes_in_an_unknown_one_in_place() -> None:
    total = torch.zeros(())
    total += F.huber_loss(net()(X)[:, 0], X[:, 0])
    with pytest.raises(SourceError, match="got huber_loss"):
        total.backward()


def test_total_of_losses_counts_each_once() -> None:
    model = net()
    torch.manual_seed(1)
    total, expected = torch.zeros(()), 0.0
    for _ in range(2):
        logits = model(X)
        loss = F.cross_entropy(logits, Y)
        total += loss + logits.mean()
        expected += (loss + logits.mean()).item()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    total.backward()


@pytest.mark.parametrize("head", [None, nn.LogSoftmax(-1)], ids=["paired", "log-probabilities"])
def test_outputs_are_handled_as_ordinary_tensors(head: nn.Module | None, capsys: pytest.CaptureFixture[str]) -> None:
    out = net(*([head] if head else []))(X)
    plain = out.detach()
    assert type(plain) is torch.Tensor
    print(out, f"{out.mean():.3f}")
    assert "PairedTensor" not in (shown := capsys.readouterr().out)
    assert "LogProbs" not in shown
    buffer = BytesIO()
    torch.save({"out": out}, buffer)
    buffer.seek(0)
    for read in (pickle.loads(pickle.dumps(out)), torch.load(buffer)["out"], copy.deepcopy(plain)):
        assert type(read) is torch.Tensor
        assert torch.equal(read, plain)
    assert out.tolist() == plain.tolist()
    assert (out.detach().cpu().numpy() == plain.numpy()).all()
    assert (out.argmax(-1) == Y).float().mean().item() == (plain.argmax(-1) == Y).float().mean().item()
    assert out.max(-1).indices.equal(plain.max(-1).indices)
    assert torch.topk(out, 2).indices.equal(torch.topk(plain, 2).indices)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly"):
        copy.deepcopy(out)


def test_block_without_gradients_sees_plain_values() -> None:
    model = net()
    logits = model(X)
    with torch.no_grad():
        assert F.cross_entropy(logits, Y) == F.cross_entropy(logits.detach(), Y)
        assert type(model(X)) is torch.Tensor
    assert type(model.eval()(X)) is torch.Tensor
    assert stats(model)["rdrop_fired"] == 0


def test_no_graph_outlives_the_step() -> None:
    model, watched, kept = net(), [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            logits = model(X)
            probs = logits.log_softmax(-1)
            loss = F.nll_loss(probs, Y) + F.cross_entropy(logits / 2, Y)
            watched += [weakref.ref(t) for t in (logits, logits.first, probs, loss)]
            loss.backward()
            kept.append((loss.detach(), loss.item(), logits.argmax(-1), logits.detach()))
            with torch.no_grad():
                kept.append((model(X), logits * 2))
        del logits, probs, loss
        assert [ref() for ref in watched] == [None] * 12
    finally:
        gc.enable()


def test_labels_turned_round_are_not_taken_for_equal_passes() -> None:
    """mse_loss(labels, prediction): it is the predictions that differ."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(12):
        F.mse_loss(X[:, 0], model(X)[:, 0]).backward()
        optimizer.step()
    assert stats(model)["pair_mse"] > 0


def test_step_without_the_patched_model_is_refused() -> None:
    model = net()
    layers = nn.Sequential(*model)
    F.cross_entropy(layers(X), Y).backward()
    with pytest.raises(SourceError) as error:
        torch.optim.SGD(layers.parameters(), lr=0.1).step()
    assert str(error.value) == (
        "rdrop: expected a forward of the patched model in training mode before the optimizer's step, got none whose "
        "loss it could reach. Call model.train(), and patch what the script calls as model(...)."
    )


def test_argument_that_a_forward_writes_to_is_the_scripts_own() -> None:
    class Writer(nn.Linear):
        def forward(self, batch: Any) -> Any:  # type: ignore[override]
            batch["logits"] = F.dropout(super().forward(batch["x"]), 0.5)
            return batch

    model, batch = patch_model(Writer(3, 5), rdrop=1.0), {"x": X}
    F.cross_entropy(model(batch)["logits"], Y).backward()
    assert batch.keys() == {"x", "logits"}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static graph"])
def test_distributed_data_parallel_keeps_outputs_paired(is_static: bool) -> None:
    model, plain = net(), net()
    wrapped = DistributedDataParallel(model, static_graph=is_static)
    for _ in range(3):
        for each in (wrapped, plain):
            each.zero_grad()
            torch.manual_seed(1)
            F.cross_entropy(each(X), Y).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert stats(model)["kl"] == stats(plain)["kl"] > 0
    assert describe(model).unjoined == ()


class OwnLoss(nn.Module):
    """Makes its own loss, as heads with labels do."""

    def __init__(self, loss: Callable[[torch.Tensor], torch.Tensor], wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.loss, self.wrap = nn.Linear(3, 5), loss, wrap

    def forward(self, x: torch.Tensor) -> Any:
        logits = F.dropout(self.layer(x), 0.5, self.training)
        return self.wrap(self.loss(logits), logits)


def as_output(loss: torch.Tensor, logits: torch.Tensor | None) -> ModelOutput:
    return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(("script", "got"), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_unknown_loss_in_the_model_is_refused_by_name(script: Any, got: str) -> None:
    with pytest.raises(SourceError) as error:
        patch_model(OwnLoss(script, as_output), rdrop=1.0)(X)
    assert str(error.value) == KNOWN + "got " + got + WAY_OUT


@pytest.mark.parametrize("wrap", [lambda loss, z: (z, loss), lambda loss, _: loss], ids=["tuple", "loss alone"])
def test_unknown_loss_in_the_model_is_refused_at_backward(wrap: Any) -> None:
    output = patch_model(OwnLoss(UNKNOWN["huber"][0], wrap), rdrop=1.0)(X)
    with pytest.raises(SourceError, match=r"got huber_loss\. Train"):
        (output[1] if isinstance(output, tuple) else output).backward()


def test_loss_without_logits_is_refused_with_the_switches_to_turn() -> None:
    """As a fused loss returns it that R-Drop does not know."""
    model = OwnLoss(lambda z: Scaled.apply(z, torch.sum), lambda loss, _: as_output(loss, None))  # type: ignore[no-untyped-call]
    with pytest.raises(SourceError) as error:
        patch_model(model, rdrop=1.0)(X)
    assert str(error.value) == (
        "rdrop: expected logits, or a fused head of TRL, Liger or cut-cross-entropy, got a model that makes its loss "
        "without them. If that is a fused loss, or a compiled one, turn it off: fused_linear_cross_entropy=False for "
        "Liger, or in Trainer's liger_kernel_config; label_smoothing_factor or a compute_loss_func of the logits for "
        "TRL's SFTTrainer. Else train without rdrop."
    )


def test_patched_model_goes_on_from_the_outputs_of_another() -> None:
    """Two passes, each from its own: a batch twice over would need both in one."""
    torch.manual_seed(0)
    encoder, x, labels = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5)), X.reshape(2, 4, 3), Y.reshape(2, 4)
    head = seeded.gpt2().train()
    wanted = None
    for patch in (False, True):
        torch.manual_seed(2)
        if patch:
            patch_model(encoder, rdrop=1.0)
            patch_model(head, rdrop=1.0)
            loss = head(inputs_embeds=encoder(x), labels=labels).loss
        else:
            first, second = encoder(x), encoder(x)
            a, b = (head(inputs_embeds=z).logits[:, :-1].flatten(0, 1) for z in (first, second))
            p, q, target = a.softmax(-1), b.softmax(-1), labels[:, 1:].flatten()
            divergence = ((p - q) * (p / q).log()).sum(-1).mean() / 2
            loss = (F.cross_entropy(a, target) + F.cross_entropy(b, target)) / 2 + divergence / 2
        grads = torch.autograd.grad(loss, list(encoder.parameters()))
        wanted = wanted or grads
    torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-7)


def test_outputs_of_a_patched_model_are_refused_as_inputs_to_double() -> None:
    model = patch_model(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), rdrop=RDrop(1.0, passes="doubled"))
    with pytest.raises(SettingError) as error:
        model(net()(X))
    assert str(error.value) == (
        'passes: expected inputs without R-Drop, got outputs of a patched model. Use RDrop(alpha, passes="two").'
    )
