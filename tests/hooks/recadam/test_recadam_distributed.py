"""RecAdam on two gloo processes, DDP and FSDP 2: what one process does with all the rows."""

import pytest
from ranks import STEPS
from ranks_recadam import CASES
from two_ranks import Found, launched, measured

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return launched(tmp_path_factory, "ranks_recadam", list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank["losses"] <= TOLERANCE
        assert rank["parameters"] <= TOLERANCE
        assert rank["distance"] <= TOLERANCE
        assert rank["moved"] > 1e-3
        assert rank["t"] == [STEPS, STEPS]
        assert rank["recalled"] == STEPS
        assert rank["share"] == (0.5 if name.startswith("fsdp") else 1)
        assert rank["plain"]
