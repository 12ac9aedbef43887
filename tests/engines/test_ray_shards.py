"""perturb, materialize and verify on a real Ray cluster of two nodes: the bytes of one process, whatever is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from checkpoints import tree_digest, write_json
from commands import clean_env, command
from plain_study import wait_for
from safetensors.numpy import load_file, save_file

from surgery import perturb_checkpoint
from surgery.engines.registry import open_engine
from surgery.perturb.shared import PARTS

pytest.importorskip("ray", reason="Ray is not installed: make test-engines")

KILLS = 20 if "SURGERY_TEST_ALL" in os.environ else 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """400 MB in eight shards, and what one process makes of it."""
    root = tmp_path_factory.mktemp("shards")
    rng, weight_map = np.random.default_rng(0), {}
    (root / "source").mkdir()
    for number in range(1, 9):
        shard, name = f"model-{number:05}-of-00008.safetensors", f"layer.{number}.weight"
        save_file({name: rng.standard_normal((5000, 2500), dtype=np.float32)}, root / "source" / shard)
        weight_map[name] = shard
    write_json(root / "source/model.safetensors.index.json", {"weight_map": weight_map})
    write_json(root / "source/config.json", {"model_type": "bert"})
    perturb_checkpoint(root / "source", root / "whole", seed=7)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def start(tmp_path, cluster_of_ray):
    """Start `surgery ARGS --engine ray` in a process of its own."""
    env = clean_env(RAY_ADDRESS=cluster_of_ray.address, HF_HOME=str(tmp_path))
    return lambda *args: subprocess.Popen(
        command(*args, "--engine", "ray"),
        env=env,
        cwd=tmp_path,
        stdout=-1,
        stderr=-1,
        text=True,
        start_new_session=True,
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def workers(cluster_of_ray):
    """Return the workers that are at a task now, of this cluster alone."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            raylet = process.parent()
            return raylet is not None and cluster_of_ray.address in " ".join(raylet.cmdline())
        except psutil.Error:
            return False

    def find() -> list[psutil.Process]:
        named = [each for each in psutil.process_iter(["name"]) if (each.info["name"] or "").startswith("ray::surgery")]
        return [each for each in named if is_ours(each)]

    return find


def test_folders_are_those_of_one_process(root, tmp_path, start):
    assert end(start("perturb", root / "source", "--seed", 7, "-o", "out"))[::2] == (0, "")
    assert tree_digest(tmp_path / "out") == tree_digest(root / "whole")
    assert end(start("materialize", root / "whole", "-o", "again"))[::2] == (0, "")
    assert tree_digest(tmp_path / "again") == tree_digest(root / "whole")
    assert end(start("verify", "again"))[::2] == (0, "")
    name = "model-00003-of-00008.safetensors"
    save_file({"layer.3.weight": load_file(tmp_path / "again" / name)["layer.3.weight"] + 1}, tmp_path / "again" / name)
    code, out, _ = end(start("verify", "again", "--json"))
    found = json.loads(out)
    assert (code, [each["name"] for each in found["differences"]]) == (1, ["layer.3.weight"])
    assert not list(tmp_path.glob(".surgery*"))


def test_workers_killed_at_any_moment_end_in_the_same_bytes(root, tmp_path, start, workers):
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        driver = start("perturb", root / "source", "--seed", 7, "-o", "out")
        wait_for(workers, 60)
        for _ in range(3):
            time.sleep(moments.uniform(0.0, 0.4))
            for worker in workers()[:1]:
                worker.kill()
                kills += 1
        code, _, err = end(driver)
        assert code == 0, err
        assert tree_digest(tmp_path / "out") == tree_digest(root / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_node_that_is_lost_is_done_without(root, tmp_path, start, workers, cluster_of_ray):
    driver = start("perturb", root / "source", "--seed", 7, "-o", "out")
    try:
        wait_for(lambda: len(workers()) == 2, 60)
        cluster_of_ray.tell("remove")
        assert end(driver)[0] == 0
    finally:
        cluster_of_ray.tell("add")
    assert tree_digest(tmp_path / "out") == tree_digest(root / "whole")


def test_a_driver_that_was_killed_goes_on_by_the_same_command(root, tmp_path, start, workers):
    words = ("perturb", root / "source", "--seed", 7, "-o", "out")
    driver = start(*words)
    finished = tmp_path / "out" / PARTS
    wait_for(lambda: list(finished.rglob("finished/*.json")), 60)
    os.killpg(driver.pid, signal.SIGKILL)
    end(driver)
    assert (tmp_path / "out/surgery.unfinished.json").exists()
    assert end(start(*words))[::2] == (0, "")
    assert tree_digest(tmp_path / "out") == tree_digest(root / "whole")
    wait_for(lambda: not workers(), 30)


def test_an_error_of_a_node_is_one_line(root, tmp_path, start):
    shutil.copytree(root / "source", tmp_path / "broken")
    shard = tmp_path / "broken/model-00006-of-00008.safetensors"
    tensors = load_file(shard)
    tensors["layer.6.weight"][0, 0] = np.nan
    save_file(tensors, shard)
    code, out, err = end(start("perturb", "broken", "-o", "out"))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {shard}: 'layer.6.weight': expected finite values, got NaN")
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / shard.name).exists()


def test_a_second_run_finds_warm_workers(root, tmp_path, cluster_of_ray, monkeypatch):
    """In one process that has joined the cluster, as in a notebook."""
    monkeypatch.setenv("RAY_ADDRESS", cluster_of_ray.address)
    keeps = open_engine("ray", logs=tmp_path)  # connects
    try:
        for number in range(2):
            perturb_checkpoint(root / "source", tmp_path / str(number), seed=7, engine="ray")
            assert tree_digest(tmp_path / str(number)) == tree_digest(root / "whole")
    finally:
        keeps.close()
