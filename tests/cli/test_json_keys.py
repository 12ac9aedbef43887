"""surgery/cli/README.md says what `--json` prints and which exit codes there are: both are held to real commands."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_json, write_sharded
from click.testing import CliRunner
from commands import clean_env, command
from hub import Hub
from runs import training
from safetensors.numpy import load_file, save_file
from studies import make_study

from surgery import exit_codes
from surgery.cli import main
from surgery.study.trial import Status

CARD = (Path(__file__).parents[2] / "surgery/cli/README.md").read_text(encoding="utf-8")
ERROR = "an error, a wrong option, Ctrl-C"
Leaves = Mapping[str, Any]

TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "list of strings": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "list of integers": lambda value: isinstance(value, list) and all(type(item) is int for item in value),
}


# -- what the card says -----------------------------------------------------------------------------------------------


def read_keys(card: str) -> dict[str, dict[str, str]]:
    """Return the type of each key, by the title of its table."""
    parts = re.split(r"(?m)^\*\*(.+)\*\*$", card.partition("\n## Works with")[0])
    tables = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {title: dict(re.findall(r"(?m)^\| `(.+?)` \| (.+?) \|", table)) for title, table in tables.items()}


def read_codes(card: str) -> set[tuple[str, int]]:
    rows = re.findall(r"(?m)^\| (\d+) \| ([\w, ]+) \|", card)
    return {(command, int(code)) for code, commands in rows for command in commands.split(", ")}


KEYS = read_keys(CARD)
CODES = read_codes(CARD)


def leaves(value: Any, known: Leaves, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what an object holds by its documented keys; nothing of what is null or empty in place of an object."""
    inner = [key for key in known if key.startswith((f"{path}.", f"{path}[]."))] if path else list(known)
    if path in known or not inner:
        yield path, value
    elif isinstance(value, dict):
        is_map = any(key.startswith(f"{path}.<name>") for key in inner)
        for key, item in value.items():
            yield from leaves(item, known, f"{path}.{'<name>' if is_map else key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, known, f"{path}[]")
    elif value is not None:
        yield path, value


def test_leaves_of_an_object() -> None:
    known = dict.fromkeys(["a", "b.<name>", "c[].d", "e.f"], "")
    document = {"a": {"x": 1}, "b": {"k": 2, "l": 3}, "c": [{"d": 4}, {"g": 5}], "e": None, "h": []}
    found = [("a", {"x": 1}), ("b.<name>", 2), ("b.<name>", 3), ("c[].d", 4), ("c[].g", 5), ("h", [])]
    assert list(leaves(document, known)) == found


# -- what is printed --------------------------------------------------------------------------------------------------


def surgery(*args: object) -> Any:
    if args[0] == "run":  # it holds the signals of its process, from then on
        done = subprocess.run(command(*args), capture_output=True, text=True, env=clean_env(), timeout=100)
        return SimpleNamespace(exit_code=done.returncode, output=done.stderr)
    return CliRunner().invoke(main, [*map(str, args)])


def printed(*args: object, code: int = 0) -> dict[str, Any]:
    done = surgery(*args, "--json")
    assert done.exit_code == code, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["version"] == exit_codes.JSON_VERSION
    return document


def write_model(folder: Path) -> Path:
    """A checkpoint with everything that a report may name: other dtypes, tied tensors, files that are left out."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((32, 16)).astype(np.float32)
    tensors = {"embed.weight": table, "head.weight": table.copy(), "ids": np.arange(4), "flat.bias": np.ones(8)}
    tensors |= {f"layer.{i}.weight": rng.standard_normal((8, 8)).astype(np.float16) for i in (0, 1)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "bert"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def alter(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["layer.0.weight"] = tensors["layer.0.weight"] * 2
    tensors["layer.1.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source `model`, and what perturb has made of it: `out`, `altered`, and others."""
    folder = tmp_path_factory.mktemp("json")
    model = write_model(folder / "model")
    for name in ("out", "altered"):
        assert surgery("perturb", model, "-o", folder / name).exit_code == 0
    alter(folder / "altered")
    (folder / "altered/config.json").write_text("{}")
    write_sharded(folder / "sharded")
    assert surgery("perturb", folder / "sharded", "-o", folder / "shards").exit_code == 0
    write_json(folder / "quantized/config.json", {"quantization_config": {"quant_method": "gptq"}})
    save_file({"a.weight": np.ones((4, 4), np.float32)}, folder / "quantized/model.safetensors")
    (folder / "quantized/tf_model.h5").touch()
    w = torch.arange(64.0).reshape(8, 8)
    torch.save({"a.weight": w, "b.weight": w}, folder / "tied.bin")
    (folder / "out/notes.txt").write_text("of the user")
    scores = {"plain": [0.5, 0.6, 0.7], "mixout=0.7": [0.6, 0.7, 0.9]}
    make_study(folder / "study", scores, log=lambda trial: f"eval_accuracy={scores[trial.arm.name][trial.seed]}\n")
    make_study(folder / "crashed", {"plain": [0.5, 0.6], "mixout=0.7": [Status.CRASHED]})
    return folder


@pytest.fixture
def hub(in_process: Callable[[Hub], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        in_process(hub)
        monkeypatch.setenv("HF_TOKEN", hub.login("me"))
        yield hub


def perturbed(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    out = ("perturb", folder / "model", "-o", tmp_path / "weak")
    several = printed("perturb", folder / "model", "-o", f"{tmp_path}/{{seed}}", "--seed", "0..1")
    assert several.keys() == {"version", "variants"}
    variants = [{"version": 1} | variant for variant in several["variants"]]
    again = printed("materialize", folder / "out", "-o", tmp_path / "again")
    pushed = printed(*out, "--lam", "1e-6", "--push", "me/weak")
    assert {"version": 1}.keys() | pushed["push"].keys() == {key.partition("[")[0] for key in KEYS["push"]}
    return [again, pushed, *variants]


def in_parts(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    part = ("--array", "0/2", "-o")
    return [
        printed("perturb", folder / "sharded", *part, tmp_path / "first"),
        printed("materialize", folder / "shards", *part, tmp_path / "second"),
    ]


def planned(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    command = ("perturb", folder / "model", "-o", tmp_path / "weak", "--dry-run")
    return [
        printed(*command),
        printed(*command, "--push", "me/weak"),
        printed(*command, "--engine", "ray"),
        printed("perturb", folder / "tied.bin", "--dry-run"),
    ]


def verified(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    return [printed("verify", folder / "out"), printed("verify", folder / "altered", code=1)]


def inspected(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    stats = printed("inspect", folder / "altered", "--stats")
    return [printed("inspect", folder / name) for name in ("out", "quantized", "tied.bin")] + [stats]


def compared(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    model = folder / "model"
    return [printed("diff", model, folder / name) for name in ("out", "altered", "shards", "quantized")]


def pushes(folder: Path, tmp_path: Path) -> list[tuple[object, ...]]:  # noqa: ARG001
    edited = ("push", folder / "out", "me/one", "--collection", "Mine")
    return [("push", folder / "shards", "me/one"), edited, edited, ("push", folder / "out", "me/two", "--create-pr")]


def pushed(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    return [printed(*command) for command in pushes(folder, tmp_path)]


def planned_pushes(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    plans = []
    for words in pushes(folder, tmp_path):
        plans.append(printed(*words, "--dry-run"))
        printed(*words)
    return plans


def studied(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    runs = [f"{folder}/study/trials/{arm}/*/log.txt" for arm in ("plain", "mixout=0.7")]
    return [
        printed("study", folder / "study"),
        printed("study", folder / "crashed", code=1),
        printed("study", "compare", *runs, "--metric", "eval_accuracy", "--failed-below", "0.5"),
    ]


def failed(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    return [printed("inspect", tmp_path / "nowhere", code=1), printed("diff", folder, code=2)]


RUNS: dict[str, Callable[[Path, Path], list[dict[str, Any]]]] = {
    ERROR: failed,
    "perturb, materialize": perturbed,
    "perturb --array, materialize --array": in_parts,
    "perturb --dry-run": planned,
    "verify": verified,
    "inspect": inspected,
    "diff": compared,
    "push": pushed,
    "push --dry-run": planned_pushes,
    "study, study compare": studied,
    "env": lambda *_: [printed("env", "--mixout", "0.7")],
    "doctor": lambda *_: [printed("doctor")],
}


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What doctor says of a GPU is not of this machine."""
    about = SimpleNamespace(name="GPU", total_memory=1 << 30)
    found = {"is_available": lambda: True, "device_count": lambda: 1, "get_device_properties": lambda _: about}
    for name, answer in found.items():
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("title", RUNS)
def test_keys_are_those_of_the_card(title: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if title == "doctor":
        request.getfixturevalue("accelerator")
    known, found = KEYS[title], defaultdict(list)
    for document in RUNS[title](folder, tmp_path):
        for key, value in leaves(document, known):
            found[key].append(value)
    assert found.keys() == known.keys()
    for key, type_ in known.items():
        tests = [TYPES[part] for part in type_.split(" or ")]
        assert all(any(test(value) for test in tests) for value in found[key]), (key, type_, found[key])


def test_every_command_with_json_has_a_table() -> None:
    told = {command.partition(" --")[0] for title in KEYS if title != ERROR for command in title.split(", ")}
    assert told == {name for name, command in main.commands.items() if any(p.name == "as_json" for p in command.params)}
    assert KEYS.keys() == RUNS.keys()


# -- exit codes -------------------------------------------------------------------------------------------------------


def test_exit_codes_are_those_of_the_card() -> None:
    named = {value for name, value in vars(exit_codes).items() if name.isupper() and name != "JSON_VERSION"}
    assert {code for _, code in CODES} == named | {0}
    assert {command for command, _ in CODES} == set(main.commands)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


WORK = {
    "perturb": "surgery.perturb.plan.make_plan",
    "materialize": "surgery.perturb.materialize.plan_materialize",
    "verify": "surgery.perturb.verify.verify_checkpoint",
    "inspect": "surgery.inspect.inspection.inspect_checkpoint",
    "diff": "surgery.inspect.diff.diff_checkpoints",
    "push": "surgery.push.contents.read_contents",
    "env": "surgery.hooks.run.launch.environment_of",
    "doctor": "surgery.report.doctor.rows",
    "study": "surgery.study.collect.collect",
    "study compare": "surgery.study.others.compare_runs",
}
"""Where Ctrl-C comes."""
NOTHING = [sys.executable, "-c", "pass"]
GOOD: dict[str, list[Any]] = {
    "perturb": ["model", "-o", "fresh"],
    "materialize": ["out", "-o", "fresh"],
    "verify": ["shards"],
    "inspect": ["model"],
    "diff": ["model", "out"],
    "push": ["out", "me/one"],
    "env": ["--mixout", "0.7"],
    "doctor": [],
    "run": ["--mixout", "0.7", "--", *training("mixout")],
    "study": ["study"],
    "study compare": ["study/trials/plain/*", "study/trials/mixout=0.7/*", "--metric", "eval_accuracy"],
}
BAD: dict[tuple[str, int], list[Any]] = {
    ("perturb", 1): ["./nowhere", "-o", "fresh"],
    ("materialize", 1): ["./nowhere"],
    ("inspect", 1): ["./nowhere"],
    ("diff", 1): ["model", "./nowhere"],
    ("push", 1): ["model", "me/one"],
    ("study", 1): ["crashed"],
    ("study compare", 1): ["none/*", "study/trials/*/*", "--metric", "eval_accuracy"],
    ("verify", 1): ["altered"],
    ("verify", 4): ["./nowhere"],
    ("run", 3): ["--mixout", "0.7", "--", *NOTHING],
}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("name", "code"), sorted(CODES))
def test_command_exits_so(name: str, code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for made in ("model", "out", "altered", "shards", "study", "crashed"):
        (tmp_path / made).symlink_to(folder / made)
    if code == exit_codes.INTERRUPTED:
        monkeypatch.setattr(WORK[name], interrupt)
    args = ["--nope", *GOOD[name]] if code == exit_codes.USAGE else BAD.get((name, code), GOOD[name])
    done = surgery(*name.split(), *args, *([] if name == "run" else ["--json"]))
    assert done.exit_code == code, done.output
    if name != "run":
        is_answer = code == 0 or (name, code) in (("verify", exit_codes.DIFFERS), ("study", exit_codes.FAILED))
        assert ("error" in json.loads(done.stdout)) is not is_answer


@pytest.mark.parametrize("name", ["env", "run"])
def test_errors_of_their_own_are_2(name: str) -> None:
    command = ["--", *NOTHING] if name == "run" else []
    assert surgery(name, "--mixout", "7", *command).exit_code == exit_codes.USAGE


def test_any_other_code_of_run_is_the_commands() -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    assert surgery("run", "--mixout", "0.7", "--", *command).exit_code == 7
