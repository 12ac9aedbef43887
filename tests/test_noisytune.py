"""Settings, decisions and statistics of NoisyTune."""

import numpy as np
import pytest

from surgery.checkpoint.roles import find_roles
from surgery.errors import SettingError, SourceError
from surgery.globs import matches
from surgery.noisytune import Moments, NoisyTune, merge_blocks, merge_effect, pool
from surgery.roles import BUFFER, CLASS, NAME, Role, role_of_reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -0.1}, "lam: expected a number from 0 to 1, got -0.1. The paper uses 0.1 to 0.15."),
        ({"lam": float("nan")}, "lam: expected a number from 0 to 1, got nan. The paper uses 0.1 to 0.15."),
        ({"lam": 1.01}, "lam: expected a number from 0 to 1, got 1.01. The paper uses 0.1 to 0.15."),
        ({"seed": -1}, "seed: expected an integer from 0 to 2^64 - 1, got -1. Choose another."),
        ({"seed": 2**64}, f"seed: expected an integer from 0 to 2^64 - 1, got {2**64}. Choose another."),
        ({"noise": "laplace"}, "noise: expected uniform or normal, got 'laplace'. Choose one of them."),
        ({"scale": "layer"}, "scale: expected matrix or global, got 'layer'. Choose one of them."),
        ({"rounding": "up"}, "rounding: expected nearest or stochastic, got 'up'. Choose one of them."),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_settings_refuse_bad_values(settings, message):
    with pytest.raises(SettingError) as caught:
        NoisyTune(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "reason"),
    [
        ("encoder.weight", "F32", (4, 4), None),
        ("encoder.weight", "BF16", (4, 4), None),
        ("norm.bias", "F16", (4,), None),
        ("position_ids", "I64", (1, 512), "I64, not floating point"),
        ("mask", "BOOL", (4,), "BOOL, not floating point"),
        ("bn.running_mean", "F32", (4,), "a buffer, not a parameter"),
        ("rotary_emb.inv_freq", "F32", (4,), "a buffer, not a parameter"),
        ("h.0.attn.bias", "F32", (1, 1, 8, 8), "a buffer, not a parameter: a causal mask"),
        ("h.0.attn.bias", "F32", (8,), None),
        ("mlp.gate.e_score_correction_bias", "F32", (8,), "a buffer, not a parameter"),
        ("empty", "F32", (0, 4), "empty"),
        ("logit_scale", "F32", (), "one element, no spread"),
        ("one", "F32", (1, 1), "one element, no spread"),
    ],
    ids=lambda value: str(value),
)
def test_reason_to_copy(name, dtype, shape, reason):
    assert NoisyTune().reason_to_copy(name, dtype, shape, find_roles({name: shape})[name]) == reason


def test_reason_to_copy_follows_the_globs():
    settings = NoisyTune(include=("encoder.**",), exclude=("**.bias",))
    assert settings.reason_to_copy("encoder.0.weight", "F32", (4,)) is None
    assert settings.reason_to_copy("encoder.0.bias", "F32", (4,)) == "in --exclude"
    assert settings.reason_to_copy("decoder.weight", "F32", (4,)) == "not in --include"


@pytest.mark.parametrize(
    ("include", "is_buffer"),
    [
        ((), True),
        (("**",), True),
        (("**.bias",), True),
        (("h.**",), True),
        (("h.0.attn.*",), True),
        (("h.*.attn.bias",), False),
        (("h.0.attn.bias",), False),
        (("**", "h.0.attn.bias"), False),
        (("h.1.attn.bias",), True),
    ],
    ids=str,
)
def test_include_overrules_where_it_names_the_buffer(include, is_buffer):
    assert NoisyTune(include=include).overrule("h.0.attn.bias", Role(True, NAME)) == Role(is_buffer, NAME)


@pytest.mark.parametrize("role", [Role(True, NAME), Role(True, CLASS, "a mask"), Role(True, None), Role(False, None)])
def test_role_is_read_from_the_reason_in_a_recipe(role):
    assert role_of_reason(role.reason, role.known) == role
    assert role_of_reason("in --exclude", role.known) == Role(False, role.known)
    assert role_of_reason(f"{BUFFER}s", role.known) == Role(False, role.known)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_glob_that_matches_nothing_is_refused(option):
    with pytest.raises(
        SettingError, match=rf"`{option}` '\*bias': expected a glob that matches a tensor, got none of 2"
    ):
        NoisyTune(**{option: ("*bias",)}).check_globs(["a.bias", "a.weight"])


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("**", "a.b.c", True),
        ("*", "a", True),
        ("*", "a.b", False),
        ("*.weight", "a.weight", True),
        ("*.weight", "a.b.weight", False),
        ("**.weight", "weight", True),
        ("**.weight", "a.b.weight", True),
        ("**.weight", "a.b.weights", False),
        ("encoder.**", "encoder.0.weight", True),
        ("encoder.**", "encoder", True),
        ("encoder.**", "encoders.0", False),
        ("a.**.c", "a.c", True),
        ("a.**.c", "a.b.b.c", True),
        ("layer.[0-3].w", "layer.2.w", True),
        ("layer.[!0-3].w", "layer.2.w", False),
        ("layer.?.w", "layer.12.w", False),
        ("a+b.(c)", "a+b.(c)", True),
        ("**norm**", "model.layers.0.input_layernorm.weight", True),
        ("A", "a", False),
    ],
)
def test_glob_matches(glob, name, expected):
    assert matches(glob, name) is expected


def test_pool_equals_the_moments_of_all_elements():
    rng = np.random.default_rng(0)
    parts = [rng.normal(m, s, n) for m, s, n in ((0, 1, 100), (5, 0.1, 7), (-2, 3, 1000))]
    moments = [Moments(x.size, float(x.mean()), float(((x - x.mean()) ** 2).sum())) for x in parts]
    whole = np.concatenate(parts)
    pooled = pool(moments)
    assert pooled.n == whole.size
    assert pooled.mean == pytest.approx(whole.mean(), rel=1e-13)
    assert pooled.std == pytest.approx(whole.std(ddof=1), rel=1e-13)
    assert pool(moments[::-1]) == pooled


def test_merge_blocks_refuses_what_is_not_finite():
    with pytest.raises(SourceError, match=r"^m\.safetensors: 'w': expected finite values, got NaN, Inf or values"):
        merge_blocks(np.array([[1.0, np.nan]]), 5, 0.0, what="m.safetensors: 'w'")


def test_merge_blocks_gives_no_spread_for_equal_elements():
    assert merge_blocks(np.zeros((3, 2)), 9000, 0.7, what="w").std == 0


def test_merge_effect_refuses_overflow():
    with pytest.raises(
        SourceError, match=r"^f: 'w': expected perturbed values that fit its dtype, got some that overflow"
    ):
        merge_effect(np.array([[1.0, 1.0, 1.0, 1.0]]), 4096, 1.0, what="f: 'w'")
