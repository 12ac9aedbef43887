"""Machine code of numba kernels, kept on disk and loaded with llvmlite alone, which starts ten times as fast.

numba takes 0.3 s to load, llvmlite 0.02 s: a command that reads its input in 0.3 s should not wait for a compiler.
Such a kernel takes pointers and 64-bit numbers, allocates nothing and raises nothing, so that it needs no runtime.
"""

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from surgery.caches import cache_folder

_DIGEST = 16
_lock = threading.Lock()
_loaded: list[Any] = []  # what a function's code must not outlive


class Native:
    """A function of this package's kernels, called without the GIL.

    Args:
        name: of the function in surgery.kernels.stats.
        types: numba's name for the type of each argument: "int64", "float64", or that of a pointer's target and "*".
    """

    def __init__(self, name: str, types: tuple[str, ...]) -> None:
        self._name = name
        self._types = types
        self._call: Callable[..., object] | None = None

    def __call__(self, *args: Any) -> None:
        if self._call is None:
            with _lock:
                self._call = self._call or _load(self._name, self._types)
        result, exception = ctypes.c_void_p(), ctypes.c_void_p()  # numba's own convention; neither is used
        places = ctypes.addressof(result), ctypes.addressof(exception)
        self._call(*places, *(arg.ctypes.data if isinstance(arg, np.ndarray) else arg for arg in args))


def _load(name: str, types: tuple[str, ...]) -> Callable[..., object]:
    folder = cache_folder(f"native-{_machine()}")
    key = hashlib.blake2b("\0".join(types).encode(), digest_size=8).hexdigest()
    path = folder / f"{name}-{key}.o" if folder else None
    code = _recall(path) if path else None
    if code is None:
        code = _compile(name, types)
        if path:
            _keep(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _loaded.append((engine, code))
    kinds: list[Any] = [
        {"int64": ctypes.c_int64, "float64": ctypes.c_double}.get(type, ctypes.c_void_p) for type in types
    ]
    signature = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *kinds)
    return signature(engine.get_function_address(name))


def _compile(name: str, types: tuple[str, ...]) -> bytes:
    """Compile with numba, and keep nothing of it but the function itself."""
    import numba

    from surgery.kernels import stats

    kinds = [
        numba.types.CPointer(getattr(numba.types, type[:-1])) if type.endswith("*") else getattr(numba.types, type)
        for type in types
    ]
    function = numba.njit(numba.void(*kinds), nogil=True, error_model="numpy")(getattr(stats, name))
    compiled: Any = function.overloads[tuple(kinds)]
    module = llvm.parse_assembly(function.inspect_llvm(tuple(kinds)))
    for other in module.functions:
        if other.name == compiled.fndesc.llvm_func_name:
            other.name = name
        elif not other.is_declaration:  # Python's side of it
            other.linkage = "internal"
    target = _target()
    # optimized again as a whole, now that nothing else can call its parts: no reference counts are left then
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    needed = {other.name for other in module.functions if other.is_declaration and not other.name.startswith("llvm.")}
    assert not needed, f"{name} needs {needed}, which only numba's runtime has"
    return bytes(target.emit_object(module))


def _recall(path: Path) -> bytes | None:
    """Return the code kept there, but not what a crash left half written: LLVM does not check."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    code = kept[_DIGEST:]
    return code if hashlib.blake2b(code, digest_size=_DIGEST).digest() == kept[:_DIGEST] else None


def _keep(path: Path, code: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_bytes(hashlib.blake2b(code, digest_size=_DIGEST).digest() + code)
        part.replace(path)
    except OSError:  # a full or read-only cache only costs time
        part.unlink(missing_ok=True)


@cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)


@cache
def _machine() -> str:
    """Digest what machine code depends on: these sources, the compiler (llvmlite's version tells numba's), the CPU."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for part in (llvmlite.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
