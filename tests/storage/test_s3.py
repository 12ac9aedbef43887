"""The commands against a real S3 server, by the real s3fs, in processes of their own: faults, kills, credentials."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree_digest, write_json
from commands import clean_env, command
from s3 import DROPPED, S3, SECRET
from safetensors.numpy import save_file

LOCK, JOURNAL, RECORDS = ".surgery.lock.json", "surgery.unfinished.json", "surgery.unfinished/"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
MODEL = "s3://models/model"
_numbers = count()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """20 MB in two shards, each of more than one part, and what is made of it on a disk."""
    root = tmp_path_factory.mktemp("s3")
    rng = np.random.default_rng(0)
    weight_map = {}
    (root / "model").mkdir()
    for number, shard in enumerate(SHARDS, start=1):
        weights = {f"layer.{number}.weight": rng.standard_normal((1700, 1600), dtype=np.float32)}
        weights[f"layer.{number}.norm.weight"] = rng.standard_normal(1600, dtype=np.float32)
        save_file(weights, root / "model" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, shard)
    write_json(root / "model/model.safetensors.index.json", {"weight_map": weight_map})
    write_json(root / "model/config.json", {"model_type": "bert"})
    return root


@pytest.fixture(scope="module")
def s3(root) -> Iterator[S3]:
    with S3() as s3:
        s3.upload("models", root / "model", "model")
        yield s3


@pytest.fixture
def bucket(s3) -> str:
    """A bucket of this test's own, empty."""
    s3.faults.clear()
    s3.requests.clear()
    name = f"bucket-{next(_numbers)}"
    s3.client.create_bucket(Bucket=name)
    return name


class Commands:
    """Runs commands, and keeps all that they print."""

    def __init__(self, folder: Path, s3: S3) -> None:
        self.folder = folder
        self.env = clean_env(**s3.env, XDG_CACHE_HOME=str(folder / "cache"), USER="me")
        self.said = ""

    def start(self, *words: object) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command(*words), cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        out, err = process.communicate(timeout=100)
        self.said += out + err
        return process.returncode, err

    def run(self, *words: object) -> tuple[int, str]:
        return self.end(self.start(*words))


@pytest.fixture
def commands(tmp_path, s3, bucket) -> Iterator[Commands]:
    commands = Commands(tmp_path, s3)
    yield commands
    written = b"".join(s3.read(bucket, key) for key in s3.keys(bucket) if not key.endswith(".safetensors"))
    for secret in (SECRET, s3.env["AWS_ACCESS_KEY_ID"]):
        assert secret not in commands.said
        assert secret.encode() not in written


def digests(s3: S3, bucket: str, folder: Path, prefix: str = "out/") -> dict[str, str]:
    """Bring a folder here; return the digests of its files."""
    for key in s3.keys(bucket, prefix):
        path = folder / key.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.read(bucket, key))
    return tree_digest(folder)


@pytest.fixture(scope="module")
def whole(s3, tmp_path_factory) -> dict[str, str]:
    """What an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert Commands(folder, s3).run("perturb", MODEL, "-o", "s3://models/out") == (0, "")
    return digests(s3, "models", folder / "files")


def test_every_command_takes_urls(s3, bucket, commands, root, tmp_path):
    out = f"s3://{bucket}/out"
    assert commands.run("perturb", MODEL, "-o", out) == (0, "")
    assert commands.run("perturb", root / "model", "-o", "disk") == (0, "")
    assert commands.run("verify", out) == (0, "")
    assert commands.run("diff", MODEL, out) == (0, "")
    assert "the figures agree" in commands.said
    assert commands.run("inspect", out, "--stats") == (0, "")
    assert commands.run("materialize", out, "-o", f"s3://{bucket}/again") == (0, "")
    whole = [path for method, path, range in s3.requests if (method, range) == ("GET", None)]
    assert not [path for path in whole if path.endswith(".safetensors?")]
    assert s3.uploads(bucket) == []
    found, expected = digests(s3, bucket, tmp_path / "found"), tree_digest(tmp_path / "disk")
    assert found.keys() == expected.keys()
    assert {name for name in expected if found[name] != expected[name]} == {"surgery.json"}
    recipe = json.loads(s3.read(bucket, "out/surgery.json"))
    tags = [s3.client.head_object(Bucket="models", Key=f"model/{name}")["ETag"].strip('"') for name in SHARDS]
    assert [file["source_version"] for file in recipe["files"]] == [f"ETag {tag}" for tag in tags]
    assert [file["digest"] for file in recipe["files"]] == [
        file["digest"] for file in json.loads((tmp_path / "disk/surgery.json").read_text())["files"]
    ]
    assert digests(s3, bucket, tmp_path / "again", "again/") == found


def test_a_run_that_has_finished_is_not_done_again(s3, bucket, commands):
    words = ("perturb", MODEL, "-o", f"s3://{bucket}/out")
    assert commands.run(*words) == (0, "")
    s3.requests.clear()
    assert commands.run(*words) == (0, "")
    assert "this command had finished here before" in commands.said
    assert not s3.asked("PUT", "")


@pytest.mark.parametrize(
    ("method", "part", "kind"),
    [
        ("GET", "model-00001", 503),
        ("GET", "model-00002", DROPPED),
        ("PUT", "partNumber=1", 503),
        ("POST", "uploadId=", 503),
        ("PUT", "surgery.json", 503),
        ("GET", "list-type", 503),
    ],
    ids=["slow read", "dropped read", "slow part", "slow completion", "slow recipe", "slow list"],
)
def test_faults_that_pass_are_not_seen(s3, bucket, commands, method, part, kind):
    s3.fail(method, part, kind, times=2)
    assert commands.run("perturb", MODEL, "-o", f"s3://{bucket}/out") == (0, "")
    assert not any(fault.times for fault in s3.faults)
    assert commands.run("verify", f"s3://{bucket}/out") == (0, "")


@pytest.mark.parametrize(
    ("method", "part"),
    [("GET", "model-00002"), ("PUT", "partNumber=2"), ("PUT", f"out/{JOURNAL}"), ("GET", "list-type")],
    ids=["read", "part", "journal", "list"],
)
def test_what_is_not_allowed_is_one_line_and_leaves_nothing_half_sent(s3, bucket, commands, method, part):
    s3.fail(method, part, 403, times=1000)
    code, err = commands.run("perturb", MODEL, "-o", f"s3://{bucket}/out")
    s3.faults.clear()
    assert code == 1
    assert re.fullmatch(r"error: s3://\S+: expected access to it, got AccessDenied .*\n", err)
    assert s3.uploads(bucket) == []
    assert f"out/{LOCK}" not in s3.keys(bucket)
    assert commands.run("perturb", MODEL, "-o", f"s3://{bucket}/out") == (0, "")


MOMENTS = {
    "claimed": ("PUT", f"out/{JOURNAL}"),
    "first part": ("PUT", "partNumber=1"),
    "second part": ("PUT", "partNumber=2"),
    "completion": ("POST", "uploadId="),
    "record": ("PUT", f"out/{RECORDS}"),
    "index": ("PUT", "out/model.safetensors.index.json"),
    "recipe": ("PUT", "out/surgery.json"),
    "journal goes": ("DELETE", f"out/{JOURNAL}"),
    "lock goes": ("DELETE", f"out/{LOCK}"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_in_the_same_bytes(s3, bucket, commands, tmp_path, whole, moment):
    words = ("perturb", MODEL, "-o", f"s3://{bucket}/out")
    processes: list[subprocess.Popen[str]] = []
    s3.fail(*MOMENTS[moment], lambda: os.kill(processes[0].pid, signal.SIGKILL))
    processes.append(commands.start(*words))
    assert commands.end(processes[0])[0] == -signal.SIGKILL
    assert (f"out/{LOCK}" in s3.keys(bucket)) == (moment != "lock goes")  # the server does what it was asked
    assert commands.run(*words) == (0, "")
    assert digests(s3, bucket, tmp_path / "found") == whole
    assert s3.uploads(bucket) == []


def test_ctrl_c_leaves_no_lock_and_nothing_half_sent(s3, bucket, commands, tmp_path, whole):
    words = ("perturb", MODEL, "-o", f"s3://{bucket}/out")
    processes: list[subprocess.Popen[str]] = []
    s3.fail("PUT", "partNumber=2", lambda: os.kill(processes[0].pid, signal.SIGINT))
    processes.append(commands.start(*words))
    assert commands.end(processes[0]) == (130, "interrupted: run the same command again.\n")
    assert f"out/{LOCK}" not in s3.keys(bucket)
    assert commands.run(*words) == (0, "")
    assert digests(s3, bucket, tmp_path / "found") == whole
    assert s3.uploads(bucket) == []


def test_finished_shards_are_kept(s3, bucket, commands):
    words = ("perturb", MODEL, "-o", f"s3://{bucket}/out", "--workers", "1")
    processes: list[subprocess.Popen[str]] = []
    s3.fail("PUT", f"{RECORDS}{SHARDS[1]}", lambda: os.kill(processes[0].pid, signal.SIGKILL))
    processes.append(commands.start(*words))
    commands.end(processes[0])
    before = s3.client.head_object(Bucket=bucket, Key=f"out/{SHARDS[0]}")["LastModified"]
    s3.requests.clear()
    assert commands.run(*words) == (0, "")
    assert s3.client.head_object(Bucket=bucket, Key=f"out/{SHARDS[0]}")["LastModified"] == before
    assert not [path for path in s3.asked("PUT", SHARDS[0]) if RECORDS not in path]


def test_two_runs_at_once_are_one_and_a_refusal(s3, bucket, commands):
    words = ("perturb", MODEL, "-o", f"s3://{bucket}/out")
    refused: list[tuple[int, str]] = []
    s3.fail("PUT", "partNumber=1", lambda: refused.append(commands.run(*words)))
    assert commands.run(*words) == (0, "")
    ((code, err),) = refused
    assert code == 1
    assert re.fullmatch(
        rf"error: s3://{bucket}/out: expected a folder for this run alone, got one that me@\S+ \(process \d+\) has "
        rf"been writing to for \d+ s\. Wait for it, or choose another with -o; if it has ended, remove s3://{bucket}/out/"
        rf"{re.escape(LOCK)}\.\n",
        err,
    )


def test_a_source_that_is_written_meanwhile_is_refused(s3, bucket, commands, root):
    data = bytearray((root / "model" / SHARDS[0]).read_bytes())
    data[-1] ^= 1
    key = f"model/{SHARDS[0]}"
    s3.upload(bucket, root / "model", "model")
    s3.fail("PUT", "partNumber=1", lambda: s3.client.put_object(Bucket=bucket, Key=key, Body=bytes(data)))
    code, err = commands.run("perturb", f"s3://{bucket}/model", "-o", f"s3://{bucket}/out", "--workers", "1")
    assert (code, err) == (
        1,
        f"error: s3://{bucket}/{key}: expected an object at rest, got one that changed while it was read. Run again.\n",
    )
    assert "out/surgery.json" not in s3.keys(bucket)
    code, err = commands.run("perturb", f"s3://{bucket}/model", "-o", f"s3://{bucket}/out")
    assert code == 1
    assert "expected the source as it was when this run began, got one that has changed since." in err


def test_materialize_does_not_read_a_source_twice_that_is_at_rest(s3, bucket, commands, tmp_path):
    assert commands.run("perturb", MODEL, "-o", f"s3://{bucket}/out") == (0, "")
    commands.env["XDG_CACHE_HOME"] = str(tmp_path / "another")
    s3.requests.clear()
    assert commands.run("materialize", f"s3://{bucket}/out", "-o", "disk") == (0, "")
    reads = len(s3.asked("GET", SHARDS[0]))
    s3.requests.clear()
    assert commands.run("perturb", MODEL, "-o", "again") == (0, "")
    assert reads <= len(s3.asked("GET", SHARDS[0]))


def test_verify_names_what_differs(s3, bucket, commands):
    assert commands.run("perturb", MODEL, "-o", f"s3://{bucket}/out") == (0, "")
    data = bytearray(s3.read(bucket, f"out/{SHARDS[1]}"))
    data[-1] ^= 1
    s3.client.put_object(Bucket=bucket, Key=f"out/{SHARDS[1]}", Body=bytes(data))
    code, _ = commands.run("verify", f"s3://{bucket}/out")
    assert code == 1
    assert "layer.2.weight" in commands.said
    s3.fail("GET", SHARDS[0], 403, times=1000)
    assert commands.run("verify", f"s3://{bucket}/out")[0] == 4


def test_wrong_credentials_are_one_line(commands):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del commands.env[name]
    commands.env |= {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    code, err = commands.run("inspect", MODEL)
    assert code == 1
    assert re.fullmatch(
        rf"error: {MODEL}: expected access to it, got NoCredentialsError .*\. Check the credentials that "
        r"the store's client finds\.\n",
        err,
    )


def test_a_store_that_is_not_there_is_one_line(commands):
    commands.env["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    commands.env["AWS_MAX_ATTEMPTS"] = "1"
    code, err = commands.run("inspect", "s3://bucket/model")
    assert code == 1
    assert re.fullmatch(r"error: s3://bucket/model: expected a store that answers, got .*\n", err)


def test_nothing_is_imported_without_a_url(tmp_path, root):
    code = (
        f"import sys, surgery\nsurgery.perturb_checkpoint({str(root / 'model')!r}, 'out')\n"
        "print(sorted({'s3fs', 'fsspec', 'boto3', 'botocore', 'aiohttp'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
