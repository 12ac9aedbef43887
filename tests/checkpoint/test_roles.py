"""Parameters and buffers told apart by rules on names, those beside them and shapes; modules of torch say the truth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from surgery.checkpoint.buffer_rules import role_by_rules
from surgery.checkpoint.model_types import ModelType
from surgery.checkpoint.roles import find_roles
from surgery.roles import CLASS, NAME, RULE, Role


def buffers_of(names: str, shape: tuple[int, ...] = (4,)) -> set[str]:
    """Return which of these names, all of one model, are taken for buffers."""
    found = find_roles(dict.fromkeys(names.split(), shape))
    return {name for name, role in found.items() if role.is_buffer}


class Positions(nn.Module):
    """Sine positions as in torch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pe", torch.randn(1, 8, 4))


class Frozen(nn.Module):
    """A frozen batch norm as in torchvision and detectron2."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.randn(4))


def pruned() -> nn.Module:
    layer = nn.Conv1d(2, 2, 3)
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)
    return layer


MODULES: dict[str, Callable[[], nn.Module]] = {
    "pruning": pruned,
    "spectral-norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "spectral-norm-parametrization": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "weight-norm-parametrization": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "batch-norm": lambda: nn.BatchNorm1d(4),
    "frozen-batch-norm": Frozen,
    "instance-norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "positions": Positions,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "make", [*MODULES.values(), lambda: weight_norm(nn.Linear(4, 4))], ids=[*MODULES, "weight-norm"]
)
def test_rules_agree_with_the_module(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    roles = find_roles({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    parameters = dict(model.named_parameters())
    assert {name for name in floats if not roles[name].is_buffer} == parameters.keys()


SCHEDULE = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights"""
BUFFERS = {
    "latent-diffusion": (SCHEDULE, "model.diffusion_model.out.2.weight scale.weight"),
    "sdxl": ("denoiser.sigmas", "model.diffusion_model.out.2.bias"),
    "ldm-ema": ("model_ema.decay model_ema.diffusion_modelout2weight", "model.diffusion_model.out.2.weight"),
    "llama": ("rope.freqs", "tok_embeddings.weight norm.weight"),
    "torchtitan": ("freqs_cis", "layers.0.attention.wq.weight"),
    "eva": ("rope.freqs_cos blocks.0.attn.rope.freqs_sin", "blocks.0.attn.q_proj.weight"),
    "whisper": (
        "encoder.positional_embedding",
        "encoder.conv1.weight encoder.conv2.weight decoder.positional_embedding decoder.token_embedding.weight",
    ),
    "segment-anything": (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix pixel_mean pixel_std",
        "image_encoder.pos_embed mask_decoder.iou_token.weight",
    ),
    "radio": ("input_conditioner.norm_mean input_conditioner.norm_std", "model.blocks.0.norm1.weight"),
    "lerobot": (
        "normalize_inputs.buffer_observation_state.mean normalize_inputs.buffer_observation_state.std "
        "unnormalize_outputs.buffer_action.max unnormalize_outputs.buffer_action.min",
        "model.action_head.weight",
    ),
    "lerobot-processor": ("observation.state.mean observation.state.std action.min action.max action.q99 action.mean "
                          "action.std", ""),
    "encodec": (
        "quantizer.vq.layers.0._codebook.embed quantizer.vq.layers.0._codebook.embed_avg "
        "quantizer.vq.layers.0._codebook.cluster_size quantizer.vq.layers.0._codebook.inited",
        "encoder.model.0.conv.conv.weight_g encoder.model.0.conv.conv.weight_v embed",
    ),
    "moshi": ("q._codebook.embedding_sum q._codebook.cluster_usage", "q.output_proj.weight"),
    "nemo": ("preprocessor.featurizer.window preprocessor.featurizer.fb", "encoder.pre_encode.out.weight"),
    "panns": (
        "spectrogram_extractor.stft.conv_real.weight spectrogram_extractor.stft.conv_imag.weight "
        "logmel_extractor.melW",
        "conv_block1.conv1.weight",
    ),
    "bigvgan": (
        "resblocks.0.activations.0.upsample.filter resblocks.0.activations.0.downsample.lowpass.filter",
        "resblocks.0.activations.0.act.alpha ups.0.0.weight_g ups.0.0.weight_v",
    ),
    "yolo": ("model.22.anchors model.22.stride model.22.dfl.conv.weight", "model.22.cv2.0.0.conv.weight"),
    "stylegan2": (
        "mapping.w_avg synthesis.b4.conv1.noise_const synthesis.b8.conv0.resample_filter",
        "synthesis.b4.const synthesis.b4.conv1.noise_strength.weight mapping.fc0.weight",
    ),
    "stylegan3": (
        "synthesis.input.freqs synthesis.input.phases synthesis.L0_36_512.up_filter synthesis.L0_36_512.magnitude_ema",
        "synthesis.input.weight synthesis.L0_36_512.weight",
    ),
    "i-bert": ("encoder.layer.0.act.x_max encoder.layer.0.act.act_scaling_factor", "pooler.weight"),
    "minimax": ("layers.0.self_attn.slope_rate layers.0.self_attn.query_decay", "layers.0.self_attn.norm.weight"),
    "alibi": ("alibi_slopes", "wte.weight"),
    "florence-2": ("visual_temporal_embed.pos_idx_to_embed", "image_projection"),
    "rt-detr-v2": ("decoder.layers.0.cross_attn.n_points_scale anchors", "decoder.layers.0.fc1.weight"),
    "hifigan": ("mean scale", "conv_pre.weight upsampler.0.bias"),
    "timm-gemma": ("std_bias std_scale", "blocks.0.attn.qkv.weight"),
    "timm-csatv2": ("stem_dct.transform.transform.weights", "stem_dct.conv.weight"),
    "stable-diffusion-3": (
        "model.diffusion_model.pos_embed",
        "model.diffusion_model.x_embedder.proj.weight model.diffusion_model.context_embedder.weight",
    ),
    "vit": ("", "pos_embed patch_embed.proj.weight"),
    "parameters": ("", "mean.weight w.mean log_std pos_mean embed weight_v weight_u_proj gate_mask head.scale"),
}  # fmt: skip


@pytest.mark.parametrize(("buffers", "parameters"), BUFFERS.values(), ids=BUFFERS.keys())
def test_rules_know_buffers_and_leave_parameters(buffers: str, parameters: str) -> None:
    assert buffers_of(f"{buffers} {parameters}") == set(buffers.split())


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("h.0.attn.bias", (1, 1, 8, 8), Role(True, RULE, "a causal mask")),
        ("h.0.attn.bias", (8,), Role(False, NAME)),
        ("tril", (8, 8), Role(True, RULE, "a mask")),
        ("attn.mask", (1, 1, 8, 8), Role(True, RULE, "a mask")),
        ("mask", (8,), Role(False, NAME)),
        ("pe", (1, 8, 4), Role(True, RULE, "a sine table")),
        ("pe", (4,), Role(False, NAME)),
        ("bn.running_mean", (4,), Role(True, NAME)),
        ("encoder.weight", (4, 4), Role(False, NAME)),
    ],
    ids=str,
)
def test_role_by_shape_and_last_name(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert role_by_rules(name, shape, {name}) == role


def test_the_class_comes_before_rules_and_names() -> None:
    kind = ModelType("x", frozenset({"table", "pe"}), frozenset({"gate.e_score_correction_bias"}))
    shapes: dict[str, Any] = dict.fromkeys(["table", "pe", "gate.e_score_correction_bias", "weight"], (4, 4))
    shapes |= {"layers.0.inv_freq": (4,), "window": (4,)}
    assert find_roles(shapes, kind) == {
        "table": Role(True, CLASS),
        "pe": Role(True, CLASS),
        "gate.e_score_correction_bias": Role(False, CLASS),
        "weight": Role(False, CLASS),
        "layers.0.inv_freq": Role(True, NAME),
        "window": Role(True, RULE, "a table of the audio front end"),
    }
