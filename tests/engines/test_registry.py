"""Engines that are asked for and cannot be had are one clear line."""

import sys

import pytest

from surgery.engines.local import LocalEngine
from surgery.engines.registry import ENGINES, open_engine
from surgery.errors import SettingError

_STUDY = ("study", "-o", "study", "--seeds", "2", "--metric", "score", "--arm", "mixout=0.7")
_COMMAND = ("--", "true", "{seed}")


def refusal(tmp_path, name, **settings):
    with pytest.raises(SettingError) as refused:
        open_engine(name, logs=tmp_path / "logs", **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def no_package(monkeypatch):
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)


def test_local_is_the_default(tmp_path):
    assert isinstance(open_engine(logs=tmp_path), LocalEngine)


def test_an_unknown_engine_is_refused(tmp_path):
    assert refusal(tmp_path, "pbs") == "--engine: expected local, ray, slurm, got 'pbs'. Choose one of them."


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(("name", "package"), [("ray", "Ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_names_its_extra(tmp_path, name, package):
    assert refusal(tmp_path, name) == (
        f"--engine {name}: expected {package} to be installed, got none. Install it: pip install "
        f"'model-surgery[{name}]'."
    )


def test_jobs_at_once_are_refused_by_ray(tmp_path):
    assert refusal(tmp_path, "ray", jobs=2) == (
        "--jobs: expected it with --engine local or slurm, got --engine ray, which runs as many at once as the cluster "
        "has room for. Say what each needs with --cpus and --gpus."
    )


def test_the_command_takes_an_engine_and_refuses_it_in_one_line(run_here, tmp_path):
    ran = run_here(*_STUDY, "--engine", "ray", "--jobs", "2", *_COMMAND)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: --jobs: expected it with --engine local or slurm, got --engine ray")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_perturb_refuses_an_engine_that_is_not_installed_before_it_writes(run_here, source, tmp_path, name):
    ran = run_here("perturb", source, "-o", "out", "--engine", name)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.endswith(f"Install it: pip install 'model-surgery[{name}]'.\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [_STUDY, ("perturb", "a"), ("materialize", "a"), ("verify", "a")], ids=lambda c: c[0]
)
def test_the_command_names_the_engines(run_here, command):
    ran = run_here(*command, "--engine", "pbs", *(_COMMAND if command is _STUDY else ()))
    assert ran.code == 2
    assert all(f"'{name}'" in ran.err for name in ENGINES)
