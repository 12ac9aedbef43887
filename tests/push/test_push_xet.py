"""Pushing to Xet storage: the real hf_xet, in its own process, against a Hub on the loopback."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import clean_env
from hub import Hub
from hub_store import sha256

import surgery

pytest.importorskip("hf_xet")

_PUSH_TWICE = """
import sys
from surgery import push_checkpoint
from surgery.errors import OutputError
for _ in range(2):
    try:
        print(push_checkpoint(sys.argv[1], "me/noisy").commit)
    except OutputError as error:
        print(error)
"""


def test_xet_error_is_one_line_and_the_push_is_resumed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.perturb_checkpoint(source, out=out)
    weights = (out / "model.safetensors").read_bytes()
    with Hub() as hub:
        hub.stored[sha256(weights)] = weights
        hub.fail("POST", "/v2/shards", 403)
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.login("me"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "0"}
        ran = subprocess.run(
            [sys.executable, "-c", _PUSH_TWICE, str(out)],
            env=clean_env(HF_HOME=str(tmp_path / "hf-home"), **env),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert ran.stdout.splitlines() == [
            "me/noisy: expected a complete upload to Xet storage, got Network error: Request error: "
            f"HTTP status client error (403 Forbidden), domain: {hub.url}/xet/v2/shards. "
            "Try again, or with HF_HUB_DISABLE_XET=1, which uploads over plain HTTP. "
            f"Resume with `surgery push {out} me/noisy`.",
            hub.repos["me/noisy"].commit,
        ]
        assert hub.repos["me/noisy"].files["model.safetensors"] == weights
        assert hub.asked("PUT", "/lfs/") == []
