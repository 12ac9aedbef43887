"""PyTorch pickles as sources: the same bytes as from safetensors, and nothing in them is run."""

import io
import json
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_digest, write_json
from commands import Ran
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

from surgery.checkpoint.pickles import PickleFile  # noqa: E402
from surgery.errors import SourceError  # noqa: E402


def _state_dict() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "dense.weight": torch.randn(16, 8, generator=generator),
        "dense.bias": torch.randn(8, generator=generator),
        "half": torch.randn(8, 8, generator=generator).to(torch.bfloat16),
        "ids": torch.arange(8),
    }


def _read(file: PickleFile) -> dict[str, bytes]:
    contents = {}
    for tensor in file.header.tensors:
        contents[tensor.name] = bytes(tensor.nbytes)
        buffer = bytearray(tensor.nbytes)
        for start in range(0, tensor.nbytes, 100):  # in pieces, as the stream does
            file.read_into(tensor, start, memoryview(buffer)[start : start + 100])
        contents[tensor.name] = bytes(buffer)
    return contents


def _bytes(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


class _Evil:
    """Unpickles to a call of os.mkdir: a harmless proof that code was run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


# -- reading ------------------------------------------------------------------------------------------------------

_NESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "module": lambda s: {"module": s, "global_steps": 7},
    "twice": lambda s: {"model": {"state_dict": s}},
    "lightning": lambda s: {"state_dict": s, "pytorch-lightning_version": "2.5", "loops": {}, "callbacks": {}},
    "counters beside it": lambda s: {"model": s, "step": torch.tensor(5), "ema": torch.ones(4)},
}


@pytest.mark.parametrize("nest", _NESTS.values(), ids=_NESTS)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_state_dict_is_found_in_its_nest(nest: Callable[[dict[str, Any]], Any], is_zip: bool, tmp_path: Path) -> None:
    torch.save(nest(_state_dict()), tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    file = PickleFile(tmp_path / "x.ckpt", label="x")
    contents = _read(file)
    file.close()
    assert contents == {name: _bytes(tensor) for name, tensor in _state_dict().items()}


def test_tensor_of_any_strides_is_read_in_order(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "transposed": base.permute(2, 0, 1),
        "expanded": torch.arange(4.0).expand(3, 4),
        "empty": torch.empty(0, 3),
    }
    torch.save(state, tmp_path / "x.pt")
    file = PickleFile(tmp_path / "x.pt", label="x")
    contents = _read(file)
    file.close()
    assert contents == {name: _bytes(tensor) for name, tensor in state.items()}


def test_shared_storage_is_written_once(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    state = _state_dict()
    state["head.weight"] = state["dense.weight"]
    torch.save(state, tmp_path / "x.pt")
    ran = run_cli("perturb", "x.pt", "-o", "out", "--json")
    assert json.loads(ran.out)["tied"] == {"head.weight": "dense.weight"}
    assert set(load_file_names(tmp_path / "out/model.safetensors")) == set(_state_dict())
    assert json.loads((tmp_path / "out/surgery.json").read_bytes())["files"][0]["tied"] == {
        "head.weight": "dense.weight"
    }


def load_file_names(path: Path) -> list[str]:
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    return [name for name in json.loads(header[8 : 8 + length]) if name != "__metadata__"]


def test_neighbours_in_one_storage_are_apart(tmp_path: Path) -> None:
    storage = torch.arange(10.0)
    torch.save({"a": storage[:4], "b": storage[4:]}, tmp_path / "x.pt")
    file = PickleFile(tmp_path / "x.pt", label="x")
    contents = _read(file)
    file.close()
    assert (file.tied, contents) == ({}, {"a": _bytes(storage[:4]), "b": _bytes(storage[4:])})


# -- writing ------------------------------------------------------------------------------------------------------


def _tiny_model(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

    small = {"vocab_size": 32}
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config: Any = transformers.BertConfig(**small, **sizes)
    else:
        config = transformers.GPT2Config(**small, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt2", marks=pytest.mark.sweep)])
def test_bin_gives_the_bytes_of_safetensors_and_loads(kind: str, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    model = _tiny_model(kind)
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "pickled/config.json").write_bytes((tmp_path / "safe/config.json").read_bytes())
    before = tree_digest(tmp_path / "pickled")
    for name in ("safe", "pickled"):
        ran = run_cli("perturb", name, "-o", f"{name}-out", "--seed", "3")
        assert (ran.code, ran.err) == (0, "")
    assert tree_digest(tmp_path / "pickled") == before
    written = {"config.json", "model.safetensors", "README.md", "surgery.json"}
    assert set(tree_digest(tmp_path / "pickled-out")) == written
    safe, pickled = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("safe", "pickled"))
    assert {name: w.tobytes() for name, w in safe.items()} == {name: w.tobytes() for name, w in pickled.items()}
    loaded = type(model).from_pretrained(tmp_path / "pickled-out").state_dict()
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, loaded[name])]
    assert loaded.keys() == model.state_dict().keys()
    assert set(changed) == {name for name, w in model.state_dict().items() if w.float().std() > 0}
    assert all(_bytes(loaded[name]) == pickled[name].tobytes() for name in pickled)


def test_sharded_bin_becomes_sharded_safetensors(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    state = _state_dict()
    names = {"dense.weight": 1, "dense.bias": 1, "half": 2, "ids": 2}
    source = tmp_path / "source"
    source.mkdir()
    for number in (1, 2):
        shard = {name: state[name] for name in state if names[name] == number}
        torch.save(shard, source / f"pytorch_model-{number:05}-of-00002.bin")
    weight_map = {name: f"pytorch_model-{number:05}-of-00002.bin" for name, number in names.items()}
    write_json(source / "pytorch_model.bin.index.json", {"metadata": {"total_size": 700}, "weight_map": weight_map})
    ran = run_cli("perturb", "source", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": 700}
    assert index["weight_map"] == {name: f"model-{number:05}-of-00002.safetensors" for name, number in names.items()}
    for name, shard in index["weight_map"].items():
        assert name in load_file_names(tmp_path / "out" / shard)
    assert not list((tmp_path / "out").glob("*.bin*"))


# -- refusing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.ckpt"])
def test_pickle_with_code_is_refused_and_not_run(
    is_zip: bool, name: str, refuses: Callable[..., None], tmp_path: Path
) -> None:
    proof = tmp_path / "it-ran"
    file = tmp_path / "source" / name
    file.parent.mkdir()
    torch.save({**_state_dict(), "evil": _Evil(proof)}, file, _use_new_zipfile_serialization=is_zip)
    called = f"{os.mkdir.__module__}.mkdir"
    refuses(
        f"{file}: expected a pickle of nothing but tensors, got one that calls {called}. "
        "It was not run; get safetensors instead.",
        file if name == "x.ckpt" else "source",
        *("-o", "out"),
    )
    assert not proof.exists()


def test_evil_pickle_would_run_elsewhere(tmp_path: Path) -> None:
    """The test above proves something only if plain unpickling does run it."""
    torch.save({"evil": _Evil(tmp_path / "it-ran")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "it-ran").is_dir()


def _refused(content: bytes | dict[Any, Any], tmp_path: Path) -> str:
    if isinstance(content, bytes):
        (tmp_path / "x.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    return str(error.value)


_loop: dict[str, Any] = {}
_loop["model"] = _loop
_NONE = "x: expected a state_dict, got a dict of {}. Save one with torch.save."
_DAMAGED = "x: expected a PyTorch checkpoint, got a damaged or another file. Fetch it again."
_BASE = torch.arange(10.0)
_REFUSED: dict[str, tuple[Any, str]] = {
    "bytes of none": (b"\xff\xfe\xfd" * 9, _DAMAGED),
    "no tensors": ({"epoch": 1}, _NONE.format("'epoch'")),
    "numbered": ({1: torch.ones(2)}, "x: expected names that are text, got 1. Save a state_dict."),
    "holds itself": (_loop, _NONE.format("'model'")),
    "overlap": (
        {"a": _BASE[:6], "b": _BASE[4:]},
        "x: 'b': expected tensors that are equal or apart, got one that overlaps 'a'. Save a copy of it with .clone().",
    ),
    "sparse": (
        {"a": torch.eye(3).to_sparse()},
        "x: 'a': expected a dense tensor of a plain dtype, got torch.float32, torch.sparse_coo. Convert it first.",
    ),
    "unusual dtype": (
        {"a": torch.ones(3, dtype=torch.complex128)},
        "x: 'a': expected a dense tensor of a plain dtype, got torch.complex128, torch.strided. Convert it first.",
    ),
}


@pytest.mark.parametrize(("content", "message"), _REFUSED.values(), ids=_REFUSED)
def test_other_pickle_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    assert _refused(content, tmp_path) == message


def test_damaged_bin_is_one_line(refuses: Callable[..., None], tmp_path: Path) -> None:
    torch.save(_state_dict(), tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-300])
    refuses(f"{tmp_path}/x.pt: expected a PyTorch checkpoint, got a damaged or another file. Fetch it again.", "x.pt")


def _saved(is_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2)}, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


@pytest.mark.parametrize("whole", [_saved(True), _saved(False), pickle.dumps({"a": 1})], ids=["zip", "legacy", "plain"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 600), new=st.binary(min_size=1, max_size=4), cut=st.integers(0, 60))
def test_mutated_pickle_never_crashes(whole: bytes, at: int, new: bytes, cut: int, tmp_path: Path) -> None:
    at = at % len(whole)
    mutated = whole[:at] + new + whole[at + len(new) :]
    (tmp_path / "x.pt").write_bytes(mutated[: len(mutated) - cut])
    try:
        PickleFile(tmp_path / "x.pt", label="x").close()
    except SourceError as error:
        message = str(error)
    else:
        return
    assert message.startswith("x: ")


def test_input_embedding_keeps_its_name_whatever_the_order(tmp_path: Path) -> None:
    shared = torch.randn(10, 4)
    names = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    torch.save(dict.fromkeys(names, shared), tmp_path / "pytorch_model.bin")
    file = PickleFile(tmp_path / "pytorch_model.bin", label="x")
    assert file.tied == {names[0]: names[1]}
    assert [tensor.name for tensor in file.header.tensors] == [names[1]]
    file.close()
