"""Files and folders that are no checkpoint of ours: each is named for what it is, with what to do."""

import gzip
import io
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import raw_safetensors, write_json, write_weights
from safetensors.numpy import save

from surgery.checkpoint.foreign_files import kind_of_file, kind_of_folder
from surgery.checkpoint.resolve import resolve
from surgery.checkpoint.tensorfile import read_header
from surgery.errors import SourceError

torch = pytest.importorskip("torch")

from surgery.checkpoint.pickles import PickleFile  # noqa: E402

_AGAIN = "Fetch it again."
_LOGIN = "The server sent this in place of the file: log in if it is gated, and fetch it again."
_UNPACK = "Unpack it, and name the checkpoint in it."
_ORIGINAL = "Take the safetensors or PyTorch weights that it was made from."
_TF = "Load it in transformers 4 with from_tf=True, and write it with save_pretrained."
_FLAX = "Load it in transformers 4 with from_flax=True, and write it with save_pretrained."
_NUMPY = "Write its arrays with safetensors.numpy.save_file."
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
_SCRIPT = "Load it with torch.jit.load, and save its state_dict with torch.save."


def _stream(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def _zip(*names: str) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return _stream(write)


def _tar(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_config.yaml"))


def _torch_script() -> bytes:
    with warnings.catch_warnings(action="ignore"):  # deprecated, and in use
        return _stream(lambda stream: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream))


_KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", f"an empty file. {_AGAIN}"),
    "zeros": (lambda: bytes(1000), "zeros at its start. Its download did not finish: fetch it again."),
    "LFS pointer": (lambda: _LFS, "a git-LFS pointer. Fetch the file with `git lfs pull`."),
    "HTML": (lambda: b"\n<!DOCTYPE html><html><head>", f"an HTML page. {_LOGIN}"),
    "HTML with a comment": (lambda: b"<!-- x -->\n<HTML lang='en'>", f"an HTML page. {_LOGIN}"),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', f"an XML text. {_LOGIN}"),
    "JSON": (lambda: b'{"error": "Repository not found"}', f"a JSON text. {_LOGIN}"),
    "text": (lambda: b"Invalid username or password.", f"a text. {_LOGIN}"),
    "TorchScript": (_torch_script, f"a TorchScript archive. {_SCRIPT}"),
    "torch.export": (
        lambda: _zip("m/archive_format", "m/models/model.json"),
        "a program of torch.export. Load it with torch.export.load, and save its state_dict with torch.save.",
    ),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + bytes(50), f"a GGUF file. {_ORIGINAL}"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.3.0:\xff\1", f"an ONNX file. {_ORIGINAL}"),
    "HDF5": (
        lambda: b"\x89HDF\r\n\x1a\n" + bytes(40),
        f"an HDF5 file, as Keras and TensorFlow write them. {_TF}",
    ),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3" + bytes(40), f"a TensorFlow Lite file. {_ORIGINAL}"),
    "Flax": (lambda: b"\x82\xa6params\x81\xa4bert", f"a msgpack file, as Flax writes them. {_FLAX}"),
    "npy": (lambda: _stream(lambda s: np.save(s, np.ones(3))), f"a NumPy array. {_NUMPY}"),
    "npz": (lambda: _stream(lambda s: np.savez(s, w=np.ones(3))), f"a NumPy archive. {_NUMPY}"),
    "zip": (lambda: _zip("weights/a.txt"), f"a zip archive without a PyTorch checkpoint. {_UNPACK}"),
    "Keras": (lambda: _zip("config.json", "model.weights.h5"), f"a Keras archive. {_ORIGINAL}"),
    "tar": (lambda: _stream(_tar), f"a tar archive. {_UNPACK}"),
    "gzip": (lambda: gzip.compress(b"x" * 99), f"a gzip archive. {_UNPACK}"),
}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize(("make", "message"), _KINDS.values(), ids=_KINDS)
def test_foreign_file_is_named(make: Callable[[], bytes], message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(make())
    read: Any = PickleFile if suffix == ".bin" else read_header
    with pytest.raises(SourceError) as error:
        read(path, label="x")
    own = "PyTorch" if suffix == ".bin" else "safetensors"
    assert str(error.value) == f"x: expected a {own} file, got {message}"


def test_file_under_the_other_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(save({"w": np.ones(3, np.float32)}))
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "a.bin", label="x")
    assert str(error.value) == "x: expected a PyTorch file, got a safetensors file. Rename it to .safetensors."
    for is_zip in (True, False):
        torch.save({"w": torch.ones(3)}, tmp_path / "a.safetensors", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(SourceError) as error:
            read_header(tmp_path / "a.safetensors", label="x")
        assert str(error.value) == "x: expected a safetensors file, got a PyTorch file. Rename it to .bin."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\3\0\0\0", f"got a GGUF file. {_ORIGINAL}"),
        (_stream(lambda s: torch.save({"w": torch.ones(2)}, s)), "got a PyTorch file. Rename it to .bin."),
        (save({"w": np.ones(3, np.float32)}), "got a safetensors file. Rename it to .safetensors."),
    ],
    ids=["GGUF", "PyTorch", "safetensors"],
)
def test_file_of_another_suffix_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model_best.pth.tar"
    path.write_bytes(content)
    with pytest.raises(SourceError) as error:
        resolve(path)
    assert str(error.value) == f"{path}: expected .safetensors, .bin, .pt, .pth, .ckpt, {message}"


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nest", [lambda m: m, lambda m: {"epoch": 3, "model": m}], ids=["module", "nested"])
def test_whole_module_is_named_and_not_run(nest: Callable[[Any], Any], is_zip: bool, tmp_path: Path) -> None:
    module = nest(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    torch.save(module, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        "x: expected a pickle of nothing but tensors, got a whole module, torch.nn.modules.container.Sequential. "
        "It was not run; save its state_dict() with torch.save where it was trained."
    )


def test_raw_weights_are_named_by_the_file_beside(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.bin").write_bytes(os.urandom(600))
    assert kind_of_file(tmp_path / "openvino_model.bin") is None
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    assert kind_of_file(tmp_path / "openvino_model.bin") == ("weights of OpenVINO", _ORIGINAL)


# -- folders ------------------------------------------------------------------------------------------------------

_DCP = "Fetch its .metadata too, and name its folder."
_ZERO = "Run DeepSpeed's zero_to_fp32.py on the folder above it, and name what that writes."
_GATHER = "Have the training script gather it on one rank, and save that."
_ORBAX = "Restore it in JAX, and write it with safetensors.flax.save_file."
_FOLDERS = {
    "ZeRO": (
        ["config.json", "latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"],
        ("shards of DeepSpeed ZeRO (global_step9/mp_rank_00_model_states.pt)", _ZERO),
    ),
    "Orbax": (["0/_CHECKPOINT_METADATA", "0/d/ab12"], ("an Orbax checkpoint (0/_CHECKPOINT_METADATA)", _ORBAX)),
    "Flax": (["config.json", "flax_model.msgpack"], ("Flax weights (flax_model.msgpack)", _FLAX)),
    "Keras": (["config.json", "tf_model.h5"], ("TensorFlow weights (tf_model.h5)", _TF)),
    "TF": (["bert_model.ckpt.index"], ("TensorFlow weights (bert_model.ckpt.index)", _TF)),
    "GGUF": (["m.Q4_K_M.gguf", "README.md"], ("a GGUF file (m.Q4_K_M.gguf)", _ORIGINAL)),
    "ONNX": (["onnx/model.onnx", "config.json"], ("an ONNX file (onnx/model.onnx)", _ORIGINAL)),
    "MLX": (["weights.npz", "config.json"], ("NumPy arrays (weights.npz)", _NUMPY)),
    "NeMo": (["model.nemo"], ("an archive (model.nemo)", _UNPACK)),
    "Megatron": (
        ["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"],
        (
            "a Megatron-LM checkpoint (iter_0000010/mp_rank_00/model_optim_rng.pt)",
            "Convert it with Megatron's tools/checkpoint/convert.py first.",
        ),
    ),
    "Trainer": (
        ["checkpoint-500/model.safetensors", "checkpoint-500/trainer_state.json"],
        ("weights in a folder below (checkpoint-500/model.safetensors)", "Point at that folder."),
    ),
    "none": (["config.json", "lora_rank8.txt"], None),
}


@pytest.mark.parametrize(("names", "kind"), _FOLDERS.values(), ids=_FOLDERS)
def test_foreign_folder_is_named(names: list[str], kind: tuple[str, str] | None) -> None:
    assert kind_of_folder(names) == kind


def _refused(folder: Path) -> str:
    with pytest.raises(SourceError) as error:
        resolve(folder)
    return str(error.value)


def test_distributed_checkpoint_without_its_metadata_is_named(tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    folder = tmp_path / "checkpoint-500"
    write_json(folder / "config.json", {})
    with warnings.catch_warnings(action="ignore"):  # it says that it saves in one process
        dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    (folder / "pytorch_model_fsdp_0/.metadata").unlink()
    for named, found in (
        (folder, "pytorch_model_fsdp_0/__0_0.distcp"),
        (folder / "pytorch_model_fsdp_0", "__0_0.distcp"),
    ):
        assert _refused(named) == (
            f"{named}: expected safetensors or PyTorch weights, got a torch.distributed checkpoint without its "
            f".metadata ({found}). {_DCP}"
        )
    write_weights(folder / "model.safetensors")
    assert ("pytorch_model_fsdp_0/__0_0.distcp", "weights in another format") in resolve(folder).layout.left_out


def test_folder_of_zero_shards_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "global_step9"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": {"w": torch.ones(2)}}, folder / name)
    shard = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert (
        _refused(folder)
        == f"{folder}: expected one PyTorch checkpoint, got shards of DeepSpeed ZeRO ({shard}). {_ZERO}"
    )
    assert _refused(folder / shard) == (
        f"{folder / shard}: expected a whole checkpoint, got shards of DeepSpeed ZeRO ({shard}). {_ZERO}"
    )


def test_folder_of_fsdp_ranks_is_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        torch.save({"w": torch.ones(2)}, tmp_path / f"pytorch_model_fsdp_rank{rank}.bin")
    assert _refused(tmp_path) == (
        f"{tmp_path}: expected one PyTorch checkpoint, got one shard for each FSDP rank "
        f"(pytorch_model_fsdp_rank0.bin). {_GATHER}"
    )


def test_command_names_a_pointer_in_one_line(refuses: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").write_bytes(_LFS)
    refuses(
        f"{source}/model.safetensors: expected a safetensors file, got a git-LFS pointer. "
        "Fetch the file with `git lfs pull`.",
        "source",
    )


def test_safetensors_cut_off_in_its_header_is_not_another_format(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(raw_safetensors(header)[:40])
    with pytest.raises(SourceError, match="The file is truncated or not safetensors; fetch it again"):
        read_header(tmp_path / "x.safetensors", label="x")
