"""TRL's SFTTrainer, whose head is fused: R-Drop is in its loss, and a tied head that Mixout does not mix is named."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import byhand
import pytest
import torch
from running import SCRIPTS, Run, run
from transformers import LlamaConfig, LlamaForCausalLM

NOTE = (
    "mixout: lm_head.weight: no forward in training calls this layer. Its weight is tied, and mixed only where "
    "{} is called."
)
BY_HAND = """
import torch
from torch import nn
from torch.nn import functional as F

class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.body = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
    def forward(self, ids):
        return F.linear(self.body(self.embed_tokens(ids)), self.lm_head.weight)

model = Fused()
model.load_state_dict(Fused().state_dict())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.train()(torch.tensor([0, 1])).sum().backward()
optimizer.step()
"""


def tells(ran: Run, note: str, *, mixed: int) -> None:
    assert ran.code == 0, ran.err
    assert any(note in one for one in ran.records[0]["notes"])
    assert [entry["mixed"] for entry in ran.models] == [mixed]


def test_tied_head_that_a_loss_reads_itself_is_named(tmp_path: Path) -> None:
    tells(run(tmp_path, BY_HAND, "--mixout", "0.7"), NOTE.format("embed_tokens.weight"), mixed=1)


def test_tied_head_of_trl_is_named(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=60, pad_token_id=0, eos_token_id=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    ran = run(tmp_path, "with_trl.py", "--mixout", "0.7", args=(tmp_path / "source", tmp_path / "out"))
    tells(ran, NOTE.format("model.embed_tokens.weight"), mixed=7)


# -- SFTTrainer's fused head under R-Drop ----------------------------------------------------------------------------

ALPHA = 1.5
SFT = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "packing": ("full", {"packing": True, "max_length": 24}),
    "completions, accumulation": ("completion", {"gradient_accumulation_steps": 2}),
    "checkpointing": ("full", {"gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained Llama with dropout, whose two passes differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    noise = {"attention_dropout": 0.3, "initializer_range": 0.5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, eos_token_id=2, **sizes, **noise))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def sft(folder: Path, llama: Path, way: str, settings: dict[str, Any], *flags: str) -> tuple[Run, dict[str, Any]]:
    pytest.importorskip("trl", reason="TRL is not installed")
    ran = run(folder, "with_sft.py", *flags, args=(llama, folder / "out", way, json.dumps(settings)))
    left = folder / "out.pt"
    return ran, torch.load(left, weights_only=False) if left.exists() else {}


def model_of(llama: Path, way: str, start: dict[str, torch.Tensor]) -> Any:
    """The model of the script, with the weights that it had before training, adapters of LoRA among them."""
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64).train()
    if way == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)  # type: ignore[assignment]
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.copy_(start[name])
    return model


def terms(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the cross entropy and the symmetric KL of each token, by whole logits; the second pass's log q, and y."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    y = batch["labels"][:, 1:]
    log_p, log_q = (model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)[y != -100] for _ in range(2))
    y = y[y != -100]
    nll = -(log_p + log_q).gather(-1, y[:, None])[:, 0] / 2
    return nll, ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2, log_q.detach(), y


def by_hand(model: Any, batches: list[dict[str, Any]], accumulation: int) -> list[dict[str, float]]:
    """Train with the loss written out, over whole logits; return what the trainer should log of each step."""
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3, weight_decay=0.0)
    logs = []
    for step in range(5):
        torch.manual_seed(100 + step)
        parts = batches[step * accumulation : (step + 1) * accumulation]
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        measured: list[dict[str, float]] = []
        for part in parts:
            nll, s, log_q, y = terms(model, part)
            ((nll + ALPHA / 2 * s).sum() / items).backward()
            entropy = -(log_q.exp() * log_q).sum(-1).mean()
            correct = (log_q.argmax(-1) == y).double().mean()
            figures = {"rdrop_kl": s.mean(), "rdrop_ce": nll.mean(), "entropy": entropy, "mean_token_accuracy": correct}
            figures["loss"] = (nll + ALPHA / 2 * s).sum() / items * len(parts)
            measured.append({name: value.item() for name, value in figures.items()})
        optimizer.step()
        optimizer.zero_grad()
        logs.append({name: sum(one[name] for one in measured) / len(measured) for name in measured[0]})
    return logs


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("name", SFT)
def test_sft_of_trl_is_the_loop_by_hand(name: str, llama: Path, tmp_path: Path) -> None:
    way, settings = SFT[name]
    ran, left = sft(tmp_path, llama, way, settings, "--rdrop", str(ALPHA))
    assert ran.code == 0, ran.err
    model = model_of(llama, way, left["start"])
    logs = by_hand(model, left["batches"], settings.get("gradient_accumulation_steps", 1))
    byhand.assert_equal(left["weights"], {name: w.detach() for name, w in model.named_parameters()})
    assert any(not torch.equal(w, left["start"][name]) for name, w in model.named_parameters())
    for got, wanted in zip(left["logs"], logs, strict=True):
        # TRL computes its own metrics in float32, and the loss is logged in it
        assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        assert wanted["rdrop_kl"] > 0.1
    (entry,) = ran.models
    assert (entry["steps"], entry["rdrop_fired"]) == (5, 5)


def test_dft_of_trl_is_refused(llama: Path, tmp_path: Path) -> None:
    ran, _ = sft(tmp_path, llama, "full", {"loss_type": "dft"}, "--rdrop", "1.5")
    assert ran.code != 0
    assert "rdrop: expected a loss that is a weighted sum of log-probabilities, got exp of them" in ran.err
    assert ran.records[0]["is_refused"]
    assert [entry["rdrop_fired"] for entry in ran.models] == [0]


PAIRS = {"dpo": "got that of TRL's DPO trainer", "reward": "got one by logsigmoid"}


@pytest.mark.parametrize("flags", [(), ("--allow-inactive",)], ids=["strict", "allow-inactive"])
@pytest.mark.parametrize(("trainer", "got"), PAIRS.items(), ids=PAIRS)
def test_losses_of_pairs_of_trl_are_refused(
    trainer: str, got: str, llama: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    ran = run(tmp_path, f"with_{trainer}.py", "--rdrop", "1.5", *flags, args=(llama, tmp_path / "out"))
    line = (
        f"rdrop: expected a loss with a formula, {got}: R-Drop has no formula for it, as for all losses of pairs or "
        "groups (DPO, GRPO, reward). Leave rdrop out; noise, Mixout and the anchor work there."
    )
    assert line in ran.err
    assert (ran.code == 0) == bool(flags), ran.err
    assert [entry["rdrop_fired"] for entry in ran.models] == [0] * len(ran.models)


def test_trl_sft_is_regularized_from_the_command_line(
    llama: Path, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.syspath_prepend(SCRIPTS)
    from with_sft import make_rows, make_tokenizer

    shutil.copytree(llama, tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    make_rows(False).to_json(tmp_path / "data" / "train.jsonl")
    flags = {
        "model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "max_steps": 2,
        "save_strategy": "no", "report_to": "none", "bf16": "false", "gradient_checkpointing": "false",
    }  # fmt: skip
    command = [Path(sys.executable).with_name("trl"), "sft", "--use_cpu"]
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    ran = run_cli("run", "--rdrop", "1.5", "--report", "report.json", "--", *command)
    assert ran.code == 0, ran.err
    (entry,) = json.loads((tmp_path / "report.json").read_text())["ranks"][0]["models"]
    assert (entry["steps"], entry["rdrop_fired"]) == (2, 2)
    assert entry["kl"] > 0.1
    assert "R-Drop in 2 of them" in ran.err
