"""What is in a PyTorch file beside its tensors: one state_dict is found, several are listed."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_digest, write_weights
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

from surgery.checkpoint import state_dicts  # noqa: E402
from surgery.checkpoint.pickles import PickleFile  # noqa: E402
from surgery.cli import main  # noqa: E402
from surgery.errors import OutputError, SettingError, SourceError  # noqa: E402
from surgery.inspect.comparison import EQUAL  # noqa: E402
from surgery.inspect.diff import diff_checkpoints  # noqa: E402
from surgery.inspect.inspection import inspect_checkpoint  # noqa: E402
from surgery.perturb import complete  # noqa: E402
from surgery.perturb.execute import perturb_checkpoint  # noqa: E402
from surgery.recipe import Recipe  # noqa: E402

_SD = {"conv.weight": torch.arange(8.0).reshape(2, 4), "conv.bias": torch.ones(2)}
_EMA = {name: tensor + 1 for name, tensor in _SD.items()}
_OTHER = {"head.weight": torch.ones(3)}
_OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
_SAVE = "Choose one with `key`, or save it by itself with torch.save."


def _open(content: Any, tmp_path: Path, key: str | None = None) -> PickleFile:
    torch.save(content, tmp_path / "x.pt")
    return PickleFile(tmp_path / "x.pt", label="x", key=key)


def _names(content: Any, tmp_path: Path) -> list[str]:
    file = _open(content, tmp_path)
    file.close()
    return [tensor.name for tensor in file.header.tensors]


def _refused(content: Any, tmp_path: Path, key: str | None = None) -> str:
    with pytest.raises(SourceError) as error:
        _open(content, tmp_path, key)
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


# -- one of several, by its name --------------------------------------------------------------------------------------

_SEVERAL = {
    "of two alike": ({"params": _SD, "params_ema": _EMA}, "params_ema", "'params'"),
    "beside a known one": ({"model": _SD, "ema": _EMA}, "ema", "'model'"),
    "the known one": ({"model": _SD, "ema": _EMA}, "model", "'ema'"),
    "with its own nest": ({"model": _SD, "ema": {"shadow": _EMA, "decay": 0.9}}, "ema", "'model'"),
    "one level down": ({"state_dict": {"student": _SD, "teacher": _EMA}, "epoch": 3}, "teacher", "'student'"),
    "below one of several": ({"g": _OTHER, "d": {"net": _EMA, "head": _OTHER}}, "net", "'head'"),
    "tensors beside it": ({**_OTHER, "net": _EMA}, "net", "'head.weight'"),
    "like training state": ({"model": _SD, "random": _EMA, "optimizer": _EMA}, "optimizer", "'model', 'random'"),
    "nearest of its name": ({"ema": _EMA, "model": {"ema": _OTHER, **_SD}}, "ema", "'model'"),
}


@pytest.mark.parametrize(("content", "key", "left_out"), _SEVERAL.values(), ids=_SEVERAL)
def test_key_takes_one_of_several(
    content: Any, key: str, left_out: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    file = _open(content, tmp_path, key)
    wanted = _SD if key == "model" else _EMA
    for tensor in file.header.tensors:
        buffer = bytearray(tensor.nbytes)
        file.read_into(tensor, 0, memoryview(buffer))
        assert buffer == wanted[tensor.name].numpy().tobytes()
    assert sorted(tensor.name for tensor in file.header.tensors) == sorted(wanted)
    assert f"x: took the state_dict {key!r}, and left out what is beside it: {left_out}" in warned.messages


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": _SD, "ema": _EMA}, "emma", "expected a state_dict 'emma', got 'model', 'ema'. Choose one of them"),
        (
            {"model": {"student": _SD, "teacher": _EMA}, "optimizer": _OPTIMIZER},
            "ema",
            "expected a state_dict 'ema', got 'model', 'optimizer', 'student', 'teacher'. Choose one of them",
        ),
        (_SD, "conv.weight", "expected a state_dict 'conv.weight', got no names of any. Leave `key` out."),
        ([_SD], "0", "expected a state_dict '0', got no names of any. Leave `key` out."),
        ({"model": _SD, "note": "x"}, "note", "expected a state_dict 'note', got 'model'. Choose one of them"),
        (
            {"g": {"ema": _SD}, "d": {"ema": _EMA}},
            "ema",
            "expected one state_dict 'ema', got one in each of 'g', 'd'. "
            "Save the one to take by itself with torch.save.",
        ),
    ],
    ids=["mistaken", "deep", "a tensor's", "a list", "no tensors", "twice"],
)
def test_key_that_is_not_there(content: Any, key: str, message: str, tmp_path: Path) -> None:
    message += " with `key`." if message.endswith("them") else ""
    assert _refused(content, tmp_path, key) == f"x: {message}"


def test_key_in_a_pickle_that_holds_itself_many_times(tmp_path: Path) -> None:
    loaded: dict[str, Any] = {"w": torch.ones(2)}
    loaded |= {f"n{i}": loaded for i in range(40)}
    assert _refused(loaded, tmp_path, "ema").startswith("x: expected a state_dict 'ema', got 'n0', 'n1', ")


def _surgery(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.fixture
def several(tmp_path: Path) -> Path:
    torch.save({"params": _SD, "params_ema": _EMA}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_key_in_the_command_verify_and_materialize(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = _surgery("perturb", "x.pth", "-o", "out")
    assert (refused.exit_code, refused.stderr) == (
        1,
        f"error: {several}: expected one state_dict, got 2: 'params', 'params_ema'. Choose one with --key, or save it "
        "by itself with torch.save.\n",
    )
    assert _surgery("perturb", "x.pth", "--key", "params_ema", "-o", "out", "--exclude", "conv.bias").exit_code == 0
    assert warned.messages == [f"{several}: took the state_dict 'params_ema', and left out what is beside it: 'params'"]
    assert load_file(tmp_path / "out/model.safetensors")["conv.bias"].tolist() == [2.0, 2.0]
    assert " --key params_ema --exclude conv.bias  #" in (tmp_path / "out/README.md").read_text()
    assert "\n- key: `params_ema`\n" in (tmp_path / "out/README.md").read_text()
    assert _surgery("verify", "out").exit_code == 0
    assert _surgery("materialize", "out", "-o", "again").exit_code == 0
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")


def test_key_is_recorded_only_when_given(several: Path, tmp_path: Path) -> None:
    perturb_checkpoint(several, tmp_path / "out", key="params")
    text = (tmp_path / "out/surgery.json").read_text()
    assert '"key": "params"' in text
    assert Recipe.from_json(text).key == "params"
    torch.save(_SD, several)
    perturb_checkpoint(several, tmp_path / "plain")
    text = (tmp_path / "plain/surgery.json").read_text()
    assert '"key"' not in text
    assert Recipe.from_json(text).key is None


def test_another_key_is_another_run(several: Path, tmp_path: Path) -> None:
    one = perturb_checkpoint(several, tmp_path / "out", key="params")
    assert perturb_checkpoint(several, tmp_path / "out", key="params") == one
    with pytest.raises(OutputError, match="expected a new or empty folder"):
        perturb_checkpoint(several, tmp_path / "out", key="params_ema")


def test_run_of_another_key_is_not_resumed(several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(complete, "_write_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            perturb_checkpoint(several, tmp_path / "out", key="params")
    with pytest.raises(OutputError, match=r"Finish it with `surgery perturb \S+ --lam 0.15 --seed 0 --key params -o "):
        perturb_checkpoint(several, tmp_path / "out", key="params_ema")
    assert perturb_checkpoint(several, tmp_path / "out", key="params").key == "params"


def test_key_for_safetensors_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "source/model.safetensors")
    for call in (inspect_checkpoint, perturb_checkpoint):
        with pytest.raises(SettingError) as error:
            call(tmp_path / "source", key="ema")
        expected = f"`key`: expected PyTorch files with it, got the safetensors of {tmp_path}/source. Leave it out."
        assert str(error.value) == expected


def test_inspect_takes_a_key(several: Path) -> None:
    ran = _surgery("inspect", str(several), "--key", "params_ema", "--stats", "--json")
    tensors = {tensor["name"]: tensor for tensor in json.loads(ran.stdout)["tensors"]}
    assert tensors["conv.bias"]["stats"]["max"] == 2.0
    assert sorted(info.name for info in inspect_checkpoint(several, key="params").tensors) == sorted(_SD)


def test_diff_takes_the_state_dict_that_the_other_side_was_made_from(several: Path, tmp_path: Path) -> None:
    perturb_checkpoint(several, tmp_path / "out", key="params_ema", lam=0)
    for sides in ((several, tmp_path / "out"), (tmp_path / "out", several)):
        comparison = diff_checkpoints(*sides)
        assert {tensor.name: tensor.kind for tensor in comparison.tensors} == dict.fromkeys(_SD, EQUAL)
    torch.save({"params": _SD, "params_ema": _SD}, several)
    with pytest.raises(SourceError, match="expected one state_dict, got 2"):
        diff_checkpoints(several, tmp_path / "out")
