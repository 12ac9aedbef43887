"""torch.distributed checkpoints: the tensors that torch itself loads from them, and nothing in them is run."""

import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_digest, write_json, write_weights
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from torch.distributed.checkpoint import metadata as m  # noqa: E402
from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: E402

from surgery.checkpoint import state_dicts  # noqa: E402
from surgery.checkpoint.distributed import DistributedFile  # noqa: E402
from surgery.checkpoint.resolve import resolve  # noqa: E402
from surgery.cli import main  # noqa: E402
from surgery.errors import SourceError  # noqa: E402
from surgery.inspect.inspection import inspect_checkpoint  # noqa: E402
from surgery.perturb.execute import perturb_checkpoint  # noqa: E402

_EMA = {"dense.weight": torch.full((3, 2), 2.0)}
_OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def _weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "dense.weight": torch.randn(6, 4, generator=generator),
        "dense.bias": torch.randn(4, generator=generator),
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
        "turned": torch.randn(3, 5, generator=generator).t(),
        "part": torch.randn(8, 8, generator=generator)[2:5, 1:4],
        "ids": torch.arange(7),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """dcp.save warns that it saves in one process, and that it overwrites."""
    state_dicts._warn_once.cache_clear()
    with warnings.catch_warnings(action="ignore"):
        yield


def _save(folder: Path, content: Any) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def _open(folder: Path, **kwargs: Any) -> DistributedFile:
    return DistributedFile([folder / ".metadata", *sorted(folder.glob("*.distcp"))], **kwargs)


def _read(file: DistributedFile, step: int = 1 << 20) -> dict[str, bytes]:
    contents = {}
    for tensor in file.header.tensors:
        buffer = bytearray(tensor.nbytes)
        for start in range(0, tensor.nbytes, step):
            file.read_into(tensor, start, memoryview(buffer)[start : start + step])
        contents[tensor.name] = bytes(buffer)
    return contents


def _bytes(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _loaded_by_torch(folder: Path, like: dict[str, Any]) -> dict[str, bytes]:
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name: _bytes(tensor) for name, tensor in state.items()}


# -- reading ----------------------------------------------------------------------------------------------------------


def test_tensors_are_those_that_torch_loads(tmp_path: Path) -> None:
    folder = _save(tmp_path / "ck", _weights())
    expected = _loaded_by_torch(folder, _weights())
    file = _open(folder)
    assert _read(file) == expected == _read(file, 5)
    assert {tensor.name: tensor.shape for tensor in file.header.tensors} == {
        name: tuple(tensor.shape) for name, tensor in _weights().items()
    }
    file.close()


def _grid(folder: Path, edit: Callable[[m.Metadata], Any] = lambda _: None) -> Path:
    """Write what four ranks would of one matrix and one vector, with torch's own classes."""
    whole = {"w": _weights()["dense.weight"], "v": torch.arange(9.0)}
    cuts = {
        "w": [
            (slice(0, 4), slice(0, 1)),
            (slice(0, 4), slice(1, 4)),
            (slice(4, 6), slice(0, 1)),
            (slice(4, 6), slice(1, 4)),
        ],
        "v": [(slice(0, 3),), (slice(3, 6),), (slice(6, 8),), (slice(8, 9),)],
    }
    folder.mkdir()
    files = [io.BytesIO() for _ in range(4)]
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, tensor in whole.items():
        chunks = []
        for rank, cut in enumerate(cuts[name]):
            part, offset, start = tensor[cut].clone(), torch.Size([s.start for s in cut]), files[rank].tell()
            torch.save(part, files[rank])
            chunks.append(m.ChunkStorageMetadata(offset, part.shape))
            length = files[rank].tell() - start
            places[m.MetadataIndex(f"model.{name}", offset)] = _StorageInfo(f"__{rank}_0.distcp", start, length)
        properties = m.TensorProperties.create_from_tensor(tensor)
        tensors[f"model.{name}"] = m.TensorStorageMetadata(properties, tensor.shape, chunks)
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    paths = {name: ("model", name.partition(".")[2]) for name in tensors}
    metadata = m.Metadata(tensors, paths, places, m.StorageMeta(folder, "id"))
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_tensors_in_chunks_of_four_ranks(tmp_path: Path) -> None:
    folder = _grid(tmp_path / "ck")
    expected = {"w": _weights()["dense.weight"], "v": torch.arange(9.0)}
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert _read(_open(folder), 7) == {name: _bytes(tensor) for name, tensor in state["model"].items()}
    assert _read(_open(folder)) == {name: _bytes(tensor) for name, tensor in expected.items()}


def test_nest_is_that_of_dcp_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"model": {**_EMA, "scale": 0.5}, "optim": _OPTIMIZER, "step": 7, "list": [1, 2]}
    folder = _save(tmp_path / "ck", content)
    assert list(_read(_open(folder))) == ["dense.weight"]
    said = [record.message for record in caplog.records if record.name.startswith("surgery")]
    assert said == [f"{folder}: left out 1 that are no tensors: 'scale' (bytes)"]


def test_key_takes_one_of_several(tmp_path: Path) -> None:
    model = {"dense.weight": torch.ones(3, 2)}
    folder = _save(tmp_path / "ck", {"model": model, "ema": _EMA, "optim": _OPTIMIZER})
    with pytest.raises(
        SourceError, match=r"ck: expected one state_dict, got 2: 'model', 'ema'\. Choose one with `key`"
    ):
        _open(folder)
    assert _read(_open(folder, key="ema")) == {"dense.weight": _bytes(_EMA["dense.weight"])}
    assert list(_read(_open(folder, key="optim"))) == ["exp_avg"]


def test_tensors_in_lists_are_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "ck", {**_EMA, "heads": [torch.ones(2), torch.ones(3)]})
    with pytest.raises(SourceError, match="'heads': expected a tensor, got a list of tensors"):
        _open(folder)


def test_perturbed_as_the_same_in_one_file_would_be(tmp_path: Path) -> None:
    content = {name: tensor.contiguous() for name, tensor in _weights().items()}
    _save(tmp_path / "ck", {"model": content, "optim": _OPTIMIZER})
    (tmp_path / "ck/config.json").write_text("{}")
    (tmp_path / "one").mkdir()
    save_file(content, tmp_path / "one/model.safetensors")
    perturb_checkpoint(tmp_path / "ck", tmp_path / "out", seed=3)
    perturb_checkpoint(tmp_path / "one", tmp_path / "expected", seed=3)
    made, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    written = ["README.md", "config.json", "model.safetensors", "surgery.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "ck", {"model": _weights(), "ema": _EMA | {"dense.bias": torch.arange(4.0)}})

    def surgery(*args: str) -> tuple[int, str]:
        ran = CliRunner().invoke(main, list(args))
        return ran.exit_code, ran.output

    code, said = surgery("perturb", "ck", "-o", "out")
    assert (code, "'model', 'ema'. Choose one with --key, or save it" in said) == (1, True)
    assert surgery("perturb", "ck", "--key", "ema", "-o", "out")[0] == 0
    assert surgery("verify", "out")[0] == 0
    assert surgery("materialize", "out", "-o", "again")[0] == 0
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")
    assert "nothing: this command had finished here before" in surgery("perturb", "ck", "--key", "ema", "-o", "out")[1]
    with (tmp_path / "ck/__0_0.distcp").open("ab") as file:
        file.write(b"x")
    code, said = surgery("verify", "out")
    assert (code, "ck/.metadata: expected the recipe's source (blake3 " in said) == (4, True)


def test_weights_of_a_trainers_folder(tmp_path: Path) -> None:
    """accelerate writes the model and its optimizer into folders of their own."""
    _save(tmp_path / "pytorch_model_fsdp_0", {"model": _EMA})
    _save(tmp_path / "optimizer_0", {"optimizer": _OPTIMIZER})
    write_json(tmp_path / "trainer_state.json", {})
    layout = resolve(tmp_path).layout
    assert [s.parts for s in layout.weights] == [
        ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp")
    ]
    assert layout.companions == ("trainer_state.json",)
    assert dict(layout.left_out)["optimizer_0/.metadata"] == "optimizer_0/ holds other copies or training state"
    write_weights(tmp_path / "model.safetensors")
    layout = resolve(tmp_path).layout
    assert [s.files for s in layout.weights] == [("model.safetensors",)]
    assert dict(layout.left_out)["pytorch_model_fsdp_0/.metadata"] == "weights in another format"


# -- what is refused --------------------------------------------------------------------------------------------------


class _Evil:
    """Unpickles to a call of a function: os.mkdir is a harmless proof that code was run."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _refused(folder: Path) -> str:
    with pytest.raises(SourceError) as error:
        inspect_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


_METHOD = "TensorProperties.create_from_tensor"


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "posix.mkdir"),
        (eval, "builtins.eval"),
        (torch.load, "torch.serialization.load"),
        (None, "torch.distributed.checkpoint.metadata.TensorProperties.create_from_tensor"),
    ],
    ids=["mkdir", "eval", "torch.load", "method"],
)  # fmt: skip
def test_metadata_that_calls_a_function_is_not_run(function: Any, name: str, tmp_path: Path) -> None:
    _save(tmp_path / "ck", _EMA)
    data = pickle.dumps(_Evil(function or os.mkdir, str(tmp_path / "run")), protocol=4)
    if function is None:  # a method of a class that is admitted
        parts = (name[: -len(_METHOD) - 1].encode(), _METHOD.encode())
        data = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93."
    (tmp_path / "ck/.metadata").write_bytes(data)
    assert _refused(tmp_path / "ck") == (
        f"{tmp_path}/ck/.metadata: expected a pickle of nothing but DCP's metadata, got one that calls {name}. "
        "It was not run; do not trust this checkpoint."
    )
    assert not (tmp_path / "run").exists()


def test_getattr_of_older_python_is_not_called(tmp_path: Path) -> None:
    """Python 3.11.2 pickles a member of an Enum as getattr(class, name)."""

    def write(metadata: m.Metadata) -> None:
        properties = metadata.state_dict_metadata["model.v"].properties
        member = _Evil(getattr, m._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
        state = (torch.float32, torch.strided, False, member, False)
        metadata.state_dict_metadata["model.v"].properties = _Stated(type(properties), state)  # type: ignore[union-attr]

    assert sorted(_read(_open(_grid(tmp_path / "ck", write)))) == ["v", "w"]
    (tmp_path / "ck/.metadata").write_bytes(pickle.dumps(_Evil(getattr, "x", "upper")))
    assert _refused(tmp_path / "ck").startswith(
        f"{tmp_path}/ck/.metadata: expected the metadata of a torch.distributed checkpoint, got a damaged"
    )


class _Stated:
    """Unpickles to an object of a class, with a state."""

    def __init__(self, kind: type, state: Any) -> None:
        self.made = kind, (), state

    def __reduce__(self) -> Any:
        return self.made


def _first_place(metadata: m.Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def _set(**fields: Any) -> Callable[[m.Metadata], None]:
    return lambda metadata: vars(_first_place(metadata)).update(fields)


def _chunk(**fields: Any) -> Callable[[m.Metadata], None]:
    return lambda metadata: vars(metadata.state_dict_metadata["model.w"].chunks[0]).update(fields)  # type: ignore[union-attr]


_DAMAGED = (
    "{0}/.metadata: expected the metadata of a torch.distributed checkpoint, got a damaged or another file. "
    "Fetch it again."
)
_ESCAPES = "{{0}}/.metadata: expected files of its own folder, got {!r}. Do not trust this checkpoint."
_FAULTS: dict[str, tuple[Callable[[m.Metadata], Any], str]] = {
    "up": (_set(relative_path="../x.distcp"), _ESCAPES.format("../x.distcp")),
    "absolute": (_set(relative_path="/etc/passwd"), _ESCAPES.format("/etc/passwd")),
    "missing": (
        _set(relative_path="__7_0.distcp"),
        "{0}/.metadata: 'w': expected __7_0.distcp beside it, got no such file. Fetch it too.",
    ),
    "transformed": (
        _set(transform_descriptors=["stream.zstd/1"]),
        "{0}/.metadata: expected plain bytes, got bytes that 'stream.zstd/1' has transformed. "
        "Save it without extensions.",
    ),
    "too long": (
        _set(length=1 << 20),
        "{0}/__0_0.distcp: expected at least 1048576 bytes, as .metadata says, got {1}. "
        "The file is truncated; fetch it again.",
    ),
    "gap": (
        _chunk(sizes=torch.Size([3, 1])),
        "{0}/.metadata: 'w': expected chunks that make up [6, 4], got none of element [3, 0]. Save it again.",
    ),
    "overlap": (
        _chunk(sizes=torch.Size([4, 2])),
        "{0}/.metadata: 'w': expected chunks that make up [6, 4], got two that hold element [0, 1]. Save it again.",
    ),
    "beyond": (
        _chunk(sizes=torch.Size([4, 5])),
        "{0}/.metadata: 'w': expected chunks that make up [6, 4], got one from [0, 0] to [4, 5]. Save it again.",
    ),
    "no place": (_chunk(offsets=torch.Size([1, 0])), _DAMAGED),
    "negative": (_set(offset=-5), _DAMAGED),
    "no text": (_set(relative_path=b"x"), _DAMAGED),
    "no mapping": (lambda metadata: vars(metadata).update(storage_data=[]), _DAMAGED),
    "paths clash": (
        lambda metadata: metadata.planner_data.update({"model.v": ("model", "w")}), _DAMAGED,
    ),
    "deep path": (
        lambda metadata: metadata.planner_data.update({"model.v": ("a",) * 100_000}), _DAMAGED,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), _FAULTS.values(), ids=_FAULTS)
def test_metadata_that_does_not_fit_is_refused(edit: Callable[[m.Metadata], Any], message: str, tmp_path: Path) -> None:
    folder = _grid(tmp_path / "ck", edit)
    assert _refused(folder) == message.format(folder, (folder / "__0_0.distcp").stat().st_size)


def test_damaged_metadata_is_refused(tmp_path: Path) -> None:
    folder = _grid(tmp_path / "ck")
    whole = (folder / ".metadata").read_bytes()
    for data in (b"", b"x", whole[:-9], pickle.dumps({"a": 1}), pickle.dumps([1, 2])):
        (folder / ".metadata").write_bytes(data)
        assert _refused(folder) == _DAMAGED.format(folder)


@pytest.mark.parametrize("other", ["shape", "dtype", "bytes"])
def test_chunk_that_is_another_is_refused(other: str, tmp_path: Path) -> None:
    folder = _grid(tmp_path / "ck")
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    if other == "bytes":
        data[: len(data) // 2] = bytes(len(data) // 2)
    else:
        stream = io.BytesIO()
        torch.save(torch.ones(2, 2) if other == "shape" else torch.ones(4, 1, dtype=torch.int32), stream)
        data[: len(stream.getvalue())] = stream.getvalue()
    (folder / "__0_0.distcp").write_bytes(data)
    with pytest.raises(SourceError) as error:
        inspect_checkpoint(folder, stats=True)
    assert str(error.value) == (
        f"{folder}/__0_0.distcp: expected F32 [4, 1] at byte 0, as torch.save writes it, got another thing. "
        "The file is damaged; fetch it again."
    )


def test_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    folder = _grid(tmp_path / "ck")
    file = _open(folder)
    path = folder / "__2_0.distcp"
    _read(file)
    os.truncate(path, 10)
    with pytest.raises(SourceError, match=f"{path}: expected a file at rest, got one that changed"):
        _read(file)


def test_one_file_of_it_is_no_checkpoint(tmp_path: Path) -> None:
    folder = _grid(tmp_path / "ck")
    for name in (".metadata", "__0_0.distcp"):
        assert _refused(folder / name) == (
            f"{folder}/{name}: expected a whole checkpoint, got one file of a torch.distributed checkpoint. "
            "Name its folder."
        )
