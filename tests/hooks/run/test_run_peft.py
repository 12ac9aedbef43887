"""Noise under PEFT's adapters, which are saved without it: what a run advises is tried, or the noise is refused."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from running import Run, run
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from surgery import perturb_model
from surgery.cli import main
from surgery.hooks.run.inside.adapters import REPEATED, LoadedValues, advise, refuse_unrepeatable
from surgery.hooks.run.inside.noise import Noise
from surgery.hooks.run.inside.snapshots import Snapshots

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
QV = ["q_proj", "v_proj"]
LORA = {"r": 2, "target_modules": QV}
NOISE = ("--noisytune", "0.5", "--seed", "3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained language model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, eos_token_id=2, **sizes)).save_pretrained(folder)
    return folder


def train(
    tmp_path: Path, source: Path, settings: dict[str, Any], *flags: str, kind: str = "Lora", how: str = ""
) -> Run:
    args = (f"{kind}Config", json.dumps(settings), source, tmp_path / "out", *([how] if how else []))
    return run(tmp_path, "with_adapter.py", *flags, args=args)


def perturbed(source: Path, folder: Path, flags: str) -> Path:
    done = CliRunner().invoke(main, ["perturb", str(source), "-o", str(folder), *shlex.split(flags)])
    assert done.exit_code == 0, done.output
    return folder


def has_logits(model: nn.Module, out: Path) -> bool:
    ids, wanted = torch.load(out / "logits.pt")
    with torch.no_grad():
        return torch.equal(model.eval()(input_ids=ids).logits, wanted)


def reload(base: Path, out: Path) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Lora", LORA),
        pytest.param("Lora", LORA | {"use_dora": True, "modules_to_save": ["lm_head"]}, marks=pytest.mark.sweep),
        pytest.param("PromptTuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, marks=pytest.mark.sweep),
    ],
    ids=["lora", "dora-and-head", "prompt"],
)
def test_adapter_is_loaded_onto_what_the_printed_flags_make(
    kind: str, settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    ran = train(tmp_path, source, settings, *NOISE, "--exclude", "**.o_proj", kind=kind)
    assert ran.code == 0, ran.err
    (note,) = (one for one in ran.records[0]["notes"] if "noise is on" in one)
    assert ("merge them" in note) == (kind == "Lora")
    found = re.search(r"load it onto what surgery perturb makes with (.*)\.$", note)
    assert found
    assert found[1] == "--lam 0.5 --seed 3 --exclude model.layers.0.self_attn.o_proj.weight"
    out = tmp_path / "out"
    assert has_logits(reload(perturbed(source, tmp_path / "noisy", found[1]), out), out)
    assert not has_logits(reload(source, out), out)


def test_copy_of_a_pretrained_head_is_mixed_and_anchored(source: Path, tmp_path: Path) -> None:
    flags = (*NOISE, "--mixout", "0.5", "--anchor", "0.1")
    ran = train(tmp_path, source, LORA | {"modules_to_save": ["lm_head"]}, *flags)
    assert ran.code == 0, ran.err
    assert ran.records[0]["acts"] == ["anchor", "mixout", "noisytune"]
    assert [(entry["mixed"], entry["perturbed"]) for entry in ran.models] == [(3, 9)]
    assert ran.models[0]["distance"] > 0


def test_merged_adapter_keeps_the_noise(source: Path, tmp_path: Path) -> None:
    ran = train(tmp_path, source, LORA, *NOISE, how="after")
    assert ran.code == 0, ran.err
    ids, wanted = torch.load(tmp_path / "out" / "logits.pt")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("kind", "settings", "how", "fault"),
    [
        ("Lora", LORA | {"init_lora_weights": "olora"}, "", "got LORA with init_lora_weights='olora': noise"),
        pytest.param(
            *("Lora", LORA | {"init_lora_weights": "pissa"}, "", "got LORA with init_lora_weights='pissa': noise"),
            marks=pytest.mark.sweep,
        ),
        pytest.param("Frod", {"target_modules": QV}, "", "got FROD: noise", marks=pytest.mark.sweep),
        pytest.param("OSF", {"target_modules": QV}, "", "got OSF: noise", marks=pytest.mark.sweep),
        (
            "Lora",
            LORA,
            "before",
            "q_proj.base_layer.weight: expected base weights as they were loaded, got 1 that were",
        ),
    ],
    ids=["olora", "pissa", "frod", "osf", "merged"],
)
def test_noise_that_no_reload_repeats_is_refused_and_the_advice_works(
    kind: str, settings: dict[str, Any], how: str, fault: str, source: Path, tmp_path: Path
) -> None:
    ran = train(tmp_path, source, settings, *NOISE, kind=kind, how=how)
    assert ran.code == 3
    assert fault in ran.err
    assert "Run `surgery perturb` on the checkpoint, train on what it makes, and leave noisytune out." in ran.err
    if not how:
        noisy = perturbed(source, tmp_path / "noisy", "--lam 0.5 --seed 3")
        assert train(tmp_path, noisy, settings, kind=kind).code == 0
        assert has_logits(reload(noisy, tmp_path / "out"), tmp_path / "out")


def test_loaded_values_follow_a_change_of_dtype_and_see_any_other() -> None:
    loaded, w = LoadedValues(), nn.Parameter(torch.linspace(-1, 1, 40).reshape(4, 10))
    assert not loaded.is_changed(w)
    loaded.keep([w])
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        w.data = w.data.to(dtype)
        assert not loaded.is_changed(w)
    w.data = w.data * 1.01
    assert loaded.is_changed(w)
    loaded.keep([w])
    assert not loaded.is_changed(w)


def test_noise_of_live_names_is_not_said_to_be_repeated() -> None:
    model = get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    noise = Noise(0.5, 0, Snapshots())
    noise.add(model, model.parameters(), (), (), ())
    assert advise(model, noise.recipes(model)) == (
        "noise is on base weights, which an adapter is saved without: merge them, for surgery perturb does not repeat "
        "this noise."
    )


def test_noise_is_beside_a_prompt_but_not_on_a_teacher(source: Path) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(source) for _ in range(2))
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    both = nn.ModuleDict({"teacher": teacher, "student": get_peft_model(student, config)})
    Noise(0.5, 0, Snapshots()).add(both, [w for w in both["student"].parameters() if w.requires_grad], (), (), ())
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(teacher.lm_head.weight, plain.lm_head.weight)
    perturb_model(plain, lam=0.5)
    assert torch.equal(student.lm_head.weight, plain.lm_head.weight)


def test_noise_on_a_copy_and_its_original_counts_once(source: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source), peft.LoraConfig(**LORA, modules_to_save=["lm_head"])
    )
    noise = Noise(0.5, 0, Snapshots())
    noise.add(model, [w for w in model.parameters() if w.requires_grad], (), (), ())
    names = [record.name for record in noise.records(model) if record.copied is None]
    assert names.count("lm_head.weight") == 1
    head = model.base_model.model.lm_head
    assert torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)


CONFIGS: dict[str, dict[str, Any]] = {
    "AdaLora": {"total_step": 9},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1], "task_type": "CAUSAL_LM"},
    "FourierFT": {"n_frequency": 9},
    "Gralora": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "LNTuning": {"target_modules": ["input_layernorm"]},
    "Miss": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PrefixTuning": {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
    "PromptEncoder": {"num_virtual_tokens": 2, "encoder_hidden_size": 8, "task_type": "CAUSAL_LM"},
    "PromptTuning": {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
    "Road": {"group_size": 4},
    "Shira": {"r": 2},
    "TrainableTokens": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLoRA": {"vector_length": 8, "num_vectors": 8},
    "WaveFT": {"n_frequency": 9},
} | {
    name: {}
    for name in "BOFT Beft Deft Delora Glora HRA Hira Lily LoHa LoKr Lora Peanut Pvera RandLora Supertuning "
    "TinyLora UniLora Vera".split()
}
"""Of every type that a run adds noise under."""


def config(kind: str) -> Any:
    targets = {} if "virtual" in str(CONFIGS[kind]) or kind == "CPT" else {"target_modules": QV}
    return getattr(peft, f"{kind}Config")(**targets | CONFIGS[kind])


def test_every_type_that_is_not_refused_is_tried() -> None:
    assert {config(kind).peft_type.value for kind in CONFIGS} == REPEATED


@pytest.mark.sweep
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_adapter_that_is_not_refused_is_loaded_onto_the_noise(kind: str, source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), config(kind))
    refuse_unrepeatable(model, LoadedValues())
    perturb_model(model, lam=0.5)
    ids = torch.arange(5, 13).reshape(1, 8)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(source)
        perturb_model(base, lam=0.5)
        got = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if kind == "AdaLora" else 0)
