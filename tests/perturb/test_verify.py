"""surgery verify: bit for bit equal, or what is not, wherever a byte was changed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from checkpoints import raw_safetensors, tensors, tree_digest, write_json, write_sharded, write_weights
from commands import Ran
from hub import Hub
from safetensors.numpy import load_file, save, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from test_materialize import CHECKPOINTS, files_of

from surgery import SourceError, perturb_checkpoint, verify_checkpoint

TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """What a run makes of `source`: dense.bias, dense.weight and out.weight, F32."""
    (source / "README.md").write_text("# tiny\n")
    (source / ".gitattributes").write_text("* lfs\n")
    perturb_checkpoint(source, tmp_path / "out", seed=4)
    return tmp_path / "out"


def change(folder: Path, **weights: Any) -> None:
    """Write the weights again, with some of them replaced; None leaves one out."""
    found = load_file(folder / "model.safetensors") | {name.replace("__", "."): w for name, w in weights.items()}
    save_file({k: w for k, w in found.items() if w is not None}, folder / "model.safetensors", {"format": "pt"})


# -- equal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize(("write", "settings"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_what_perturb_wrote_is_equal(
    write: Callable[[Path], Any], settings: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    before = tree_digest(tmp_path)
    found = verify_checkpoint(tmp_path / "out", workers=workers)
    assert (found.is_equal, found.differences, found.faults) == (True, (), ())
    assert found.tensors == len(recipe.tensors)
    assert found.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert tree_digest(tmp_path) == before


def test_pieces_of_a_large_tensor_are_compared(tmp_path: Path) -> None:
    """Several pieces to a tensor, and tensors of several pieces measured ahead of the one that is written."""
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    large = {f"layer.{i}": rng.standard_normal((900, 1000), np.float32) for i in range(3)}
    save_file(large, tmp_path / "source/model.safetensors")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").is_equal
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    for position in (-1, -900 * 1000 * 2, -900 * 1000 * 4):
        data[position] ^= 1
    path.write_bytes(data)
    found = verify_checkpoint(tmp_path / "out")
    assert [(d.name, d.elements, d.differing) for d in found.differences] == [("layer.2", 900_000, 3)]


@pytest.mark.parametrize("name", ["README.md", ".gitattributes"])
def test_files_that_are_not_ours_to_judge(name: str, out: Path) -> None:
    (out / name).write_text("mine")
    assert verify_checkpoint(out).is_equal
    (out / name).unlink()
    assert verify_checkpoint(out).is_equal


@pytest.mark.parametrize("name", ["notes.txt", "onnx/model.onnx", "training_args.bin", ".git/x.bin", "onnx/model.bin"])
def test_more_companions_are_no_fault(name: str, out: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    assert verify_checkpoint(out).is_equal


@pytest.mark.usefixtures("out")
def test_command_says_equal_and_exits_0(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    before = tree_digest(tmp_path)
    ran = run_cli("verify", "out")
    assert (ran.code, ran.err) == (0, "")
    first, second, third = ran.out.splitlines()
    assert first == f"out is bit for bit equal to what its recipe makes of {source}"
    assert second == "  tensors      3 equal, 0 differ"
    assert third.startswith("  read         1.3 kB in ")
    assert tree_digest(tmp_path, skip="hf-home") == before


@pytest.mark.usefixtures("out")
def test_moved_source(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    source.rename(tmp_path / "there")
    ran = run_cli("verify", "out", "--source", "there", "--json")
    rows = json.loads(ran.out)
    assert (ran.code, rows["equal"], rows["source"]) == (0, True, str(source))
    ran = run_cli("verify", "out", "--json")
    line = f"out: expected its source, {source}, on this machine, got no such path. Say with --source where it is."
    assert (ran.code, json.loads(ran.out)) == (4, {"version": 1, "error": line})


def test_fault_is_one_printable_line(out: Path) -> None:
    recipe = json.loads((out / "surgery.json").read_bytes())
    recipe["files"][0]["tied"] = {"\x1b[31m\n": "x"}
    write_json(out / "surgery.json", recipe)
    assert verify_checkpoint(out).faults == (
        "surgery.json: model.safetensors: tied: expected {}, as source and settings give, "
        r"got {'\x1b[31m\n': 'x'} in the recipe.",
    )


# -- tensors that differ ------------------------------------------------------------------------------------------


def test_no_byte_of_the_weights_can_change_unseen(out: Path) -> None:
    path = out / "model.safetensors"
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        found = verify_checkpoint(out, workers=1)
        assert not found.is_equal, position
        assert bool(found.faults) == (position < length), position
        assert sum(d.differing for d in found.differences) == 1 or position < length, position


def test_differences_are_exact(out: Path) -> None:
    w = load_file(out / "model.safetensors")["out.weight"]
    w[3, 4] += 0.5
    w[0, 0] += 0.25
    change(out, out__weight=w)
    (d,) = verify_checkpoint(out).differences
    right = load_file(out.parent / "source/model.safetensors")["out.weight"]
    assert (d.file, d.name, d.dtype) == ("model.safetensors", "out.weight", "F32")
    assert (d.elements, d.differing, d.not_finite) == (128, 2, 0)
    assert d.max_abs == pytest.approx(0.5, rel=1e-6)
    assert d.std == pytest.approx(right.astype(np.float64).std(ddof=1), rel=1e-12)
    assert d.max_over_std == d.max_abs / d.std


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_differ(value: float, out: Path) -> None:
    bias = load_file(out / "model.safetensors")["dense.bias"]
    bias[-1] = value
    change(out, dense__bias=bias)
    (d,) = verify_checkpoint(out).differences
    assert (d.differing, d.not_finite, d.max_abs, d.max_over_std) == (1, 1, None, None)


_KINDS = {
    **dict.fromkeys((torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64), 0.5),
    **dict.fromkeys((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8), 3.0),
    torch.bool: 1.0,
}


@pytest.mark.parametrize(("dtype", "step"), _KINDS.items(), ids=map(str, _KINDS))
def test_differences_of_every_dtype(dtype: torch.dtype, step: float, tmp_path: Path) -> None:
    """Of copied tensors, too: their bytes must be the source's."""
    (tmp_path / "source").mkdir()
    weights = {"w": torch.randn(5, 5), "x": torch.tensor([0, 1, 0, 1]).to(dtype)}
    save_torch(weights, tmp_path / "source/model.safetensors")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out", exclude="x")
    right = load_torch(tmp_path / "out/model.safetensors")
    right["x"] = torch.tensor([step, 1, 0, 1]).to(dtype)
    save_torch(right, tmp_path / "out/model.safetensors")
    (d,) = verify_checkpoint(tmp_path / "out").differences
    assert (d.name, d.elements, d.differing, d.max_abs, d.max_over_std) == ("x", 4, 1, step, None)


def test_minus_zero_differs_from_zero(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file(tensors() | {"zeros": np.zeros(4, np.float32)}, tmp_path / "source/model.safetensors")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    save_file(
        load_file(tmp_path / "out/model.safetensors") | {"zeros": np.array([0, -0.0, 0, 0], np.float32)},
        tmp_path / "out/model.safetensors",
    )
    (d,) = verify_checkpoint(tmp_path / "out").differences
    assert (d.differing, d.max_abs) == (1, 0.0)


def test_equal_nans_of_a_copied_tensor_are_equal(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    broken = np.array([np.nan, np.inf, 1.0], np.float32)
    save_file(tensors() | {"norm.running_var": broken}, tmp_path / "source/model.safetensors")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").is_equal


def test_table_names_the_worst_first_and_counts_the_rest(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    rng = np.random.default_rng(0)
    save_file(
        {f"layer.{i:02}": rng.standard_normal(50, np.float32) for i in range(25)}, tmp_path / "source/model.safetensors"
    )
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    for i in range(24):
        weights[f"layer.{i:02}"][0] += i + 1
    weights["layer.07"][1:3] = np.nan
    save_file(weights, tmp_path / "out/model.safetensors")
    ran = run_cli("verify", "out")
    assert (ran.code, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"out is NOT equal to what its recipe makes of {tmp_path}/source"
    assert lines[1] == "  tensors      1 equal, 24 differ"
    assert re.split("  +", lines[4]) == ["tensor", "differ", "of", "max |d|", "max |d| / std", "NaN or Inf"]
    worst = lines[5].split()
    assert (worst[:4], worst[-1]) == (["layer.07", "3", "50", "8"], "2")
    assert [line.split()[0] for line in lines[6:25]] == [
        d.name for d in verify_checkpoint(tmp_path / "out").differences[1:20]
    ]
    assert lines[25:] == ["4 more differ: --json lists all of them"]
    rows = json.loads(run_cli("verify", "out", "--json").out)
    assert (rows["equal"], len(rows["differences"])) == (False, 24)
    over_std = [row["max_over_std"] for row in rows["differences"]][1:]
    assert over_std == sorted(over_std, reverse=True)


# -- everything else that may be wrong --------------------------------------------------------------------------------


def _header(out: Path) -> tuple[dict[str, Any], bytes]:
    data = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_metadata(out: Path) -> None:
    header, data = _header(out)
    header["__metadata__"] = {"format": "tf"}
    (out / "model.safetensors").write_bytes(raw_safetensors(json.dumps(header).encode(), data))


def _spelled_otherwise(out: Path) -> None:
    header, data = _header(out)
    (out / "model.safetensors").write_bytes(raw_safetensors(json.dumps(header, indent=1).encode(), data))


def _in_another_order(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    spans, data = {}, b""
    for name in sorted(weights, reverse=True):
        w = weights[name]
        span = [len(data), len(data) + w.nbytes]
        spans[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": span}
        data += w.tobytes()
    header = json.dumps({"__metadata__": {"format": "pt"}} | spans).encode()
    (out / "model.safetensors").write_bytes(raw_safetensors(header, data))


def _cut(out: Path) -> None:
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])


def _weights(out: Path, name: str) -> np.ndarray:
    return load_file(out / "model.safetensors")[name]


_FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "metadata": (
        _with_metadata,
        ["model.safetensors: expected metadata {'format': 'pt'}, got {'format': 'tf'}."],
    ),
    "spelling": (_spelled_otherwise, ["model.safetensors: expected its source's header, got another spelling."]),
    "order": (_in_another_order, ["model.safetensors: expected its source's order of tensors, got another."]),
    "missing tensor": (
        lambda out: change(out, dense__bias=None),
        ["model.safetensors: expected 1 tensors ('dense.bias'), got none of them."],
    ),
    "extra tensor": (
        lambda out: change(out, more=np.ones(3)),
        ["model.safetensors: expected its source's tensors, got 1 others ('more')."],
    ),
    "dtype": (
        lambda out: change(out, out__weight=_weights(out, "out.weight").astype(np.float64)),
        ["model.safetensors: 'out.weight': expected F32 [16, 8], got F64 [16, 8]."],
    ),
    "shape": (
        lambda out: change(out, out__weight=_weights(out, "out.weight").T.copy()),
        ["model.safetensors: 'out.weight': expected F32 [16, 8], got F32 [8, 16]."],
    ),
    "cut": (
        _cut,
        [
            "model.safetensors: expected 1304 bytes, as its header says, got 1303. The file is truncated or damaged; "
            "fetch it again."
        ],
    ),
    "no safetensors": (
        lambda out: (out / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        ["model.safetensors: expected a safetensors file, got a git-LFS pointer. Fetch the file with `git lfs pull`."],
    ),
    "missing file": (
        lambda out: (out / "model.safetensors").unlink(),
        ["model.safetensors: expected a weight file, got none."],
    ),
    "extra files": (
        lambda out: [write_weights(out / name) for name in ("adapter_model.safetensors", "unet/x.bin")],
        [
            f"{name}: expected no weights but the recipe's, got a file that a loader may take for them."
            for name in ("adapter_model.safetensors", "unet/x.bin")
        ],
    ),
    "missing companion": (
        lambda out: (out / "tokenizer.json").unlink(),
        ["tokenizer.json: expected the source's file (blake3 69c2f83b3583...), got none."],
    ),
    "changed companion": (
        lambda out: (out / "tokenizer.json").write_bytes(b"{}"),
        ["tokenizer.json: expected the source's file (blake3 69c2f83b3583...), got another (blake3 6e46dd10defc...)."],
    ),
}


@pytest.mark.parametrize(("spoil", "faults"), _FAULTS.values(), ids=_FAULTS)
def test_fault_is_named(spoil: Callable[[Path], Any], faults: list[str], out: Path) -> None:
    """Tensors that are there in another place or spelling are compared all the same."""
    spoil(out)
    found = verify_checkpoint(out)
    assert (found.faults, found.differences, found.is_equal) == (tuple(faults), (), False)


def test_faults_are_printed(out: Path, run_cli: Callable[..., Ran]) -> None:
    (out / "tokenizer.json").unlink()
    ran = run_cli("verify", "out")
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.endswith(
        "  fault        tokenizer.json: expected the source's file (blake3 69c2f83b3583...), got none.\n"
    )


def test_index_is_computed_again(tmp_path: Path) -> None:
    """A recipe altered along with its index is not believed."""
    write_sharded(tmp_path / "source")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    index = tmp_path / "out/model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001", "00002"))
    (fault,) = verify_checkpoint(tmp_path / "out").faults
    assert fault.startswith("model.safetensors.index.json: expected the source's file (blake3 ")
    recipe = json.loads((tmp_path / "out/surgery.json").read_bytes())
    recipe["companions"][index.name] = f"blake3:{blake3(index.read_bytes()).hexdigest()}"
    write_json(tmp_path / "out/surgery.json", recipe)
    with pytest.raises(SourceError, match=f"^{tmp_path}/source/{index.name}: expected the recipe's source"):
        verify_checkpoint(tmp_path / "out")


def _edit(out: Path, alter: Callable[[Any], Any]) -> None:
    recipe = json.loads((out / "surgery.json").read_bytes())
    alter(recipe)
    write_json(out / "surgery.json", recipe)


_RECIPES = {
    "std": (
        lambda r: r["files"][0]["tensors"][1].update(std="0x1p0"),
        "surgery.json: model.safetensors: 'dense.weight': std: expected 0x1.",
    ),
    "digest": (
        lambda r: r["files"][0].update(digest="blake3:" + "0" * 64),
        "surgery.json: model.safetensors: digest: expected blake3:",
    ),
    "shape": (
        lambda r: r["files"][0]["tensors"][0].update(shape=[9]),
        "surgery.json: model.safetensors: 'dense.bias': shape: expected (8,), as source and settings give, got (9,) in",
    ),
    "order": (
        lambda r: r["files"][0]["tensors"].reverse(),
        "surgery.json: model.safetensors: names: expected its source's, in their order, as source and settings give, ",
    ),
    "ties": (
        lambda r: r["files"][0].update(tied={"a": "b"}),
        "surgery.json: model.safetensors: tied: expected {}, as source and settings give, got {'a': 'b'} in the",
    ),
    "pooled std": (lambda r: r.update(pooled_std="0x1p0"), "surgery.json: pooled_std: expected None, as source and"),
}


@pytest.mark.parametrize(("alter", "fault"), _RECIPES.values(), ids=_RECIPES)
def test_false_figure_of_the_recipe_is_named(alter: Callable[[Any], Any], fault: str, out: Path) -> None:
    _edit(out, alter)
    found = verify_checkpoint(out)
    assert len(found.faults) == 1
    assert found.faults[0].startswith(fault)
    assert (found.differences, found.is_equal) == ((), False)


def test_other_seed_makes_every_tensor_differ(out: Path) -> None:
    _edit(out, lambda recipe: recipe["settings"].update(seed=5))
    found = verify_checkpoint(out)
    assert {d.name: d.differing for d in found.differences} == {"dense.weight": 128, "out.weight": 128, "dense.bias": 8}
    assert max(d.max_over_std or 0 for d in found.differences) < 0.15
    assert found.faults[0].startswith("surgery.json: model.safetensors: digest")
    assert {re.sub(r".*'(.*)'.*", r"\1", fault.partition(": effect")[0]) for fault in found.faults[1:]} == {
        "dense.weight",
        "out.weight",
        "dense.bias",
    }


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_other_source_is_refused_by_name(scale: str, source: Path, tmp_path: Path) -> None:
    perturb_checkpoint(source, tmp_path / "out", scale=scale)
    write_weights(source / "model.safetensors", seed=1)
    with pytest.raises(
        SourceError, match=rf"^{source}/model.safetensors: expected the recipe's source \(blake3 [0-9a-f]"
    ):
        verify_checkpoint(tmp_path / "out")


_NOT_TO_VERIFY = {
    "no recipe": (
        lambda out: (out / "surgery.json").unlink(),
        "out: expected a surgery.json, a folder that holds one, or a Hub id, got none of them. Check the name.",
    ),
    "unfinished": (
        lambda out: (out / "surgery.unfinished.json").write_text("{}"),
        "out: expected a finished checkpoint, got one that `surgery perturb` did not finish. "
        "surgery.unfinished.json there has the command that finishes it.",
    ),
    "no such folder": (
        shutil.rmtree,
        "out: expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
        "Check the name, or connect once to fetch it.",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), _NOT_TO_VERIFY.values(), ids=_NOT_TO_VERIFY)
def test_what_cannot_be_verified_is_one_line(
    spoil: Callable[[Path], Any], message: str, out: Path, run_cli: Callable[..., Ran]
) -> None:
    spoil(out)
    ran = run_cli("verify", "out")
    assert (ran.code, ran.out, ran.err) == (4, "", f"error: {message}\n")


# -- the Hub ------------------------------------------------------------------------------------------------------


def test_checkpoint_on_the_hub(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    files = {"README.md": b"# tiny\n", "config.json": b"{}", "model.fp16.safetensors": save(tensors())}
    with Hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        hub.add("org/tiny", files, token=TOKEN)
        command = ("org/tiny", "--variant", "fp16", "-o", "out", "--token", TOKEN)
        assert run_cli("perturb", *command, env=env).code == 0
        pushed = files_of(tmp_path / "out") | {".gitattributes": b"* lfs\n", "tf_model.h5": b"x", "README.md": b"mine"}
        hub.add("me/noisy", pushed, token=TOKEN)
        ran = run_cli("verify", "me/noisy", "--token", TOKEN, env=env)
        assert (ran.code, ran.err) == (0, "")
        commit = hub.repos["org/tiny"].commit
        assert ran.out.startswith(f"me/noisy is bit for bit equal to what its recipe makes of org/tiny@{commit[:12]}\n")
        assert hub.downloaded("me/noisy") == {*pushed} - {"tf_model.h5"}
        pushed["model.fp16.safetensors"] = pushed["model.fp16.safetensors"][:-1] + b"\0"
        hub.add("me/noisy", pushed | {"pytorch_model.bin": b"x"}, token=TOKEN)
        ran = run_cli("verify", "me/noisy@main", "--token", TOKEN, "--json", env=env)
        hub.add("me/recipe", {"surgery.json": pushed["surgery.json"]}, token=TOKEN)
        without = run_cli("verify", "me/recipe", "--token", TOKEN, env=env)
    rows = json.loads(ran.out)
    assert [row["differing"] for row in rows["differences"]] == [1]
    assert rows["faults"] == [
        "pytorch_model.bin: expected no weights but the recipe's, got a file that a loader may take for them."
    ]
    assert ran.code == 1
    assert without.err == (
        "error: me/recipe: expected the weights that surgery.json names, got a repository without any. "
        "`surgery materialize me/recipe` writes them.\n"
    )
    assert TOKEN not in ran.out + ran.err
