"""Large files in Xet storage: the real hf_xet, in its own process, against a Hub on the loopback that has it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import tensors
from commands import clean_env
from hub import DROPPED, TRUNCATED, Hub
from hub_xet import xet_hash
from safetensors.numpy import save

pytest.importorskip("hf_xet")

WEIGHTS = "model.safetensors"
_RESOLVE = (
    "from surgery.checkpoint.resolve import resolve as r; print(r('org/model').path('model.safetensors').resolve())"
)
_FETCH_EACH = """
import sys
from surgery.checkpoint.hub import fetch
from surgery.errors import SourceError
for repo in sys.argv[1:]:
    try:
        fetch(repo, revision=None, variant=None, token=None)
    except SourceError as error:
        print(error)
"""
_FAULTS: dict[str, tuple[str, int | str, str]] = {
    "refused": ("/reconstructions/", 401, "401 Unauthorized"),
    "missing": ("/reconstructions/", 404, "404 Not Found"),
    "down": ("/reconstructions/", 500, "500 Internal Server Error"),
    "dropped": ("/reconstructions/", DROPPED, "error sending request"),
    "garbled": ("/reconstructions/", TRUNCATED, "error decoding response body"),
    "signed": ("/chunk/", 500, "/chunk/"),
    "short": ("/chunk/", TRUNCATED, "I/O error"),
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.has_xet = True
        yield hub


def _env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "0"}
    retries = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}  # else minutes
    return clean_env(HF_HOME=str(tmp_path / "hf-home"), **settings, **retries)


def _python(script: str, *args: str, **env: str) -> str:
    command = [sys.executable, "-c", script, *args]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_model_in_xet_storage_is_fetched_and_found_again_offline(hub: Hub, tmp_path: Path) -> None:
    """The cache keeps such a file once for all models, by another hash than the Hub's sha256."""
    data = save(tensors())
    hub.add("org/model", {WEIGHTS: data, "config.json": b"{}"})
    env = _env(hub, tmp_path)
    blob = Path(_python(_RESOLVE, **env).strip())
    if blob.parents[1] == tmp_path / "hf-home/hub/models--org--model":
        pytest.skip("huggingface_hub 0 has them for each model, by their sha256")
    assert blob == tmp_path / "hf-home/hub/blobs" / xet_hash(data)[:2] / xet_hash(data)
    assert blob.read_bytes() == data
    assert not hub.asked("GET", f"/{WEIGHTS}")
    for trees in tmp_path.glob("hf-home/hub/models--*/trees"):  # which hold the Hub's sha256
        shutil.rmtree(trees)
    assert _python(_RESOLVE, **env | {"HF_HUB_OFFLINE": "1"}).strip() == str(blob)


def test_xet_error_is_one_line(hub: Hub, tmp_path: Path) -> None:
    for seed, (name, (part, kind, _)) in enumerate(_FAULTS.items()):
        data = save(tensors(seed))
        hub.add(f"org/{name}", {WEIGHTS: data})
        hub.fail("GET", f"{part}{xet_hash(data)}", kind, times=9)
    hub.add("org/tokenless", {WEIGHTS: save(tensors(99))})
    hub.fail("GET", "/org/tokenless/xet-read-token/", 200)
    repos = [f"org/{name}" for name in (*_FAULTS, "tokenless")]
    lines = _python(_FETCH_EACH, *repos, **_env(hub, tmp_path)).splitlines()
    said = [*(said for _, _, said in _FAULTS.values()), "Xet headers have not been correctly set"]
    for repo, line, part in zip(repos, lines, said, strict=True):
        assert line.startswith(f"{repo}: expected a complete download from Xet storage, got ")
        assert part in line
        assert line.endswith(". Try again, or with HF_HUB_DISABLE_XET=1, which downloads over plain HTTP.")
        assert "s3cret" not in line
    assert not list(tmp_path.glob(f"hf-home/hub/models--*/snapshots/*/{WEIGHTS}"))
