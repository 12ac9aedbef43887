"""`surgery doctor` as rows and as a table: what this installation is and works with, for a report of a problem.

Nothing here fails for what is missing, and nothing tells a secret: of the Hub's token only whether there is one.
"""

import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from surgery.caches import cache_root
from surgery.report.tables import Terminal
from surgery.report.text import line
from surgery.sizes import as_bytes
from surgery.threads import cores

PACKAGES = (
    *("model-surgery", "torch", "transformers", "safetensors", "huggingface_hub", "numpy", "blake3", "click"),
    *("tqdm", "filelock", "pyyaml", "hf_xet", "triton", "matplotlib", "peft", "accelerate", "trl", "lightning"),
    *("sentence-transformers", "diffusers", "timm", "deepspeed"),
)
"""Those that surgery needs, and those that it is used with."""


def rows() -> dict[str, Any]:
    """Describe this installation. What cannot be asked is None, and named in `faults` if that is a fault."""
    faults: list[str] = []
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "python": sys.executable,
            "package": str(Path(__file__).resolve().parents[1]),
        },
        "cpu": {"cores": cores(), **_ask("kernels", _kernels, faults, {"kernels": None, "level": None, "why": None})},
        "devices": _ask("devices", _devices, faults, []),
        "hub": _ask("huggingface_hub", _hub, faults, None),
        "caches": _ask("caches", _caches, faults, {}),
        "faults": faults,
    }


def _ask(what: str, question: Callable[[], Any], faults: list[str], default: Any) -> Any:
    """Return an answer, or the default, for a broken installation is what a doctor is called to."""
    try:
        return question()
    except Exception as error:
        faults.append(f"{what}: {type(error).__name__}: {error}")
        return default


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    from surgery.kernels.backends import find_compiled
    from surgery.kernels.native import LEVELS

    compiled, fault = find_compiled()
    if compiled is None:
        return {"kernels": "NumPy", "level": None, "why": f"expected a compiled library, got {fault}"}
    return {"kernels": "compiled", "level": LEVELS[compiled.level], "why": None}


def _devices() -> list[dict[str, Any]]:
    """Return the accelerators that torch sees; none without torch."""
    if _version("torch") is None:
        return []
    import torch

    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            found.append(
                {"kind": "cuda", "name": about.name, "bytes": about.total_memory, "driver": torch.version.cuda}
            )
    if torch.backends.mps.is_available():
        found.append({"kind": "mps", "name": platform.processor(), "bytes": None, "driver": None})
    return found


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    return {
        "endpoint": _without_login(constants.ENDPOINT),
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": bool(get_token()),
        "xet": not constants.HF_HUB_DISABLE_XET,
    }


def _without_login(url: str) -> str:
    """Return a URL without the user, the password and the query that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _caches() -> dict[str, Any]:
    from huggingface_hub import constants

    return {"surgery": _folder(cache_root()), "hub": _folder(Path(constants.HF_HUB_CACHE))}


def _folder(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"path": None, "bytes": 0, "writable": False}
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return {"path": str(path), "bytes": _size(path), "writable": os.access(existing, os.W_OK)}


def _size(folder: Path) -> int:
    """Sum up the files of a folder, without those that links lead to."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{root}/{name}").st_size
            except OSError:  # it has gone meanwhile
                continue
    return total


def table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out rows for people."""
    known = {name: found or "not installed" for name, found in rows["versions"].items()}
    system, cpu, hub = rows["platform"], rows["cpu"], rows["hub"]
    lines = [
        f"model-surgery {known.pop('model-surgery')}",
        *(line(name, found) if len(name) < 12 else f"  {name} {found}" for name, found in known.items()),
        line("platform", f"{system['system']}, {system['machine']}"),
        line("executable", system["python"]),
        line("package", system["package"]),
        line("cores", str(cpu["cores"])),
        line("kernels", _kernel_text(cpu)),
        *(line("device", _device_text(device)) for device in rows["devices"] or [None]),
        *(line(f"{name} cache", _cache_text(cache)) for name, cache in rows["caches"].items()),
    ]
    if hub:
        state = f"{'offline' if hub['offline'] else 'online'}, token {'present' if hub['token'] else 'absent'}"
        lines.append(line("hub", f"{hub['endpoint']}, {state}, Xet {'on' if hub['xet'] else 'off'}"))
    lines += [line("fault", fault) for fault in rows["faults"]]
    return "\n".join(terminal.wrap_all(lines))


def _kernel_text(cpu: Mapping[str, Any]) -> str:
    if cpu["kernels"] is None:
        return "unknown"
    return f"compiled, {cpu['level']}" if cpu["level"] else f"{cpu['kernels']}: {cpu['why']}"


def _device_text(device: Mapping[str, Any] | None) -> str:
    if device is None:
        return "none but the CPU"
    memory = f", {as_bytes(device['bytes'])}" if device["bytes"] else ""
    return f"{device['kind']}: {device['name']}{memory}"


def _cache_text(cache: Mapping[str, Any]) -> str:
    if cache["path"] is None:
        return "none: there is no home folder"
    return f"{cache['path']}, {as_bytes(cache['bytes'])}, {'' if cache['writable'] else 'not '}writable"
