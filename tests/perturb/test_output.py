"""The output folder: atomic, resumable, locked, and never at the cost of anything that is not ours."""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree_digest, write_json, write_sharded, write_weights
from commands import Ran, clean_env, command
from safetensors.numpy import save_file

JOURNAL = "surgery.unfinished.json"
Refuses = Callable[..., None]


# -- a run that takes long enough to be interrupted ------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """100 MB of float32 in four shards, and what an undisturbed run makes of it."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    weight_map = {}
    (root / "source").mkdir()
    for number in range(1, 5):
        shard = f"model-{number:05}-of-00004.safetensors"
        weights = {
            f"layer.{number}.weight": rng.standard_normal((2400, 2500), dtype=np.float32),
            f"layer.{number}.norm.weight": rng.standard_normal(100_000, dtype=np.float32),
        }
        save_file(weights, root / "source" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, shard)
    write_json(root / "source/model.safetensors.index.json", {"weight_map": weight_map})
    write_json(root / "source/config.json", {"model_type": "bert"})
    start = time.monotonic()
    assert _end(_start(root, "undisturbed")) == (0, "")
    (root / "seconds").write_text(str(time.monotonic() - start))
    yield root
    shutil.rmtree(root)


def _start(root: Path, out: str | Path, *args: str) -> subprocess.Popen[str]:
    words = command("perturb", root / "source", "-o", out, "--seed", "7", *args)
    return subprocess.Popen(words, cwd=root, env=clean_env(), stdout=-1, stderr=-1, text=True)


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def _wait_for_journal(process: subprocess.Popen[str], out: Path) -> None:
    while not (out / JOURNAL).exists():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.001)


def _finish(root: Path, out: str | Path) -> None:
    """The same command finishes, with the same bytes as a run that nothing disturbed."""
    assert _end(_start(root, out)) == (0, "")
    assert tree_digest(root / out) == tree_digest(root / "undisturbed")
    shutil.rmtree(root / out)


def test_killed_run_resumes_to_the_same_bytes(large: Path) -> None:
    source = tree_digest(large / "source")
    undisturbed = float((large / "seconds").read_text())
    moments = random.Random(0)
    unfinished = 0
    for attempt in range(10 if "SURGERY_TEST_ALL" in os.environ else 4):
        out = f"killed-{attempt}"
        process = _start(large, out)
        time.sleep(moments.uniform(0.05, undisturbed))
        process.kill()
        process.communicate()
        unfinished += (large / out / JOURNAL).exists()
        looks_finished = (large / out / "model.safetensors.index.json").exists()
        assert not looks_finished or (large / out / JOURNAL).exists() or (large / out / "surgery.json").exists()
        _finish(large, out)
    assert tree_digest(large / "source") == source
    assert unfinished, "none of the kills fell into the writing"


def test_interrupted_run_exits_130_at_once_and_resumes(large: Path) -> None:
    process = _start(large, "interrupted", "--workers", "1")
    _wait_for_journal(process, large / "interrupted")
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    seconds = time.monotonic() - sent
    assert (process.returncode, out, err) == (130, "", "interrupted: run the same command again.\n")
    assert seconds < 1
    journal = json.loads((large / "interrupted" / JOURNAL).read_bytes())
    assert journal["resume"] == f"surgery perturb {large}/source --lam 0.15 --seed 7 -o {large}/interrupted"
    assert "not finished" in journal["why"]
    assert not (large / "interrupted/config.json").exists()
    _finish(large, "interrupted")


def test_second_run_at_once_is_refused(large: Path) -> None:
    first = _start(large, "shared")
    _wait_for_journal(first, large / "shared")
    first.send_signal(signal.SIGSTOP)
    second = _start(large, "shared")
    _, err = second.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert err == (
        f"error: {large}/shared: expected a folder for this run alone, got one that another run is writing to. "
        "Wait for it, or choose another with -o.\n"
    )
    assert second.returncode == 1
    first.communicate(timeout=60)
    assert first.returncode == 0
    _finish(large, "shared")


def test_resumed_run_keeps_finished_shards_and_redoes_damaged_ones(large: Path) -> None:
    process = _start(large, "partial", "--workers", "1")
    done = large / "partial/model-00001-of-00004.safetensors"
    while not json.loads(_read(large / "partial" / JOURNAL) or "{}").get("finished"):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    before = done.stat()
    assert _end(_start(large, "partial")) == (0, "")
    assert (done.stat().st_ino, done.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert tree_digest(large / "partial") == tree_digest(large / "undisturbed")
    (large / "partial" / JOURNAL).write_bytes(b"{}")  # as if it had not finished, by an unknown hand
    process = _start(large, "partial")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "expected a new or empty folder" in err
    shutil.rmtree(large / "partial")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 130 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or not mount:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=130m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_keeps_what_is_finished(large: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    process = _start(large, out)
    _wait_for_journal(process, out)
    process.send_signal(signal.SIGSTOP)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert err == (
        f"error: {out}: expected room on the disk, got No space left on device. Finished shards are kept: free some "
        f"space and run `surgery perturb {large}/source --lam 0.15 --seed 7 -o {out}`.\n"
    )
    assert process.returncode == 1
    assert (out / JOURNAL).exists()
    filler.unlink()
    assert _end(_start(large, out)) == (0, "")
    assert tree_digest(out) == tree_digest(large / "undisturbed")


def test_small_disk_is_refused_before_anything_is_written(large: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(80 << 20))
    process = _start(large, small_disk / "out")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == (
        f"error: {small_disk}/out: expected 97.6 MB free on this disk, got 52.4 MB. "
        "Free some space, or choose another disk with -o.\n"
    )
    assert tree_digest(small_disk / "out") == {}


# -- small runs -------------------------------------------------------------------------------------------------------


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_file_too_large_keeps_what_is_finished(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_weights(source / "model-00001-of-00002.safetensors", names=("a.weight",))
    save_file({"b.weight": np.arange(50_000, dtype=np.float32)}, source / "model-00002-of-00002.safetensors")
    weight_map = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    write_json(source / "model.safetensors.index.json", {"weight_map": weight_map})
    before = tree_digest(source)
    ran = run_cli("perturb", "source", "-o", "out", "--workers", 1, preexec_fn=_limit_file_size)
    assert ran.err == (
        f"error: {out}: expected room on the disk, got File too large. Finished shards are kept: free some space and "
        f"run `surgery perturb {source} --lam 0.15 --seed 0 -o {out}`.\n"
    )
    assert (ran.code, ran.out) == (1, "")
    assert set(tree_digest(out)) == {JOURNAL, "model-00001-of-00002.safetensors"}
    kept = (out / "model-00001-of-00002.safetensors").stat().st_ino
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert (out / "model-00001-of-00002.safetensors").stat().st_ino == kept
    assert run_cli("perturb", "source", "-o", "fresh").code == 0
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")
    assert tree_digest(source) == before


@pytest.mark.parametrize(
    "left",
    [
        {JOURNAL + ".surgery-part": b"{"},
        {JOURNAL + ".surgery-part": b"{", "model.safetensors.surgery-part": b"x"},
        {"surgery.json.surgery-part": b"{"},
        {"surgery.json": b"{}"},
        {"model.safetensors": b"cut"},
        {"config.json": b"cut"},
        {"README.md": b"cut"},
        {"README.md.surgery-part": b"cut"},
    ],
    ids=["journal part", "parts", "recipe part", "recipe", "cut shard", "cut companion", "cut card", "card part"],
)
def test_what_a_kill_leaves_behind_does_not_hinder(
    left: dict[str, bytes], run_cli: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    """The journal of a real run, beside any file that it may have been killed at."""
    good = (source / "model.safetensors").read_bytes()
    assert run_cli("perturb", "source", "-o", "fresh").code == 0
    _unfinish(run_cli, tmp_path)
    for name, content in left.items():
        (tmp_path / "out" / name).write_bytes(content)
    ran = run_cli("perturb", "source", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")
    assert (source / "model.safetensors").read_bytes() == good


def _unfinish(run_cli: Callable[..., Ran], tmp_path: Path, *args: str) -> None:
    """Leave `out` as a run that could not write its shards does."""
    small = run_cli("perturb", "source", "-o", "out", *args, preexec_fn=_limit_to_the_journal)
    assert small.code == 1
    assert set(tree_digest(tmp_path / "out")) == {JOURNAL}


def _limit_to_the_journal() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))


def test_run_killed_as_it_began_is_begun_again(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / (JOURNAL + ".surgery-part")).write_bytes(b"{")
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert run_cli("perturb", "source", "-o", "fresh").code == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")
    assert source.exists()


def test_unfinished_by_another_command_is_refused(
    run_cli: Callable[..., Ran], refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    _unfinish(run_cli, tmp_path)
    refuses(
        f"{tmp_path}/out: expected a new or empty folder, got one that another command did not finish. Finish it with "
        f"`surgery perturb {source} --lam 0.15 --seed 0 -o {tmp_path}/out`, or replace it with --overwrite.",
        *("source", "-o", "out", "--seed", "1"),
    )
    assert run_cli("perturb", "source", "-o", "out", "--seed", "1", "--overwrite").code == 0


def test_source_that_changed_meanwhile_is_told(
    run_cli: Callable[..., Ran], refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    _unfinish(run_cli, tmp_path)
    write_weights(source / "model.safetensors", seed=1)
    refuses(
        f"{tmp_path}/out: expected the source as it was when this run began, got one that has changed since. "
        "Start again with --overwrite.",
        *("source", "-o", "out"),
    )
    assert run_cli("perturb", "source", "-o", "out", "--overwrite").code == 0


def test_finished_run_is_not_done_again(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    assert run_cli("perturb", "source", "-o", "out").code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert source.exists()


def test_modes_follow_the_umask(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    assert run_cli("perturb", "source", "-o", "out", preexec_fn=lambda: os.umask(0o027)).code == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}
    assert source.exists()


# -- --overwrite ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_sources(tmp_path: Path) -> None:
    """A sharded and a single-file source."""
    write_sharded(tmp_path / "sharded")
    write_json(tmp_path / "sharded/vocab/merges.json", {})
    write_weights(tmp_path / "single/model.safetensors")


@pytest.mark.usefixtures("two_sources")
def test_overwrite_leaves_nothing_of_the_former_run(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    for name in ("sharded", "single"):
        assert run_cli("perturb", name, "-o", f"{name}-fresh").code == 0
    for name in ("sharded", "single", "sharded"):
        assert run_cli("perturb", name, "-o", "out", "--overwrite").code == 0
        assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / f"{name}-fresh")


@pytest.mark.usefixtures("two_sources")
def test_finished_folder_needs_overwrite(run_cli: Callable[..., Ran], refuses: Refuses, tmp_path: Path) -> None:
    assert run_cli("perturb", "sharded", "-o", "out").code == 0
    refuses(
        f"{tmp_path}/out: expected a new or empty folder, got 7 files, such as 'README.md'. "
        "Replace it with --overwrite, or use -o.",
        *("single", "-o", "out"),
    )


@pytest.mark.usefixtures("two_sources")
@pytest.mark.parametrize("stranger", ["notes.txt", "model.safetensors"], ids=["any", "of a planned name"])
@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_strangers_in_a_finished_folder_are_spared(
    stranger: str, option: list[str], run_cli: Callable[..., Ran], refuses: Refuses, tmp_path: Path
) -> None:
    assert run_cli("perturb", "sharded", "-o", "out").code == 0
    (tmp_path / "out" / stranger).write_text("mine")
    refuses(
        f"{tmp_path}/out: expected a new or empty folder, got 1 files, such as {stranger!r}. Choose another with -o.",
        *("single", "-o", "out", *option),
    )


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "surgery.json"])
def test_folder_of_strangers_is_refused(
    name: str, option: list[str], refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    (tmp_path / "out" / name).write_text('{"files": [1]}')
    message = f"{tmp_path}/out: expected a new or empty folder, got {{}}. Choose another with -o."
    if name == "surgery.json":
        if not option:
            message = f"{tmp_path}/out/surgery.json: expected a recipe, got another or a damaged file. Fetch it again."
        count = 1
    else:
        count = 2
    refuses(message.format(f"{count} files, such as 'mine.txt'"), "source", "-o", "out", *option)
    assert source.exists()


# -- where the output may not be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("out", ["source", "source/", "source/out", "elsewhere/../source/x", "link/x"])
def test_output_inside_the_source_is_refused(
    out: str, option: list[str], refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(source)
    refuses(
        f"{(tmp_path / out).resolve()}: expected a folder outside the source, got one inside {source}. "
        "Choose another with -o.",
        *("source", "-o", out, *option),
    )


@pytest.mark.parametrize("model", ["former/model.safetensors", "former/vae"], ids=["file", "component"])
def test_output_that_holds_the_source_is_refused(
    model: str, run_cli: Callable[..., Ran], refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    """--overwrite would remove a source that a former run wrote."""
    write_weights(source / "vae/model.safetensors")
    assert run_cli("perturb", "source", "-o", "former").code == 0
    refuses(
        f"{tmp_path}/former: expected a folder outside the source, got one that holds it. Choose another with -o.",
        *(model, "-o", "former", "--overwrite"),
    )


@pytest.mark.parametrize("where", ["hub", "hub/models--a--b/snapshots/0123"])
def test_output_in_the_hub_cache_is_refused(where: str, refuses: Refuses, source: Path, tmp_path: Path) -> None:
    assert source.exists()
    out = tmp_path / "hf-home" / where / "out"
    refuses(
        f"{out}: expected a folder of your own, got one in the Hub's cache. Choose another with -o.",
        *("source", "-o", out),
    )


@pytest.mark.parametrize(("out", "why"), [("file", "File exists"), ("file/out", "Not a directory")])
def test_output_at_a_file_is_refused(out: str, why: str, refuses: Refuses, source: Path, tmp_path: Path) -> None:
    assert source.exists()
    (tmp_path / "file").write_text("mine")
    refuses(f"{tmp_path / out}: expected a folder to write to, got {why}. Choose another with -o.", "source", "-o", out)


def test_output_in_an_unwritable_folder_is_refused(refuses: Refuses, source: Path, tmp_path: Path) -> None:
    if not os.geteuid():
        pytest.skip("root may write anywhere")
    assert source.exists()
    (tmp_path / "locked").mkdir(mode=0o555)
    refuses(
        f"{tmp_path}/locked/out: expected a folder to write to, got Permission denied. Choose another with -o.",
        *("source", "-o", "locked/out"),
    )


def test_locked_folder_is_refused(refuses: Refuses, source: Path, tmp_path: Path) -> None:
    assert source.exists()
    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    refuses(
        f"{tmp_path}/out: expected a folder for this run alone, got one that another run is writing to. "
        "Wait for it, or choose another with -o.",
        *("source", "-o", "out"),
    )
    os.close(lock)
