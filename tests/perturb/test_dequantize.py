"""--dequantize bf16: against transformers' own dequantization, and formulas in float64 where that has none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_scales
import numpy as np
import pytest
import torch
from checkpoints import tree_digest
from commands import Ran
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from surgery import diff_checkpoints, materialize_checkpoint, perturb_checkpoint, verify_checkpoint
from surgery.checkpoint.block_scaled import Float8Blocks, Mxfp4Blocks
from surgery.checkpoint.tensorfile import Tensor
from surgery.errors import SettingError, SourceError

Run = Callable[..., Ran]
MAKERS = {"qwen": block_scales.qwen, "deepseek": block_scales.deepseek, "gpt-oss": block_scales.gpt_oss}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()}


def in_float64(folder: Path) -> dict[str, torch.Tensor]:
    """The float8 weights of a folder by the formula, element for element, and all others as they are."""
    stored = tensors(folder)
    plain = {name: w for name, w in stored.items() if not name.endswith("_scale_inv")}
    for name, w in plain.items():
        if w.dtype == torch.float8_e4m3fn:
            i, j = torch.meshgrid(*map(torch.arange, w.shape), indexing="ij")
            # one product of 4 and 24 bits is exact in float64, and so is float32's rounding of it
            plain[name] = (w.double() * stored[f"{name}_scale_inv"].double()[i // 128, j // 128]).float().bfloat16()
    return plain


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "gpt-oss"])
def test_weights_are_those_that_transformers_dequantizes(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    perturb_checkpoint(sources[name], tmp_path / "out", lam=0.0, dequantize="bf16")
    config: Any = Mxfp4Config(dequantize=True) if name == "gpt-oss" else FineGrainedFP8Config(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(
        sources[name], quantization_config=config, dtype=torch.bfloat16
    ).state_dict()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(model.config, "quantization_config")
    assert {w.dtype for w in model.state_dict().values()} == {torch.bfloat16}
    for key, w in model.state_dict().items():
        assert torch.equal(w, expected[key]), key


def test_blocks_that_are_cut_off_and_scales_in_another_shard_follow_the_formula(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    perturb_checkpoint(sources["deepseek"], tmp_path / "out", lam=0.0, dequantize="bf16")
    expected, written = in_float64(sources["deepseek"]), tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, w in written.items():
        assert torch.equal(w, expected[name]), name
    assert any(w.shape[0] > 128 and w.shape[0] % 128 for name, w in written.items() if name.endswith("_proj.weight"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in written.values())


@pytest.mark.parametrize("name", MAKERS)
def test_noise_is_that_of_the_dequantized_checkpoint(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    perturb_checkpoint(sources[name], tmp_path / "plain", lam=0.0, dequantize="bf16")
    perturb_checkpoint(tmp_path / "plain", tmp_path / "expected")
    perturb_checkpoint(sources[name], tmp_path / "out", dequantize="bf16")
    expected = tensors(tmp_path / "expected")
    for key, w in tensors(tmp_path / "out").items():
        assert torch.equal(w, expected[key]), key
    plain = tensors(tmp_path / "plain")
    assert any(not torch.equal(w, plain[key]) for key, w in expected.items())


@pytest.mark.parametrize("name", MAKERS)
def test_recipe_verifies_and_is_made_again(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = perturb_checkpoint(sources[name], tmp_path / "out", dequantize="bf16")
    assert recipe.dequantize == "bf16"
    assert verify_checkpoint(tmp_path / "out").is_equal
    materialize_checkpoint(tmp_path / "out/surgery.json", tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")
    agreement = diff_checkpoints(sources[name], tmp_path / "out").agreement
    assert agreement
    assert not agreement.disagreeing


def test_a_scale_that_changes_is_another_source(tmp_path: Path) -> None:
    source = block_scales.deepseek(tmp_path / "source")
    perturb_checkpoint(source, tmp_path / "out", dequantize="bf16")
    (shard,) = source.glob("*-00002-of-*.safetensors")
    stored = load_file(shard)
    scale = next(name for name in stored if name.endswith("_scale_inv"))
    save_file(stored | {scale: stored[scale] * 2}, shard, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="expected the recipe's source"):
        materialize_checkpoint(tmp_path / "out/surgery.json", tmp_path / "again")


# -- the formats, wherever a piece begins -----------------------------------------------------------------------------


def reader(data: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    flat = data.contiguous().view(torch.uint8).flatten()
    return lambda start, count: flat[start : start + count].clone()


@pytest.mark.parametrize("shape", [(256, 384), (3, 130, 250)], ids=["matrix", "stack"])
def test_any_run_of_float8_is_that_of_the_whole(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[codes % 128 == 127] = 0  # NaN
    q = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128), generator=generator)
    decoder = Float8Blocks(
        Tensor("w", "F8_E4M3", shape, 0, q.numel()), reader(q), scales.reshape(-1, *scales.shape[-2:]), (128, 128)
    )
    rows = scales.repeat_interleave(128, -2)[..., : shape[-2], :].repeat_interleave(128, -1)[..., : shape[-1]]
    expected = (q.double() * rows.double()).float().bfloat16().flatten()
    for first, count in ((0, q.numel()), (0, 1), (5, 700), (q.numel() - 3, 3), (shape[-1] * 129 + 7, shape[-1] * 3)):
        assert torch.equal(decoder.values(first, count), expected[first : first + count]), (first, count)


def test_any_run_of_mxfp4_is_that_of_the_whole() -> None:
    """By the specification: sign, two bits of exponent with bias 1, one of mantissa; scales of 2^(s - 127)."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 5, 3, 16), np.uint8)
    scales = rng.integers(100, 150, (2, 5, 3), np.uint8)
    expected = np.empty((2, 96, 5))
    for expert, output, group, byte in np.ndindex(*blocks.shape):
        for half in (0, 1):
            code = int(blocks[expert, output, group, byte]) >> 4 * half & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            value = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
            value *= (-1) ** (code >> 3) * 2.0 ** (int(scales[expert, output, group]) - 127)
            expected[expert, group * 32 + byte * 2 + half, output] = value
    stored = Tensor("w_blocks", "U8", blocks.shape, 0, blocks.size)
    decoder = Mxfp4Blocks(stored, reader(torch.from_numpy(blocks)), reader(torch.from_numpy(scales)))
    assert decoder.shape == expected.shape
    for first, count in ((0, 960), (3, 1), (170, 400), (479, 2), (955, 5)):
        values = decoder.values(first, count).double().numpy()
        assert np.array_equal(values, expected.reshape(-1)[first : first + count]), (first, count)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "gpt-oss"])
def test_refusal_names_the_option(name: str, sources: dict[str, Path], run_cli: Run) -> None:
    ran = run_cli("perturb", sources[name], "-o", "out")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert ran.err.endswith("quantize the result, or have bfloat16 written with --dequantize.\n")
    assert ", and no --dequantize bf16: perturb refuses it" in run_cli("inspect", sources[name]).out
    ran = run_cli("perturb", sources[name], "-o", "out", "--dequantize", "bf16")
    assert ran.code == 0, ran.err
    assert "weights of small floats in blocks were read as bf16, and their scales left out" in ran.out


def test_unquantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match=r"^`dequantize`: expected a config\.json with a quantization_config, got none"
    ):
        perturb_checkpoint(source, tmp_path / "out", dequantize="bf16")


def other(weights: dict[str, torch.Tensor], name: str, w: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if key != name} | ({} if w is None else {name: w})


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, rf"{Q}': expected its scales, '{Q}_scale_inv', in the checkpoint, got none"),
        (torch.ones(3, 2), rf"{Q}': expected scales of blocks that make up \[256, 256\], got \[3, 2\]"),
        (torch.tensor([[float("nan"), 1], [1, 1]]), rf"{Q}': expected finite"),
    ],
    ids=["missing", "other shape", "NaN"],
)
def test_scales_that_do_not_fit_are_one_line(scale: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    source = block_scales.qwen(tmp_path / "source")
    (file,) = source.glob("*.safetensors")
    changed = other(load_file(file), f"{Q}_scale_inv", scale)
    save_file(changed, file, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(changed, file.name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=message):
        perturb_checkpoint(source, tmp_path / "out", dequantize="bf16")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({Q: torch.ones(256, 256)}, rf"'{Q}_scale_inv': expected '{Q}' in float8 or mxfp4 with it, got F32"),
        ({Q: None}, rf"'{Q}_scale_inv': expected '{Q}' in float8 or mxfp4 with it, got none"),
        (
            {"experts.up_proj": torch.ones(2, 4, dtype=torch.int8), "experts.up_proj_scale_inv": torch.ones(2, 1)},
            r"'experts.up_proj_scale_inv': expected 'experts.up_proj' in float8 or mxfp4 with it, got I8",
        ),
        ({"table_scales": torch.ones(4, dtype=torch.uint8)}, r"'table_scales': expected 'table_blocks' in float8"),
        ({"x.activation_scale": torch.ones(1)}, r"'x.activation_scale': expected 'x.weight' in float8 or mxfp4"),
    ],
    ids=["unquantized", "gone", "packed in bytes", "without blocks", "of activations"],
)
def test_scales_that_nothing_is_multiplied_by_do_not_vanish(
    changed: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    source = block_scales.qwen(tmp_path / "source")
    (file,) = source.glob("*.safetensors")
    weights = load_file(file)
    for name, w in changed.items():
        weights = other(weights, name, w)
    save_file(weights, file, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, file.name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=message):
        perturb_checkpoint(source, tmp_path / "out", dequantize="bf16")
