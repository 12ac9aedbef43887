"""`--array I/N`: parts of a run in any order, at once, killed and run again end in the bytes of one process."""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree_digest, write_json, write_sharded
from commands import Ran, clean_env, command
from safetensors.numpy import load_file, save_file

from surgery import perturb_checkpoint
from surgery.errors import OutputError, SourceError
from surgery.noisytune import NoisyTune
from surgery.perturb import parts, tasks
from surgery.perturb.execute import execute
from surgery.perturb.materialize import plan_materialize
from surgery.perturb.parts import Part, PartDone, execute_part
from surgery.perturb.plan import Plan, make_plan
from surgery.perturb.same_run import open_output
from surgery.perturb.shared import FINISHED, PARTS, GoneError

TIMES = 7 if "SURGERY_TEST_ALL" in os.environ else 1
JOURNAL = "surgery.unfinished.json"
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards, with an index and a config, and a table that two of them hold."""
    folder = tmp_path / "source"
    write_sharded(folder)
    table = np.random.default_rng(7).standard_normal((32, 16)).astype(np.float32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, shard in (("embed.weight", SHARDS[0]), ("head.weight", SHARDS[2])):
        save_file(load_file(folder / shard) | {name: table}, folder / shard, metadata={"format": "pt"})
        index["weight_map"][name] = shard
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", {"model_type": "bert"})
    return folder


def plan_of(source: Path, out: Path, **settings: object) -> Plan:
    is_recipe_only = bool(settings.pop("recipe_only", False))
    return make_plan(source, out, NoisyTune(seed=3, **settings), recipe_only=is_recipe_only)


def whole(source: Path, **settings: object) -> dict[str, str]:
    """What one process makes of it."""
    out = source.parent / "whole"
    perturb_checkpoint(source, out, seed=3, **settings)
    return tree_digest(out)


def do(plan: Plan, *texts: str, **how: object) -> list[PartDone]:
    return [execute_part(plan, Part(*map(int, text.split("/"))), workers=2, **how) for text in texts]


# -- the bytes of one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "settings"),
    [
        ("0/1", {}),
        ("2/3 0/3 1/3", {}),
        ("6/7 0/7 2/7 1/7 3/7", {}),
        ("2/3 0/3 1/3", {"scale": "global"}),
        ("6/7 0/7 2/7 1/7 3/7", {"scale": "global"}),
        ("1/2 0/2", {"recipe_only": True}),
    ],
)
def test_parts_end_in_the_bytes_of_one_process(source, tmp_path, array, settings):
    expected = whole(source, **settings)
    *first, last = do(plan_of(source, tmp_path / "out", **settings), *array.split())
    assert [done.recipe for done in first if done.left] == [None] * len([done for done in first if done.left])
    assert last.recipe
    assert tree_digest(tmp_path / "out") == expected


def test_a_part_says_what_is_left(source, tmp_path):
    first, idle, last = do(plan_of(source, tmp_path / "out"), "1/2", "6/7", "0/2")
    assert (first.shards, first.left, first.recipe) == ((SHARDS[1],), (SHARDS[0], SHARDS[2]), None)
    assert (idle.shards, idle.left) == ((), (SHARDS[0], SHARDS[2]))
    assert (last.shards, last.left) == ((SHARDS[0], SHARDS[2]), ())


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_parts_materialize(source, tmp_path, scale):
    expected = whole(source, scale=scale)
    plan = plan_materialize(tmp_path / "whole", tmp_path / "out", source=None, token=None, checks_source=False)
    assert do(plan, "1/2", "0/2")[-1].recipe
    assert tree_digest(tmp_path / "out") == expected


def test_parts_that_materialize_refuse_another_source(source, tmp_path):
    whole(source)
    data = bytearray((source / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (source / SHARDS[1]).write_bytes(data)
    plan = plan_materialize(tmp_path / "whole", tmp_path / "out", source=None, token=None, checks_source=False)
    assert do(plan, "0/3")[0].left
    with pytest.raises(SourceError, match="expected the recipe's source") as refused:
        do(plan, "1/3")
    assert str(source / SHARDS[1]) in str(refused.value)
    assert not (tmp_path / "out" / SHARDS[1]).exists()


def test_a_part_that_is_run_again_does_nothing(source, tmp_path):
    plan = plan_of(source, tmp_path / "out")
    do(plan, "0/2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    do(plan, "0/2")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    done = do(plan, "1/2", "0/2", "1/2")
    assert [one.recipe == done[0].recipe for one in done] == [True] * 3


def test_parts_know_each_others_ties(source, tmp_path, monkeypatch):
    """Both copies of a table get one noise, and only the first part has to find that out."""
    expected = whole(source)
    plan = plan_of(source, tmp_path / "out")
    do(plan, "0/2")
    monkeypatch.setattr(tasks, "find_ties", None)
    assert do(plan, "1/2")[0].recipe.files[2].tied == {"head.weight": "embed.weight"}
    assert tree_digest(tmp_path / "out") == expected


def test_one_process_finishes_what_parts_have_begun(source, tmp_path, monkeypatch):
    expected = whole(source, scale="global")
    plan = plan_of(source, tmp_path / "out", scale="global")
    do(plan, "1/3")
    monkeypatch.setattr("surgery.perturb.here.measure", None)  # all has been measured
    before = (tmp_path / "out" / SHARDS[1]).stat().st_ino
    execute(plan)
    assert tree_digest(tmp_path / "out") == expected
    assert (tmp_path / "out" / SHARDS[1]).stat().st_ino == before
    assert do(plan, "0/3")[0].recipe


def test_parts_finish_what_one_process_has_begun(source, tmp_path):
    expected = whole(source)
    plan = plan_of(source, tmp_path / "out")
    recipe = perturb_checkpoint(source, tmp_path / "whole", seed=3)
    folder = open_output(plan)
    with folder.claim(overwrite=False):  # and left as a killed run leaves it
        shutil.copy(tmp_path / "whole" / SHARDS[0], tmp_path / "out")
        size = (tmp_path / "whole" / SHARDS[0]).stat().st_size
        folder.finish_shard(SHARDS[0], None, {"size": size, **recipe.files[0].to_json()})
    assert do(plan, "1/2")[0].left == (SHARDS[2],)
    assert do(plan, "0/2")[0].recipe
    assert tree_digest(tmp_path / "out") == expected


# -- two at once ------------------------------------------------------------------------------------------------------


def test_of_two_at_one_shard_one_writes_it(source, tmp_path):
    plan = plan_of(source, tmp_path / "out")
    do(plan, "1/3")
    mine, theirs = open_output(plan).shared, open_output(plan).shared
    lost, won = mine.open_part(SHARDS[0]), theirs.open_part(SHARDS[0])
    lost.append(b"half")
    won.append(b"whole")
    mine.finish_shard(SHARDS[0], lost, {})
    assert not (tmp_path / "out" / SHARDS[0]).exists()
    assert not mine.records.has("finished", SHARDS[0])
    theirs.finish_shard(SHARDS[0], won, {})
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == b"whole"
    assert mine.records.has("finished", SHARDS[0])


@pytest.mark.parametrize("how", ["finished", "replaced", "being replaced"])
def test_what_was_taken_for_lost_writes_no_more(source, tmp_path, how):
    plan = plan_of(source, tmp_path / "out")
    do(plan, "1/3")
    shared = open_output(plan).shared
    part = shared.open_part(SHARDS[0])
    part.append(b"late")
    other = plan_of(source, tmp_path / "out", lam=0.1)
    if how == "being replaced":
        do(other, "1/3", overwrite=True)
    else:
        execute(plan if how == "finished" else other, overwrite=how == "replaced")
    before = tree_digest(tmp_path / "out")
    for late in (lambda: shared.finish_shard(SHARDS[0], part, {}), lambda: shared.open_part(SHARDS[1])):
        with pytest.raises(GoneError) as refused:
            late()
    assert str(refused.value) == (
        f"{tmp_path}/out: expected a run that goes on, got one that another command has finished or replaced."
    )
    assert tree_digest(tmp_path / "out") == before


def test_a_part_that_another_process_overtakes_is_done(source, tmp_path, monkeypatch):
    expected = whole(source)
    plan = plan_of(source, tmp_path / "out")
    write = parts.here.write

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(parts.here, "write", write)
        execute(plan)
        write(*args, **kwargs)

    monkeypatch.setattr(parts.here, "write", overtaken)
    assert do(plan, "0/2")[0].recipe
    assert tree_digest(tmp_path / "out") == expected


def test_of_two_that_are_the_last_one_completes_the_folder(source, tmp_path):
    plan = plan_of(source, tmp_path / "out")
    recipe = do(plan, "0/1")[0].recipe
    assert parts._complete(plan, open_output(plan)) == recipe


def test_a_record_of_an_older_version_is_none(source, tmp_path):
    plan = plan_of(source, tmp_path / "out", recipe_only=True)
    do(plan, "0/3")
    records = open_output(plan).shared.records
    record = records.read(FINISHED)[SHARDS[0]]
    records.write(FINISHED, SHARDS[0], record | {"digest": "sha256:" + "0" * 64})
    assert do(plan, "1/3", "2/3")[1].left == (SHARDS[0],)
    folder = open_output(plan)
    with folder.claim(overwrite=False):
        assert SHARDS[0] not in folder.finished
        assert folder.shared.missing(SHARDS) == [SHARDS[0]]
    assert do(plan, "0/3")[0].recipe
    assert tree_digest(tmp_path / "out") == whole(source, recipe_only=True)


def test_overwrite_replaces_another_run_once(source, tmp_path):
    expected = whole(source)
    perturb_checkpoint(source, tmp_path / "out", lam=0.1)
    plan = plan_of(source, tmp_path / "out")
    with pytest.raises(OutputError, match="expected a new or empty folder"):
        do(plan, "0/2")
    do(plan, "0/2", "1/2", "0/2", overwrite=True)
    assert tree_digest(tmp_path / "out") == expected


# -- what is refused --------------------------------------------------------------------------------------------------


def test_parts_of_another_run_are_refused(source, tmp_path):
    do(plan_of(source, tmp_path / "out"), "0/2")
    with pytest.raises(OutputError) as refused:
        do(plan_of(source, tmp_path / "out", lam=0.1), "1/2")
    assert "got one that another command did not finish. Finish it with `surgery perturb" in str(refused.value)


def test_parts_of_another_version_are_refused(source, tmp_path, monkeypatch):
    plan = plan_of(source, tmp_path / "out")
    do(plan, "0/2")
    monkeypatch.setattr(parts, "version", lambda _: "9.9")
    with pytest.raises(OutputError) as refused:
        do(plan, "1/2")
    assert str(refused.value) == (
        f"{tmp_path}/out: expected model-surgery 0.1.0, which other parts have, got 9.9. Install one version on all "
        "machines."
    )


def test_a_part_beside_a_whole_run_is_refused_in_the_end(source, tmp_path, monkeypatch):
    plan = plan_of(source, tmp_path / "out")
    monkeypatch.setattr(parts, "_LONGEST_WAIT", 0.3)
    with open_output(plan).claim(overwrite=False):
        begin = time.monotonic()
        with pytest.raises(OutputError, match="got one that another run is writing to"):
            do(plan, "0/2")
        assert time.monotonic() - begin > 0.3


@pytest.mark.parametrize("array", ["2/2", "0/0", "-1/2", "1", "a/2", "1/2/3", "\u0661/2", "0/99999999"])
def test_what_is_no_part_is_a_wrong_option(run_here: Callable[..., Ran], source, array):
    ran = run_here("perturb", source, "--array", array)
    assert ran.code == 2
    assert f"got {array}." in ran.err


@pytest.mark.parametrize("option", ["--plot", "--push", "--dry-run", "--engine"])
def test_what_takes_a_whole_checkpoint_is_refused(refuses: Callable[..., None], source, option):
    value = {"--plot": ["a.png"], "--push": ["me/noisy"], "--engine": ["ray"]}.get(option, [])
    message = f"--array: expected no {option} with it, got both. Use {option} without --array."
    refuses(message, source, "--array", "0/2", option, *value)


# -- real processes ---------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(run_here: Callable[..., Ran], source, tmp_path):
    ran = run_here("perturb", source, "-o", "out", "--array", "1/2")
    assert ran.code == 0
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[:2] == [f"part 1/2 of {source} perturbed into {tmp_path}/out", "shards 1 of this part, finished"]
    assert lines[2].startswith(f"left 2 ({SHARDS[0]}, {SHARDS[2]}), to other parts: the last to end")
    ran = run_here("perturb", source, "-o", "out", "--array", "0/2")
    assert "8 perturbed, 0 copied" in ran.out


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """40 MB in eight shards."""
    folder, weight_map = tmp_path / "large", {}
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1, 9):
        shard, name = f"model-{number:05}-of-00008.safetensors", f"layer.{number}.weight"
        save_file({name: rng.standard_normal((1000, 1250), dtype=np.float32)}, folder / shard)
        weight_map[name] = shard
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "bert"})
    return folder


def start(source: Path, out: Path, array: str) -> subprocess.Popen[str]:
    words = command("perturb", source, "-o", out, "--seed", 3, "--array", array, "--workers", 2)
    return subprocess.Popen(words, env=clean_env(), stdout=-1, stderr=-1, text=True, cwd=source.parent)


def test_parts_at_once_that_are_killed_end_in_the_same_bytes(large, tmp_path):
    expected, moments, kills = whole(large), random.Random(0), 0
    for attempt in range(TIMES):
        out = tmp_path / f"out-{attempt}"
        running = {array: start(large, out, array) for array in ("0/3", "1/3", "2/3")}
        for array in running:
            with suppress(subprocess.TimeoutExpired):
                running[array].wait(moments.uniform(0.05, 0.35))
            running[array].kill()
            kills += running[array].wait() != 0
            running[array].communicate()
            running[array] = start(large, out, array)
        for process in running.values():
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, "")
        assert tree_digest(out) == expected
    assert kills


def test_nothing_is_left_of_parts(source, tmp_path):
    plan = plan_of(source, tmp_path / "out")
    do(plan, "0/2")
    assert (tmp_path / "out" / PARTS).is_dir()
    assert (tmp_path / "out" / JOURNAL).exists()
    do(plan, "1/2")
    assert not list((tmp_path / "out").glob("surgery.unfinished*"))
