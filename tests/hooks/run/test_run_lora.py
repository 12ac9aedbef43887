"""`surgery run` on LoRA's adapters alone: parameters of a loop by hand in float64, the report, and what is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import byhand
import pytest
import seeded
import torch
from peft import LoraConfig, get_peft_model
from running import Run, run
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from surgery.hooks import describe, patch_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
METHODS = (*byhand.MIXOUT, "--anchor", str(byhand.ANCHOR))
LORA = {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded.bert_folder(tmp_path_factory.mktemp("source"))


def adapted_model(source: Path) -> Any:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64)
    return get_peft_model(base, LoraConfig(**LORA, lora_dropout=0.2))


class MixedByHand:
    """Mixout of the merged weight of LoRA's layers, and the decay of s B A by the gradient of its norm."""

    def __init__(self, model: nn.Module, dropout: tuple[str, ...]) -> None:
        self.layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
        for layer in self.layers:
            layer.forward = partial(self._forward, layer)
        for name in dropout:
            model.get_submodule(name).p = 0.0

    @staticmethod
    def _delta(layer: Any) -> torch.Tensor:
        delta: torch.Tensor = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return delta

    def _forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        m = torch.empty(1, layer.in_features, dtype=torch.float64).bernoulli_(1 - byhand.P)
        w = layer.base_layer.weight + self._delta(layer)
        w_pre = layer.base_layer.weight
        return F.linear(x, w_pre + (w - w_pre) * m / (1 - byhand.P), layer.base_layer.bias)

    def anchor(self, lr: float) -> None:
        for layer in self.layers:
            factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            slopes = torch.autograd.grad(self._delta(layer).square().sum() / 2, factors)
            for w, slope in zip(factors, slopes, strict=True):
                w.data -= lr * byhand.ANCHOR * slope


def test_mixout_anchor_and_rdrop_on_lora_are_those_of_a_loop_by_hand(source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, "with_peft.py", *METHODS, *byhand.RDROP, args=("lora", source, tmp_path / "final.pt"))
    assert ran.code == 0, ran.err
    model = adapted_model(source)
    replaced = describe(patch_model(adapted_model(source), mixout=byhand.P)).replaced
    assert sum("lora_dropout" in name for name in replaced) == 4
    mixed = MixedByHand(model, tuple(name for name in replaced if "lora_dropout" not in name))
    batch = seeded.batch(20)
    rows = list(zip(batch["input_ids"].split(4), batch["labels"].split(4), strict=True))
    wanted = byhand.train(
        model,
        byhand.seeded_steps(rows),
        lambda ids: model(input_ids=ids).logits,
        optimizer=byhand.adamw,
        lr=1e-3,
        mixed=mixed,  # type: ignore[arg-type]
    )
    byhand.assert_equal(torch.load(tmp_path / "final.pt"), wanted)
    (entry,) = ran.models
    assert (entry["mixed"], entry["steps"], entry["rdrop_fired"], entry["w_pre_bytes"]) == (4, 5, 5, 0)
    squares = sum(float(mixed._delta(layer).detach().square().sum()) for layer in mixed.layers)
    assert entry["distance"] == pytest.approx(squares**0.5, rel=1e-9)
    assert ran.records[0]["acts"] == ["anchor", "mixout", "rdrop"]
    assert "4 weights mixed (p 0.5)" in ran.err


def test_lora_alone_is_active_with_noise_on_its_base(source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, "with_peft.py", *byhand.NOISE, *METHODS, args=("lora", source, tmp_path / "final.pt"))
    assert ran.code == 0, ran.err
    assert ran.records[0]["acts"] == ["anchor", "mixout", "noisytune"]
    (entry,) = ran.models
    assert (entry["mixed"], entry["w_pre_bytes"]) == (4, 0)


def test_w_pre_without_the_noise_of_the_base_is_refused(source: Path, tmp_path: Path) -> None:
    flags = (*byhand.NOISE, *METHODS, "--w-pre", "original")
    ran = run(tmp_path, "with_peft.py", *flags, args=("lora", source, tmp_path / "final.pt"))
    assert ran.code == 3
    assert "w_pre: expected perturbed for LoRA (base_model.model.bert.encoder.layer.0.attention.self.query" in ran.err
    assert ran.err.count("Leave it out, or name LoRA's layers in exclude.") == 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, eos_token_id=2, **sizes)).save_pretrained(folder)
    return folder


def train_adapter(tmp_path: Path, llama: Path, kind: str, settings: dict[str, Any], *flags: str) -> Run:
    words = json.dumps({"r": 2, "target_modules": ["q_proj", "v_proj"]} | settings)
    return run(tmp_path, "with_adapter.py", *flags, args=(f"{kind}Config", words, llama, tmp_path / "out"))


@pytest.mark.parametrize(
    ("method", "kind", "settings", "reason"),
    [
        ("mixout", "Lora", {"use_dora": True}, "PEFT's own: DoRA: its norm ||W0 + s B A|| is of the whole weight"),
        pytest.param("anchor", "LoHa", {}, "8 PEFT's own: an adapter", marks=pytest.mark.sweep),
    ],
    ids=["dora", "loha"],
)
def test_other_adapters_alone_end_with_3_and_the_reason(
    method: str, kind: str, settings: dict[str, Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    ran = train_adapter(tmp_path, llama, kind, settings, f"--{method}", "0.5")
    assert ran.code == 3
    assert reason in ran.err
    assert "of adapters, W0 + s B A of plain LoRA alone is acted on" in ran.err
    assert "\nsurgery: PeftModel: left as it is" in ran.err


@pytest.mark.sweep
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_start_that_was_taken_out_of_the_base_is_kept(init: str, llama: Path, tmp_path: Path) -> None:
    ran = train_adapter(tmp_path, llama, "Lora", {"init_lora_weights": init}, *METHODS)
    assert ran.code == 0, ran.err
    (entry,) = ran.models
    assert (entry["mixed"], entry["w_pre_bytes"]) == (2, 2 * (2 * 16 + 16 * 2) * 4)
    assert 0 < entry["distance"] < 2
