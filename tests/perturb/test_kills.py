"""perturb, materialize, push: after a signal at moments spread over a run the same command ends in the same bytes."""

import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tree_digest, write_json
from commands import clean_env, command
from hub import Hub
from safetensors.numpy import save_file

from surgery import perturb_checkpoint

START = 0.3  # seconds that Python may take on a busy machine to come to our first line
TIMES = 100 if "SURGERY_TEST_ALL" in os.environ else 3
SIGNALS = {
    "SIGKILL": (-signal.SIGKILL, ""),
    "SIGTERM": (-signal.SIGTERM, ""),
    "SIGINT": (130, "interrupted: run the same command again.\n"),
}
NAMES = ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.sweep), "SIGINT"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """40 MB in three shards, and what an undisturbed run makes of it."""
    root = tmp_path_factory.mktemp("kills")
    rng = np.random.default_rng(0)
    weight_map = {}
    (root / "source").mkdir()
    for number in range(1, 4):
        weights = {f"layer.{number}.weight": rng.standard_normal((1800, 1850), dtype=np.float32)}
        weights[f"layer.{number}.norm.weight"] = rng.standard_normal(50_000, dtype=np.float32)
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file(weights, root / "source" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, shard)
    write_json(root / "source/model.safetensors.index.json", {"weight_map": weight_map})
    write_json(root / "source/config.json", {"model_type": "bert"})
    perturb_checkpoint(root / "source", root / "whole", seed=7)
    yield root
    shutil.rmtree(root)


def start(root: Path, words: list[object], env: Mapping[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*words), cwd=root, env=clean_env(**env), stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def seconds(run: Callable[[int], subprocess.Popen[str]]) -> float:
    """Return how long an undisturbed run takes."""
    took = []
    for number in range(3):
        begin = time.monotonic()
        assert end(run(number)) == (0, "")
        took.append(time.monotonic() - begin)
    return statistics.median(took)


def is_before_us(code: int, err: str) -> bool:
    """Tell whether Ctrl-C came while Python itself still started: before it listened, or before a line of ours ran."""
    return (code, err) == (-signal.SIGINT, "") or (
        err.rstrip().endswith("KeyboardInterrupt") and "/surgery/" not in err
    )


def disturb(name: str, run: Callable[[str], subprocess.Popen[str]], check: Callable[[str], Any], whole: float) -> None:
    """End runs by a signal, finish each, and have `check` compare what there is then.

    Args:
        whole: how long a run takes, in seconds; less, where one has ended before its moment came.
    """
    number, expected = signal.Signals[name], SIGNALS[name]
    landed, tries = 0, 0
    while landed < TIMES:
        tries += 1
        assert tries <= 2 * TIMES + 10, f"{landed} of {tries} signals fell into a run"
        key, moment = f"{name.lower()}-{tries}", (landed + 0.5) / TIMES * whole
        process, begin = run(key), time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
            whole = 0.95 * min(whole, time.monotonic() - begin)
        process.send_signal(number)
        code, err = end(process)
        if (code, err) != (0, ""):  # else it had ended before
            landed += 1
            is_early = name == "SIGINT" and moment < START and is_before_us(code, err)
            assert (code, err) == expected or is_early, f"{name} after {moment:.3f} of {whole:.3f} s: {err}"
        assert end(run(key)) == (0, "")
        check(key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["perturb", "materialize"])
def test_folder(what: str, name: str, root: Path) -> None:
    words = ["perturb", root / "source", "--seed", 7] if what == "perturb" else ["materialize", root / "whole"]
    expected, source = tree_digest(root / "whole"), tree_digest(root / "source")

    def run(key: object) -> subprocess.Popen[str]:
        return start(root, [*words, "-o", root / f"out-{key}"], {})

    def check(key: object) -> None:
        assert tree_digest(root / f"out-{key}") == expected
        shutil.rmtree(root / f"out-{key}")

    whole = seconds(run)
    for number in range(3):
        check(number)
    disturb(name, run, check, whole)
    assert tree_digest(root / "source") == source


@pytest.mark.parametrize("name", NAMES)
def test_push(name: str, root: Path) -> None:
    with Hub() as hub:
        token = hub.login("me")
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(root / "hf-home")}

        def run(key: object) -> subprocess.Popen[str]:
            return start(root, ["push", root / "whole", f"me/noisy-{key}"], online)

        def check(key: object) -> None:
            repo = hub.repos.pop(f"me/noisy-{key}")
            files = {name: data for name, data in repo.files.items() if name != ".gitattributes"}
            assert files.keys() == {path.name for path in (root / "whole").iterdir()}
            for file, data in files.items():
                here = (root / "whole" / file).read_bytes()
                assert file == "surgery.json" or data == here.replace(b"ORG/NAME", f"me/noisy-{key}".encode())
            assert len(repo.messages) == 2, repo.messages  # the initial one, and ours once
            hub.stored.clear()

        whole = seconds(run)
        for number in range(3):
            check(number)
        disturb(name, run, check, whole)
