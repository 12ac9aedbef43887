"""Arms, sweeps and the command's template: what is made of what the user wrote, and what is refused."""

from pathlib import Path

import pytest

from surgery.errors import SettingError
from surgery.study.arms import make_arms
from surgery.study.template import make_template


def names(arms: list[str], sweeps: list[str] = []) -> list[str]:  # noqa: B006
    return [arm.name for arm in make_arms(arms, sweeps)]


def test_plain_comes_first_and_names_are_the_users() -> None:
    assert names(["mixout=0.7", "  rdrop=1   mixout=0.70 "]) == ["plain", "mixout=0.7", "rdrop=1 mixout=0.70"]


def test_sweep_makes_an_arm_of_each_value_and_product() -> None:
    arms = make_arms([], ["noisytune=0.05,0.1", "rdrop=1,2 rdrop-every=1,5"])
    assert [arm.name for arm in arms[1:]] == [
        "noisytune=0.05",
        "noisytune=0.1",
        "rdrop=1 rdrop-every=1",
        "rdrop=1 rdrop-every=5",
        "rdrop=2 rdrop-every=1",
        "rdrop=2 rdrop-every=5",
    ]
    assert arms[4].swept == {"rdrop": "1", "rdrop-every": "5"}
    assert arms[0].swept == {}


def test_flags_are_those_of_surgery_run_and_noise_follows_the_seed() -> None:
    _, both, own, mixed = make_arms(
        ["noisytune=0.15 mixout=0.7", "noisytune=0.15 noise-seed=7", "rdrop-every=2 rdrop=1"], []
    )
    assert both.flags(3) == ["--noisytune", "0.15", "--mixout", "0.7", "--noise-seed", "3"]
    assert own.flags(3) == ["--noisytune", "0.15", "--noise-seed", "7"]
    assert mixed.flags(3) == ["--rdrop-every", "2", "--rdrop", "1"]


def test_globs_with_spaces_and_several_of_them() -> None:
    _, arm = make_arms(["mixout=0.7 'include=a b' include=c.*"], [])
    assert arm.options is not None
    assert arm.options.include == ("a", "b", "c.*")
    assert arm.flags(0) == ["--mixout", "0.7", "--include", "a b", "--include", "c.*"]


@pytest.mark.parametrize(
    ("arms", "sweeps", "message"),
    [
        ([], [], 'arm: expected one to compare with plain, got none. Add one, such as --arm "mixout=0.7".'),
        ([" "], [], 'arm: expected flags such as "mixout=0.7", got nothing. The arm `plain` is always there.'),
        (["mixout"], [], "arm 'mixout': expected name=value, such as mixout=0.7, got 'mixout'. Correct it."),
        (["mixout=2"], [], "arm 'mixout=2': mixout: expected a probability p in [0, 1], got 2.0."),
        (["mixout=x"], [], "arm 'mixout=x': mixout: expected a number, got 'x'. Correct it."),
        (["mixout=0.7 mixout=0.8"], [], "arm 'mixout=0.7 mixout=0.8': expected mixout once, got it twice."),
        (["rdrop-every=2"], [], "arm 'rdrop-every=2': rdrop_every: expected rdrop with it, got none."),
        (["mixout=0.7 report=x"], [], "arm 'mixout=0.7 report=x': expected no report in an arm, got one"),
        (["mixout=0.7 'x"], [], "expected name=value, got No closing quotation. Mend the quotes."),
        (["rdrop=1 mixout=0.7", "mixout=.70 rdrop=1.0"], [],
         "arm: expected each arm once, got 'rdrop=1 mixout=0.7' and 'mixout=.70 rdrop=1.0'. Leave one of them out."),
        (["noisytune=0.1"], ["noisytune=0.1,0.2"], "arm: expected each arm once, got 'noisytune=0.1' and"),
        ([], ["noisytune"], "sweep 'noisytune': expected name=value,value,..., got something else. Correct it."),
        ([], ["noisytune=0.1,,0.2"], "sweep 'noisytune=0.1,,0.2': expected name=value,value,..., got something else."),
        ([], ["rdrop=1,2 rdrop=3"], "sweep 'rdrop=1,2 rdrop=3': expected each name once, got one twice."),
        (["plain"], [], "arm 'plain': expected name=value"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_arm_that_cannot_be_is_refused(arms: list[str], sweeps: list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        make_arms(arms, sweeps)
    assert message in str(caught.value)


def test_unknown_flag_names_the_known_ones() -> None:
    with pytest.raises(SettingError) as caught:
        make_arms(["mixuot=0.7"], [])
    assert str(caught.value).startswith("arm 'mixuot=0.7': expected flags of `surgery run` (noisytune, mixout, rdrop, ")
    assert str(caught.value).endswith("got 'mixuot'. Correct it.")


def test_folders_are_legible_safe_and_apart() -> None:
    arms = make_arms(
        ["rdrop=1 mixout=0.7", "mixout=0.7 include=a/b", "mixout=0.7 include=a_b", f"mixout=0.7 include={'x' * 300}"],
        [],
    )
    folders = [arm.folder for arm in arms]
    assert folders[:2] == ["plain", "rdrop=1+mixout=0.7"]
    assert len(set(folders)) == len(folders)
    assert all("/" not in folder and len(folder) < 130 for folder in folders)


def test_template_fills_only_seed_and_out() -> None:
    template = make_template(["python", "-c", "{seed} {x} {{out}}", "--o={out}/a"], ["S={seed}", "A=b=c"])
    filled = template.fill(7, Path("/t"))
    assert filled.words == ("python", "-c", "7 {x} {/t}", "--o=/t/a")
    assert filled.variables == {"S": "7", "A": "b=c"}


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        ([], [], "command: expected one, got none. Write it after --"),
        (["python", "train.py"], [], "command: expected {seed} where the script takes its seed, got none."),
        (["python", "{seed}"], ["X"], "--env: expected NAME=VALUE, got 'X'. Correct it."),
        (["python", "{seed}"], ["=1"], "--env: expected NAME=VALUE, got '=1'. Correct it."),
    ],
    ids=["none", "no seed", "no value", "no name"],
)
def test_template_that_cannot_be_is_refused(command: list[str], variables: list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        make_template(command, variables)
    assert message in str(caught.value)


def test_seed_may_be_in_a_variable_alone() -> None:
    assert make_template(["python", "train.py"], ["SEED={seed}"]).fill(2, Path("o")).variables == {"SEED": "2"}
