"""What a file or folder that is no checkpoint of ours is, told from its first bytes or its names, for errors to say so.

Asked only where reading has failed or no weights were found, so that a wrong guess costs nothing but a word.
"""

import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from surgery.errors import SourceError


class Kind(NamedTuple):
    """A kind of file.

    Args:
        what: with its article, for `got ...`.
        advice: what to do instead, a whole sentence.
    """

    what: str
    advice: str


_AGAIN = "Fetch it again."
_LOGIN = "The server sent this in place of the file: log in if it is gated, and fetch it again."
_UNPACK = "Unpack it, and name the checkpoint in it."
_ORIGINAL = "Take the safetensors or PyTorch weights that it was made from."
_OF_TENSORFLOW = "Load it in transformers 4 with from_tf=True, and write it with save_pretrained."
_OF_FLAX = "Load it in transformers 4 with from_flax=True, and write it with save_pretrained."
_NUMPY = "Write its arrays with safetensors.numpy.save_file."
_GATHER = "Have the training script gather it on one rank, and save that."

_STATE_DICT = "Load it with {}, and save its state_dict with torch.save."
_DCP = "Fetch its .metadata too, and name its folder."
_ZERO = "Run DeepSpeed's zero_to_fp32.py on the folder above it, and name what that writes."
_MEGATRON = "Convert it with Megatron's tools/checkpoint/convert.py first."
_ORBAX = "Restore it in JAX, and write it with safetensors.flax.save_file."
_BELOW = "Point at that folder."

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with this number
PYTORCH = Kind("a PyTorch file", "Rename it to .bin.")
SAFETENSORS = Kind("a safetensors file", "Rename it to .safetensors.")
_MAGIC = (
    (b"version https://git-lfs.github.com/spec", Kind("a git-LFS pointer", "Fetch the file with `git lfs pull`.")),
    (b"GGUF", Kind("a GGUF file", _ORIGINAL)),
    (b"lmgg", Kind("a GGML file", _ORIGINAL)),
    (b"tjgg", Kind("a GGML file", _ORIGINAL)),
    (b"fmgg", Kind("a GGML file", _ORIGINAL)),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file, as Keras and TensorFlow write them", _OF_TENSORFLOW)),
    (b"\x93NUMPY", Kind("a NumPy array", _NUMPY)),
    (b"\x1f\x8b", Kind("a gzip archive", _UNPACK)),
    (b"BZh", Kind("a bzip2 archive", _UNPACK)),
    (b"\xfd7zXZ\x00", Kind("an xz archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("a zstd archive", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
)
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_XML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|error)\b", re.IGNORECASE)
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*["}]|\[\s*[{"\]])')
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")  # ir_version, and any field after it
_MSGPACK = re.compile(rb"[\x81-\x8f](?:[\xa1-\xbf]|\xd9.)[\w.]|\xde..(?:[\xa1-\xbf]|\xd9.)[\w.]", re.DOTALL)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{8,}")

_IN_ZIP = (
    (r"[^/]+/constants\.pkl", Kind("a TorchScript archive", _STATE_DICT.format("torch.jit.load"))),
    (
        r"(?:[^/]+/)?(?:archive_format|serialized_exported_program\.json)",
        Kind("a program of torch.export", _STATE_DICT.format("torch.export.load")),
    ),
    (r"[^/]+/\.data/extern_modules", Kind("an archive of torch.package", _ORIGINAL)),
    (r"model\.weights\.h5", Kind("a Keras archive", _ORIGINAL)),
    (r"[^/]+/data\.pkl", PYTORCH),
    (r".+\.npy", Kind("a NumPy archive", _NUMPY)),
)
"""What a zip archive is, by the first of these that one of its names matches."""

_SHARDS = (
    (r"[^/]+\.distcp", Kind("a torch.distributed checkpoint without its .metadata", _DCP)),
    (r"(?:\w*zero_pp_rank_\d+_|mp_rank_\d+_model_)\w+\.pt", Kind("shards of DeepSpeed ZeRO", _ZERO)),
    (r"model_optim_rng\.pt", Kind("a Megatron-LM checkpoint", _MEGATRON)),
    (r"(?:\w*(?:fsdp_|world_size_\d+_))?rank_?\d+\.(?:bin|pt|pth)", Kind("one shard for each FSDP rank", _GATHER)),
)
_FOLDERS = (
    *_SHARDS,
    (r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt", Kind("an Orbax checkpoint", _ORBAX)),
    (r"[^/]+\.msgpack", Kind("Flax weights", _OF_FLAX)),
    (r"[^/]+\.h5|[^/]+\.ckpt\.(?:index|data.*)|saved_model\.pb", Kind("TensorFlow weights", _OF_TENSORFLOW)),
    (r"[^/]+\.(?:gguf|ggml|llamafile)", Kind("a GGUF file", _ORIGINAL)),
    (r"[^/]+\.onnx", Kind("an ONNX file", _ORIGINAL)),
    (r"[^/]+\.(?:tflite|mlmodel|engine|pdparams|ot)", Kind("weights of another framework", _ORIGINAL)),
    (r"[^/]+\.(?:npz|npy)", Kind("NumPy arrays", _NUMPY)),
    (r"[^/]+\.(?:nemo|zip|tar|tgz|tar\.gz)", Kind("an archive", _UNPACK)),
    (r"(?:checkpoint-\d+|original)/.*\.(?:safetensors|bin|pth)", Kind("weights in a folder below", _BELOW)),
)
"""What a folder is, by the first of these that the end of one of its paths matches."""

_HEAD = 512
_PICKLE_BYTES = 16 << 20  # of a pickle that are looked through; a module's own names come early


def kind_of_file(path: Path) -> Kind | None:
    """Tell from a file's first bytes what it is; None where they say nothing, or it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return _kind_of_bytes(head) or _kind_of_archive(path, head) or _kind_beside(path)
    except OSError:
        return None


def _kind_of_bytes(head: bytes) -> Kind | None:
    if not head:
        return Kind("an empty file", _AGAIN)
    if kind := next((kind for magic, kind in _MAGIC if head.startswith(magic)), None):
        return kind
    if head[257:262] == b"ustar":
        return Kind("a tar archive", _UNPACK)
    if _PAGE.match(head):
        return Kind("an HTML page", _LOGIN)
    if _XML.match(head):
        return Kind("an XML text", _LOGIN)
    if _JSON.match(head):
        return Kind("a JSON text", _LOGIN)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 40:
        return SAFETENSORS
    if head.startswith(_LEGACY_TORCH):
        return PYTORCH
    return _kind_without_magic(head)


def _kind_without_magic(head: bytes) -> Kind | None:
    """Tell the formats that begin with an ordinary field, by the fields that follow."""
    if head[4:8] == b"TFL3":
        return Kind("a TensorFlow Lite file", _ORIGINAL)
    if _ONNX.match(head):
        return Kind("an ONNX file", _ORIGINAL)
    if re.match(rb"\x80[\x02-\x05]", head):
        return Kind("a pickle that torch did not write", "It was not run; get safetensors instead.")
    if _MSGPACK.match(head):
        return Kind("a msgpack file, as Flax writes them", _OF_FLAX)
    if len(head) >= 16 and not any(head):
        return Kind("zeros at its start", "Its download did not finish: fetch it again.")
    if _TEXT.fullmatch(head):
        return Kind("a text", _LOGIN)
    return None


def _kind_of_archive(path: Path, head: bytes) -> Kind | None:
    if not head.startswith(b"PK"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None  # cut off, or damaged
    for pattern, kind in _IN_ZIP:
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    return Kind("a zip archive without a PyTorch checkpoint", _UNPACK)


def _kind_beside(path: Path) -> Kind | None:
    """Tell raw weights by the file that describes them."""
    for suffix, what in ((".xml", "weights of OpenVINO"), (".param", "weights of ncnn")):
        if path.suffix == ".bin" and path.with_suffix(suffix).is_file():
            return Kind(what, _ORIGINAL)
    return None


def kind_of_folder(names: Iterable[str]) -> Kind | None:
    """Tell from the names in a folder, relative to it, what of another kind it holds, with an example."""
    return _first(names, _FOLDERS)


def kind_of_shards(names: Iterable[str]) -> Kind | None:
    """Tell from their names the files of ranks, none of which is a checkpoint by itself."""
    return _first(names, _SHARDS)


def kind_of_part(path: Path) -> Kind | None:
    """Tell from the files beside it one of several that only together are a checkpoint."""
    if path.suffix == ".distcp" or path.name == ".metadata":
        return Kind("one file of a torch.distributed checkpoint", "Name its folder.")
    ranks = path.parent.glob("consolidated.[0-9][0-9].pth")
    if re.fullmatch(r"consolidated\.\d\d\.pth", path.name) and len(list(ranks)) > 1:
        return Kind("one of Llama's model-parallel shards", "Name its folder.")
    return None


def _first(names: Iterable[str], kinds: Iterable[tuple[str, Kind]]) -> Kind | None:
    names = sorted(names)
    for pattern, kind in kinds:
        if found := next((name for name in names if re.fullmatch(rf"(?:.*/)?(?:{pattern})", name)), None):
            return Kind(f"{kind.what} ({found})", kind.advice)
    return None


def holds_a_module(path: Path) -> bool:
    """Tell a pickle of a whole nn.Module by the names that each of them has; nothing is unpickled."""
    try:
        with path.open("rb") as file:
            data = file.read(4)
            if data.startswith(b"PK"):
                data = _pickle_in(path)
            else:
                data += file.read(_PICKLE_BYTES)
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    return b"_parameters" in data and b"_modules" in data and b"_buffers" in data


def _pickle_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if name is None:
            return b""
        with archive.open(name) as file:
            return file.read(_PICKLE_BYTES)


def foreign_file(path: Path, label: str, own: Kind) -> SourceError | None:
    """Return the error that names what a file is instead of `own`; None where its first bytes do not tell."""
    kind = kind_of_file(path)
    if kind is None or kind == own:
        return None
    return SourceError(f"{label}: expected {own.what}, got {kind.what}. {kind.advice}")
