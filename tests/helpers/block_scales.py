"""Small checkpoints in float8 and mxfp4, as DeepSeek, Qwen and gpt-oss are published: real models, quantized here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
_LUT = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def to_float8(w: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in float8, and the scale of each block, of which the last ones may be smaller."""
    rows, columns = w.shape
    scale = torch.empty(-(-rows // block), -(-columns // block))
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = w[i * block : (i + 1) * block, j * block : (j + 1) * block].float()
            scale[i, j] = part.abs().max() / 448
            q[i * block : (i + 1) * block, j * block : (j + 1) * block] = (part / scale[i, j]).to(q.dtype)
    return q, scale


def to_mxfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks and scales of experts (experts, inputs, outputs), of which each output's inputs make a row."""
    rows = w.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(rows.abs().amax(-1))) - 2
    nearest = (rows / exponent.exp2()[..., None])[..., None].sub(_LUT).abs().argmin(-1).to(torch.uint8)
    return nearest[..., 0::2] | nearest[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def qwen(folder: Path) -> Path:
    config = Qwen3Config(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    return _write(folder, Qwen3ForCausalLM(config), FP8)


def deepseek(folder: Path) -> Path:
    """With blocks that are cut off, and scales in another shard than their weights, as DeepSeek-V3 has both."""
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=256, intermediate_size=320, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=64, q_lora_rank=96, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32,
    )  # fmt: skip
    return _write(folder, DeepseekV3ForCausalLM(config), FP8, splits_scales=True)


def gpt_oss(folder: Path) -> Path:
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return _write(folder, GptOssForCausalLM(config), MXFP4)


def _write(folder: Path, model: PreTrainedModel, settings: dict[str, Any], *, splits_scales: bool = False) -> Path:
    generator = torch.Generator().manual_seed(0)
    for w in model.parameters():
        w.data = torch.randn(w.shape, generator=generator) * 0.02
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100GB")
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    weights: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for name, w in load_file(file).items():
        if settings is MXFP4 and name.endswith(("gate_up_proj", "down_proj")):
            weights[f"{name}_blocks"], weights[f"{name}_scales"] = to_mxfp4(w)
        elif (settings is FP8 and name.endswith("_proj.weight")) or (".kv_" in name and w.ndim == 2):
            weights[name], scales[f"{name}_scale_inv"] = to_float8(w)
        else:
            weights[name] = w
    file.unlink()
    shards = [weights | scales]
    if splits_scales:
        first, last = list(weights)[::2], list(weights)[1::2]
        shards = [_of(first, weights) | _of(last, scales), _of(last, weights) | _of(first, scales)]
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: w.contiguous() for key, w in tensors.items()}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}, indent=2))
    return folder


def _of(names: list[str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w for name, w in tensors.items() if name.removesuffix("_scale_inv") in names}
