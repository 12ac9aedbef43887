"""Two processes that train a patched model with DeepSpeed do what one does with torch's optimizer, in float64."""

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-deepspeed")

from ranks import STEPS
from ranks_zero import CASES, NOISY, PAIRED, TRAINED
from two_ranks import Found, launched, measured

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return launched(tmp_path_factory, "ranks_zero", list(CASES))


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_one_process(found: list[Found], name: str) -> None:
    anchored, recalled = (STEPS if method in name else 0 for method in ("anchor", "recadam"))
    for rank in measured(found, name):
        assert rank["losses"] <= TOLERANCE
        assert rank["parameters"] <= TOLERANCE
        assert rank["distance"] <= TOLERANCE
        assert rank["moved"] > 0.01
        assert rank["steps"] == [STEPS, anchored, recalled, recalled]
        assert rank["unmixed"] == 0
        assert rank["share"] == (pytest.approx(0.5, abs=0.01) if name.startswith("zero 3") else 1)
        assert rank["left"] == []


@pytest.mark.parametrize("name", PAIRED)
def test_both_passes_are_those_of_each_rank(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank["losses"] <= TOLERANCE
        assert rank["parameters"] <= TOLERANCE
        assert rank["fired"] == (STEPS if name.endswith("1") else STEPS // 2)


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_that_of_the_whole_model_and_lasts(found: list[Found], name: str) -> None:
    for rank in measured(found, name):
        assert rank["split"] is name.startswith("zero 3")
        assert rank["perturbed"] == 16
        assert rank["equal"] == [True, True]  # at once, and after a step with an lr of 0
        assert rank["stds"]
        assert rank["again"].startswith("the weights have this noise already (lam 0.15, seed 0): nothing was done")


def test_weight_that_is_read_past_its_layer_is_refused(found: list[Found]) -> None:
    for rank in measured(found, "zero 3 attention"):
        assert rank["refusal"] == (
            "attention.out_proj.weight: expected a weight that ZeRO-3 puts together for MultiheadAttention, which "
            "reads it, got its share: it is another layer's. Name it in exclude."
        )
