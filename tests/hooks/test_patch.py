"""Patched and unpatched: nothing is left behind, and copies, pickles and state_dicts work meanwhile."""

import inspect
import io
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import BertConfig, BertForSequenceClassification

from surgery import Anchor, Mixout, SourceError, describe, patch_model, patched, stats, unpatch_model

IDS = torch.arange(10).view(2, 5)
SETTINGS = {
    "default": {},
    "element": {"mixout": Mixout(0.5, granularity="element")},
    "p-0": {"mixout": 0.0},
    "dropout-kept": {"mixout": Mixout(0.5, replace_dropout=False)},
    "anchor": {"anchor": 0.01},
    "both": {"mixout": 0.9, "anchor": Anchor(0.1)},
    "offloaded": {"mixout": 0.9, "w_pre_device": "cpu"},
    "embeddings": {"include": "**.word_embeddings"},
}
ANY = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def bert(seed: int = 0, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **small | config)).train()


def fingerprint(model: nn.Module) -> list[Any]:
    """Return all there is to see of a model: objects, values, classes, signatures, attributes, hooks in their order."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        attributes = [(key, list(v.items()) if isinstance(v, dict) else v) for key, v in vars(module).items()]
        found.append((name, type(module), inspect.signature(module.forward), attributes))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.append((name, id(tensor), type(tensor), tensor.requires_grad, tensor.tolist()))
    return found


def loss(model: nn.Module, seed: int | None = None) -> torch.Tensor:
    if seed is not None:
        torch.manual_seed(seed)
    return model(IDS).logits.square().sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def is_equal(a: nn.Module, b: nn.Module) -> bool:
    others = b.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in a.state_dict().items())


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


# -- the restore contract ------------------------------------------------------------------------------------------


@ANY
def test_unpatch_restores_everything(settings: dict[str, Any]) -> None:
    model = bert()
    before = fingerprint(model)
    assert patch_model(model, **settings) is model
    assert fingerprint(model) != before
    assert unpatch_model(model) is model
    assert fingerprint(model) == before
    assert str(describe(model)) == "not patched"


@ANY
def test_unpatched_model_has_the_pickle_of_an_untouched_one(settings: dict[str, Any]) -> None:
    model, untouched = bert(), bert()
    before = pickle.dumps(model), saved(model)
    loss(patch_model(model, **settings)).backward()
    unpatch_model(model).zero_grad()
    assert (pickle.dumps(model), saved(model)) == before
    assert saved(model) == saved(untouched)
    assert is_equal(model, untouched)


@ANY
def test_patched_model_has_the_parameters_and_state_dict_of_before(settings: dict[str, Any]) -> None:
    model = bert()
    before = {name: (id(p), p.data_ptr(), p.tolist()) for name, p in model.named_parameters()}
    kinds = [(type(module), inspect.signature(module.forward)) for module in model.modules()]
    keys = list(model.state_dict())
    loss(patch_model(model, **settings)).backward()
    assert {name: (id(p), p.data_ptr(), p.tolist()) for name, p in model.named_parameters()} == before
    assert [(type(module), inspect.signature(module.forward)) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_optimizer_made_before_steps_through_patch_and_unpatch(kind: type[torch.optim.Optimizer]) -> None:
    model = bert()
    optimizer = kind(model.parameters(), lr=0.1)
    for change in (patch_model, unpatch_model):
        change(model)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.before = parameter.detach().clone()
            assert parameter.data_ptr(), name
        step(model, optimizer)
        assert all((p != p.before).any() for p in model.parameters() if p.grad is not None and p.grad.any())
        for parameter in model.parameters():
            del parameter.before


def test_unpatched_training_has_the_bits_of_an_untouched_model() -> None:
    models = [unpatch_model(patch_model(bert())), bert()]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(1)
        step(model, optimizer)
    assert is_equal(*models)


def test_unpatch_does_nothing_to_a_model_that_is_not_patched() -> None:
    model = bert()
    before = fingerprint(model)
    unpatch_model(unpatch_model(model))
    assert fingerprint(model) == before


def test_unpatch_keeps_a_dropout_rate_that_was_set_meanwhile() -> None:
    model = patch_model(bert())
    dropout = model.bert.encoder.layer[0].output.dropout
    assert dropout.p == 0
    dropout.p = 0.3
    unpatch_model(model)
    assert (dropout.p, model.bert.encoder.layer[1].output.dropout.p) == (0.3, 0.1)


def test_unpatch_leaves_what_another_tool_made_of_a_weight() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    prune.l1_unstructured(model[0], "weight", 8)
    expected = model[0].weight.clone()
    unpatch_model(model)
    assert torch.equal(model[0].weight, expected)


def test_unpatch_restores_a_model_that_has_lost_a_layer() -> None:
    model = patch_model(bert())
    layer = model.bert.encoder.layer[0]
    model.bert.encoder.layer[0] = nn.Identity()
    unpatch_model(model)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in [*model.modules(), *layer.modules()]
    )


# -- patching again, and for a while -------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_patching_again_replaces_settings_and_keeps_w_pre() -> None:
    model = patch_model(bert(), mixout=0.5)
    count = hooks(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    distance = stats(model)["distance"]
    for _ in range(3):
        patch_model(model, mixout=Mixout(0.9, replace_dropout=False), anchor=0.1)
    assert stats(model)["distance"] == distance > 0
    assert (describe(model).mixout, describe(model).anchor) == (Mixout(0.9, replace_dropout=False), Anchor(0.1))
    assert hooks(model) == count
    assert model.bert.encoder.layer[0].output.dropout.p == 0.1
    unpatch_model(model)
    assert hooks(model) == 0


def test_patching_again_takes_the_w_pre_it_is_given() -> None:
    model = patch_model(bert(), mixout=0.5)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    patch_model(model, mixout=0.5, w_pre=model.state_dict())
    assert stats(model)["distance"] == 0


def test_patched_restores_an_unpatched_model_also_when_the_body_raises() -> None:
    model = bert()
    before = fingerprint(model)
    with patched(model, mixout=0.5) as same:
        assert same is model
        assert describe(model).mixout == Mixout(0.5)
    assert fingerprint(model) == before
    with pytest.raises(IndexError), patched(model, mixout=0.5):
        model(IDS + 1000)
    assert fingerprint(model) == before


def test_patched_within_patched_restores_the_outer_settings() -> None:
    model = bert()
    with patched(model, mixout=0.5):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        outer, found, count = describe(model), stats(model), hooks(model)
        with patched(model, mixout=Mixout(0.9, replace_dropout=False), include="**.query"):
            assert len(describe(model).mixed) == 2
        assert (describe(model), stats(model), hooks(model)) == (outer, found, count)
        assert loss(model, 1) != loss(model, 2)
    assert (hooks(model), model.bert.encoder.layer[0].output.dropout.p) == (0, 0.1)


def test_patched_restores_what_the_body_patched_or_unpatched() -> None:
    model = bert()
    before = fingerprint(model)
    with patched(model, mixout=0.5):
        patch_model(model, mixout=0.9)
    assert fingerprint(model) == before
    with patched(model, mixout=0.5):
        unpatch_model(model)
    assert fingerprint(model) == before


# -- exceptions in forward -----------------------------------------------------------------------------------------


class Failing(nn.Module):
    """A layer whose user fails while its weight is mixed."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.error: type[BaseException] | None = error
        self.second.register_forward_pre_hook(self._fail)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))

    def _fail(self, module: nn.Module, _: Any) -> None:
        module.weight.sum()
        if self.error is not None:
            raise self.error


def failing(error: type[BaseException]) -> Failing:
    model = Failing(error)
    patch_model(model, mixout=0.5)
    model.second._forward_pre_hooks.move_to_end(min(model.second._forward_pre_hooks))  # after ours
    return model


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError], ids=["ValueError", "OutOfMemoryError"])
def test_exception_in_forward_leaves_the_parameter(error: type[Exception]) -> None:
    model = failing(error)
    with pytest.raises(error):  # and no warning of a hook that failed after it
        model(torch.ones(1, 4))
    assert model.second.weight is model.second._parameters["weight"]
    deepcopy(model)
    model.error = None
    model(torch.ones(1, 4)).sum().backward()


def test_interrupted_forward_is_cleared_by_the_next_one() -> None:
    model, x = failing(KeyboardInterrupt), torch.ones(1, 4)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(model.state_dict()["second.weight"], model.second._parameters["weight"])
    model.error = None
    assert torch.equal(model.eval()(x), nn.Module.__call__(unpatch_model(deepcopy(model)), x))
    assert model.second.weight is model.second._parameters["weight"]


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_interrupted_model_can_be_copied_and_unpatched(copied: Any) -> None:
    model = failing(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 4))
    assert is_equal(copied(model), model)
    for one in (copied(model), model):
        unpatch_model(one)
        assert one.second.weight is one.second._parameters["weight"]


def test_first_pass_that_fails_does_not_hide_weights_that_are_never_mixed(caplog: pytest.LogCaptureFixture) -> None:
    model = failing(ValueError)
    model.unused = nn.Linear(2, 2)
    patch_model(unpatch_model(model), mixout=0.5)
    with pytest.raises(ValueError):  # noqa: PT011
        model(torch.ones(1, 4))
    model.error = None
    assert not caplog.records
    model(torch.ones(1, 4))
    assert "unused.weight: expected a call of the layer in forward, got none (1 weights): not mixed" in caplog.text


# -- copies --------------------------------------------------------------------------------------------------------


def test_deepcopy_mixes_on_its_own_and_shares_w_pre() -> None:
    model = patch_model(bert(), mixout=0.5)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    copied = deepcopy(model)
    assert torch.equal(loss(model, 1), loss(copied, 1))
    sites = [each.bert.encoder.layer[0].output.dense._surgery_mixed.reads[0][1].tracked for each in (model, copied)]
    assert sites[0] is not sites[1]
    assert sites[0].values is sites[1].values
    assert sites[1].weight is copied.bert.encoder.layer[0].output.dense.weight
    unpatch_model(model)
    assert hooks(model) == 0
    assert hooks(copied) > 0
    assert loss(copied, 1) != loss(copied, 2)
    assert hooks(unpatch_model(copied)) == 0
    assert is_equal(model, copied)
    assert copied.bert.encoder.layer[0].output.dropout.p == 0.1


def test_deepcopy_is_cast_alone() -> None:
    model = patch_model(bert(), mixout=0.5)
    copied = deepcopy(model).bfloat16()
    loss(copied).backward()
    assert model.bert.encoder.layer[0].output.dense._surgery_mixed.reads[0][1].tracked.values.dtype == torch.float32


@pytest.mark.parametrize("mixout", [None, 0.5])
def test_deepcopy_is_anchored_as_well(mixout: float | None) -> None:
    model = patch_model(nn.Linear(3, 2), mixout=mixout, anchor=0.5)
    w_pre = model.weight.detach().clone()
    copied = deepcopy(model)
    for one in (model, copied):
        with torch.no_grad():
            one.weight += 1
        one.weight.grad = torch.zeros_like(one.weight)
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        torch.testing.assert_close(one.weight.detach(), w_pre + 1 - 0.05)


def test_pickle_carries_no_w_pre() -> None:
    model = patch_model(bert(hidden_size=64), mixout=0.5, anchor=0.1)
    loss(model)
    plain = saved(bert(hidden_size=64))
    w_pre = stats(model)["w_pre_bytes"]
    assert w_pre > 100_000
    assert len(saved(model)) - len(plain) < w_pre / 2


@pytest.mark.parametrize(
    "copied", [lambda m: load(saved(m)), lambda m: pickle.loads(pickle.dumps(m))], ids=["save", "pickle"]
)
def test_loaded_model_evaluates_and_refuses_to_train(copied: Any) -> None:
    model = patch_model(bert(), mixout=0.5, anchor=0.1)
    loaded = copied(model)
    assert torch.equal(loss(loaded.eval()), loss(deepcopy(model).eval()))
    message = (
        r"expected w_pre, got a model from a pickle, which does not carry it\. Call patch_model with w_pre, the "
        r"checkpoint it was trained from, and all its settings again, or unpatch_model\.$"
    )
    assert "; MISSING: a pickle does not carry it. Call patch_model with w_pre and all" in str(describe(loaded))
    assert "MISSING" not in str(describe(model))
    with pytest.raises(SourceError, match=message):
        loss(loaded.train())
    with pytest.raises(
        SourceError,
        match=r"expected w_pre from the former patch_model, got none\. Name it in exclude if it is new, give w",
    ):
        patch_model(loaded)
    again = patch_model(deepcopy(loaded), mixout=0.5, w_pre=bert().state_dict())
    assert torch.equal(loss(again, 1), loss(patch_model(model, mixout=0.5), 1))
    assert loaded.bert.encoder.layer[0].output.dropout.p == 0
    assert unpatch_model(loaded).bert.encoder.layer[0].output.dropout.p == 0.1
    assert (hooks(loaded), str(describe(loaded))) == (0, "not patched")
    assert is_equal(loaded, model)


# -- state_dicts, dtypes, freezing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_load_state_dict_changes_w_and_not_w_pre(assign: bool) -> None:
    model, other = patch_model(bert(), mixout=1.0), bert(seed=1).state_dict()
    expected = loss(bert().eval())
    model.load_state_dict(
        other | {k: v for k, v in model.state_dict().items() if k not in describe(model).mixed}, assign=assign
    )
    assert all(torch.equal(model.state_dict()[name], other[name]) for name in describe(model).mixed)
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.eval()
    torch.testing.assert_close(loss(model), expected)
    unpatch_model(model)
    assert all(torch.equal(model.state_dict()[name], other[name]) for name in other if name.endswith("dense.weight"))


def test_optimizer_state_moves_between_patched_models() -> None:
    models = [patch_model(bert(), mixout=0.5) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    torch.manual_seed(0)
    step(models[0], optimizers[0])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(1)
        step(model, optimizer)
    assert is_equal(*models)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_after_patching_equals_cast_before(dtype: torch.dtype) -> None:
    before, after = patch_model(bert().to(dtype), mixout=0.5), patch_model(bert(), mixout=0.5).to(dtype)
    for model in (before, after):
        loss(model, 1).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert stats(after)["w_pre_bytes"] == stats(before)["w_pre_bytes"]
    assert stats(after)["distance"] == 0


def test_weight_frozen_after_patching_is_not_mixed_until_it_is_unfrozen() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mixout=0.5)
    model[0].requires_grad_(False)
    assert describe(model).mixed == ("1.weight",)
    assert describe(model).left["0.weight"] == "frozen: mixed once it is trainable"
    model[1].weight.requires_grad_(False)
    assert torch.equal(model(torch.ones(1, 4)), model(torch.ones(1, 4)))
    model.requires_grad_(True)
    with torch.no_grad():
        model[0].weight += 1
    assert len({model(torch.ones(1, 4)).sum().item() for _ in range(20)}) > 2


def test_weight_unfrozen_after_patching_is_mixed_with_what_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    patch_model(model, mixout=0.5)
    assert stats(model)["w_pre_bytes"] == model[1].weight.nbytes
    model(torch.ones(1, 4))
    w_pre = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    step_all = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    step_all.step()
    site = model[0]._surgery_mixed.reads[0][1].tracked
    assert torch.equal(site.values, w_pre)
    assert stats(model)["w_pre_bytes"] == 2 * w_pre.nbytes


@pytest.mark.parametrize("is_patched_again", [False, True], ids=["once", "again"])
def test_weight_written_to_while_frozen_is_refused(is_patched_again: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    patch_model(model, mixout=0.5)
    model.load_state_dict(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict())
    if is_patched_again:
        patch_model(model, mixout=0.9)
    model[0].requires_grad_(True)
    message = "0.weight: expected a weight as it was when it was frozen, got one that has been written to since patch"
    with pytest.raises(SourceError, match=message):
        model(torch.ones(1, 4))
    patch_model(model, mixout=0.5, w_pre=model.state_dict())
    model(torch.ones(1, 4))


# -- modules within modules ----------------------------------------------------------------------------------------


def test_shared_module_is_patched_once() -> None:
    shared = nn.Linear(4, 4)
    model = patch_model(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), mixout=0.5)
    assert (len(shared._forward_hooks), len(shared._forward_pre_hooks)) == (1, 1)
    assert (describe(model).mixed, describe(model).tied) == (("a.weight",), ("b.0.weight",))
    unpatch_model(model)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "settings", [{"mixout": 0.5}, {"mixout": 0}, {"anchor": 0.1}], ids=["mixed", "p-0", "anchored"]
)
def test_two_models_that_share_a_module_are_refused(settings: dict[str, Any]) -> None:
    shared = nn.Linear(4, 4)
    one, two = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared)
    patch_model(one, **settings)
    before = fingerprint(two), fingerprint(one)
    message = "expected modules of one patched model, got one that patch_model has patched as a part of another"
    for refused in (two, one[1]):
        with pytest.raises(SourceError, match=message):
            patch_model(refused)
        with pytest.raises(SourceError, match=message):
            unpatch_model(refused)
    assert (fingerprint(two), fingerprint(one)) == before
    unpatch_model(one)
    patch_model(two)


def test_whole_of_a_patched_part_is_refused() -> None:
    model = bert()
    patch_model(model.bert, mixout=0.5)
    with pytest.raises(SourceError, match="bert: expected modules of one patched model"):
        patch_model(model)
    unpatch_model(model.bert)
    patch_model(model)


def test_parametrization_after_patching_is_named() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4)), mixout=0.5)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    message = (
        "0.weight: expected the layer's own parameter, got none. DataParallel, FSDP 1 and parametrizations take it"
    )
    with pytest.raises(SourceError, match=message):
        model(torch.ones(1, 4))
    unpatch_model(model)(torch.ones(1, 4))
