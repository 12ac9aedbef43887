"""Two processes that train a patched model between them do what one does with all the rows: DDP and FSDP 2 on gloo."""

import pytest
from ranks import CASES, STEPS
from two_ranks import Found, launched, measured

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return launched(tmp_path_factory, "ranks", list(CASES))


TRAINED = [
    name
    for name in CASES
    if name not in ("fsdp bf16 before", "fsdp bf16 after", "fsdp folder", "fsdp eval", "fsdp cpu")
]
SHARDED = [name for name in TRAINED if name.startswith("fsdp") and "state_dict" not in name]


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
            "w_pre_device: expected same for weights that are split over the ranks, got cpu (blocks.0.inner.weight, "
            "blocks.0.outer.weight, ...). Leave it out: w_pre is split as they are."
        )
        assert max(rank["losses"], rank["parameters"], rank["distance"]) <= TOLERANCE
        assert rank["share"] == 1


def test_eval_of_a_sharded_model_is_the_identity(found: list[Found]) -> None:
    for rank in measured(found, "fsdp eval"):
        assert rank == {"outputs": 0, "names": True}
