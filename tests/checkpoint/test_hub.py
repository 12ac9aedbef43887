"""Fetching from the Hub: the real command against a Hub on the loopback."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from checkpoints import tensors, tree_digest
from commands import Ran
from hub import FLIPPED, Hub
from safetensors.numpy import load_file, save

from surgery import perturb_checkpoint
from surgery.checkpoint.digests import Hasher, recall
from surgery.checkpoint.hub import fetch
from surgery.errors import SourceError

MODEL = "org/tiny.model-v1"
TOKEN = "hf_" + "s3cret" * 5
_COMPANIONS = {
    ".gitattributes": b"*.bin lfs\n",
    "README.md": b"# tiny\n",
    "config.json": b'{"model_type": "bert"}',
    "tokenizer[1].json": b"{}",
    "1_Pooling/config.json": b'{"dim": 8}',
}
_KNOWS_TREE = hasattr(huggingface_hub, "get_cached_repo_tree")
_NOT_KNOWN = "" if _KNOWS_TREE else "surgery.json"  # says what was left out, as far as is known
_WEIGHTS = {"model.safetensors": save(tensors(), {"format": "pt"})}
_NOT_NEEDED = {
    "pytorch_model.bin": b"x" * 2000,
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
    "onnx/model.onnx": b"x",
    "openvino/openvino_model.bin": b"x",
    "optimizer.pt": b"x",
    "checkpoint-500/model.safetensors": b"x",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(MODEL, {**_COMPANIONS, **_WEIGHTS, **_NOT_NEEDED}, revisions=("main", "v1", "refs/pr/1"))
        yield hub


@pytest.fixture
def perturb(hub: Hub, run_cli: Callable[..., Ran]) -> Callable[..., Ran]:
    def run(*args: object, **env: str) -> Ran:
        return run_cli("perturb", *args, env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"} | env)

    return run


def test_perturb_downloads_only_what_it_needs(hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    ran = perturb(MODEL, "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert hub.downloaded(MODEL) == {*_COMPANIONS, *_WEIGHTS}
    out = tmp_path / "out"
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {*_COMPANIONS, *_WEIGHTS, "surgery.json"}
    assert all((out / name).read_bytes() == data for name, data in _COMPANIONS.items() if name != "README.md")
    before, after = tensors(), load_file(out / "model.safetensors")
    assert {name: w.shape for name, w in before.items()} == {name: w.shape for name, w in after.items()}
    assert all((before[name] != after[name]).mean() > 0.99 for name in before)


def test_recipe_records_id_commit_and_what_was_left_out(hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    perturb(MODEL, "-o", "out", "--revision", "v1")
    recipe = json.loads((tmp_path / "out/surgery.json").read_bytes())
    assert recipe["source"] == {"id": MODEL, "commit": hub.repos[MODEL].commit, "variant": None}
    assert set(recipe["companions"]) == {*_COMPANIONS} - {"README.md"}
    assert set(recipe["left_out"]) == {*_NOT_NEEDED, "README.md"}


def test_default_folder_is_named_after_the_model(perturb: Callable[..., Ran], tmp_path: Path) -> None:
    assert perturb(MODEL).code == 0
    assert (tmp_path / "tiny.model-v1-noisytune-lam0.15-seed0/model.safetensors").is_file()


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "commit"])
def test_revision_is_fetched_by_any_name(revision: str, hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    revision = hub.repos[MODEL].commit if revision == "commit" else revision
    assert perturb(MODEL, "-o", "named", "--revision", revision).code == 0
    assert perturb(f"{MODEL}@{revision}", "-o", "at").code == 0
    assert perturb(MODEL, "-o", "plain").code == 0
    assert tree_digest(tmp_path / "named") == tree_digest(tmp_path / "at") == tree_digest(tmp_path / "plain")


@pytest.mark.parametrize("revision", [None, "v1"], ids=["main", "tag"])
def test_offline_uses_the_cached_copy(
    revision: str | None, hub: Hub, perturb: Callable[..., Ran], tmp_path: Path
) -> None:
    which = ["--revision", revision] if revision else []
    assert perturb(MODEL, *which, "-o", "online").code == 0
    hub.requests.clear()
    ran = perturb(MODEL, *which, "-o", "offline", HF_HUB_OFFLINE="1")
    assert (ran.code, ran.err) == (0, "")
    assert hub.requests == []
    assert tree_digest(tmp_path / "offline", skip=_NOT_KNOWN) == tree_digest(tmp_path / "online", skip=_NOT_KNOWN)


@pytest.mark.transformers
def test_unreachable_hub_uses_the_cached_copy(perturb: Callable[..., Ran], tmp_path: Path) -> None:
    assert perturb(MODEL, "-o", "online").code == 0
    ran = perturb(MODEL, "-o", "offline", HF_ENDPOINT=f"http://127.0.0.1:{_free_port()}")
    assert (ran.code, ran.err) == (0, "")
    assert tree_digest(tmp_path / "offline", skip=_NOT_KNOWN) == tree_digest(tmp_path / "online", skip=_NOT_KNOWN)


def test_second_run_downloads_nothing(hub: Hub, perturb: Callable[..., Ran]) -> None:
    perturb(MODEL, "-o", "one")
    hub.requests.clear()
    assert perturb(MODEL, "-o", "two").code == 0
    assert hub.downloaded(MODEL) == set()


@pytest.mark.skipif(not _KNOWS_TREE, reason="the cache does not know all files before huggingface_hub 2")
def test_partly_cached_copy_is_refused_offline(hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    assert perturb(MODEL, "-o", "online").code == 0
    snapshot = next((tmp_path / "hf-home/hub").glob(f"models--*/snapshots/{hub.repos[MODEL].commit}"))
    (snapshot / "config.json").unlink()
    ran = perturb(MODEL, "-o", "offline", HF_HUB_OFFLINE="1")
    assert ran.code == 1
    assert ran.err == (
        f"error: {MODEL}: expected a complete copy in the Hub's cache while offline, got one without 'config.json'. "
        "Connect once to fetch it.\n"
    )


def test_token_is_sent_and_kept_nowhere(hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    hub.add("org/private", _COMPANIONS | _WEIGHTS, token=TOKEN)
    ran = perturb("org/private", "-o", "out", "--token", TOKEN)
    assert (ran.code, ran.err) == (0, "")
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in ran.out
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holders == []


def test_token_is_not_in_the_journal(hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    broken = tensors()
    broken["out.weight"][3, 3] = float("nan")
    hub.add("org/private", {"model.safetensors": save(broken)}, token=TOKEN)
    ran = perturb("org/private", "-o", "out", "--token", TOKEN)
    assert ran.code == 1
    assert "'out.weight': expected finite values, got NaN" in ran.err
    journal = (tmp_path / "out/surgery.unfinished.json").read_text()
    assert TOKEN not in journal + ran.err
    assert "surgery perturb org/private" in journal


@pytest.mark.transformers
def test_broken_download_is_tried_again(hub: Hub, perturb: Callable[..., Ran], tmp_path: Path) -> None:
    hub.breaks_after = 600
    ran = perturb(MODEL, "-o", "broken")
    if "Connection broken: IncompleteRead" in ran.err:  # huggingface_hub 0 leaves that to the user
        assert ran.err.startswith(f"error: {MODEL}: expected a complete download, got ")
        assert ran.err.endswith(". Try again.\n")
        ran = perturb(MODEL, "-o", "broken")
    assert ran.code == 0
    weights = [r for r in hub.requests if r.method == "GET" and r.path.endswith("/model.safetensors")]
    assert (len(weights), hub.breaks_after) == (2, None)
    assert perturb(MODEL, "-o", "whole").code == 0
    assert tree_digest(tmp_path / "broken") == tree_digest(tmp_path / "whole")


def _blob(hub: Hub, tmp_path: Path) -> Path:
    name = hashlib.sha256(hub.repos[MODEL].files["model.safetensors"]).hexdigest()
    (blob,) = tmp_path.glob(f"hf-home/hub/models--*/blobs/{name}")
    return blob


def _refusal(blob: Path) -> str:
    found = hashlib.sha256(blob.read_bytes()).hexdigest()
    return (
        f"error: {MODEL}: model.safetensors: expected sha256 {blob.name[:12]}..., as on the Hub, "
        f"got sha256 {found[:12]}.... "
        f"It was damaged on its way or in the cache: remove {blob} and run the command again.\n"
    )


def test_byte_flipped_on_the_way_is_refused_until_its_file_is_removed(
    hub: Hub, perturb: Callable[..., Ran], tmp_path: Path
) -> None:
    hub.fail("GET", "/model.safetensors", FLIPPED)
    for _ in range(2):  # the client keeps it, and asks for no other
        ran = perturb(MODEL, "-o", "out")
        assert (ran.code, ran.err) == (1, _refusal(_blob(hub, tmp_path)))
        assert not (tmp_path / "out").exists()
    _blob(hub, tmp_path).unlink()
    assert perturb(MODEL, "-o", "out").code == 0
    assert len(hub.asked("GET", "/model.safetensors")) == 2


@pytest.mark.parametrize("tree", ["tree known", "tree unknown"])
def test_byte_flipped_in_the_cache_is_refused_offline(
    tree: str, hub: Hub, perturb: Callable[..., Ran], tmp_path: Path
) -> None:
    assert perturb(MODEL, "-o", "online").code == 0
    if tree == "tree unknown":
        for trees in tmp_path.glob("hf-home/hub/models--*/trees"):  # none before huggingface_hub 2
            shutil.rmtree(trees)
        assert perturb(MODEL, "-o", "offline", HF_HUB_OFFLINE="1").code == 0
    blob = _blob(hub, tmp_path)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ran = perturb(MODEL, "-o", "damaged", HF_HUB_OFFLINE="1")
    assert (ran.code, ran.err) == (1, _refusal(blob))
    assert not (tmp_path / "damaged").exists()


def test_checked_file_is_not_hashed_again(hub: Hub, in_process: Callable[[Hub], None], tmp_path: Path) -> None:
    in_process(hub)
    folder, _, _ = fetch(MODEL, revision=None, variant=None, token=None)
    blob = _blob(hub, tmp_path)
    assert recall(folder / "model.safetensors", "sha256") == f"sha256:{blob.name}"
    (entry,) = (path for path in tmp_path.glob("cache/model-surgery/digests/*") if path.read_text().endswith(blob.name))
    entry.write_text("sha256:" + "0" * 64)  # what it remembers is what it goes by
    with pytest.raises(SourceError, match=r"got sha256 000000000000\.\.\."):
        fetch(MODEL, revision=None, variant=None, token=None)


def test_checked_source_is_not_hashed_again(
    hub: Hub, in_process: Callable[[Hub], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe has the Hub's sha256 of it, and BLAKE3 of what is written."""
    hashed: dict[str, int] = {"sha256": 0, "blake3": 0}
    update = Hasher.update

    def count(hasher: Hasher, data: bytes | memoryview) -> None:
        hashed[hasher.text().partition(":")[0]] += len(data)
        update(hasher, data)

    in_process(hub)
    monkeypatch.setattr(Hasher, "update", count)
    recipe = perturb_checkpoint(MODEL, tmp_path / "out")
    blob = _blob(hub, tmp_path)
    assert recipe.source_digests == {"model.safetensors": f"sha256:{blob.name}"}
    assert {digest.partition(":")[0] for digest in recipe.digests.values()} == {"blake3"}
    assert hashed["sha256"] == blob.stat().st_size
    assert hashed["blake3"] == sum((tmp_path / "out" / name).stat().st_size for name in [*recipe.digests, "README.md"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


_ERRORS = {
    "unknown": (
        ["org/nothing"],
        {},
        "org/nothing: expected a path or a model on {url}, got neither. Check the name; if it is private, "
        "`hf auth login` first.",
    ),
    "private": (
        ["org/private"],
        {},
        "org/private: expected a path or a model on {url}, got neither. Check the name; if it is private, "
        "`hf auth login` first.",
    ),
    "bad token": (
        ["org/private", "--token", "hf_wrong"],
        {},
        "org/private: expected a token that {url} accepts, got HTTP 401. Correct --token, or `hf auth login` again.",
    ),
    "unknown revision": (
        [MODEL, "--revision", "v9"],
        {},
        f"{MODEL}@v9: expected a branch, tag or commit, got none of that name. See {{url}}/{MODEL}/commits.",
    ),
    "two revisions": (
        [f"{MODEL}@v1", "--revision", "v1"],
        {},
        f"--revision: expected it once, got v1 and {MODEL}@v1. Leave one of them out.",
    ),
    "gated": (
        ["org/gated"],
        {},
        "org/gated: expected access, got a gated model. Ask for access at {url}/org/gated, then `hf auth login`.",
    ),
    "offline": (
        ["org/uncached"],
        {"HF_HUB_OFFLINE": "1"},
        "org/uncached: expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
        "Check the name, or connect once to fetch it.",
    ),
    "two dots": (
        ["org/a..b"],
        {},
        "org/a..b: expected a path or a Hub id, got neither. Check the name.",
    ),
    "no weights": (
        ["org/empty"],
        {},
        "org/empty: expected safetensors or PyTorch weights, got 1 files without any. "
        "Point at the folder that holds the weights.",
    ),
    "no such variant": (
        [MODEL, "--variant", "fp16"],
        {},
        f"{MODEL}: expected weights of variant 'fp16', got none. Leave --variant out or correct it.",
    ),
    "escaping name": (
        ["org/escape"],
        {},
        "org/escape: expected files of its own, got '../../../evil.json'. Do not trust this checkpoint.",
    ),
}  # fmt: skip


@pytest.mark.transformers
@pytest.mark.parametrize(("args", "env", "message"), _ERRORS.values(), ids=_ERRORS)
def test_hub_error_is_one_line(
    args: list[str], env: dict[str, str], message: str, hub: Hub, perturb: Callable[..., Ran], tmp_path: Path
) -> None:
    hub.add("org/private", _WEIGHTS, token=TOKEN)
    hub.add("org/gated", _WEIGHTS, gated=True)
    hub.add("org/empty", {"README.md": b""})
    hub.add("org/escape", _WEIGHTS | {"../../../evil.json": b"{}"})
    ran = perturb(*args, "-o", "out", **env)
    assert ran.err == f"error: {message.format(url=hub.url)}\n"
    assert (ran.code, ran.out) == (1, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (429, "Wait, or `hf auth login` for a higher limit."),
        (503, "Try again later, or set HF_HUB_OFFLINE=1 to use a cached copy."),
    ],
    ids=["rate limit", "down"],
)
def test_hub_that_refuses_everything_is_one_line(
    status: int, hint: str, hub: Hub, perturb: Callable[..., Ran], tmp_path: Path
) -> None:
    hub.status = status
    ran = perturb(MODEL, "-o", "out")
    assert ran.err == f"error: {MODEL}: expected an answer from {hub.url}, got HTTP {status}. {hint}\n"
    assert (ran.code, ran.out, (tmp_path / "out").exists()) == (1, "", False)


def test_rate_limit_says_how_long_to_wait(hub: Hub, in_process: Callable[[Hub], None]) -> None:
    in_process(hub)
    hub.fail("GET", "/api/models/", 429, retry_after=7)
    with pytest.raises(SourceError, match=r"got HTTP 429\. Wait 7 s, or `hf auth login` for a higher limit\.$"):
        fetch(MODEL, revision=None, variant=None, token=None)


def test_forbidden_model_says_why(hub: Hub, in_process: Callable[[Hub], None]) -> None:
    in_process(hub)
    hub.fail("GET", "/api/models/", 403)
    with pytest.raises(SourceError, match=rf"got HTTP 403\. Ask for access at {hub.url}/{MODEL}, or `hf auth login` "):
        fetch(MODEL, revision=None, variant=None, token=None)


def test_pickle_only_model_is_fetched_and_written_as_safetensors(
    hub: Hub, perturb: Callable[..., Ran], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(w) for name, w in tensors().items()}, tmp_path / "weights")
    pickled = (tmp_path / "weights").read_bytes()
    hub.add("org/pickled", {"pytorch_model.bin": pickled, "config.json": b"{}", "tf_model.h5": b"x"})
    assert perturb("org/pickled", "-o", "pickled").code == 0
    assert hub.downloaded("org/pickled") == {"pytorch_model.bin", "config.json"}
    assert perturb(MODEL, "-o", "safe").code == 0
    mine, theirs = load_file(tmp_path / "pickled/model.safetensors"), load_file(tmp_path / "safe/model.safetensors")
    assert all((mine[name] == theirs[name]).all() for name in theirs)
