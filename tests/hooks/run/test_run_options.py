"""What `surgery run` is asked for: checked, and carried to every process by variables."""

import math
import subprocess
import sys

import pytest

from surgery import Anchor, Mixout, RDrop, RecAdam
from surgery.errors import SettingError
from surgery.hooks.run.folder import RUN_DIR
from surgery.hooks.run.launch import environment_of
from surgery.hooks.run.options import make_options, read_options

EVERYTHING = make_options(
    noisytune=0.15,
    mixout=0.7,
    rdrop=1.0,
    anchor=1e-05,
    rdrop_every=3,
    mixout_granularity="element",
    noise_seed=2**64 - 1,
    include=("*.layer.*", 'it\'s a "glob"', "Bert*"),
    exclude=("**.bias",),
    w_pre="original",
    report="/tmp/a report.json",
    allow_inactive=True,
)


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        make_options(mixout=0.7),
        make_options(mixout=0.0, rdrop=0.0, anchor=0.0),
        make_options(noisytune=0.1, noise_seed=3),
        make_options(rdrop=1.0, allow_inactive=True),
        make_options(recadam=5000.0, recadam_k=0.25, recadam_t0=100.0, mixout=0.5),
        make_options(mixout=0.1 + 0.2, include=("",)),
    ],
    ids=["all", "one", "zeros", "seed-0", "flag", "recadam", "digits"],
)
def test_options_survive_the_environment(options):
    assert read_options(options.variables) == options


def test_options_survive_a_shell():
    names = " ".join(f'"${name}"' for name in EVERYTHING.variables)
    shell = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {names}"], env=EVERYTHING.variables, capture_output=True, text=True, check=True
    )
    assert read_options(dict(zip(EVERYTHING.variables, shell.stdout.split("\0")[:-1], strict=True))) == EVERYTHING


def test_options_are_written_as_plain_text():
    assert make_options(mixout=0.7, noise_seed=None, allow_inactive=True, include=("a", "b c")).variables == {
        "SURGERY_MIXOUT": "0.7",
        "SURGERY_INCLUDE": "a 'b c'",
        "SURGERY_ALLOW_INACTIVE": "1",
    }


def test_seed_is_the_former_name_of_the_noise_seed(caplog):
    read = read_options({"SURGERY_NOISYTUNE": "0.1", "SURGERY_SEED": "7"})
    assert read == make_options(noisytune=0.1, noise_seed=7)
    assert "are --noise-seed and SURGERY_NOISE_SEED now" in caplog.text


def test_noise_seed_is_accepted_without_noise():
    assert make_options(mixout=0.7, noise_seed=7).methods == (Mixout(0.7),)


def test_no_variables_are_no_options():
    assert read_options({}) is None
    assert read_options({"PATH": "/bin", RUN_DIR: "/tmp", "SURGERY_MIXOUT": ""}) is None


def test_flags_win_over_variables():
    variables = {"SURGERY_MIXOUT": "0.7", "SURGERY_RDROP": "1", "SURGERY_INCLUDE": "a b"}
    flags = {"mixout": 0.0, "rdrop": None, "include": ("c",), "exclude": (), "allow_inactive": False}
    assert read_options(variables, flags) == make_options(mixout=0.0, rdrop=1.0, include=("c",))


def test_options_make_the_settings_of_patch_model():
    assert EVERYTHING.methods == (Mixout(0.7, "element"), RDrop(1.0, 3), Anchor(1e-05))
    assert make_options(noisytune=0.15).methods == ()
    assert make_options(mixout=0.9).methods == (Mixout(0.9),)
    assert make_options(rdrop=0.5).methods == (RDrop(0.5),)
    assert make_options(recadam=100.0, recadam_k=0.1, recadam_t0=20.0).methods == (RecAdam(100.0, 0.1, 20),)


def test_asked_names_what_is_asked_for():
    assert EVERYTHING.asked == ("noisytune", "mixout", "rdrop", "anchor")
    assert make_options(rdrop=0.0).asked == ("rdrop",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {},
            "regularizer: expected noisytune, mixout, rdrop, anchor or recadam, got none. Give one, such as "
            "--mixout 0.7.",
        ),
        (
            {"noisytune": 0.0},
            "noisytune: expected a lam above 0, up to 1, got 0. The paper uses 0.1 to 0.15.",
        ),
        ({"noisytune": math.nan}, "noisytune: expected a lam above 0, up to 1, got nan. The paper uses 0.1 to 0.15."),
        ({"noisytune": 1.5}, "noisytune: expected a lam above 0, up to 1, got 1.5. The paper uses 0.1 to 0.15."),
        ({"mixout": 1.5}, "mixout: expected a probability p in [0, 1], got 1.5. Give one such as 0.7."),
        ({"mixout": math.nan}, "mixout: expected a probability p in [0, 1], got nan. Give one such as 0.7."),
        ({"rdrop": -1.0}, "rdrop: expected an alpha of at least 0, got -1.0. Give one such as 1.0."),
        ({"anchor": math.inf}, "anchor: expected a weight of at least 0, got inf. Give one such as 0.01."),
        (
            {"rdrop": 1.0, "rdrop_every": 0},
            "every: expected a whole number of at least 1, got 0. Give one such as 1.",
        ),
        (
            {"mixout": 0.7, "mixout_granularity": "row"},
            "granularity: expected neuron or element, got 'row'. Choose one of them.",
        ),
        (
            {"noisytune": 0.1, "noise_seed": -1},
            "noise_seed: expected an integer from 0 to 2^64 - 1, got -1. Choose another.",
        ),
        (
            {"noisytune": 0.1, "noise_seed": 2**64},
            "noise_seed: expected an integer from 0 to 2^64 - 1, got 18446744073709551616. Choose another.",
        ),
        (
            {"noisytune": 0.1, "mixout": 0.7, "w_pre": "new"},
            "w_pre: expected perturbed or original, got 'new'. Choose one of them.",
        ),
        (
            {"mixout": 0.7, "rdrop_every": 2},
            "rdrop_every: expected rdrop with it, got none. Add it, or leave rdrop_every out.",
        ),
        (
            {"rdrop": 1.0, "mixout_granularity": "neuron"},
            "mixout_granularity: expected mixout with it, got none. Add it, or leave mixout_granularity out.",
        ),
        (
            {"noisytune": 0.1, "w_pre": "original"},
            "w_pre: expected noisytune and mixout with it, got none. Add it, or leave w_pre out.",
        ),
        (
            {"recadam": 1.0, "anchor": 0.1},
            "recadam: expected no anchor beside it, got both, which pull to the same place. Leave one of them out.",
        ),
        (
            {"mixout": 0.7, "recadam_t0": 9.0},
            "recadam_t0: expected recadam with it, got none. Add it, or leave recadam_t0 out.",
        ),
        (
            {"anchor": 0.1, "w_pre": "original"},
            "w_pre: expected noisytune and anchor with it, got none. Add it, or leave w_pre out.",
        ),
    ],
)
def test_options_refuse(values, message):
    with pytest.raises(SettingError) as raised:
        make_options(**values)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXOUT", "much", "SURGERY_MIXOUT: expected a number, got 'much'. Correct it."),
        ("NOISYTUNE", "nan", "SURGERY_NOISYTUNE: expected a number, got 'nan'. Correct it."),
        ("RDROP_EVERY", "1.5", "SURGERY_RDROP_EVERY: expected a whole number, got '1.5'. Correct it."),
        ("SEED", "x", "SURGERY_SEED: expected a whole number, got 'x'. Correct it."),
        ("ALLOW_INACTIVE", "yes", "SURGERY_ALLOW_INACTIVE: expected 1 or 0, got 'yes'. Choose one of them."),
        ("INCLUDE", "'a", 'SURGERY_INCLUDE: expected globs with spaces between, got "\'a". Mend the quotes.'),
        (
            "MIXUP",
            "0.7",
            "SURGERY_MIXUP: expected one of SURGERY_NOISYTUNE, SURGERY_MIXOUT, SURGERY_RDROP, SURGERY_ANCHOR, "
            "SURGERY_RECADAM, SURGERY_MIXOUT_GRANULARITY, SURGERY_RDROP_EVERY, SURGERY_RECADAM_K, SURGERY_RECADAM_T0, "
            "SURGERY_NOISE_SEED, SURGERY_SEED, SURGERY_INCLUDE, SURGERY_EXCLUDE, SURGERY_W_PRE, SURGERY_REPORT, "
            "SURGERY_ALLOW_INACTIVE, SURGERY_DEBUG, got an unknown variable. Correct its name.",
        ),
    ],
)
def test_variables_are_refused(name, value, message):
    with pytest.raises(SettingError) as raised:
        read_options({"SURGERY_MIXOUT": "0.7", f"SURGERY_{name}": value})
    assert str(raised.value) == message


KUBERNETES = {
    "SURGERY_SERVICE_HOST": "10.0.0.11",
    "SURGERY_SERVICE_PORT": "80",
    "SURGERY_SERVICE_PORT_HTTP": "80",
    "SURGERY_PORT": "tcp://10.0.0.11:80",
    "SURGERY_PORT_80_TCP": "tcp://10.0.0.11:80",
    "SURGERY_PORT_80_TCP_PROTO": "tcp",
    "SURGERY_WARD_PORT_80_TCP_ADDR": "10.0.0.11",
}


def test_variables_of_a_service_of_kubernetes_are_left_alone():
    assert read_options(KUBERNETES) is None
    assert read_options(KUBERNETES | {"SURGERY_MIXOUT": "0.7"}) == make_options(mixout=0.7)
    left = environment_of(make_options(mixout=0.7), KUBERNETES | {"SURGERY_RDROP": "1"})
    assert KUBERNETES.items() <= left.items()
    assert "SURGERY_RDROP" not in left


def test_reading_options_takes_nothing_heavy(tmp_path):
    code = (
        "import sys, surgery.hooks.run.options\nprint({'torch', 'numpy', 'transformers', 'click'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
