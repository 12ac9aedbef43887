"""Buffers told from names, those beside them and shapes, for checkpoints whose class is not in the table.

A file does not tell a buffer from a parameter, and noise in a statistic, a table or a mask breaks the model. A rule
knows a kind of buffer by the library that writes it; the list of last names is what remains.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from surgery.roles import NAME, RULE, Role

Names = Collection[str]
_Condition = Callable[[str, str, Names, Sequence[int]], bool]
"""From a tensor's path with its dot, last name, the names beside it and shape: whether the rule holds."""


@dataclass(frozen=True)
class _Rule:
    """One kind of buffer.

    Args:
        last: last names that it may have.
        ending: what its last name may end in, with an underscore; `_0` stands for any number.
    """

    what: str
    last: str = ""
    ending: str = ""
    holds: _Condition | None = None


def _inside(*modules: str) -> _Condition:
    """Hold if the module that holds the tensor has a name that starts with one of these."""
    return lambda path, _last, _names, _shape: path[:-1].rpartition(".")[2].startswith(modules)


def _under(*paths: str) -> _Condition:
    """Hold if one of these stands in the path, which ends in a dot."""
    return lambda path, _last, _names, _shape: any(part in f".{path}" for part in paths)


def _beside(*siblings: str) -> _Condition:
    """Hold if all of these last names stand under the same path."""
    return lambda path, _last, names, _shape: all(path + sibling in names for sibling in siblings)


def _beside_stem(suffix: str) -> _Condition:
    """Hold if the name up to its last underscore, with this suffix, stands beside it."""
    return lambda path, last, names, _shape: path + last.rpartition("_")[0] + suffix in names


def _is_mean_or_std(path: str, last: str, names: Names, _shape: Sequence[int]) -> bool:
    """Hold for x_mean and x_std that stand together, or x_mean and x_var."""
    stem = path + last.rpartition("_")[0]
    return f"{stem}_mean" in names and (f"{stem}_std" in names or f"{stem}_var" in names)


def _is_statistic(path: str, _last: str, names: Names, _shape: Sequence[int]) -> bool:
    """Hold for what stands beside a mean and a std: min, max, quantiles."""
    return path + "mean" in names and any(path + other in names for other in ("std", "var", "scale"))


def _is_range(path: str, _last: str, names: Names, _shape: Sequence[int]) -> bool:
    return path + "min" in names and path + "max" in names


def _is_frozen_norm(path: str, _last: str, names: Names, _shape: Sequence[int]) -> bool:
    """Hold for a batch norm without num_batches_tracked, which torch's own always has and a frozen one never."""
    return path + "running_mean" in names and path + "num_batches_tracked" not in names


def _is_whispers_encoder(path: str, _last: str, names: Names, _shape: Sequence[int]) -> bool:
    """Hold for Whisper's encoder, whose positions are sines; its decoder's are learned."""
    return path.endswith("encoder.") and path + "conv1.weight" in names and path + "conv2.weight" in names


def _is_square(_path: str, _last: str, _names: Names, shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and shape[-1] == shape[-2]


def _is_causal_mask(_path: str, _last: str, _names: Names, shape: Sequence[int]) -> bool:
    # GPT-2, GPT-J and GPT-NeoX keep their causal mask as attn.bias, (1, 1, positions, positions)
    return len(shape) == 4 and shape[0] == shape[1] == 1 and shape[2] == shape[3]


_SCHEDULE, _ROTARY, _SINE = "a table of the noise schedule", "a table of rotary frequencies", "a sine table"
_STATISTIC, _FRONT_END, _CODEBOOK = "a normalization statistic", "a table of the audio front end", "a codebook"
_FILTER = "a resampling filter"

_RULES = (
    # torch: nn.utils.spectral_norm, its parametrization, nn.utils.prune, quantization observers
    _Rule("a vector of spectral_norm", ending="_u _v", holds=_beside_stem("_orig")),
    _Rule("a vector of spectral_norm", last="_u _v", holds=_under(".parametrizations.")),
    _Rule("a mask of pruning", ending="_mask", holds=_beside_stem("_orig")),
    _Rule("a range of quantization", last="min_val max_val min_vals max_vals"),
    _Rule("a range of quantization", last="scale eps", holds=_under("fake_quant", "post_process")),
    _Rule("of a frozen batch norm", last="weight bias", holds=_is_frozen_norm),
    # CompVis's latent-diffusion, stability's generative-models, k-diffusion, denoising-diffusion-pytorch
    _Rule(
        _SCHEDULE,
        last="alphas_cumprod alphas_cumprod_prev alphas_cumprod_next sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
        "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
        "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights p2_loss_weight sigmas "
        "log_sigmas",
    ),
    _Rule(_SCHEDULE, last="betas alphas loss_weight snr logvar", holds=_beside("alphas_cumprod")),
    # Llama's own files, torchtitan, timm's EVA, vLLM, lucidrains
    _Rule(
        _ROTARY,
        last="freqs_cis freqs_cos freqs_sin cos_sin_cache cos_cache sin_cache rope_cache sinu_pos freqs_cis_real "
        "rope_freqs",
    ),
    _Rule(_ROTARY, last="freqs cos sin scale", holds=_inside("rope", "rotary")),
    # positions: torch's tutorial, Segment Anything, Whisper's and Stable Diffusion 3's own files, NeRF, Florence-2
    _Rule(_SINE, last="pe", holds=lambda _path, _last, _names, shape: len(shape) > 1),
    _Rule(_SINE, last="pos_table sinusoid_table positional_encoding_gaussian_matrix pos_idx_to_embed freq_bands"),
    _Rule(_SINE, last="positional_embedding", holds=_is_whispers_encoder),
    _Rule(_SINE, last="pos_embed", holds=_beside("x_embedder.proj.weight", "context_embedder.weight")),
    _Rule("slopes of ALiBi", last="alibi alibi_slopes slopes"),
    _Rule("a table of decays", last="slope_rate query_decay key_decay diagonal_decay"),
    _Rule("a table of decays", last="deltas", holds=_inside("modulation")),
    # statistics: detectron2 and Segment Anything, RADIO, timm, LeRobot (buffers, and processors' files), vocoders
    _Rule(_STATISTIC, last="pixel_mean pixel_std running_std running_max running_min"),
    _Rule(_STATISTIC, ending="_mean _std _var", holds=_is_mean_or_std),
    _Rule(_STATISTIC, last="mean std min max", holds=_under(".normalize_", ".unnormalize_")),
    _Rule(_STATISTIC, last="mean std var scale min max count q01 q10 q50 q90 q99", holds=_is_statistic),
    _Rule(_STATISTIC, last="min max", holds=_is_range),
    _Rule(_STATISTIC, last="std_bias std_scale", holds=_beside("std_bias", "std_scale")),
    # codebooks: EnCodec, lucidrains, Moshi, VQ-VAE
    _Rule(_CODEBOOK, last="embed embedding embeddings codebook", holds=_beside("cluster_size")),
    _Rule(_CODEBOOK, last="embed embedding embeddings codebook", holds=_beside("embed_avg")),
    _Rule(_CODEBOOK, last="embed", holds=_inside("_codebook")),
    _Rule(_CODEBOOK, last="embedding_sum ema_w _ema_w ema_cluster_size _ema_cluster_size implicit_codebook"),
    # audio: torchaudio, torchlibrosa, NeMo, Tacotron's STFT, SincNet, BigVGAN
    _Rule(_FRONT_END, last="window window_ hann_window fb mel_fb mel_basis mel_filters melW dct_mat"),
    _Rule(_FRONT_END, last="forward_basis inverse_basis"),
    _Rule(_FRONT_END, last="weight", holds=_under(".stft.conv_real.", ".stft.conv_imag.")),
    _Rule(_FILTER, last="filter kernel", holds=_inside("upsample", "downsample", "lowpass", "blur")),
    # YOLO, StyleGAN 1 to 3, RT-DETR v2, I-BERT
    _Rule("anchors of a detector", last="anchors anchor_grid stride strides n_points_scale num_points_scale"),
    _Rule("a table of bins", last="weight", holds=_under(".dfl.conv.")),
    _Rule(_FILTER, last="resample_filter up_filter down_filter"),
    _Rule("a running average", last="w_avg latent_avg magnitude_ema"),
    _Rule("fixed noise", last="noise_const"),
    _Rule("fixed noise", ending="_0", holds=_inside("noises")),
    _Rule("fixed Fourier features", last="freqs phases", holds=_beside("freqs", "phases")),
    _Rule("a range of quantization", last="x_min x_max act_scaling_factor fc_scaling_factor norm_scaling_factor"),
    _Rule("a range of quantization", last="weight_integer bias_integer"),
    _Rule("a cosine transform", last="weights", holds=_under("dct.transform.")),
    # masks
    _Rule("a mask", last="mask tril triu", holds=_is_square),
    _Rule("a causal mask", last="bias", holds=_is_causal_mask),
)

# Buffers as transformers, torch and their ancestors name them.
_LAST_NAMES = frozenset(
    """
    running_mean running_var num_batches_tracked inv_freq original_inv_freq inv_timescales rotary_pos_emb_cache
    cos_cached sin_cached position_ids token_type_ids masked_bias causal_mask attn_mask attn_mask_probs logits_mask
    relative_position_index relative_coords_table relative_position_bucket e_score_correction_bias expert_bias
    balancing_biases final_logits_bias empty_weight cluster_size cluster_usage embed_avg embed_sum inited initialized
    mup_vector latent_mean latent_std global_mean global_invstd
    """.split()
)

_BY_LAST: dict[str, list[_Rule]] = {}
_BY_ENDING: dict[str, list[_Rule]] = {}
for _rule in _RULES:
    for _key in _rule.last.split():
        _BY_LAST.setdefault(_key, []).append(_rule)
    for _key in _rule.ending.split():
        _BY_ENDING.setdefault(_key, []).append(_rule)


def role_by_rules(name: str, shape: Sequence[int], names: Names) -> Role:
    """Say what a tensor is from names and shapes alone.

    Args:
        names: of all tensors of the same model, a set.
    """
    path, dot, last = name.rpartition(".")
    path += dot
    if last in _LAST_NAMES:
        return Role(True, NAME)
    if name.startswith("model_ema."):  # latent-diffusion keeps its averaged weights in buffers
        return Role(True, RULE, "an EMA copy")
    _, underscore, ending = last.rpartition("_")
    rules = [*_BY_LAST.get(last, ()), *_BY_ENDING.get(underscore + ("0" if ending.isdigit() else ending), ())]
    for rule in rules:
        if rule.holds is None or rule.holds(path, last, names, shape):
            return Role(True, RULE, rule.what)
    return Role(False, NAME)
