"""The real peft: copies of pretrained layers are mixed, adapters other than LoRA's are not, nor is a frozen base."""

import re
from pathlib import Path
from typing import Any

import kinds
import peft
import pytest
import seeded
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from surgery import perturb_model
from surgery.errors import SettingError
from surgery.hooks import describe, patch_model, stats, unpatch_model

# peft asks transformers by a name that it is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
ADAPTER = "PEFT's own: an adapter"
NEW = "new: it has no pretrained value"
LORA = {"r": 2, "target_modules": ["query", "value"]}


def base(path: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(seeded.bert_folder(path))


def trainable(model: nn.Module) -> nn.Module:
    """Unfreeze all but the adapters, which are trainable anyhow."""
    return model.requires_grad_(True).train()


def left_as(model: nn.Module, reason: str) -> set[str]:
    return {name for name, why in (describe(model).left or {}).items() if why == reason}


def test_frozen_base_leaves_nothing_to_mix(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), peft.LoHaConfig(**LORA))
    before = seeded.fingerprint(model)
    message = (
        r"^model: expected a trainable weight to mix, got none \(.*16 PEFT's own: an adapter; 13 frozen.*\)\. "
        r"PEFT trains its adapters, and keeps the weights that they are added to frozen: of adapters, W0 \+ s B A of "
        r"plain LoRA alone is acted on\. Leave it out, or name pretrained layers in PEFT's modules_to_save\.$"
    )
    with pytest.raises(SettingError, match=message):
        patch_model(model)
    assert seeded.fingerprint(model) == before


def test_trainable_base_is_mixed_and_adapters_are_not(tmp_path: Path) -> None:
    model = patch_model(trainable(get_peft_model(base(tmp_path), LoraConfig(**LORA))))
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert left_as(model, ADAPTER) == adapters
    assert len(adapters) == 8
    assert len(describe(model).mixed) == 13
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight" in describe(model).mixed


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("RandLora", {"target_modules": ["query"]}),
        ("Pvera", {"target_modules": ["query"]}),
        ("VBLoRA", {"target_modules": ["query"], "vector_length": 16, "num_vectors": 8}),
        ("TinyLora", {"target_modules": ["query"]}),
        ("Gralora", {"target_modules": ["query"], "r": 4, "gralora_k": 2}),
        ("Frod", {"target_modules": ["query"]}),
        ("HRA", {"target_modules": ["query"]}),
        ("IA3", {"target_modules": ["query"], "feedforward_modules": []}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_that_are_linear_layers_are_no_swapped_weights(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = get_peft_model(base(tmp_path), getattr(peft, f"{kind}Config")(**settings))
    with pytest.raises(
        SettingError, match=r"^model: expected a trainable weight to mix, got none .*PEFT trains its ad"
    ):
        patch_model(model)


COPY = "base_model.model.bert.pooler.modules_to_save.default.dense.weight"


def test_copy_of_a_pretrained_layer_is_mixed_with_its_values(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LoraConfig(**LORA, modules_to_save=["pooler"]))
    patch_model(model, mixout=0.5)
    assert describe(model).mixed[0] == COPY
    assert [name.rpartition("self.")[2] for name in describe(model).mixed[1:]] == [
        "query.base_layer.weight",
        "value.base_layer.weight",
    ] * 2
    original = model.base_model.model.bert.pooler.original_module.dense.weight
    assert torch.equal(seeded.w_pre_of(model)[COPY], original)
    model.train()(**seeded.batch()).loss.backward()
    assert describe(model).uncalled == ()


def test_copy_of_a_pretrained_layer_takes_w_pre_from_the_checkpoint(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LoraConfig(**LORA, modules_to_save=["pooler"]))
    values = model.get_parameter(COPY).detach().clone()
    with torch.no_grad():
        model.get_parameter(COPY).add_(1)
    patch_model(model, w_pre=tmp_path)
    assert torch.equal(seeded.w_pre_of(model)[COPY], values)


def test_copy_of_a_pretrained_layer_is_anchored(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LoraConfig(**LORA, modules_to_save=["pooler"]))
    patch_model(model, anchor=0.5)
    before = model.get_parameter(COPY).detach().clone()
    with torch.no_grad():
        model.get_parameter(COPY).add_(1)
    optimizer = torch.optim.SGD([model.get_parameter(COPY)], lr=1.0)
    model.get_parameter(COPY).grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(model.get_parameter(COPY).detach(), before + 0.5)


def test_copy_of_a_new_layer_is_new(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LoraConfig(**LORA, modules_to_save=["classifier"]))
    patch_model(trainable(model))
    saved = {name for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert len(saved) == 2
    assert saved <= left_as(model, NEW)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning:peft")
def test_tuned_norms_are_recalled_and_refused_by_what_acts_on_layers(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LNTuningConfig(target_modules=["LayerNorm"]))
    tuned = {name for name, w in model.named_parameters() if w.requires_grad}
    assert len(tuned) == 10
    for settings in ({"mixout": 0.7}, {"anchor": 0.1}):
        with pytest.raises(SettingError, match=r"Unfreeze .*, or take recadam, which acts on all kinds of weights\.$"):
            patch_model(model, **settings)
    patch_model(model, recadam=100.0)
    tracked = model.__dict__["_surgery_patch"].weights.of("parameters")
    recalled = {one.name: one.values for one in tracked if one.weight.requires_grad}
    assert recalled.keys() == tuned
    name = next(iter(tuned))
    assert torch.equal(recalled[name], model.get_parameter(name.replace("ln_tuning_layers.default", "base_layer")))


def test_bias_only_training_leaves_nothing_to_mix(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), peft.HRAConfig(**LORA, bias="hra_only", modules_to_save=["classifier"]))
    with pytest.raises(SettingError, match=r"13 frozen.*PEFT trains its adapters"):
        patch_model(model)


def test_base_thawed_later_is_mixed_from_then_on(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LoraConfig(**LORA))
    pooler = model.base_model.model.bert.pooler
    pooler.requires_grad_(True)
    patch_model(model)
    assert describe(model).mixed[0] == "base_model.model.bert.pooler.dense.weight"
    assert stats(model)["mixed"] == 1 + 4
    trainable(model)
    model(**seeded.batch()).loss.backward()
    assert stats(model)["mixed"] == 13
    assert len(left_as(model, ADAPTER)) == 8


def test_wrapper_in_training_mode_around_an_eval_model_is_no_fault(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), LoraConfig(**LORA)).requires_grad_(True)
    patch_model(model)
    assert (model.training, model.base_model.model.training) == (True, False)
    model(**seeded.batch())
    model.train()(**seeded.batch())
    assert describe(model).uncalled == ()


def test_dropout_of_adapters_is_kept(tmp_path: Path) -> None:
    model = patch_model(trainable(get_peft_model(base(tmp_path), LoraConfig(**LORA, lora_dropout=0.1))))
    kept = {name for name in describe(model).kept if name.endswith("lora_dropout.default")}
    assert len(kept) == 4
    assert set(describe(model).kept) - kept == {"base_model.model.dropout"}


def test_mixed_base_and_adapters_train(tmp_path: Path) -> None:
    model = patch_model(trainable(get_peft_model(base(tmp_path), LoraConfig(**LORA))), mixout=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    for step in range(2):
        model(**seeded.batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    for name in (f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"):
        assert not torch.equal(model.get_parameter(name), before[name])
    assert describe(model).uncalled == ()


def test_p_1_gives_the_pretrained_base_with_its_adapter(tmp_path: Path) -> None:
    model = trainable(get_peft_model(base(tmp_path), LoraConfig(**LORA))).eval()
    with torch.no_grad():
        model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B["default"].weight.add_(0.1)
        expected = model(**seeded.batch()).logits
        patch_model(model, mixout=1.0)
        model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.add_(3)
        model.train().base_model.model.dropout.p = 0.0
        assert torch.equal(model(**seeded.batch()).logits, expected)


def test_checkpoint_gives_w_pre_through_pefts_names(tmp_path: Path) -> None:
    model = trainable(get_peft_model(base(tmp_path), LoraConfig(**LORA, modules_to_save=["classifier"])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    patch_model(model, w_pre=tmp_path)
    found = seeded.w_pre_of(model)
    query = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"
    assert torch.equal(found[query] + 1, model.get_parameter(query))
    assert len(found) == 13


@pytest.mark.parametrize("thaw", [True, False], ids=["thawed", "frozen"])
def test_model_patched_before_peft_wraps_it(thaw: bool, tmp_path: Path) -> None:
    plain = base(tmp_path)
    patch_model(plain, mixout=0.5)
    model = get_peft_model(plain, LoraConfig(**LORA))
    if thaw:
        trainable(model)
    model.train()(**seeded.batch()).loss.backward()
    assert stats(plain)["mixed"] == (13 if thaw else 0)
    assert isinstance(model, PeftModel)
    unpatch_model(plain)
    assert not any("_surgery_mixed" in vars(module) for module in model.modules())


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])  # type: ignore[no-any-return]


class Routing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = kinds.mixtral("eager").float(), nn.Linear(kinds.HIDDEN, 2)

    def forward(self, x: torch.Tensor, *route: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x, *route))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "config", "read"),
    [
        (Attending, {"target_modules": ["attention"]}, lambda: (torch.ones(2, 3, 8),)),
        (
            Routing,
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            lambda: tuple(x.float() if x.is_floating_point() else x for x in kinds.routed()),
        ),
    ],
    ids=["attention", "parameters"],
)
def test_layer_whose_weight_peft_replaces_is_named_and_still_trained(make: Any, config: Any, read: Any) -> None:
    model = get_peft_model(make(), LoraConfig(r=2, modules_to_save=["head"], **config))
    patch_model(model.train(), mixout=0.5)
    assert describe(model).mixed == ("base_model.model.head.modules_to_save.default.weight",)
    assert len(left_as(model, "of a layer whose weight PEFT replaces at each call")) == 2
    model(*read()).sum().backward()
    assert describe(model).uncalled == ()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning:peft")
@pytest.mark.parametrize(
    "config",
    [
        LNTuningConfig(target_modules=["LayerNorm"]),
        LoraConfig(**LORA, modules_to_save=["pooler"]),
        LoraConfig(**LORA, trainable_token_indices={"word_embeddings": [1, 2]}),
    ],
    ids=["norms", "pooler", "tokens"],
)
def test_noise_is_that_of_the_checkpoint_on_originals_and_copies(config: Any, tmp_path: Path) -> None:
    pretrained = seeded.bert(BertModel)
    for norm in (module for module in pretrained.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
    pretrained.save_pretrained(source := tmp_path / "source")
    plain = BertForSequenceClassification.from_pretrained(source)
    perturb_model(plain, lam=0.5)
    model = get_peft_model(BertForSequenceClassification.from_pretrained(source), config)
    perturb_model(model, lam=0.5)
    noisy = dict(plain.named_parameters())
    wrappers = (
        r"base_model\.model\.|(token_adapter|base_layer|original_module|(modules_to_save|ln_tuning_layers)\.\w+)\."
    )
    for name, w in model.named_parameters():
        if not any(part in name for part in ("lora_", "delta", "classifier")):
            assert torch.equal(w, noisy[re.sub(wrappers, "", name)]), name
