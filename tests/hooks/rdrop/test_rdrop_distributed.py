"""R-Drop on two gloo processes, DDP and FSDP 2: the gradient is the mean of those of each rank's two passes."""

import pytest
from ranks_rdrop import CASES, STEPS
from two_ranks import Found, launched, measured

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return launched(tmp_path_factory, "ranks_rdrop", list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_mean_over_the_ranks(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank["losses"] <= TOLERANCE
        assert rank["gradients"] <= TOLERANCE
        assert min(rank["sizes"]) > 1e-3
        assert rank["fired"] == STEPS
        assert rank["kl"] > 0
        assert rank["left"] == 0
