"""perturb, materialize and verify under a real Slurm with two nodes: the bytes of one process, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from checkpoints import tree_digest, write_json
from commands import clean_env, command
from plain_study import wait_for
from safetensors.numpy import save_file
from slurm_cluster import CannotStartError, slurm_cluster

from surgery import perturb_checkpoint

pytest.importorskip("submitit", reason="submitit is not installed: make test-engines")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
            yield started
    except CannotStartError as error:
        pytest.skip(f"no Slurm here: {error}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """800 MB in four shards, each a task, and what one process makes of it."""
    root = tmp_path_factory.mktemp("shards")
    rng, weight_map = np.random.default_rng(0), {}
    (root / "source").mkdir()
    for number in range(1, 5):
        shard, name = f"model-{number:05}-of-00004.safetensors", f"layer.{number}.weight"
        save_file({name: rng.standard_normal((5000, 10_000), dtype=np.float32)}, root / "source" / shard)
        weight_map[name] = shard
    write_json(root / "source/model.safetensors.index.json", {"weight_map": weight_map})
    write_json(root / "source/config.json", {"model_type": "bert"})
    perturb_checkpoint(root / "source", root / "whole", seed=7)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def start(tmp_path, cluster):
    """Start `surgery ARGS --engine slurm` in a process of its own."""
    env = clean_env(**cluster.env, HF_HOME=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    yield lambda *args: subprocess.Popen(command(*args, "--engine", "slurm"), env=env, cwd=tmp_path, **pipes)
    cluster.output("scancel", "--quiet", f"--user={os.getuid()}")
    wait_for(lambda: not cluster.output("squeue", "-h").strip())


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def jobs_of(cluster) -> list[str]:
    return cluster.output("squeue", "-h", "--array", "-o", "%i").split()


def test_folders_are_those_of_one_process(root, tmp_path, start):
    assert end(start("perturb", root / "source", "--seed", 7, "-o", "out"))[::2] == (0, "")
    assert tree_digest(tmp_path / "out") == tree_digest(root / "whole")
    code, out, err = end(start("verify", "out", "--json"))
    assert (code, err, json.loads(out)["equal"]) == (0, "", True)
    assert not list(tmp_path.glob(".surgery*"))


def test_a_node_that_is_lost_and_a_driver_that_is_killed(root, tmp_path, start, cluster):
    words = ("perturb", root / "source", "--seed", 7, "-o", "out")
    driver = start(*words)
    wait_for(lambda: len(jobs_of(cluster)) == 4, 60)
    cluster.kill_node("n2")
    os.killpg(driver.pid, signal.SIGKILL)
    end(driver)
    former = jobs_of(cluster)
    again = start(*words)
    wait_for(lambda: not {*former} & {*jobs_of(cluster)}, 120)
    cluster.start_node("n2")
    code, _, err = end(again)
    assert code == 0, err
    assert tree_digest(tmp_path / "out") == tree_digest(root / "whole")


def test_an_error_of_a_node_is_one_line(root, tmp_path, start):
    perturb_checkpoint(root / "source", tmp_path / "whole", seed=7)
    shutil.copytree(root / "source", tmp_path / "other")
    shard = tmp_path / "other/model-00002-of-00004.safetensors"
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    code, out, err = end(start("materialize", "whole", "--source", "other", "-o", "out"))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {shard}: expected the recipe's source (blake3 ")
    assert err.count("\n") == 1
