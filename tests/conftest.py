"""Fixtures of all tests: the command line in a process of its own or here, a tiny checkpoint, a Hub."""

import contextlib
import os
import signal
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core already; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from checkpoints import tree_digest, write_json, write_weights
from click.testing import CliRunner
from commands import Ran, clean_env, command

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background has it ignored


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, but for `make test-all`."""
    if "SURGERY_TEST_ALL" not in os.environ:
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-all"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of several workers on few cores wait for each other longer than tiny models compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., Ran]:
    """Run `surgery ARGS` in its own process, in tmp_path."""

    def run(*args: object, env: Mapping[str, str] | None = None, **popen: Any) -> Ran:
        environment = clean_env(HF_HOME=str(tmp_path / "hf-home")) | dict(env or {})
        done = subprocess.run(
            command(*args),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=120,
            **popen,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Have this very process use a Hub of `tests/helpers/hub.py`, which otherwise the environment decides at import."""
    from huggingface_hub import constants, file_download

    def use(hub: Any) -> None:
        home = tmp_path / "hf-home"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        settings: dict[str, Any] = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = template
        paths = {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
        for name, value in (settings | paths).items():
            monkeypatch.setattr(constants, name, value)
        if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # huggingface_hub 0
            monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    return use


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `surgery ARGS` in tmp_path, without a Hub, in this very process: one of its own takes a second to import."""
    from huggingface_hub import constants

    from surgery.cli import main

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-home/hub"))

    def run(*args: object) -> Ran:
        with contextlib.chdir(tmp_path):
            done = CliRunner().invoke(main, [*map(str, args)])
        return Ran(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def refuses(run_here: Callable[..., Ran], tmp_path: Path) -> Callable[..., None]:
    """Assert that `surgery perturb ARGS` prints this one line, exits 1, and changes nothing on the disk."""

    def check(message: str, *args: object) -> None:
        before = tree_digest(tmp_path, skip="hf-home")
        ran = run_here("perturb", *args)
        assert ran.err == f"error: {message}\n"
        assert (ran.code, ran.out) == (1, "")
        assert tree_digest(tmp_path, skip="hf-home") == before

    return check


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny single-file checkpoint with companions."""
    folder = tmp_path / "source"
    write_weights(folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "bert"})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of another test listens to optimizers."""
    from torch.optim import optimizer

    from surgery.hooks import steps as optimizers

    monkeypatch.setattr(optimizers, "_listeners", WeakKeyDictionary())
    monkeypatch.setattr(optimizers, "_handles", [])
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        monkeypatch.setattr(optimizer, name, OrderedDict())
