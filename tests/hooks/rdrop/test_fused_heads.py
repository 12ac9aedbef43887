"""Fused heads of TRL, Liger and cut-cross-entropy in a model of one's own, beside the loss of the whole logits.

Stand-ins have their place where they are not installed; that these take the arguments of the real ones is asked below.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import MethodType
from typing import Any

import fused_heads
import pytest
import torch
from fused_heads import STAND_INS, ByAutograd, CCEParams
from torch import nn
from torch.nn import functional as F  # noqa: N812

from surgery import RDrop, SettingError, SourceError, patch_model, patched, stats, unpatch_model
from surgery.hooks.rdrop import fused_interception
from surgery.hooks.rdrop.fused_calls import _signature
from surgery.hooks.rdrop.regularizer import RDropRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHA, ROWS, VOCAB = 1.5, 9, 12
NEEDS = {"trl": ("trl",), "liger": ("liger_kernel", "triton"), "cce": ("cut_cross_entropy", "triton")}
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(1))
Y[2] = Y[7] = -100


class Net(nn.Module):
    """A body with dropout, and one of the fused heads."""

    def __init__(self, head: str, cls: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.dropout, self.lm_head = (
            nn.Linear(6, 8),
            nn.Dropout(0.3),
            nn.Linear(8, VOCAB, bias=head != "cce"),
        )
        self.head, self.cls, self.options = head, cls, options
        self.double()

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.dropout(self.body(x))
        return hidden

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return getattr(self, f"_{self.head}")(self.hidden(x), y)

    def _trl(self, hidden: torch.Tensor, y: torch.Tensor) -> Any:
        outputs = ("log_probs", "entropy", "is_top1")
        softcap, scale = self.options.get("softcap"), self.options.get("scale", 1.0)
        mask, temperature = y != -100, self.options.get("temperature", 1.0)
        given = (
            hidden,
            self.lm_head.weight,
            self.lm_head.bias,
            y.clamp(min=0),
            temperature,
            32768,
            softcap,
            scale,
            outputs,
        )
        log_probs, entropy, _, _, is_top1 = self.cls.apply(*given)
        log_probs, entropy = (x.view(mask.shape).masked_fill(~mask, 0) for x in (log_probs, entropy))
        count = self.options.get("items", mask.sum())
        return {"loss": -log_probs.sum() / count, "log_probs": log_probs, "entropy": entropy, "right": is_top1 & mask}

    def _liger(self, hidden: torch.Tensor, y: torch.Tensor) -> Any:
        softcap, reduction = self.options.get("softcap"), self.options.get("reduction", "mean")
        more = self.options.get("more", {})
        apply = self.cls.apply
        given = [hidden, self.lm_head.weight, y, self.lm_head.bias, None, -100, 0.0, 0.0, reduction, softcap, False]
        given += [None, False, self.options.get("has_accuracy", False), False, None, None, 1]
        names = list(inspect.signature(self.cls.forward).parameters)[1:]
        loss, _, accuracy, _ = apply(*(more.get(name, value) for name, value in zip(names, given, strict=True)))
        loss = loss.sum() / self.options["items"] if "items" in self.options else loss
        return {"loss": loss, "accuracy": accuracy}

    def _cce(self, hidden: torch.Tensor, y: torch.Tensor) -> Any:
        shift, reduction = self.options.get("shift", False), self.options.get("reduction", "mean")
        valids = (y[shift:] != -100).nonzero().squeeze(1).to(torch.int32)
        params = CCEParams(y, valids, self.options.get("softcap"), reduction, None, shift, y.shape)
        loss = self.cls.apply(hidden, self.lm_head.weight, params)
        return {"loss": loss.sum() / self.options["items"] if "items" in self.options else loss}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("trl", {}),
    "trl items": ("trl", {"items": 40}),
    "trl scaled": ("trl", {"softcap": 2.0, "scale": 0.5, "temperature": 0.8}),
    "liger": ("liger", {}),
    "liger sum": ("liger", {"reduction": "sum", "items": 40}),
    "liger none": ("liger", {"reduction": "none", "items": 40}),
    "liger softcap, accuracy": ("liger", {"softcap": 2.0, "has_accuracy": True}),
    "cce": ("cce", {}),
    "cce sum": ("cce", {"reduction": "sum", "items": 40}),
    "cce none": ("cce", {"reduction": "none", "items": 40}),
    "cce shifted": ("cce", {"shift": True, "softcap": 3.0}),
}


@pytest.fixture(params=CASES)
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    head, options = CASES[request.param]
    with fused_heads.stand_in(head) as cls:
        yield Net(head, cls, **options)


@pytest.fixture(params=STAND_INS)
def plain_net(request: pytest.FixtureRequest) -> Iterator[Net]:
    with fused_heads.stand_in(request.param) as cls:
        yield Net(request.param, cls)


def by_hand(net: Net, *, alpha: float = ALPHA, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of two passes and the divergence, of the whole logits; and the second pass's logits."""
    options, y = net.options, Y[1:] if net.options.get("shift") else Y
    scale, temperature, softcap = options.get("scale", 1.0), options.get("temperature", 1.0), options.get("softcap")
    made = []
    for _ in range(2):
        z = net.lm_head(net.hidden(X))[: len(y)] * scale
        made.append(((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature)[y != -100])
    log_p, log_q = (z.log_softmax(-1) for z in made)
    s = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    loss = (sum(F.cross_entropy(z, y[y != -100], reduction="sum") for z in made)) / 2 + alpha / 2 * s.sum()
    return factor * loss / options.get("items", len(s)), s.mean(), made[1]


def gradients(net: Net) -> list[torch.Tensor]:
    found = [w.grad.clone() for w in net.parameters() if w.grad is not None]
    net.zero_grad()
    return found


def is_clean(net: Net) -> bool:
    return "apply" not in vars(net.cls) and not fused_interception._listeners and not fused_interception._replaced


SETTINGS = {"alpha": RDrop(ALPHA), "paper": RDrop(ALPHA, scale="paper"), "alpha 0": RDrop(0.0)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradients_are_those_of_the_whole_logits(net: Net, settings: RDrop) -> None:
    torch.manual_seed(1)
    wanted, kl, logits = by_hand(net, alpha=settings.alpha, factor=2.0 if settings.scale == "paper" else 1.0)
    wanted.backward()
    wanted_gradients = gradients(net)
    patch_model(net, rdrop=settings)
    torch.manual_seed(1)
    output = net(X, Y)
    output["loss"].backward()
    torch.testing.assert_close(output["loss"], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(net), wanted_gradients, rtol=1e-12, atol=1e-12)
    found = stats(net)
    assert found["rdrop_fired"] == 1
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-12)
    assert kl > 0.01
    assert is_clean(net)
    mean_ce = F.cross_entropy(logits, (Y[1:] if net.options.get("shift") else Y)[_valid(net)])
    assert found["ce"] != pytest.approx(mean_ce.item(), rel=1e-6)  # that of both passes


def _valid(net: Net) -> torch.Tensor:
    return (Y[1:] if net.options.get("shift") else Y) != -100


def test_figures_of_the_head_are_its_own_of_the_second_pass() -> None:
    with fused_heads.stand_in("trl") as cls:
        net = Net("trl", cls)
        torch.manual_seed(1)
        _, _, logits = by_hand(net)
        torch.manual_seed(1)
        output = patch_model(net, rdrop=ALPHA)(X, Y)
        valid = Y != -100
        log_q = logits.log_softmax(-1)
        own = log_q.gather(1, Y[valid][:, None])[:, 0]
        torch.testing.assert_close(output["log_probs"].detach()[valid], own.detach())
        torch.testing.assert_close(output["entropy"][valid], -(log_q.exp() * log_q).sum(-1))
        assert output["right"][valid].tolist() == (logits.argmax(-1) == Y[valid]).tolist()
        assert (output["log_probs"] < 0).sum() == valid.sum()
        output["entropy"].sum().backward()  # a term of the loss that comes from the second pass, as all others do
        assert net.lm_head.weight.grad is not None
    with fused_heads.stand_in("liger") as cls:
        net = Net("liger", cls, has_accuracy=True)
        torch.manual_seed(1)
        _, _, logits = by_hand(net)
        torch.manual_seed(1)
        accuracy = patch_model(net, rdrop=ALPHA)(X, Y)["accuracy"]
        assert accuracy == (logits.argmax(-1) == Y[valid]).double().mean()


def test_head_without_figures_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByAutograd, "calls", 0)
    for name in ("liger", "cce"):
        with fused_heads.stand_in(name) as cls:
            patch_model(Net(name, cls), rdrop=ALPHA)(X, Y)["loss"].backward()
    assert ByAutograd.calls == 0


def test_evaluation_and_no_grad_leave_the_head_alone(plain_net: Net) -> None:
    net = plain_net.eval()
    wanted = net(X, Y)["loss"]
    patch_model(net, rdrop=ALPHA)
    assert torch.equal(net(X, Y)["loss"], wanted)
    net.train()
    with torch.no_grad():
        assert type(net(X, Y)["loss"]) is torch.Tensor
    assert stats(net)["rdrop_fired"] == 0
    assert is_clean(net)


def test_every_second_step_alone_has_two_passes(plain_net: Net) -> None:
    patch_model(plain_net, rdrop=RDrop(ALPHA, every=2))
    optimizer = torch.optim.SGD(plain_net.parameters(), 0.1)
    fired = []
    for _ in range(4):
        plain_net(X, Y)["loss"].backward()
        optimizer.step()
        fired.append(stats(plain_net)["rdrop_fired"])
    assert fired == [0, 1, 1, 2]


def test_unpatched_model_calls_the_head_itself(plain_net: Net) -> None:
    torch.manual_seed(1)
    wanted = plain_net(X, Y)["loss"]
    patch_model(plain_net, rdrop=ALPHA)(X, Y)
    unpatch_model(plain_net)
    torch.manual_seed(1)
    assert torch.equal(plain_net(X, Y)["loss"], wanted)
    assert is_clean(plain_net)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_head_is_put_back_after_an_error(plain_net: Net, error: type[BaseException]) -> None:
    def fail(*_: Any) -> None:
        raise error("on purpose")

    patch_model(plain_net, rdrop=ALPHA)
    handle = plain_net.dropout.register_forward_hook(fail)
    with pytest.raises(error):
        plain_net(X, Y)
    handle.remove()
    plain_net(X, Y)["loss"].backward()
    assert stats(plain_net)["rdrop_fired"] == 1
    unpatch_model(plain_net)
    assert is_clean(plain_net)


def test_an_apply_that_was_there_before_comes_back(plain_net: Net) -> None:
    own = staticmethod(plain_net.cls.apply)
    plain_net.cls.apply = own
    try:
        patch_model(plain_net, rdrop=ALPHA)(X, Y)
        assert vars(plain_net.cls)["apply"] is own
    finally:
        del plain_net.cls.apply


def test_two_models_and_threads_keep_to_their_own_passes(plain_net: Net) -> None:
    other = Net(plain_net.head, plain_net.cls)
    wanted = other.eval()(X, Y)["loss"]
    seen: list[torch.Tensor] = []

    def call_other(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(other(X, Y)["loss"].detach()))
        thread.start()
        thread.join()

    patch_model(plain_net, rdrop=ALPHA)
    plain_net.dropout.register_forward_hook(call_other)
    plain_net(X, Y)["loss"].backward()
    assert [torch.equal(loss, wanted) for loss in seen] == [True, True]
    assert is_clean(plain_net)


def test_head_outside_of_the_model_is_refused(plain_net: Net) -> None:
    """It is given the hidden states of the second pass alone."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return plain_net.hidden(x)

    body = patch_model(Body(), rdrop=ALPHA)
    with pytest.raises(SourceError, match="rdrop: expected a loss by cross_entropy"):
        getattr(plain_net, f"_{plain_net.head}")(body(X), Y)["loss"].backward()


def test_batch_without_labels_has_no_loss() -> None:
    for name in ("trl", "liger"):
        with fused_heads.stand_in(name) as cls:
            net = Net(name, cls, items=1)
            loss = patch_model(net, rdrop=ALPHA)(X, torch.full_like(Y, -100))["loss"]
            loss.backward()
            assert loss == 0
            assert not any(w.grad.any() for w in net.parameters() if w.grad is not None)


# -- refused -------------------------------------------------------------------------------------------------------

NO_FORMULA: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "dft": (lambda log_probs: -(log_probs * log_probs.exp().detach()).sum(), "exp"),
    "dpo": (lambda log_probs: -F.logsigmoid(log_probs[:4].sum(-1, keepdim=True) - 1).mean(), "log_sigmoid"),
    "grpo": (lambda log_probs: -torch.exp(log_probs - log_probs.detach()).mean(), "exp"),
    "ipo": (lambda log_probs: ((log_probs - 0.1) ** 2).mean(), "pow"),
    "written into": (lambda log_probs: torch.zeros_like(log_probs).copy_(log_probs).sum(), "copy_"),
}


@pytest.fixture
def trl_net() -> Iterator[Net]:
    with fused_heads.stand_in("trl") as cls:
        yield Net("trl", cls)


@pytest.mark.parametrize(("loss", "function"), NO_FORMULA.values(), ids=NO_FORMULA)
def test_losses_without_a_formula_are_refused(trl_net: Net, loss: Any, function: str) -> None:
    patch_model(trl_net, rdrop=ALPHA)
    message = (
        f"rdrop: expected a loss that is a weighted sum of log-probabilities, got {function} of them: R-Drop has no"
    )
    with pytest.raises(SourceError, match=message):
        loss(trl_net(X, Y)["log_probs"])
    assert stats(trl_net)["rdrop_fired"] == 0


def test_refused_loss_is_the_plain_one_where_rdrop_may_step_aside(trl_net: Net) -> None:
    loss = NO_FORMULA["dpo"][0]
    torch.manual_seed(1)
    trl_net.hidden(X)  # the dropout of the first pass
    loss(trl_net(X, Y)["log_probs"]).backward()
    wanted = gradients(trl_net)
    patch_model(trl_net, rdrop=ALPHA)
    rdrop = next(one for one in trl_net.__dict__["_surgery_patch"].regularizers if isinstance(one, RDropRegularizer))
    rdrop.may_step_aside = True
    torch.manual_seed(1)
    loss(trl_net(X, Y)["log_probs"]).backward()
    torch.testing.assert_close(gradients(trl_net), wanted)
    assert rdrop.is_aside
    assert not rdrop.has_acted


LIGER_REFUSED = {
    "label_smoothing": (0.1, "0.0", "0.1"),
    "lse_square_scale": (1e-4, "0.0", "0.0001"),
    "use_token_scaling": (True, "False", "True"),
    "ce_weight": (torch.ones(VOCAB), "None", "a tensor"),
}


@pytest.mark.parametrize("name", LIGER_REFUSED)
def test_options_of_liger_without_a_formula_are_refused(name: str) -> None:
    value, expected, got = LIGER_REFUSED[name]
    with fused_heads.stand_in("liger") as cls:
        net = patch_model(Net("liger", cls, more={name: value}), rdrop=ALPHA)
        with pytest.raises(
            SourceError, match=f"rdrop: expected {name}={expected} in Liger's .* got {got}. Leave it out"
        ):
            net(X, Y)
        assert is_clean(net)


def test_head_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, trl_net: Net) -> None:
    patch_model(trl_net, rdrop=ALPHA)
    monkeypatch.setattr(trl_net.cls, "forward", staticmethod(lambda ctx, hidden, *_: hidden))  # noqa: ARG005
    _signature.cache_clear()
    with pytest.raises(SourceError, match="rdrop: expected TRL's fused_lm_head as R-Drop knows it, got a version with"):
        trl_net(X, Y)
    _signature.cache_clear()


def test_an_argument_of_a_later_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the bias of later versions of cut-cross-entropy, which comes before `params`, or a new option."""
    with fused_heads.stand_in("cce") as cls:
        net = patch_model(Net("cce", cls), rdrop=ALPHA)
        monkeypatch.setattr(cls, "forward", staticmethod(lambda ctx, e, c, bias, params=None: e))  # noqa: ARG005
        _signature.cache_clear()
        with pytest.raises(SourceError, match=r"got a version with other arguments \('bias' is not known\)"):
            net(X, Y)
    _signature.cache_clear()


def test_doubled_batch_is_refused(plain_net: Net) -> None:
    patch_model(plain_net, rdrop=RDrop(ALPHA, passes="doubled"))
    with pytest.raises(SettingError, match=r"passes: expected losses that can be halved, got .*passes=.two."):
        plain_net(X, Y)


def test_summed_divergence_needs_a_loss_of_the_head(plain_net: Net) -> None:
    settings = RDrop(ALPHA, kl_reduction="sum")
    with patched(plain_net, rdrop=settings):
        if plain_net.head == "trl":
            with pytest.raises(SettingError, match='kl_reduction: expected "match" for a loss computed from log-prob'):
                plain_net(X, Y)
            return
        torch.manual_seed(1)
        loss = plain_net(X, Y)["loss"]
    torch.manual_seed(1)
    wanted, kl, _ = by_hand(plain_net)
    torch.testing.assert_close(loss, wanted - ALPHA / 2 * kl + ALPHA / 2 * kl * (Y != -100).sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
def test_compiled_model_is_refused(trl_net: Net) -> None:
    patch_model(trl_net, rdrop=ALPHA)
    torch._dynamo.reset()
    message = (
        "rdrop: expected TRL's fused_lm_head to be called by Python, got a call that torch.compile has taken apart"
    )
    with pytest.raises(SourceError, match=message):
        torch.compile(trl_net, backend="eager")(X, Y)
    torch._dynamo.reset()
    trl_net(X, Y)["loss"].backward()
    assert stats(trl_net)["rdrop_fired"] == 1


def test_model_without_dropout_is_refused(plain_net: Net) -> None:
    plain_net.dropout.p = 0.0
    patch_model(plain_net, rdrop=ALPHA)
    with pytest.raises(
        SourceError, match="rdrop: expected two passes that differ, got logits that are equal to the bit"
    ):
        plain_net(X, Y)


# -- the real ones -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", STAND_INS)
def test_stand_in_takes_the_arguments_of_the_real_head(name: str) -> None:
    for package in NEEDS[name]:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    own, wanted = fused_heads.real(name), STAND_INS[name][1]
    parameters = [inspect.signature(cls.forward).parameters for cls in (own, wanted)]
    assert list(parameters[0]) == list(parameters[1])
    defaults = [[one.default for one in each.values()] for each in parameters]
    assert defaults[0] == defaults[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STAND_INS)
def test_real_head_is_the_whole_logits(name: str) -> None:
    """Without figures of Liger, neither its kernels nor cut-cross-entropy's are called, which need a GPU."""
    for package in NEEDS[name]:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    net = Net(name, fused_heads.real(name))
    torch.manual_seed(1)
    wanted, _, _ = by_hand(net)
    wanted.backward()
    wanted_gradients = gradients(net)
    torch.manual_seed(1)
    loss = patch_model(net, rdrop=ALPHA)(X, Y)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(net), wanted_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_llama_that_liger_has_patched_is_the_unpatched_one() -> None:
    for package in NEEDS["liger"]:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    from liger_kernel.transformers.model.llama import lce_forward
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, attention_dropout=0.3, initializer_range=0.5, **sizes)
    ids = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids < 8, -100)
    found = []
    for forward in (None, lce_forward):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        if forward is not None:
            model.forward = MethodType(forward, model)  # type: ignore[method-assign]
        torch.manual_seed(1)
        patch_model(model, rdrop=RDrop(ALPHA, passes="two"))
        # reduced as Trainer has it with accumulation
        output = model(input_ids=ids, labels=labels, num_items_in_batch=33, return_dict=True)
        assert (output.logits is None) == (forward is not None)
        output.loss.backward()
        found.append([output.loss.detach(), *(w.grad for w in model.parameters())])
        assert stats(model)["kl"] > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
