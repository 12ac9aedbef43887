"""TRL's SFTTrainer reads the weight of a tied head past its layer: a run says so, and does not count it as mixed."""

from pathlib import Path

import pytest
import torch
from running import Run, run
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
