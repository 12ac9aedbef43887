"""Two processes that train a patched model between them do what one does with all the rows: DDP and FSDP 2 on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.conftest import clean_env
from tests.helpers.ranks import CASES, STEPS

ROOT = Path(__file__).parents[3]
Found = dict[str, dict[str, Any]]
TOLERANCE = 1e-12


def launch(folder: Path, names: list[str], *, module: str = "ranks") -> list[Found]:
    """Run cases of a module in two processes, and return what each has measured."""
    environment = clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    folder.mkdir()
    ranks = []
    try:
        for rank in ("0", "1"):
            command = [sys.executable, "-m", f"tests.helpers.{module}", rank, str(folder), *names]
            with (folder / f"{rank}.log").open("w") as log:
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
        codes = [process.wait(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0, 0], (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def launched(tmp_path_factory: pytest.TempPathFactory, module: str, names: list[str]) -> list[Found]:
    """What every case measured, by rank: launched once, also when pytest-xdist spreads the tests over processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / module
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            launch(shared, names, module=module)
    return [json.loads((shared / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return launched(tmp_path_factory, "ranks", list(CASES))


TRAINED = [
    name
    for name in CASES
    if name not in ("fsdp bf16 before", "fsdp bf16 after", "fsdp folder", "fsdp eval", "fsdp cpu")
]
SHARDED = [name for name in TRAINED if name.startswith("fsdp") and "state_dict" not in name]


def measured(found: list[Found], name: str) -> list[dict[str, Any]]:
    """What both ranks have measured in a case."""
    assert [rank[name].get("error") for rank in found] == [None, None]
    return [rank[name] for rank in found]


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_one_process(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank["losses"] <= TOLERANCE * max(1, rank["moved"])
        assert rank["parameters"] <= TOLERANCE
        assert rank["distance"] <= TOLERANCE
        assert rank["moved"] > 0.1
        assert rank["steps"] == STEPS
        assert rank["uncalled"] == (["unused.weight"] if name == "ddp unused" else [])
        assert rank["anchored"] == (0 if "anchor" in name or "state_dict" in name else STEPS)


@pytest.mark.parametrize("name", SHARDED)
def test_w_pre_is_split_between_the_ranks(found: list[Found], name: str) -> None:
    first = 1 if "before" in name else 0.5  # patched before, it is whole until all weights have been seen split
    for rank in measured(found, name):
        assert rank["notes"] == [first, *[0.5] * (STEPS - 1)]


@pytest.mark.parametrize("name", SHARDED)
def test_unpatched_training_goes_on_as_in_one_process(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank["left"] == []
        assert rank["unpatched"]["losses"] <= TOLERANCE
        assert rank["unpatched"]["parameters"] <= TOLERANCE


@pytest.mark.parametrize("name", ["fsdp bf16 before", "fsdp bf16 after"])
def test_weights_gathered_as_bfloat16_mix_as_a_bfloat16_model(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank == {"outputs": 0, "gradients": pytest.approx(0, abs=1e-6)}


def test_w_pre_of_a_sharded_model_comes_from_a_folder(found: list[Found]) -> None:
    for rank in measured(found, "fsdp folder"):
        assert rank["outputs"] == 0
        assert rank["distance"] <= TOLERANCE
        assert rank["share"] == 0.5


def test_w_pre_on_the_cpu_stays_whole(found: list[Found]) -> None:
    for rank in measured(found, "fsdp cpu"):
        assert rank["refusal"] == (
            "w_pre_device: expected same for weights that fully_shard has split, got cpu (blocks.0.inner.weight, "
            "blocks.0.outer.weight, ...). Leave it out: w_pre is split as they are."
        )
        assert max(rank["losses"], rank["parameters"], rank["distance"]) <= TOLERANCE
        assert rank["share"] == 1


def test_eval_of_a_sharded_model_is_the_identity(found: list[Found]) -> None:
    for rank in measured(found, "fsdp eval"):
        assert rank == {"outputs": 0, "names": True}
