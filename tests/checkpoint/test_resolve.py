"""Sources: which files of a folder are read, copied and left out, and which checkpoints are refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import raw_safetensors, tensors, tree_digest, write_json, write_sharded, write_weights
from commands import Ran
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery.checkpoint.layout import arrange
from surgery.checkpoint.resolve import resolve
from surgery.errors import SourceError
from surgery.inspect.inspection import inspect_checkpoint
from surgery.noisytune import NoisyTune
from surgery.perturb.plan import make_plan

Refuses = Callable[..., None]

# -- what is chosen -----------------------------------------------------------------------------------------------


def _chosen(names: list[str], variant: str | None = None) -> tuple[list[str], list[str], dict[str, str]]:
    layout = arrange(names, variant=variant, what="model")
    weights = [name for weight_set in layout.weights for name in weight_set.files]
    return weights, list(layout.companions), dict(layout.left_out)


_SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
_LAYOUTS = {
    "single file": (["config.json", "model.safetensors"], None, ["model.safetensors"], ["config.json"], []),
    "sharded": ([*_SHARDS, "model.safetensors.index.json"], None, _SHARDS, [], []),
    "safetensors before pickle": (
        ["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"], [], ["pytorch_model.bin"],
    ),
    "stale single file": (
        ["model.safetensors", *_SHARDS, "model.safetensors.index.json"], None, ["model.safetensors"], [],
        [*_SHARDS, "model.safetensors.index.json"],
    ),
    "consolidated copy": (
        [*_SHARDS, "model.safetensors.index.json", "consolidated.safetensors", "params.json"], None, _SHARDS,
        ["params.json"], ["consolidated.safetensors"],
    ),
    "consolidated shards": (
        [*_SHARDS, "model.safetensors.index.json", "consolidated-00001-of-00002.safetensors",
         "consolidated-00002-of-00002.safetensors", "consolidated.safetensors.index.json"],
        None, _SHARDS, [],
        ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors",
         "consolidated.safetensors.index.json"],
    ),
    "only consolidated": (["consolidated.safetensors"], None, ["consolidated.safetensors"], [], []),
    "variant": (
        ["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"], [], ["model.safetensors"],
    ),
    "without the variant": (
        ["model.safetensors", "model.fp16.safetensors"], None, ["model.safetensors"], [], ["model.fp16.safetensors"],
    ),
    "sharded variant": (
        ["model.safetensors", "model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"], "fp16",
        ["model.fp16-00001-of-00001.safetensors"], [], ["model.safetensors"],
    ),
    "training state": (
        ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin",
         "checkpoint-500/model.safetensors", "global_step10/mp_rank_00_model_states.pt", "trainer_state.json"],
        None, ["model.safetensors"], ["trainer_state.json"],
        ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "checkpoint-500/model.safetensors",
         "global_step10/mp_rank_00_model_states.pt"],
    ),
    "other formats": (
        ["model.safetensors", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf", "onnx/model.onnx",
         "onnx/config.json", "openvino/openvino_model.bin", "openvino/openvino_model.xml", "coreml/x/y.mlmodel"],
        None, ["model.safetensors"], [],
        ["tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf", "onnx/model.onnx", "onnx/config.json",
         "openvino/openvino_model.bin", "openvino/openvino_model.xml", "coreml/x/y.mlmodel"],
    ),
    "sentence-transformers": (
        ["model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors",
         "2_Dense/pytorch_model.bin", "2_Dense/config.json"],
        None, ["model.safetensors", "2_Dense/model.safetensors"],
        ["modules.json", "1_Pooling/config.json", "2_Dense/config.json"], ["2_Dense/pytorch_model.bin"],
    ),
    "diffusers": (
        ["model_index.json", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors",
         "unet/diffusion_pytorch_model.bin", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
         "text_encoder/model.safetensors", "scheduler/scheduler_config.json"],
        None,
        ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
         "vae/diffusion_pytorch_model.safetensors"],
        ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"],
        ["sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.bin"],
    ),
    "hidden folders": ([".git/config", ".cache/x", "model.safetensors"], None, ["model.safetensors"], [], []),
    "former recipe": (["model.safetensors", "surgery.json"], None, ["model.safetensors"], [], []),
}  # fmt: skip


@pytest.mark.parametrize(("names", "variant", "weights", "companions", "left_out"), _LAYOUTS.values(), ids=_LAYOUTS)
def test_arrange_sorts_files(
    names: list[str], variant: str | None, weights: list[str], companions: list[str], left_out: list[str]
) -> None:
    found, plain, left = _chosen(names, variant)
    assert (sorted(found), sorted(plain), sorted(left)) == (sorted(weights), sorted(companions), sorted(left_out))


def test_arrange_without_the_only_variant_names_it() -> None:
    with pytest.raises(SourceError) as error:
        arrange(["model.fp16.safetensors"], variant=None, what="model")
    assert str(error.value) == ("model: expected weights without a variant, got only fp16. Choose one with `variant`.")


# -- what is written ----------------------------------------------------------------------------------------------


def _metadata(path: Path) -> Any:
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), list(file.keys())


def test_sharded_checkpoint_keeps_shards_index_and_metadata(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    before = write_sharded(tmp_path / "source")
    source = tree_digest(tmp_path / "source")
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert set(tree_digest(tmp_path / "out")) == {*source, "README.md", "surgery.json"}
    assert tree_digest(tmp_path / "source") == source
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "source" / index).read_bytes()
    after = {}
    for shard in (tmp_path / "source").glob("*.safetensors"):
        assert _metadata(tmp_path / "out" / shard.name) == _metadata(shard)
        after |= load_file(tmp_path / "out" / shard.name)
    assert after.keys() == before.keys()
    assert all((after[name] != before[name]).mean() > 0.9 for name in before)


def test_sharding_does_not_change_the_noise(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    everything = write_sharded(tmp_path / "sharded")
    (tmp_path / "single").mkdir()
    save_file(everything, tmp_path / "single/model.safetensors")
    for source in ("sharded", "single"):
        assert run_cli("perturb", source, "-o", f"{source}-out").code == 0
    single = load_file(tmp_path / "single-out/model.safetensors")
    for shard in (tmp_path / "sharded-out").glob("*.safetensors"):
        for name, w in load_file(shard).items():
            assert w.tobytes() == single[name].tobytes()


def test_single_file_becomes_a_folder(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    assert run_cli("perturb", "source/model.safetensors", "-o", "file").code == 0
    assert run_cli("perturb", "source", "-o", "folder").code == 0
    assert set(tree_digest(tmp_path / "file")) == {"model.safetensors", "README.md", "surgery.json"}
    assert (tmp_path / "file/model.safetensors").read_bytes() == (tmp_path / "folder/model.safetensors").read_bytes()
    assert source.exists()


def test_index_may_name_its_shards_freely(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Every shard is read once, though its name alone looks like a checkpoint."""
    for name in ("encoder", "decoder"):
        write_weights(tmp_path / f"source/{name}.safetensors", names=(f"{name}.weight",))
    weight_map = {f"{name}.weight": f"{name}.safetensors" for name in ("encoder", "decoder")}
    write_json(tmp_path / "source/model.safetensors.index.json", {"weight_map": weight_map})
    ran = run_cli("perturb", "source", "-o", "out", "--json")
    assert ran.err == ""
    assert [t["name"] for t in json.loads(ran.out)["tensors"]] == ["decoder.weight", "encoder.weight"]


def test_sub_folders_are_perturbed_or_copied(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    write_weights(source / "2_Dense/model.safetensors", 2, names=("linear.weight",))
    write_json(source / "2_Dense/config.json", {"in_features": 8})
    write_json(source / "1_Pooling/config.json", {"word_embedding_dimension": 8})
    assert run_cli("perturb", "source", "-o", "out").code == 0
    before, after = tree_digest(source), tree_digest(tmp_path / "out")
    assert set(after) == {*before, "README.md", "surgery.json"}
    same = {name for name, digest in before.items() if after[name] == digest and digest != "folder"}
    assert same == {"config.json", "tokenizer.json", "1_Pooling/config.json", "2_Dense/config.json"}


def test_nan_in_a_buffer_is_copied(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    weights = tensors() | {
        "attn.bias": np.full((1, 1, 4, 4), -np.inf, np.float32),
        "norm.running_var": np.array([np.nan, 1.0], np.float32),
    }
    (tmp_path / "source").mkdir()
    save_file(weights, tmp_path / "source/model.safetensors")
    ran = run_cli("perturb", "source", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    after = load_file(tmp_path / "out/model.safetensors")
    for name in ("attn.bias", "norm.running_var"):
        assert after[name].tobytes() == weights[name].tobytes()


def test_source_of_any_name_can_be_read(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Neither spaces, quotes, globs nor bytes that are not UTF-8 in a name matter."""
    folder = os.fsdecode(b"a 'b' [c]* \xff")
    try:
        write_weights(tmp_path / folder / "model.safetensors")
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    ran = run_cli("perturb", folder, "-o", folder + "-out")
    assert (ran.code, ran.err) == (0, "")


def _cached(folder: Path, *commits: str, main: str = "") -> Path:
    """Lay out a model as the Hub's cache does."""
    cached = folder / "models--org--tiny"
    write_weights(cached / "blobs/b0")
    write_json(cached / "blobs/c0", {"model_type": "bert"})
    for commit in commits:
        snapshot = cached / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to("../../blobs/b0")
        (snapshot / "config.json").symlink_to("../../blobs/c0")
    if main:
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(main)
    return cached


@pytest.mark.parametrize("main", ["b" * 40, ""], ids=["main", "only one"])
def test_folder_of_the_cache_stands_for_its_snapshot(main: str, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    cached = _cached(tmp_path, *(["a" * 40, "b" * 40] if main else ["b" * 40]), main=main)
    assert resolve(cached).root == cached / "snapshots" / ("b" * 40)
    ran = run_cli("perturb", cached, "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    written = {"config.json", "model.safetensors", "README.md", "surgery.json"}
    assert set(tree_digest(tmp_path / "out")) == written
    assert run_cli("verify", "out").code == 0


def test_index_may_list_a_tied_name_that_no_shard_holds(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    write_weights(tmp_path / "source/model-00001-of-00001.safetensors", names=("model.embed_tokens.weight",))
    shard = "model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), shard)
    index = tmp_path / "source/model.safetensors.index.json"
    write_json(index, {"weight_map": weight_map})
    ran = run_cli("perturb", "source", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()
    write_json(tmp_path / "source/config.json", {"tie_word_embeddings": False})
    ran = run_cli("perturb", "source", "-o", "other")
    assert ran.err == (
        f"error: {index}: expected tensor 'lm_head.weight' in {shard}, got no such tensor. "
        "Fetch the checkpoint again.\n"
    )


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing/", "./nothing", "a/b/c", "nothing.safetensors", "~nobody.here/x"])
def test_missing_path_is_refused(name: str, refuses: Refuses) -> None:
    refuses(f"{name}: expected a folder, a file or a Hub id, got a path that does not exist. Check it.", name)


@pytest.mark.parametrize("name", ["pipe.safetensors", "a/pipe"], ids=["file", "as a Hub id"])
def test_pipe_is_refused_by_what_it_is(name: str, refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    refuses(f"{name}: expected a folder, a file or a Hub id, got a FIFO. Copy what it holds to a file.", name)


def test_empty_name_is_refused(refuses: Refuses) -> None:
    refuses("MODEL: expected a folder, a file or a Hub id, got an empty name. Name one.", "")


def test_hub_id_is_refused_offline_without_a_copy(refuses: Refuses) -> None:
    refuses(
        "org/nothing: expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
        "Check the name, or connect once to fetch it.",
        "org/nothing",
    )


@pytest.mark.parametrize(
    ("name", "what"), [("model.gguf", ".gguf suffix"), ("model.onnx", ".onnx suffix"), ("model", "no suffix")], ids=str
)
def test_other_file_is_refused(name: str, what: str, refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    refuses(
        f"{tmp_path / name}: expected .safetensors, .bin, .pt, .pth, .ckpt, got {what}. "
        "Convert it to safetensors first.",
        f"./{name}",
    )


def test_empty_folder_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(
        f"{tmp_path / 'empty'}: expected safetensors or PyTorch weights, got nothing. "
        "Point at the folder that holds the weights.",
        "empty",
    )


def test_folder_without_weights_is_refused(refuses: Refuses, source: Path) -> None:
    (source / "model.safetensors").unlink()
    refuses(
        f"{source}: expected safetensors or PyTorch weights, got 2 files without any. "
        "Point at the folder that holds the weights.",
        "source",
    )


def test_folder_of_the_cache_without_main_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    cached = _cached(tmp_path, "a" * 40, "b" * 40)
    refuses(
        f"{cached}: expected a checkpoint, got a folder of the Hub's cache without main's snapshot, and with 2 others. "
        "Name a folder of its snapshots/.",
        cached,
    )


def test_missing_variant_is_refused(refuses: Refuses, source: Path) -> None:
    refuses(
        f"{source}: expected weights of variant 'fp16', got none. Leave --variant out or correct it.",
        *("source", "--variant", "fp16"),
    )


def _index(folder: Path, change: Callable[[dict[str, str]], Any]) -> Path:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_bytes())
    change(document["weight_map"])
    write_json(path, document)
    return path


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/../../x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "config.json",
    ],
    ids=["parent", "absolute", "hidden parent", "backslash", "nul", "no weights"],
)
def test_index_that_leaves_its_folder_is_refused(shard: str, refuses: Refuses, tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    index = _index(tmp_path / "source", lambda weight_map: weight_map.update({"layer.1.bias": shard}))
    refuses(f"{index}: expected shards of its own folder, got {shard!r}. Do not trust this checkpoint.", "source")


def test_index_of_a_missing_shard_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    (tmp_path / "source/model-00002-of-00003.safetensors").unlink()
    refuses(
        f"{tmp_path}/source/model.safetensors.index.json: expected shard model-00002-of-00003.safetensors, "
        "got no such file. Fetch the missing shard.",
        "source",
    )


def test_index_of_a_shard_of_a_long_name_is_refused(tmp_path: Path) -> None:
    """Longer than a file system allows."""
    write_sharded(tmp_path / "source")
    shard = "x" * 300 + ".safetensors"
    index = _index(tmp_path / "source", lambda weight_map: weight_map.update({"layer.1.bias": shard}))
    with pytest.raises(SourceError) as error:
        resolve(tmp_path / "source")
    assert str(error.value) == f"{index}: expected shard {shard}, got no such file. Fetch the missing shard."


def test_shards_without_index_are_counted(refuses: Refuses, tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    (tmp_path / "source/model.safetensors.index.json").unlink()
    (tmp_path / "source/model-00002-of-00003.safetensors").unlink()
    refuses(
        f"{tmp_path}/source/model-00001-of-00003.safetensors: expected 3 shards, got 2. Fetch the missing ones.",
        "source",
    )


def test_index_of_a_missing_tensor_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    shard = "model-00001-of-00003.safetensors"
    index = _index(tmp_path / "source", lambda weight_map: weight_map.update({"layer.9.weight": shard}))
    refuses(
        f"{index}: expected tensor 'layer.9.weight' in {shard}, got no such tensor. Fetch the checkpoint again.",
        "source",
    )


def test_tensor_in_two_shards_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    write_weights(tmp_path / "source/model-00002-of-00003.safetensors", names=("layer.1.weight",))
    _index(tmp_path / "source", lambda m: [m.pop("layer.2.weight"), m.pop("layer.2.bias")])
    _index(tmp_path / "source", lambda m: m.update({"layer.1.weight": "model-00002-of-00003.safetensors"}))
    refuses(
        f"{tmp_path}/source/model-00002-of-00003.safetensors: expected each tensor in one shard, got 'layer.1.weight' "
        "also in model-00001-of-00003.safetensors. Remove the stale one.",
        "source",
    )


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff\xfe", b"[" * 100_000],
    ids=["cut", "list", "empty", "no map", "number", "not UTF-8", "deep"],
)
def test_malformed_index_is_refused(content: bytes, refuses: Refuses, tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    index = tmp_path / "source/model.safetensors.index.json"
    index.write_bytes(content)
    refuses(f"{index}: expected a JSON index with a weight_map, got another thing. Fetch it again.", "source")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "not UTF-8", "deep"])
def test_malformed_config_is_refused(content: bytes, refuses: Refuses, source: Path) -> None:
    (source / "config.json").write_bytes(content)
    refuses(f"{source}/config.json: expected JSON, got another or a damaged file. Repair it.", "source")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
    ids=["plain", "nested"],
)
def test_quantized_config_is_refused(config: dict[str, Any], refuses: Refuses, source: Path) -> None:
    write_json(source / "config.json", config)
    refuses(
        f"{source}/config.json: expected unquantized weights, got quantization_config (gptq). "
        "Perturb the original checkpoint and quantize the result.",
        "source",
    )


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_quantized_dtype_is_refused(dtype: str, refuses: Refuses, source: Path) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (source / "model.safetensors").write_bytes(raw_safetensors(header, b"1234"))
    refuses(
        f"{source}/model.safetensors: 'w': expected unquantized weights, got {dtype}. "
        "Perturb the original checkpoint and quantize the result.",
        "source",
    )


_PACKED = {
    "LLM.int8": {"fc.weight": np.ones((4, 4), np.int8), "fc.SCB": np.ones(4, np.float32)},
    "W8A8": {"fc.weight": np.ones((4, 4), np.int8), "fc.weight_scale": np.ones((4, 1), np.float32)},
    "block FP8": {"fc.weight_scale_inv": np.ones((4, 1), np.float32)},
    "MXFP4": {"experts.gate_up_proj_blocks": np.ones((2, 4, 4), np.uint8)},
    "GPTQ": {"fc.qweight": np.ones((4, 4), np.int32), "fc.scales": np.ones((1, 4), np.float16)},
    "AWQ": {"fc.qzeros": np.ones((4, 4), np.int32)},
    "HQQ": {"fc.W_q": np.ones((4, 4), np.uint8)},
    "MLX": {"fc.weight": np.ones((4, 4), np.uint32), "fc.scales": np.ones((4, 1), np.float16)},
}


@pytest.mark.parametrize("packed", _PACKED.values(), ids=_PACKED)
def test_quantized_weights_without_a_config_are_refused(packed: dict[str, np.ndarray], source: Path) -> None:
    save_file(tensors() | packed, source / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"expected unquantized weights, got .*\. Perturb the original checkpoint"
    ) as error:
        make_plan(source, source.parent / "out", NoisyTune())
    assert any(repr(name) in str(error.value) for name in packed)
    assert inspect_checkpoint(source).quantized


def test_integers_that_are_no_weights_are_copied(source: Path, tmp_path: Path) -> None:
    others = {
        "position_ids": np.arange(8).reshape(1, 8),
        "mask": np.ones((4, 4), np.uint8),
        "steps.weight": np.arange(4, dtype=np.int32),
    }
    save_file(tensors() | others, source / "model.safetensors")
    (shard,) = make_plan(source, tmp_path / "out", NoisyTune()).shards
    assert set(shard.copied) == set(others)


def test_left_out_link_does_not_matter(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    (source / "optimizer.pt").symlink_to("/nowhere/optimizer.pt")
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert not (tmp_path / "out/optimizer.pt").exists()


def test_pipe_in_the_folder_is_refused(refuses: Refuses, source: Path) -> None:
    os.mkfifo(source / "pipe")
    refuses(f"{source}/pipe: expected a file, got a FIFO. Remove it, or replace it by a copy.", "source")


@pytest.mark.parametrize(
    ("bad", "scale"), [(np.nan, "matrix"), (np.inf, "matrix"), (-np.inf, "matrix"), (np.nan, "global")]
)
def test_bad_value_is_named_and_nothing_looks_finished(
    bad: float, scale: str, run_cli: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    weights = tensors()
    weights["out.weight"][2, 3] = bad
    save_file(weights, source / "model.safetensors")
    before = tree_digest(source)
    ran = run_cli("perturb", "source", "-o", "out", "--scale", scale)
    assert ran.err == (
        f"error: {source}/model.safetensors: 'out.weight': expected finite values, got NaN, Inf or values whose spread "
        "overflows. Repair the checkpoint, or leave the tensor out with --exclude.\n"
    )
    assert (ran.code, ran.out) == (1, "")
    assert tree_digest(source) == before
    assert set(tree_digest(tmp_path / "out")) == {"surgery.unfinished.json"}


_OPTIONS = {
    "negative lam": (["--lam=-0.1"], "lam: expected a number from 0 to 1, got -0.1. The paper uses 0.1 to 0.15."),
    "large lam": (["--lam", "1.5"], "lam: expected a number from 0 to 1, got 1.5. The paper uses 0.1 to 0.15."),
    "nan lam": (["--lam", "nan"], "lam: expected a number from 0 to 1, got nan. The paper uses 0.1 to 0.15."),
    "infinite lam": (["--lam", "inf"], "lam: expected a number from 0 to 1, got inf. The paper uses 0.1 to 0.15."),
    "negative seed": (["--seed=-1"], "seed: expected an integer from 0 to 2^64 - 1, got -1. Choose another."),
    "large seed": (
        ["--seed", str(2**64)],
        f"seed: expected an integer from 0 to 2^64 - 1, got {2**64}. Choose another.",
    ),
    "glob without match": (
        ["--include", "nothing.*"],
        "--include 'nothing.*': expected a glob that matches a tensor, got none of 3, such as 'dense.bias'. "
        "`*` stays within one dotted part of a name, `**` spans several.",
    ),
}


@pytest.mark.parametrize(("args", "message"), _OPTIONS.values(), ids=_OPTIONS)
def test_setting_out_of_range_is_refused(args: list[str], message: str, refuses: Refuses, source: Path) -> None:
    assert source.exists()
    refuses(message, "source", "-o", "out", *args)


def test_everything_excluded_is_refused(refuses: Refuses, source: Path) -> None:
    refuses(
        f"{source}: expected a tensor to perturb, got 3 to copy (in --exclude). Correct --include and --exclude.",
        *("source", "--exclude", "**"),
    )


@pytest.mark.parametrize(
    "args", [["--nothing"], ["--lam", "much"], ["--noise", "pink"], ["--workers", "0"], []], ids=" ".join
)
def test_usage_error_exits_2(args: list[str], run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("perturb", *(["source", *args] if args else []))
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err


def test_error_as_json_is_on_stdout_too(run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("perturb", "./nothing", "--json")
    message = "./nothing: expected a folder, a file or a Hub id, got a path that does not exist. Check it."
    assert (ran.code, json.loads(ran.out), ran.err) == (1, {"version": 1, "error": message}, f"error: {message}\n")


def test_debug_shows_the_traceback(run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("perturb", "./nothing", "--debug")
    assert ran.code == 1
    assert ran.err.startswith("Traceback")
    assert ran.err.splitlines()[-1].startswith("error: ./nothing: ")


def test_unfinished_output_is_no_source(source: Path) -> None:
    write_json(source / "surgery.unfinished.json", {})
    with pytest.raises(SourceError) as error:
        resolve(source)
    assert str(error.value) == (
        f"{source}: expected a finished checkpoint, got one that `surgery perturb` did not finish. "
        "surgery.unfinished.json there has the command that finishes it."
    )


# -- dry run ------------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    before = tree_digest(tmp_path)
    ran = run_cli("perturb", "source", "--dry-run", "--json")
    assert (ran.code, ran.err) == (0, "")
    rows = json.loads(ran.out)
    assert [t["name"] for t in rows["tensors"]] == ["dense.bias", "dense.weight", "out.weight"]
    assert rows["out"] == str(tmp_path / "source-noisytune-lam0.15-seed0")
    assert tree_digest(tmp_path) == before
    assert source.exists()


def test_dry_run_of_a_terabyte_takes_seconds(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    """200 sparse shards of 5 GB; the subprocess has two minutes, and an answer from headers needs about one second."""
    folder, shards, rows = tmp_path / "source", 200, 1_250_000
    folder.mkdir()
    nbytes = rows * 1000 * 4
    weight_map = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        entry = {f"layer.{number}.weight": {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, nbytes]}}
        header = raw_safetensors(json.dumps(entry).encode())
        (folder / name).write_bytes(header)
        try:
            os.truncate(folder / name, len(header) + nbytes)
        except OSError as error:
            pytest.skip(f"no sparse files of 5 GB here: {error}")
        weight_map[f"layer.{number}.weight"] = name
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    ran = run_cli("perturb", "source", "--dry-run", "--json")
    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(ran.out)
    assert (answer["shards"], answer["parameters"]) == (shards, shards * rows * 1000)
    assert answer["bytes"] > 1e12


def test_learned_scale_of_float_weights_is_not_quantized(source: Path, run_cli: Callable[..., Ran]) -> None:
    weights = {"fc.weight": np.eye(4, dtype=np.float32), "fc.weight_scale": np.arange(1, 5, dtype=np.float32)}
    save_file(weights, source / "model.safetensors")
    ran = run_cli("perturb", source, "-o", "out")
    assert ran.code == 0, ran.err
