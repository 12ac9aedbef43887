"""Every call of a disk that fails, in every command: one line that names a file, and the same command goes on after."""

import errno
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import tree_digest, write_json, write_sharded
from commands import clean_env, command
from helpers.faults import CALLS, build, failing
from hub import Hub

_COMMANDS = {
    "perturb": ("perturb", "source", "-o", "out"),
    "materialize": ("materialize", "fresh/surgery.json", "-o", "out"),
    "verify": ("verify", "fresh"),
    "inspect": ("inspect", "source"),
    "stats": ("inspect", "source", "--stats"),
    "diff": ("diff", "source", "fresh"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    write_sharded(root / "work/source")
    write_json(root / "work/source/config.json", {"model_type": "bert"})
    write_json(root / "work/source/vocab/merges.json", {})
    (root / "work/source/README.md").write_text("---\nlicense: mit\n---\n")
    build(root)
    assert _run(root, "perturb", "source", "-o", "fresh").returncode == 0
    return root


def _run(root: Path, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    homes = {"XDG_CACHE_HOME": str(root / "work/cache"), "HF_HOME": str(root / "work/hf")}
    environment = clean_env(**homes, PYTHONSAFEPATH="1") | (env or {})  # no module is looked for in the work folder
    words = command(*args)
    return subprocess.run(words, cwd=root / "work", env=environment, capture_output=True, text=True, timeout=100)


def _is_hit(root: Path, name: str, call: str, nth: int) -> bool:
    """Run a command whose nth call fails, and hold what it does against what it should; tell whether there was one."""
    out, hit = root / "work/out", root / "hit"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(root / "work/cache", ignore_errors=True)
    hit.unlink(missing_ok=True)
    words = _COMMANDS[name]
    done = _run(root, *words, env=failing(root / "faults.so", call, errno.EIO, root / "work", nth=nth, hit=hit))
    if not hit.exists():
        return False
    if done.returncode:
        assert done.returncode == (4 if words[0] == "verify" else 1), done.stderr
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1
        # a file by its path, or what was given by the name that it was given
        assert str(root) in done.stderr or done.stderr.startswith(
            tuple(f"error: {word}{c}" for word in words[1:] for c in ":/")
        )
    else:
        assert done.stderr == ""
    if "-o" in words:
        if done.returncode:
            assert _run(root, *words).returncode == 0
        assert tree_digest(out) == tree_digest(root / "work/fresh")
    return True


@pytest.mark.parametrize(
    ("name", "call", "nth"),
    [
        *(("perturb", call, 2) for call in ("read", "write", "fsync", "rename", "close")),
        *(("verify", "read", 9), ("stats", "open", 3), ("diff", "list", 1), ("inspect", "map", 1)),
    ],
)
def test_failing_call_is_one_line_with_its_file(name: str, call: str, nth: int, root: Path) -> None:
    assert _is_hit(root, name, call, nth)


@pytest.mark.sweep
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", _COMMANDS)
def test_every_failing_call_is_one_line_with_its_file(name: str, call: str, root: Path) -> None:
    assert any(not _is_hit(root, name, call, nth) for nth in itertools.count(1))


@pytest.fixture(scope="module")
def pushed(root: Path) -> Iterator[Callable[[str, int], bool]]:
    """Push with a call that fails, as _is_hit does it for what needs no Hub."""
    with Hub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.login("me"), "HF_HUB_OFFLINE": "0"}
        words = ("push", "fresh", "me/noisy")

        def push(call: str, nth: int) -> bool:
            hub.repos.pop("me/noisy", None)
            hub.stored.clear()
            hit = root / "hit"
            hit.unlink(missing_ok=True)
            shutil.rmtree(root / "work/cache", ignore_errors=True)
            faults = failing(root / "faults.so", call, errno.EIO, root / "work", nth=nth, hit=hit)
            done = _run(root, *words, env=online | faults)
            if not hit.exists():
                return False
            if done.returncode:
                assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
                assert done.stderr.startswith("error: ")
                names = [path.name for path in (root / "work/fresh").iterdir()]
                named = any(name in done.stderr for name in (str(root), "fresh/", "error: fresh:", *names))
                assert named, done.stderr
                assert _run(root, *words, env=online).returncode == 0
            files = {name: data for name, data in hub.repos["me/noisy"].files.items() if name.endswith(".safetensors")}
            assert files == {path.name: path.read_bytes() for path in (root / "work/fresh").glob("*.safetensors")}
            return True

        yield push


@pytest.mark.parametrize(("call", "nth"), [("open", 4), ("read", 6), ("stat", 8)])
def test_failing_call_of_a_push_is_one_line_with_its_file(
    call: str, nth: int, pushed: Callable[[str, int], bool]
) -> None:
    assert pushed(call, nth)


@pytest.mark.sweep
@pytest.mark.parametrize("call", CALLS)
def test_every_failing_call_of_a_push_is_one_line_with_its_file(call: str, pushed: Callable[[str, int], bool]) -> None:
    assert any(not pushed(call, nth) for nth in itertools.count(1))
