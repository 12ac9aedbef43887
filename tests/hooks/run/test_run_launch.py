"""`surgery run` from outside: what the command gets, what is refused, exit codes, the summary and the report."""

import json
import os
import subprocess
import sys

import click
import pytest
from runs import MODEL, ROOT, python, training, write_program

from surgery.cli import main
from surgery.errors import SettingError
from surgery.hooks.run.launch import SITE, environment_of, launch
from surgery.hooks.run.options import make_options, variable_readers

MIXOUT = ("run", "--mixout", "0.7")
ACTIVE = "surgery: active: Bert, 4 mixed, 5 steps, distance 0.5\n"


@pytest.fixture
def folders(tmp_path):
    """A folder for temporary files of the launcher alone."""
    (tmp_path / "tmp").mkdir()
    return {"TMPDIR": str(tmp_path / "tmp")}


def refused(ran, message: str) -> None:
    assert (ran.code, ran.out, ran.err) == (2, "", f"error: {message}\n")


# -- what the command gets ------------------------------------------------------------------------------------------


def test_command_has_its_own_files_and_arguments(run_cli):
    code = "import sys; print(sys.stdin.read(), sys.argv[1:]); print('mine', file=sys.stderr)"
    ran = run_cli(*MIXOUT, "--", *python(code), "--rdrop", "a b", "--", "\udcff", input="text")
    assert ran.out == "text ['--rdrop', 'a b', '--', '\\udcff']\n"
    assert ran.err.startswith("mine\nsurgery: INACTIVE: ")


def test_command_needs_no_dashes(run_cli):
    ran = run_cli(*MIXOUT, *training("mixout"), "--help", "--", "-x")
    assert (ran.code, ran.out, ran.err) == (0, "", ACTIVE)


def test_command_inherits_open_files(run_cli):
    reader, writer = os.pipe()
    run_cli(*MIXOUT, "--", *python(f"import os; os.write({writer}, b'hello')"), pass_fds=[writer])
    os.close(writer)
    assert os.read(reader, 100) == b"hello"
    os.close(reader)


def test_command_gets_the_options_and_the_hooks_before_the_users_folders(run_cli, tmp_path):
    code = (
        "import os, json\n"
        "from pathlib import Path\n"
        "folder = Path(os.environ['SURGERY_RUN_DIR'])\n"
        "names = [one for one in os.environ if one.startswith('SURGERY_')]\n"
        "print(json.dumps([sorted(names), os.environ['PYTHONPATH'], folder.is_dir(), str(folder.parent)]))"
    )
    path = os.pathsep.join([str(tmp_path), str(SITE), os.environ.get("PYTHONPATH", str(ROOT))])
    env = {"PYTHONPATH": path, "SURGERY_RDROP": "1", "SURGERY_ALLOW_INACTIVE": "0", "TMPDIR": str(tmp_path)}
    names, pythonpath, is_there, where = json.loads(run_cli(*MIXOUT, "--", *python(code), env=env).out)
    assert names == ["SURGERY_MIXOUT", "SURGERY_RDROP", "SURGERY_RUN_DIR"]
    assert pythonpath.split(os.pathsep) == [str(SITE), str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))]
    assert (is_there, where) == (True, str(tmp_path))
    assert not list(tmp_path.glob("surgery-run-*"))


@pytest.mark.parametrize("before", [{}, {"PYTHONPATH": ""}, {"PYTHONPATH": str(SITE)}])
def test_no_empty_folder_comes_on_the_path(before):
    """Python takes an empty entry for the working directory."""
    assert environment_of(make_options(mixout=0.7), before) == {"PYTHONPATH": str(SITE), "SURGERY_MIXOUT": "0.7"}


def test_variables_alone_are_options(run_cli):
    ran = run_cli("run", "--", *training("mixout"), env={"SURGERY_MIXOUT": "0.7"})
    assert (ran.code, ran.err) == (0, ACTIVE)


def test_flags_win_over_variables(run_cli):
    code = "import os; print(os.environ['SURGERY_MIXOUT'], os.environ['SURGERY_ANCHOR'])"
    ran = run_cli(*MIXOUT, "--", *python(code), env={"SURGERY_MIXOUT": "0.9", "SURGERY_ANCHOR": "0.01"})
    assert ran.out == "0.7 0.01\n"


def test_a_run_in_a_run_adds_to_its_options_and_tells_both(run_cli):
    inner = [sys.executable, "-m", "surgery", "run", "--rdrop", "1", "--"]
    ran = run_cli(*MIXOUT, "--", *inner, *training("mixout", "rdrop"))
    assert (ran.code, ran.err) == (0, 2 * ACTIVE)
    ran = run_cli(*MIXOUT, "--", *inner, *training("mixout"))
    said = "surgery: INACTIVE: rdrop: its KL reached no loss, or was 0 in all steps.\n"
    assert (ran.code, ran.err) == (3, said + ACTIVE.replace("active", "in effect") + ACTIVE)


# -- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "code", "said"),
    [
        (training("mixout"), [], 0, ACTIVE),
        (training("mixout", then="raise SystemExit(5)"), [], 5, ACTIVE),
        (training(then="raise SystemExit(5)"), [], 5, "surgery: INACTIVE: mixout: "),
        (training(), [], 3, "surgery: INACTIVE: mixout: "),
        (training(), ["--allow-inactive"], 0, "surgery: INACTIVE: mixout: "),
        (training(then="raise SystemExit(1)", is_refused=True, faults=["mixout: no."]), [], 3, "surgery: INACTIVE: "),
        (training(is_refused=True, has_trained=False, models=[]), [], 3, "surgery: INACTIVE: "),
        (training(then="raise SystemExit(1)", is_refused=True), ["--allow-inactive"], 1, "surgery: INACTIVE: "),
        (python("1"), [], 3, "surgery: INACTIVE: command: expected a Python that imports torch"),
        (["true"], [], 3, "surgery: INACTIVE: command: expected a Python that reads PYTHONPATH"),
        (["false"], [], 1, "surgery: INACTIVE: the command failed before it trained."),
        ([*python("1"), "--help"], [], 0, "surgery: nothing to do: the command was asked for help"),
        (training(has_loaded=True, has_trained=False), [], 0, "surgery: nothing to do: the command loaded weights"),
    ],
    ids="active failed both inactive allowed refused early allowed-1 no-torch no-python false help eval".split(),
)
def test_exit_code(command, options, code, said, run_cli, folders, tmp_path):
    ran = run_cli(*MIXOUT, *options, "--", *command, env=folders)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(said)
    assert ran.err.count("\n") == 1
    assert not list((tmp_path / "tmp").iterdir()), "the folder of the run was left"


def test_a_refused_rank_is_told_through_a_launcher_with_a_code_of_its_own(run_cli):
    inner = training(is_refused=True, then="raise SystemExit(3)", faults=["rdrop: expected dropout, got none. Add it."])
    launcher = f"import subprocess; raise SystemExit(subprocess.run({inner!r}).returncode and 1)"
    ran = run_cli("run", "--rdrop", "1", *python(launcher))
    assert (ran.code, ran.err) == (3, "surgery: INACTIVE: rdrop: expected dropout, got none. Add it.\n")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("no-such", 127, "no-such: expected a program, got none of this name. See its name and PATH."),
        ("./no-such", 127, "./no-such: expected a program, got none of this name. See its name and PATH."),
        ("train.py", 127, "train.py: expected a program, got a script of Python. Write: python train.py."),
        ("./train.py", 126, "./train.py: expected a program, got a script of Python. Write: python ./train.py."),
        ("./plain", 126, "./plain: expected a program, got a file that may not be executed. See its permissions."),
        ("./broken", 126, "./broken: expected a program, got Exec format error. See its first line."),
        ("./lost", 127, "./lost: expected a program, got No such file or directory. See its first line."),
    ],
)
def test_a_command_that_cannot_be_executed(name, code, message, run_cli, folders, tmp_path):
    (tmp_path / "train.py").touch()
    (tmp_path / "plain").touch()
    write_program(tmp_path / "broken", "text")
    write_program(tmp_path / "lost", "#!/no/such/program\n")
    ran = run_cli(*MIXOUT, "--", name, env=folders)
    assert (ran.code, ran.out, ran.err) == (code, "", f"error: {message}\n")
    assert not list((tmp_path / "tmp").iterdir())


# -- refused up front -----------------------------------------------------------------------------------------------


def test_no_command_is_refused(run_cli):
    message = (
        "command: expected one, got none. Write it after --, such as: surgery run --mixout 0.7 -- python train.py."
    )
    refused(run_cli(*MIXOUT), message)
    refused(run_cli(*MIXOUT, "--"), message)


def test_no_regularizer_is_refused(run_cli):
    message = (
        "regularizer: expected noisytune, mixout, rdrop, anchor or recadam, got none. Give one, such as --mixout 0.7."
    )
    refused(run_cli("run", "--", "true"), message)
    refused(run_cli("run", "--allow-inactive", "--", "true"), message)
    refused(run_cli("env"), message)


@pytest.mark.parametrize("name", ["run", "env"])
def test_a_wrong_option_is_refused(name, run_cli):
    message = "mixout: expected a probability p in [0, 1], got 7.0. Give one such as 0.7."
    refused(run_cli(name, "--mixout", "7", *["true"] * (name == "run")), message)
    ran = run_cli(name, "--mixout", "0.7", *["true"] * (name == "run"), env={"SURGERY_SEED": "x"})
    refused(ran, "SURGERY_SEED: expected a whole number, got 'x'. Correct it.")


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SettingError) as raised:
        launch(["true"], make_options(mixout=0.7))
    message = "surgery run: expected Linux or macOS, got Windows. Call patch_model in the script instead."
    assert str(raised.value) == message


# -- the report -----------------------------------------------------------------------------------------------------


def test_report_is_what_the_issue_says(run_cli, tmp_path):
    ran = run_cli(*MIXOUT, "--report", "report.json", "--", *training("mixout"))
    assert ran.code == 0, ran.err
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["status"], document["reason"]) == ("active", None)
    assert [(rank["rank"], rank["models"]) for rank in document["ranks"]] == [(0, [MODEL])]
    assert document["command"].startswith(sys.executable)


def test_report_of_a_command_that_failed_is_written_where_it_was_asked_for(run_cli, tmp_path):
    command = ["sh", "-c", "cd / && exit 4"]
    ran = run_cli("run", "--", *command, env={"SURGERY_MIXOUT": "0.7", "SURGERY_REPORT": "report.json"})
    assert ran.code == 4
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["status"], document["ranks"]) == ("inactive", [])
    assert document["reason"] == "the command failed before it trained."


def test_report_that_could_not_be_written_is_refused_up_front(run_cli, tmp_path):
    refused(
        run_cli(*MIXOUT, "--report", "no/report.json", "--", "true"),
        f"--report: expected a folder that can be written to, got {tmp_path / 'no'}. Make it first.",
    )
    for name in (".", "/dev/null"):
        refused(
            run_cli(*MIXOUT, "--report", name, "--", "true"),
            f"--report: expected a file to write, got {name}, which is none. Choose another name.",
        )


def test_report_that_became_impossible_is_told(run_cli, tmp_path):
    (tmp_path / "out").mkdir()
    ran = run_cli(*MIXOUT, "--report", "out/report.json", "--", *training("mixout", then="os.rmdir('out')"))
    message = "expected a file that can be written, got No such file or directory. Choose another."
    assert (ran.code, ran.err) == (1, f"{ACTIVE}error: {tmp_path / 'out' / 'report.json'}: {message}\n")


# -- flags and surgery env ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "env"])
def test_each_flag_mirrors_a_variable(name):
    command = main.commands[name]
    flags = {one.name for one in command.get_params(click.Context(command))} - {
        "arguments",
        "as_json",
        "help",
        "_click_default_help",
    }
    assert flags == variable_readers().keys()


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_env_is_for_a_shell(shell, run_cli, tmp_path):
    ran = run_cli("env", "--mixout", "0.7", "--include", "a *", "--include", "it's", "--report", "r.json")
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 2)
    show = 'printf "%s\\n" "$PYTHONPATH" "$SURGERY_MIXOUT" "$SURGERY_INCLUDE" "$SURGERY_REPORT"'
    for before in ("", "/a b:/c"):
        env = {"PYTHONPATH": before} if before else {}
        done = subprocess.run([shell, "-c", f"{ran.out}\n{show}"], env=env, capture_output=True, text=True, check=True)
        path = f"{SITE}:{before}" if before else str(SITE)
        assert done.stdout.splitlines() == [path, "0.7", "'a *' 'it'\"'\"'s'", str(tmp_path / "r.json")]


def test_env_as_json(run_cli):
    ran = run_cli("env", "--mixout", "0.7", "--rdrop", "1", "--json", env={"SURGERY_ANCHOR": "0.01"})
    document = json.loads(ran.out)
    assert (document.keys(), document["version"]) == ({"version", "variables"}, 1)
    document = document["variables"]
    assert document.pop("PYTHONPATH").startswith(str(SITE))
    assert document == {"SURGERY_MIXOUT": "0.7", "SURGERY_RDROP": "1.0", "SURGERY_ANCHOR": "0.01"}


def test_a_process_that_becomes_another_keeps_its_word(run_cli):
    become = "import sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])"
    ran = run_cli(*MIXOUT, "--", *training("mixout", then=become))
    assert (ran.code, ran.out, ran.err) == (0, "1\n", ACTIVE)
