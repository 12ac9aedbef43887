"""`surgery study --print`: lines for another scheduler, which are really run."""

import json
import subprocess

import pytest
from plain_study import make_plan, scores, wait_for

from surgery.errors import OutputError
from surgery.lock import lock_folder
from surgery.study.todo import shell_lines

_LINE = "-m surgery.engines.execute"


def run_line(line: str, **popen: object) -> int:
    return subprocess.run(["sh", "-c", line], check=False, timeout=60, stdin=subprocess.DEVNULL, **popen).returncode


def run_lines(lines: list[str]) -> int:
    """Run lines as another scheduler would: two at once, without a terminal, from anywhere."""
    words = ["xargs", "-d", "\n", "-P2", "-I{}", "sh", "-c", "{}"]
    return subprocess.run(words, input="\n".join(lines), text=True, cwd="/", check=False, timeout=120).returncode


def test_lines_are_run_by_xargs(tmp_path):
    plan = make_plan(tmp_path / "a study's", "true", 3)
    lines = list(shell_lines(plan))
    assert len(lines) == 3
    assert run_lines(lines) == 0
    assert scores(plan) == [0.0, 0.1, 0.2]
    assert list(shell_lines(plan)) == []


def test_lines_are_run_by_sh_which_reads_them_from_its_stdin(tmp_path):
    plan = make_plan(tmp_path / "study", "cat", 2)
    lines = "\n".join(shell_lines(plan)) + "\n"
    assert subprocess.run(["sh"], input=lines, text=True, check=False, timeout=60).returncode == 0
    assert scores(plan) == [0.0, 0.1]


def test_what_is_done_is_neither_printed_nor_touched(tmp_path):
    plan = make_plan(tmp_path / "study", "true", 2)
    first, second = shell_lines(plan)
    assert run_line(first) == 0
    done = plan.trials()[0].folder
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert list(shell_lines(plan)) == [second]
    assert scores(plan) == [0.0, None]
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.name != "score.json"} == {
        path: time for path, time in before.items() if path.name != "score.json"
    }


def test_what_was_lost_is_printed_with_an_empty_folder(tmp_path):
    plan = make_plan(tmp_path / "study", "echo $2 > $1/checkpoint; sleep 600", 2)
    lines = list(shell_lines(plan))
    lost = subprocess.Popen(["sh", "-c", f"exec {lines[0]}"])
    out = plan.trials()[0].out
    wait_for((out / "checkpoint").exists)
    assert list(shell_lines(plan)) == lines[1:]  # the other is under way
    lost.terminate()
    lost.wait(20)
    assert list(shell_lines(plan)) == lines
    assert list(out.iterdir()) == []


def test_the_folder_of_a_line_that_waits_is_left_in_its_place(tmp_path):
    plan = make_plan(tmp_path / "study", "true", 2)
    lines = list(shell_lines(plan))
    inodes = [trial.folder.stat().st_ino for trial in plan.trials()]
    assert list(shell_lines(plan)) == lines
    assert [trial.folder.stat().st_ino for trial in plan.trials()] == inodes


def test_failures_are_printed_again_when_that_is_asked_for(tmp_path):
    plan = make_plan(tmp_path / "study", "exit 3", 2)
    lines = list(shell_lines(plan))
    assert run_lines(lines) == 123
    assert list(shell_lines(plan)) == []
    assert list(shell_lines(plan, retry=True)) == lines


def test_a_study_that_is_run_prints_nothing(tmp_path):
    plan = make_plan(tmp_path / "study", "true", 2)
    plan.folder.mkdir()
    with lock_folder(plan.folder), pytest.raises(OutputError):
        list(shell_lines(plan))
    assert list(plan.folder.iterdir()) == []


def test_the_command_prints_lines_and_shows_what_came_of_them(tmp_path, run_cli):
    asked = ("-o", "study", "--seeds", "2", "--metric", "score", "--arm", "mixout=0.7")
    script = ("--", "sh", "-c", "echo \"{'score': 0.{seed}}\"")
    printed = run_cli("study", *asked, "--print", *script)
    lines = printed.out.splitlines()
    assert (printed.code, len(lines)) == (0, 4)
    assert all(_LINE in line for line in lines)
    plain = [line for line in lines if "/plain/" in line]
    assert run_lines(plain) == 0
    shown = run_cli("study", "study", "--json")
    assert json.loads(shown.out)
    about = json.loads((tmp_path / "study/trials/plain/1/trial.json").read_text())
    assert (about["engine"], about["job"], about["seed"]) == ("print", None, 1)
    again = run_cli("study", *asked, "--print", *script)
    assert again.out.splitlines() == [line for line in lines if line not in plain]


@pytest.mark.parametrize("option", ["--engine=ray", "--jobs=2", "--cpus=2", "--gpus=0"])
def test_what_another_scheduler_decides_is_refused(tmp_path, run_here, option):
    asked = ("-o", "study", "--seeds", "2", "--metric", "score", "--arm", "mixout=0.7", "--print", option)
    ran = run_here("study", *asked, "--", "true", "{seed}")
    name = option.partition("=")[0]
    assert ran.code == 1
    assert ran.err == f"error: {name}: expected no --print with it, got both. Another scheduler decides that.\n"
    assert not (tmp_path / "study").exists()
