"""What is in a PyTorch file beside its tensors: one state_dict is found, several are listed."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from surgery.checkpoint import state_dicts  # noqa: E402
from surgery.checkpoint.pickles import PickleFile  # noqa: E402
from surgery.errors import SourceError  # noqa: E402

_SD = {"conv.weight": torch.arange(8.0).reshape(2, 4), "conv.bias": torch.ones(2)}
_EMA = {name: tensor + 1 for name, tensor in _SD.items()}
_OTHER = {"head.weight": torch.ones(3)}
_OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
_SAVE = "Save the one to take by itself with torch.save."


def _open(content: Any, tmp_path: Path) -> PickleFile:
    torch.save(content, tmp_path / "x.pt")
    return PickleFile(tmp_path / "x.pt", label="x")


def _names(content: Any, tmp_path: Path) -> list[str]:
    file = _open(content, tmp_path)
    file.close()
    return [tensor.name for tensor in file.header.tensors]


def _refused(content: Any, tmp_path: Path) -> str:
    with pytest.raises(SourceError) as error:
        _open(content, tmp_path)
    return str(error.value)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    state_dicts._warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("nest", ["params", "params_ema", "net", "generator", "student", "state_dict_ema", "weights"])
def test_single_nest_of_any_name_is_taken(nest: str, tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    found = _names({nest: _SD, "optimizer": _OPTIMIZER, "epoch": 3, "step": torch.tensor(5)}, tmp_path)
    assert sorted(found) == sorted(_SD)
    assert warned.messages == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"params": _SD, "params_ema": _EMA}, f"expected one state_dict, got 2: 'params', 'params_ema'. {_SAVE}"),
        ({"student": _SD, "teacher": _EMA}, f"expected one state_dict, got 2: 'student', 'teacher'. {_SAVE}"),
        ({"g": _OTHER, "d": _SD, "g_ema": _OTHER}, f"expected one state_dict, got 3: 'g', 'd', 'g_ema'. {_SAVE}"),
        (
            {"state_dict": _SD, "state_dict_ema": _EMA},
            f"expected one state_dict, got 2: 'state_dict', 'state_dict_ema'. {_SAVE}",
        ),
        ({"model": _SD, "ema": {"shadow": _EMA}}, f"expected one state_dict, got 2: 'model', 'ema'. {_SAVE}"),
        (
            {"net": _SD, "step": torch.tensor([7.0, 8.0])},
            f"expected one state_dict, got 'net' with tensors beside it: 'step'. {_SAVE}",
        ),
        (
            {**_SD, "head": _OTHER},
            f"expected one state_dict, got 'head' with tensors beside it: 'conv.weight', 'conv.bias'. {_SAVE}",
        ),
        ({**_SD, "heads": [torch.ones(2)]}, "'heads': expected a tensor, got a list of tensors. Save tensors by name."),
        (
            {"_flat_param": torch.ones(3)},
            "'_flat_param': expected a model's own weights, got those that FSDP has flattened. "
            "Save them with FULL_STATE_DICT.",
        ),
        (
            {"__metadata__": torch.ones(3)},
            "'__metadata__': expected a name that safetensors can hold, got this. Rename it.",
        ),
        ({"a": torch.ones(2), 1: torch.ones(2)}, "expected names that are text, got 1. Save a state_dict."),
        ({}, "expected a state_dict, got an empty dict. Save one with torch.save."),
        ([_SD], "expected a state_dict, got an object of type list. Save one with torch.save."),
        (
            {f"n{i}": i for i in range(9)},
            "expected a state_dict, got a dict of 'n0', 'n1', 'n2', 'n3', 'n4', 'n5', .... Save one with torch.save.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value))[:30],
)
def test_what_is_there_is_listed(content: Any, message: str, tmp_path: Path) -> None:
    assert _refused(content, tmp_path) == f"x: {message}"


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    """quantize_dynamic leaves a tuple where the weight was."""
    with warnings.catch_warnings(action="ignore"):
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), dtype=torch.qint8)
        torch.save(model.state_dict(), tmp_path / "x.pt")
        with pytest.raises(SourceError) as error:
            PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        "x: '0._packed_params._packed_params': expected unquantized weights, got packed ones. "
        "Perturb the original checkpoint and quantize the result."
    )


def test_what_holds_no_weights_is_named_once(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    content = {**_SD, "scale": 0.5, "note": "x", "state._extra_state": None}
    assert sorted(_names(content, tmp_path)) == sorted(_SD)
    _names(content, tmp_path)
    assert warned.messages == ["x: left out 3 that are no tensors: 'scale' (float), 'note' (str), ..."]


def test_what_is_beside_the_model_is_named(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    assert sorted(_names({"model": _SD, "criterion": _OTHER, "queue": torch.ones(4)}, tmp_path)) == sorted(_SD)
    assert warned.messages == ["x: took the state_dict 'model', and left out what is beside it: 'criterion', 'queue'"]


def test_command_names_what_it_left_out(run_cli: Any, tmp_path: Path) -> None:
    torch.save({"model": {**_SD, "scale": 0.5}}, tmp_path / "x.pt")
    ran = run_cli("perturb", "x.pt", "-o", "out")
    assert ran.code == 0
    assert ran.err == f"{tmp_path}/x.pt: left out 1 that are no tensors: 'scale' (float)\n"


@pytest.mark.parametrize("nest", ["optimal_transport", "random_projection", "config_net", "unscheduled"])
def test_nest_whose_name_only_reads_like_training_state_is_not_dropped(
    nest: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    assert sorted(_names({nest: _SD}, tmp_path)) == sorted(_SD)
    assert _names({"model": _SD, nest: _OTHER}, tmp_path)
    assert [nest in message for message in warned.messages] == [True]


@pytest.mark.parametrize(
    "state",
    ["optimizer", "optimizer_states", "g_optim", "optimG", "lr_schedulers", "scaler", "cuda_rng_state", "loops"],
)
def test_training_state_is_left_out_without_a_word(
    state: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    assert sorted(_names({"model": _SD, state: {"a": torch.ones(3)}}, tmp_path)) == sorted(_SD)
    assert warned.messages == []
