"""`surgery study` as people use it: real processes, resumed after every way to end, and everything it must not hide."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_digest
from commands import Ran, clean_env, command

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRAIN = (sys.executable, SCRIPTS / "scored.py", "--seed", "{seed}", "--out", "{out}")
ASKED = ("study", "-o", "study", "--metric", "eval_accuracy")
Run = Callable[..., Ran]

QUICK = """
import json, os, sys
seed, out = int(sys.argv[1]), sys.argv[2]
open("started.txt", "a").write(f"{seed}\\n")
open(f"{out}/env.json", "w").write(json.dumps(dict(os.environ)))
if os.path.exists(f"fail-{seed}"):
    sys.exit(f"seed {seed} went wrong")
if not os.path.exists(f"mute-{seed}"):
    print(f"eval_accuracy={0.5 + seed / 100}")
"""


@pytest.fixture
def quick(tmp_path: Path) -> tuple[object, ...]:
    """A command without torch: under an arm it has no effect."""
    (tmp_path / "quick.py").write_text(QUICK)
    return (sys.executable, "quick.py", "{seed}", "{out}")


def trials(root: Path) -> dict[tuple[str, int], dict[str, str]]:
    with (root / "study/trials.csv").open(newline="") as file:
        return {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}


def scores(root: Path) -> dict[tuple[str, int], str]:
    return {key: row["metric"] for key, row in trials(root).items()}


# -- a whole study ----------------------------------------------------------------------------------------------------


def test_study_runs_every_arm_and_seed_and_says_what_came_of_it(run_cli: Run, tmp_path: Path) -> None:
    arms = ("--arm", "mixout=0.9", "--sweep", "noisytune=0.3 rdrop=1,2")
    ran = run_cli(*ASKED, "--seeds", 2, "--jobs", 2, *arms, "--", *TRAIN)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("eval_accuracy, more is better\n\narm ")
    assert "mixout=0.9: cannot tell: 2 seeds in common with plain, 3 at least\n" in ran.out
    assert re.search(r"^plain, seed 0: eval_accuracy 0\.\d+, \d+ s \(\d of 8.*\)$", ran.err, re.MULTILINE)

    names = ["plain", "mixout=0.9", "noisytune=0.3 rdrop=1", "noisytune=0.3 rdrop=2"]
    assert list(trials(tmp_path)) == [(name, seed) for name in names for seed in (0, 1)]
    assert all(row["status"] == "done" and row["file"] == "out/all_results.json" for row in trials(tmp_path).values())
    for (name, seed), row in trials(tmp_path).items():
        folder = tmp_path / "study/trials" / name.replace(" ", "+") / str(seed)
        score = json.loads((folder / "out/all_results.json").read_text())["eval_accuracy"]
        assert float(row["metric"]) == score
        about = json.loads((folder / "trial.json").read_text())
        assert about["command"].endswith(f"scored.py --seed {seed} --out {folder}/out")
        assert about["environment"]["versions"]["torch"]
        assert about["environment"]["script"]["file"].endswith("scored.py")
        if name != "plain":
            report = json.loads((folder / "report.json").read_text())
            assert report["status"] == "active"
            assert report["noise_seed"] == (seed if "noisytune" in name else None)
    plain = tmp_path / "study/trials/plain/1"
    assert not (plain / "report.json").exists()

    alone = subprocess.run([*map(str, TRAIN[:3]), "1", "--out", tmp_path], env=clean_env(), check=False)
    assert alone.returncode == 0
    assert json.loads((tmp_path / "all_results.json").read_text()) == json.loads(
        (plain / "out/all_results.json").read_text()
    )

    document = json.loads(run_cli("study", "study", "--json").out)
    assert document["version"] == 1
    assert [arm["name"] for arm in document["arms"]] == names
    assert document["arms"][1]["difference"]["n"] == 2
    assert run_cli("study", "study").out == ran.out


def test_same_command_runs_nothing_again_and_more_seeds_only_the_new(
    run_cli: Run, quick: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "fail-1").touch()
    asked = (*ASKED, "--arm", "mixout=0.5", "--", *quick)
    first = run_cli(*asked[:5], "--seeds", 2, *asked[5:])
    assert first.code == 1
    started = (tmp_path / "started.txt").read_text().split()
    assert sorted(started) == ["0", "0", "1"], "the arm without effect is not run to its end"
    again = run_cli(*asked[:5], "--seeds", 2, *asked[5:])
    assert (again.code, again.out, again.err) == (1, first.out, "")
    assert (tmp_path / "started.txt").read_text().split() == started
    run_cli(*asked[:5], "--seeds", "2..3", *asked[5:])
    assert (tmp_path / "started.txt").read_text().split() == [*started, "2", "3"]
    assert [key for key in trials(tmp_path) if key[0] == "plain"] == [("plain", seed) for seed in range(4)]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_crash_missing_metric_and_no_effect_are_named_and_run_again_by_retry(
    run_cli: Run, quick: tuple[object, ...], tmp_path: Path
) -> None:
    for name in ("fail-1", "mute-2"):
        (tmp_path / name).touch()
    asked = (*ASKED, "--seeds", 4, "--arm", "mixout=0.5", "--", *quick)
    ran = run_cli(*asked)
    assert ran.code == 1
    assert "  seed 1: exit code 1: seed 1 went wrong\n" in ran.out
    assert "  seed 2: metric: expected eval_accuracy in the results, got no figures at all. See --metric.\n" in ran.out
    assert "mixout=0.5: NO EFFECT: command: expected a Python that imports torch, got none.\n" in ran.out
    arms = {arm["name"]: arm for arm in json.loads(run_cli("study", "study", "--json").out)["arms"]}
    assert (arms["mixout=0.5"]["n"], arms["mixout=0.5"]["mean"], arms["mixout=0.5"]["difference"]) == (0, None, None)
    assert arms["plain"]["n"] == 2
    assert arms["mixout=0.5"]["trials"] == {"not run": 3, "no effect": 1}

    for name in ("fail-1", "mute-2"):
        (tmp_path / name).unlink()
    before = (tmp_path / "study/trials/plain/0/result.json").read_bytes()
    assert run_cli(*asked[:5], "--retry", *asked[5:]).code == 1
    assert {key: row["status"] for key, row in trials(tmp_path).items() if key[0] == "plain"} == {
        ("plain", seed): "done" for seed in range(4)
    }
    assert (tmp_path / "study/trials/plain/0/result.json").read_bytes() == before


def test_seeds_that_the_script_ignores_are_pointed_out(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "same.py").write_text("print('acc=0.25')")
    ran = run_cli(
        *ASKED[:3], "--seeds", 3, "--metric", "acc", "--arm", "mixout=1", "--", sys.executable, "same.py", "{seed}"
    )
    assert "note: seeds 0, 1, ... of plain give the same score, 0.25: does the script ignore its seed, or" in ran.out


def test_plain_is_without_us_whatever_the_shell_has(run_cli: Run, quick: tuple[object, ...], tmp_path: Path) -> None:
    site = subprocess.run(command("env", "--mixout", 0.5, "--json"), capture_output=True, text=True, check=True).stdout
    ours = json.loads(site)["variables"]
    assert any(name.startswith("SURGERY_") for name in ours)
    run_cli(*ASKED, "--seeds", 2, "--arm", "rdrop=1", "--", *quick, env=ours)
    seen = json.loads((tmp_path / "study/trials/plain/0/out/env.json").read_text())
    assert not [name for name in seen if name.startswith("SURGERY_")]
    assert "site" not in [Path(folder).name for folder in seen.get("PYTHONPATH", "").split(os.pathsep)]
    arm = json.loads((tmp_path / "study/trials/rdrop=1/0/out/env.json").read_text())
    assert {name: arm.get(name) for name in ("SURGERY_RDROP", "SURGERY_MIXOUT")} == {
        "SURGERY_RDROP": "1.0",
        "SURGERY_MIXOUT": None,
    }


def test_variables_are_filled_in(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text("import os; print('acc=0.' + os.environ['N'], os.environ['O'])")
    asked = ("--env", "N={seed}5", "--env", "O={out}/x", "--arm", "mixout=1")
    run_cli(*ASKED[:3], "--seeds", "1..2", "--metric", "acc", *asked, "--", sys.executable, "env.py")
    assert [scores(tmp_path)["plain", seed] for seed in (1, 2)] == ["0.15", "0.25"]
    assert str(tmp_path / "study/trials/plain/2/out/x") in (tmp_path / "study/trials/plain/2/log.txt").read_text()


# -- stopped and resumed ----------------------------------------------------------------------------------------------

HANGING = ("--seeds", "2", "--arm", "mixout=0.9", "--", *TRAIN, "--hang-if", "hang-{seed}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    root = tmp_path_factory.mktemp("whole")
    subprocess.run(command(*ASKED, "--jobs", 2, *HANGING), cwd=root, env=clean_env(), check=True, capture_output=True)
    return scores(root)


def start(root: Path) -> "subprocess.Popen[str]":
    """Start a study of which half the trials end, and the others never would."""
    (root / "hang-1").touch()
    process = subprocess.Popen(
        command(*ASKED, "--jobs", 2, *HANGING), cwd=root, env=clean_env(), stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while len(list(root.glob("study/trials/*/*/result.json"))) < 2:  # some done, others under way
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def is_running(root: Path) -> bool:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return str(root / "study/trials") in listed


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", pytest.param("SIGTERM", marks=pytest.mark.sweep)])
def test_stopped_study_leaves_no_process_and_goes_on(name: str, undisturbed: Any, tmp_path: Path) -> None:
    process = start(tmp_path)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    if name == "SIGINT":
        assert process.returncode == 130
        assert err.endswith("interrupted: run the same command again.\n")
        assert "Traceback" not in err
    until = time.monotonic() + 20
    while is_running(tmp_path):
        assert time.monotonic() < until, "trials outlived the study"
        time.sleep(0.1)
    finished = {path: path.read_bytes() for path in tmp_path.glob("study/trials/*/*/result.json")}
    assert [path.parent.name for path in finished] == ["0", "0"]
    (tmp_path / "hang-1").unlink()
    ran = subprocess.run(
        command(*ASKED, "--jobs", 2, *HANGING),
        cwd=tmp_path,
        env=clean_env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert scores(tmp_path) == undisturbed
    assert all(path.read_bytes() == data for path, data in finished.items()), "a finished trial was run again"


def test_two_runs_of_one_study_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)")
    asked = command(*ASKED, "--seeds", 2, "--arm", "mixout=0.9", "--", sys.executable, "hang.py", "{seed}")
    process = subprocess.Popen(asked, cwd=tmp_path, env=clean_env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    try:
        second = subprocess.run(asked, cwd=tmp_path, env=clean_env(), capture_output=True, text=True, check=False)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert second.returncode == 1
    assert second.stderr.startswith(
        f"error: {tmp_path}/study: expected a folder for this run alone, got one that another"
    )


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "3", "--arm", "mixout=1", "--", "python", "x.py"], "command: expected {seed} where"),
        (["--seeds", "3", "--arm", "mixuot=1", "--", "python", "{seed}"], "arm 'mixuot=1': expected flags of"),
        (["--seeds", "3", "--", "python", "{seed}"], "arm: expected one to compare with plain, got none."),
        (["--arm", "mixout=1", "--", "python", "{seed}"], "--seeds: expected how many, such as 20, got none. Add it."),
        (["--seeds", "1", "--arm", "mixout=1", "--", "python", "{seed}"], "--seeds: expected at least 2, got 1."),
        (["--seeds", "2", "--arm", "mixout=1"], "command: expected one, got none. Write it after --"),
        (["--seeds", "2", "--arm", "mixout=1", "--", "no-such-program", "{seed}"],
         "no-such-program: expected a program, got none of this name. See its name and PATH."),
    ],
    ids=["no seed", "arm", "no arm", "no seeds", "one seed", "no command", "program"],
)  # fmt: skip
def test_study_that_cannot_be_is_one_line(words: list[str], message: str, run_cli: Run, tmp_path: Path) -> None:
    ran = run_cli(*ASKED, *words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), ran.err
    assert ran.err.startswith(f"error: {message}")
    assert not (tmp_path / "study").exists()


def test_folder_of_something_else_and_of_another_study_is_refused(
    run_cli: Run, quick: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    asked = ("--metric", "eval_accuracy", "--seeds", "2", "--arm", "mixout=1", "--", *quick)
    ran = run_cli("study", "-o", "full", *asked)
    assert ran.err == (
        f"error: {tmp_path}/full: expected a new folder or that of a study, got one with other files. Choose another.\n"
    )
    run_cli("study", "-o", "study", *asked)
    before = tree_digest(tmp_path / "study")
    changed = run_cli("study", "-o", "study", *asked, "--more")
    assert changed.err.startswith(f"error: {tmp_path}/study: expected its study's command, `")
    assert changed.err.endswith("--more`. Choose another folder for another study.\n")
    metric = run_cli("study", "-o", "study", "--metric", "f1", *asked[2:])
    assert "expected its study's metric, eval_accuracy, got f1." in metric.err
    assert tree_digest(tmp_path / "study") == before
    assert run_cli("study", "full").err.startswith(
        "error: full: expected the folder of a study, got one without study.json"
    )
    assert run_cli("study").code == 2
    unused = run_cli("study", "--seeds", 3, "study")
    assert unused.err.startswith("error: --seeds: expected -o OUT and a command with it, got none.")


def test_command_without_dashes_before_it_is_refused(run_cli: Run) -> None:
    ran = run_cli(*ASKED, "--seeds", 2, "--arm", "mixout=1", "python", "x.py", "{seed}")
    assert ran.code == 2
    assert "Error: expected -- before COMMAND, got none. Write it there.\n" in ran.err


def test_damaged_study_json_is_one_line(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    for text in ("{", "[]", '{"format": "surgery-study-9"}', '{"format": "surgery-study-1"}'):
        (tmp_path / "study/study.json").write_text(text)
        ran = run_cli("study", "study")
        assert (ran.code, ran.err.count("\n")) == (1, 1), ran.err
        assert "study.json: expected" in ran.err


# -- runs that somebody else made -------------------------------------------------------------------------------------


def write_runs(root: Path, arm: str, values: dict[int, float]) -> None:
    for seed, value in values.items():
        (root / arm / f"seed-{seed}").mkdir(parents=True)
        (root / arm / f"seed-{seed}/all_results.json").write_text(json.dumps({"acc": value}))


def test_compare_reads_runs_and_pairs_them_by_name(run_cli: Run, tmp_path: Path) -> None:
    base = {seed: 0.6 + seed / 100 for seed in range(8)}
    write_runs(tmp_path, "runs/plain", base)
    write_runs(tmp_path, "runs/rdrop", {seed: value + 0.02 + seed / 10_000 for seed, value in base.items()})
    before = tree_digest(tmp_path / "runs")
    ran = run_cli("study", "compare", "runs/plain/*", "runs/rdrop/*", "--metric", "acc")
    assert (ran.code, ran.err) == (0, "")
    assert "runs/rdrop/*: better by 0.0204 (0.0202 to 0.0206)\n" in ran.out
    rows = json.loads(run_cli("study", "compare", "runs/plain/*", "runs/rdrop/*", "--metric", "acc", "--json").out)
    assert rows["arms"][1]["difference"]["n"] == 8
    assert rows["arms"][1]["values"]["seed-3"] == pytest.approx(0.6503)
    assert tree_digest(tmp_path / "runs") == before


def test_compare_of_logs_and_of_names_without_pairs(run_cli: Run, tmp_path: Path) -> None:
    for name, value in (("a1", 0.5), ("a2", 0.6), ("b3", 0.7), ("b4", 0.8)):
        (tmp_path / f"{name}.log").write_text(f"step 1 acc: 0.1\nfinal acc: {value}\n")
    ran = run_cli("study", "compare", "a*.log", "b*.log", "--metric", "acc")
    assert ran.code == 0
    assert "b*.log: no seeds in common with plain\n" in ran.out
    assert "note: no run of b*.log is called as one of a*.log: there are no pairs to compare\n" in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/plain/*", "--metric", "acc"], "runs: expected two globs or more, each another, got 1."),
        (
            ["runs/plain/*", "none/*", "--metric", "acc"],
            "runs: expected a glob of runs, got 'none/*', which matches nothing.",
        ),
        (["runs/plain/*", "runs/pl*/*"], "--metric: expected the name of a metric, such as eval_accuracy, got none."),
        (
            ["runs/plain/*", "runs/*/*", "--metric", "f1"],
            "runs/plain/seed-0: metric: expected f1 in the results, got acc in",
        ),
    ],
    ids=["one", "nothing", "no metric", "no such metric"],
)
def test_compare_that_cannot_be_is_one_line(words: list[str], message: str, run_cli: Run, tmp_path: Path) -> None:
    write_runs(tmp_path, "runs/plain", {0: 0.5, 1: 0.6})
    ran = run_cli("study", "compare", *words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith(f"error: {message}")
