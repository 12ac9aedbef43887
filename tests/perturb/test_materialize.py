"""surgery materialize: the same bytes from the recipe and the source alone, or a line that says why not."""

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from checkpoints import tensors, tree_digest, write_json, write_sharded, write_weights
from commands import Ran, clean_env, command
from hub import Hub
from safetensors.numpy import save, save_file
from safetensors.torch import save_file as save_torch

from surgery import OutputError, Recipe, SourceError, materialize_checkpoint, perturb_checkpoint, perturb_model

TOKEN = "hf_" + "s3cret" * 5
ZEROS = "blake3:" + "0" * 64
AGAIN = "Say with --source where the right one is."


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """What a run makes of `source`."""
    perturb_checkpoint(source, tmp_path / "out", seed=4)
    return tmp_path / "out"


@pytest.fixture
def refuses_recipe(run_cli: Callable[..., Ran], tmp_path: Path) -> Callable[..., None]:
    """Assert that `surgery materialize ARGS` prints this one line, exits 1, and changes nothing on the disk."""

    def check(message: str, *args: object, **kwargs: Any) -> None:
        before = tree_digest(tmp_path, skip="hf-home")
        ran = run_cli("materialize", *args, **kwargs)
        assert ran.err == f"error: {message}\n"
        assert (ran.code, ran.out) == (1, "")
        assert tree_digest(tmp_path, skip="hf-home") == before

    return check


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_bytes()) | changes)


# -- the same bytes -----------------------------------------------------------------------------------------------


def _every_dtype(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    weights = {name: torch.randn(300, 50, generator=generator).to(kind) for name, kind in kinds.items()}
    save_torch(weights | {"ids": torch.arange(7)}, folder / "model.safetensors", metadata={"format": "pt"})


def _tied(folder: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((40, 8), np.float32)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file(dict.fromkeys(names, embeddings) | tensors(), folder / "model.safetensors")


def _nested(folder: Path) -> None:
    write_weights(folder / "model.safetensors")
    write_weights(folder / "2_Dense/model.safetensors", 2, names=("linear.weight",))
    write_json(folder / "2_Dense/config.json", {})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "tf_model.h5").write_bytes(b"x")


def _pickled(folder: Path) -> None:
    embeddings = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    weights = {"embed_tokens.weight": embeddings, "lm_head.weight": embeddings, "w": torch.ones(3, 3) * torch.arange(3)}
    torch.save(weights, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {})


def _variant(folder: Path) -> None:
    write_weights(folder / "model.fp16.safetensors")


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "dtypes": (_every_dtype, {"seed": 5}),
    "global": (_every_dtype, {"scale": "global", "lam": 0.1}),
    "normal, stochastic": (_every_dtype, {"noise": "normal", "rounding": "stochastic"}),
    "sharded": (write_sharded, {"exclude": ["layer.2.*"], "include": ["layer.**"]}),
    "tied": (_tied, {}),
    "tied, global": (_tied, {"scale": "global"}),
    "nested": (_nested, {"lam": 0.12345678}),
    "pickled": (_pickled, {}),
    "pickled, global": (_pickled, {"scale": "global"}),
    "variant": (_variant, {"variant": "fp16"}),
    "lam 0": (_tied, {"lam": 0}),
}
"""Ways to write a source, and settings, that tests of verify take too."""


@pytest.mark.parametrize(("write", "settings"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_same_bytes_from_recipe_and_source(
    write: Callable[[Path], Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out", **settings)
    assert materialize_checkpoint(tmp_path / "out/surgery.json", tmp_path / "again") == recipe
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")


def test_command_prints_what_perturb_prints(out: Path, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run_cli("materialize", "out", "-o", "again")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(
        f"{tmp_path}/source perturbed into {tmp_path}/again\n  tensors      3 perturbed, 0 copied\n"
    )
    assert tree_digest(tmp_path / "again") == tree_digest(out)
    assert json.loads(run_cli("materialize", "out", "-o", "again", "--json").out)["bytes"] == 0


def test_default_folder_is_the_one_of_perturb(out: Path, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    assert run_cli("materialize", out).code == 0
    assert tree_digest(tmp_path / "source-noisytune-lam0.15-seed4") == tree_digest(out)


def test_edited_card_is_written_as_it_was(out: Path, tmp_path: Path) -> None:
    card = (out / "README.md").read_bytes()
    (out / "README.md").write_bytes(card + b"Mine.\n")
    materialize_checkpoint(out, tmp_path / "again")
    assert (tmp_path / "again/README.md").read_bytes() == card


def test_other_text_of_the_card_is_told(out: Path, run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    ran = run_cli("materialize", "out", "-o", "again")
    card = tmp_path / "again/README.md"
    assert ran.err == f"{card}: its text is not the one that the recipe records; all other files are\n"
    assert ran.code == 0
    again, recorded = tree_digest(tmp_path / "again"), tree_digest(out)
    assert {name for name in recorded if again[name] != recorded[name]} == {"README.md", "surgery.json"}
    assert run_cli("perturb", "source", "-o", "again", "--seed", "4", "--overwrite").code == 0


def test_new_companion_of_the_source_is_not_copied(out: Path, source: Path, tmp_path: Path) -> None:
    (source / "new.json").write_text("{}")
    (source / "tf_model.h5").write_bytes(b"x")
    materialize_checkpoint(out, tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(out)


@pytest.mark.parametrize("recorded", ["path", "base name"])
def test_moved_source(recorded: str, out: Path, run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    """A recipe that was pushed has the base name alone."""
    if recorded == "base name":
        text = (out / "surgery.json").read_text()
        (out / "surgery.json").write_text(text.replace(json.dumps(str(source)), '"source"'))
    source.rename(tmp_path / "elsewhere")
    assert run_cli("materialize", "out", "-o", "again", "--source", "elsewhere").code == 0
    assert tree_digest(tmp_path / "again") == tree_digest(out)


def test_moved_lone_file(source: Path, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    perturb_checkpoint(source / "model.safetensors", tmp_path / "out")
    (tmp_path / "there").mkdir()
    (source / "model.safetensors").rename(tmp_path / "there/model.safetensors")
    assert run_cli("materialize", "out", "--source", "there/model.safetensors", "-o", "again").code == 0
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")


# -- the Hub ------------------------------------------------------------------------------------------------------

_FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    ".gitattributes": b"*.safetensors lfs\n",
    "config.json": b"{}",
    "model.safetensors": save(tensors()),
    "tf_model.h5": b"x",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_recipe_and_source_from_the_hub(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    with Hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        source = hub.add("org/tiny", _FILES, token=TOKEN)
        assert run_cli("perturb", "org/tiny", "-o", "out", "--token", TOKEN, env=env).code == 0
        hub.add("me/noisy", files_of(tmp_path / "out"), revisions=("main", "v1"), token=TOKEN)
        hub.requests.clear()
        shutil.rmtree(tmp_path / "hf-home")
        ran = run_cli("materialize", "me/noisy@v1", "-o", "again", "--token", TOKEN, env=env)
        assert (ran.code, ran.err) == (0, "")
        assert hub.downloaded("me/noisy") == {"surgery.json"}
        assert hub.downloaded("org/tiny") == {*_FILES} - {"tf_model.h5"}
        asked = {r.path for r in hub.requests if r.path.startswith("/api/models/org/tiny")}
        assert all(source.commit in path for path in asked)
        offline = run_cli("materialize", "me/noisy@v1", "-o", "offline", env=env | {"HF_HUB_OFFLINE": "1"})
        assert (offline.code, offline.err) == (0, "")
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "offline") == tree_digest(tmp_path / "out")
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holders == []
    assert TOKEN not in ran.out


def test_source_named_on_the_hub(out: Path, run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add("org/moved", files_of(source))
        shutil.rmtree(source)
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        assert run_cli("materialize", "out", "--source", "org/moved", "-o", "again", env=env).code == 0
    assert tree_digest(tmp_path / "again") == tree_digest(out)


_HUB_ERRORS = {
    "none": ("org/nothing", "org/nothing: expected a path or a model on {url}, got neither."),
    "private": ("org/private", "org/private: expected a path or a model on {url}, got neither."),
    "no recipe": ("org/plain", "org/plain: expected a repository with surgery.json, got one without."),
    "revision": ("org/plain@v9", "org/plain@v9: expected"),
    "two dots": ("org/a..b", "org/a..b: expected a path or a"),
}


@pytest.mark.parametrize(("where", "start"), _HUB_ERRORS.values(), ids=_HUB_ERRORS)
def test_hub_error_is_one_line(where: str, start: str, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add("org/plain", {"config.json": b"{}"})
        hub.add("org/private", {"surgery.json": b"{}"}, token=TOKEN)
        ran = run_cli("materialize", where, "-o", "out", env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
        assert ran.err.startswith(f"error: {start.format(url=hub.url)}")
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert not (tmp_path / "out").exists()


# -- refused ------------------------------------------------------------------------------------------------------


def test_offline_without_the_recipe(refuses_recipe: Callable[..., None]) -> None:
    refuses_recipe(
        "org/none: expected a path, or a model in the Hub's cache or on the Hub, got none of them while offline. "
        "Check the name, or connect once to fetch it.",
        "org/none",
    )


@pytest.mark.parametrize("where", ["nowhere/surgery.json", "source", "source/model.safetensors", "a/b/c", "", "./x"])
def test_what_is_no_recipe_is_refused(where: str, refuses_recipe: Callable[..., None], source: Path) -> None:
    assert source.exists()
    message = (
        f"{where}: expected a surgery.json, a folder that holds one, or a Hub id, got none of them. Check the name."
    )
    refuses_recipe(message, where, "-o", "out")


def test_unfinished_folder_is_refused(refuses_recipe: Callable[..., None], out: Path) -> None:
    (out / "surgery.unfinished.json").write_text("{}")
    refuses_recipe(
        f"{out}: expected a finished checkpoint, got one that `surgery perturb` did not finish. "
        "surgery.unfinished.json there has the command that finishes it.",
        *(out, "-o", "again"),
    )


def test_recipe_of_a_live_model_is_refused(refuses_recipe: Callable[..., None], tmp_path: Path) -> None:
    recipe = perturb_model(torch.nn.Linear(8, 8))
    (tmp_path / "live.json").write_text(recipe.to_json())
    refuses_recipe(
        "live.json: expected the recipe of a checkpoint, got that of a live model, Linear. "
        "Call perturb_model with its settings.",
        *("live.json", "-o", "again"),
    )


def test_missing_source_is_named(refuses_recipe: Callable[..., None], out: Path, source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source)
    missing = f"out: expected its source, {source}, on this machine, got no such path. Say with --source where it is."
    refuses_recipe(missing, "out", "-o", "again")
    (tmp_path / "tiny").mkdir()
    edit(out / "surgery.json", source={"id": "tiny", "commit": None, "variant": None})
    missing = "out: expected its source, tiny, on this machine, got no such path. Say with --source where it is."
    refuses_recipe(missing, "out", "-o", "again")


def test_other_source_is_refused_by_name(refuses_recipe: Callable[..., None], out: Path, source: Path) -> None:
    before = Recipe.read(out / "surgery.json").files[0].source_digest[7:19]
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    now = blake3(data).hexdigest()[:12]
    refuses_recipe(
        f"{path}: expected the recipe's source (blake3 {before}...), got another file (blake3 {now}...). {AGAIN}",
        *("out", "-o", "again"),
    )


def test_other_companion_is_refused_by_name(
    refuses_recipe: Callable[..., None], run_cli: Callable[..., Ran], out: Path, source: Path
) -> None:
    path = source / "tokenizer.json"
    path.write_text("{}")
    ran = run_cli("materialize", "out", "-o", "again")
    assert ran.err.startswith(f"error: {path}: expected the recipe's source (blake3 ")
    path.unlink()
    refuses_recipe(f"{path}: expected a file of the recipe's source, got none. {AGAIN}", "out", "-o", "again")
    assert out.exists()


def test_other_shards_are_refused_by_name(
    refuses_recipe: Callable[..., None], out: Path, source: Path, tmp_path: Path
) -> None:
    write_sharded(tmp_path / "sharded")
    (source / "model.safetensors").rename(source / "x.safetensors")
    refuses_recipe(
        f"{source}: expected the weight files that the recipe was made from (model.safetensors), got others "
        "(x.safetensors). Say with --source where the right ones are.",
        *(out, "-o", "again"),
    )


def test_output_at_the_recipe_is_refused(refuses_recipe: Callable[..., None], out: Path) -> None:
    message = f"{out}: expected another folder than the recipe's, got that one. Choose another with -o."
    refuses_recipe(message, "out", "-o", "out", "--overwrite")


def test_output_in_the_source_is_refused(refuses_recipe: Callable[..., None], out: Path, source: Path) -> None:
    message = f"{source}/x: expected a folder outside the source, got one inside {source}. Choose another with -o."
    refuses_recipe(message, out, "-o", "source/x")


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


_DAMAGED = {
    "no object": _set("source", to=None),
    "source": _set("source", "id", to=["/etc"]),
    "commit": _set("source", "commit", to=1),
    "lam of text": _set("settings", "lam", to="much"),
    "infinite std": _set("pooled_std", to="0x1p99999"),
    "seed of text": _set("settings", "seed", to="1"),
    "true seed": _set("settings", "seed", to=True),
    "unknown setting": _set("settings", "verbose", to=1),
    "globs": _set("settings", "include", to=[1]),
    "one glob": _set("settings", "include", to="layer.*"),
    "files": _set("files", to={}),
    "names": _set("files", 0, "name", to=3),
    "digest": _set("files", 0, "digest", to=None),
    "unknown digest": _set("files", 0, "digest", to="md5:" + "0" * 64),
    "bare digest": _set("files", 0, "source_digest", to="0" * 64),
    "short digest": _set("companions", "config.json", to="blake3:" + "0" * 63),
    "digest of other letters": _set("card", to="blake3:" + "g" * 64),
    "sha256": _set("sha256", to={"config.json": ZEROS}),
    "ties": _set("files", 0, "tied", to={"a": 1}),
    "shape": _set("files", 0, "tensors", 0, "shape", to=["1"]),
    "std": _set("files", 0, "tensors", 0, "std", to=1.0),
    "companions": _set("companions", to=["config.json"]),
    "card": _set("card", to=[]),
    "survived": _set("files", 0, "tensors", 0, "survived", to="1"),
    "noise over std": _set("files", 0, "tensors", 0, "noise_over_std", to=True),
    "notes": _set("notes", to="x"),
}


@pytest.mark.parametrize("change", _DAMAGED.values(), ids=_DAMAGED)
def test_recipe_of_wrong_types_is_refused(change: Callable[[Any], None], out: Path, tmp_path: Path) -> None:
    document = json.loads((out / "surgery.json").read_bytes())
    change(document)
    write_json(tmp_path / "bad.json", document)
    with pytest.raises(SourceError) as error:
        materialize_checkpoint(tmp_path / "bad.json", tmp_path / "again")
    assert str(error.value) == f"{tmp_path}/bad.json: expected a recipe, got another or a damaged file. Fetch it again."
    assert not (tmp_path / "again").exists()


_HOSTILE = {
    "absolute": (_set("files", 0, "name", to="/tmp/x.safetensors"), "expected files of its own folder, got '/tmp/x."),
    "above": (_set("files", 0, "source", to="../x.safetensors"), "expected files of its own folder, got '../x."),
    "companion": (
        _set("companions", to={"a/../../b": ZEROS}),
        "expected files of its own folder, got 'a/../../b'",
    ),
    "backslash": (
        _set("companions", to={"a\\b": ZEROS}),
        "expected files of its own folder, got 'a\\\\b'",
    ),
    "seed": (_set("settings", "seed", to=10**30), "seed: expected an integer from 0 to 2^64 - 1, got 1000"),
    "lam": (_set("settings", "lam", to=1e300), "lam: expected a number from 0 to 1, got 1e+300"),
    "noise": (_set("settings", "noise", to=["uniform"]), "noise: expected uniform or normal, got ['uniform']"),
    "newer": (_set("format", to="surgery-recipe-9"), "expected surgery-recipe-2 of surgery-noise-1, got surgery-rec"),
}


@pytest.mark.parametrize(("change", "message"), _HOSTILE.values(), ids=_HOSTILE)
def test_hostile_recipe_is_refused(change: Callable[[Any], None], message: str, out: Path, tmp_path: Path) -> None:
    document = json.loads((out / "surgery.json").read_bytes())
    change(document)
    write_json(tmp_path / "bad.json", document)
    with pytest.raises(SourceError) as error:
        materialize_checkpoint(tmp_path / "bad.json", tmp_path / "again")
    assert str(error.value).startswith(f"{tmp_path}/bad.json: {message}")
    assert not (tmp_path / "again").exists()


def test_glob_of_a_recipe_that_matches_nothing_is_told_of_the_recipe(out: Path, tmp_path: Path) -> None:
    document = json.loads((out / "surgery.json").read_bytes())
    document["settings"]["exclude"] = ["nothing"]
    write_json(tmp_path / "bad.json", document)
    with pytest.raises(SourceError) as error:
        materialize_checkpoint(tmp_path / "bad.json", tmp_path / "again")
    assert str(error.value).startswith("surgery.json: `exclude` 'nothing': expected a glob that matches a tensor, got")


@pytest.mark.parametrize("commit", [None, "main"], ids=["local", "hub"])
def test_source_of_a_long_name_is_missing(commit: str | None, out: Path, tmp_path: Path) -> None:
    """Longer than a file system allows."""
    document = json.loads((out / "surgery.json").read_bytes())
    long = document["source"]["id"] = "/" + "x" * 300
    document["source"]["commit"] = commit
    write_json(tmp_path / "bad.json", document)
    with pytest.raises(SourceError) as error:
        materialize_checkpoint(tmp_path / "bad.json", tmp_path / "again")
    assert str(error.value) == (
        f"{long}@main: expected a folder, a file or a Hub id, got a path that does not exist. Check it."
        if commit
        else f"{tmp_path}/bad.json: expected its source, {long}, on this machine, got no such path. "
        "Say with `source` where it is."
    )


_FALSE = {
    "seed": (_set("settings", "seed", to=5), "model.safetensors: digest: expected blake3:"),
    "digest": (_set("files", 0, "digest", to=ZEROS), "model.safetensors: digest: expected blake3:"),
    "std": (
        _set("files", 0, "tensors", 0, "std", to="0x1p0"),
        "model.safetensors: 'dense.bias': std: expected 0x1.",
    ),
    "copied": (
        _set("files", 0, "tensors", 0, "perturbed", to=False),
        "model.safetensors: 'dense.bias': copied: expected None, as source and settings give, got empty in the recipe.",
    ),
    "pooled": (_set("pooled_std", to="0x1p0"), "pooled_std: expected None, as source and settings give, got 0x1.0"),
}


@pytest.mark.parametrize(("change", "message"), _FALSE.values(), ids=_FALSE)
def test_recipe_that_says_something_else_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, out: Path, tmp_path: Path
) -> None:
    document = json.loads((out / "surgery.json").read_bytes())
    document["files"][0]["tensors"][0]["why"] = "empty"  # only read where it is not "perturbed"
    change(document)
    write_json(tmp_path / "bad.json", document)
    with pytest.raises(OutputError) as error:
        materialize_checkpoint(tmp_path / "bad.json", tmp_path / "again")
    assert str(error.value).startswith(f"{tmp_path}/again: {message}")
    assert str(error.value).endswith(" in the recipe. The recipe was altered or is damaged: fetch it again.")
    written = set(tree_digest(tmp_path / "again"))
    assert "surgery.json" not in written
    assert written - {"config.json", "tokenizer.json", "model.safetensors"} == {"surgery.unfinished.json"}
    assert ("model.safetensors" in written) is message.startswith("pooled"), "a false shard got its name"


# -- resumed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB of float32 in three shards, perturbed."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    weight_map = {}
    (root / "source").mkdir()
    for number in (1, 2, 3):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file({f"layer.{number}.weight": rng.standard_normal((2000, 2500), np.float32)}, root / "source" / shard)
        weight_map[f"layer.{number}.weight"] = shard
    write_json(root / "source/model.safetensors.index.json", {"weight_map": weight_map})
    perturb_checkpoint(root / "source", root / "out")
    return root


def _start(root: Path, out: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("materialize", "out", "-o", out), cwd=root, env=clean_env(), stdout=-1, stderr=-1, text=True
    )


def test_killed_run_resumes_to_the_same_bytes(large: Path) -> None:
    moments = random.Random(0)
    unfinished = 0
    for attempt in range(5):
        again = large / f"again-{attempt}"
        process = _start(large, again.name)
        while not (again / "surgery.unfinished.json").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()
        if (again / "surgery.unfinished.json").exists():
            unfinished += 1
            journal = json.loads((again / "surgery.unfinished.json").read_bytes())
            assert journal["resume"] == f"surgery materialize {large}/out/surgery.json -o {again}"
        process = _start(large, again.name)
        assert (process.communicate()[1], process.returncode) == ("", 0)
        assert tree_digest(again) == tree_digest(large / "out")
        shutil.rmtree(again)
    assert unfinished, "none of five kills fell into the writing"


def test_overwrite_replaces_a_former_run(out: Path, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    assert run_cli("perturb", "source", "-o", "again", "--seed", "9").code == 0
    ran = run_cli("materialize", "out", "-o", "again")
    assert ran.err.endswith("Replace it with --overwrite, or use -o.\n")
    assert ran.code == 1
    assert run_cli("materialize", "out", "-o", "again", "--overwrite", "--workers", "1").code == 0
    assert tree_digest(tmp_path / "again") == tree_digest(out)
