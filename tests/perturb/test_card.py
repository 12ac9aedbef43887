"""The model card: what it says, what it takes over from the source's card, and that its owner's edits are safe."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from checkpoints import tensors, tree_digest, write_json, write_weights
from commands import Ran
from hub import Hub
from huggingface_hub import ModelCard
from safetensors.numpy import save

from surgery import Recipe, perturb_checkpoint

MODEL = "org/tiny.model-v1"
SOURCE_CARD = """---
language: en
license: other
license_name: tiny-1
license_link: LICENSE
library_name: transformers
pipeline_tag: fill-mask
base_model: someone/else
tags:
- mine
---
# tiny
"""
CARD = """---
base_model: org/tiny.model-v1
library_name: transformers
license: other
license_name: tiny-1
license_link: LICENSE
pipeline_tag: fill-mask
tags:
- noisytune
- model-surgery
base_model_relation: finetune
---

# tiny.model-v1 with NoisyTune's noise, lam 0.1, seed 3

The weights of [org/tiny.model-v1](https://huggingface.co/org/tiny.model-v1/tree/{commit}), with a little noise \
added to each matrix. Nothing was trained. [NoisyTune](https://arxiv.org/abs/2202.12024) (Wu et al., ACL 2022) finds \
that models fine-tune better from such weights.

## What was done

- source: `org/tiny.model-v1@{commit}`
- formula: `w' = w + U(-lam/2, lam/2) * std(w)`
- lam: 0.1
- seed: 3
- noise: uniform
- scale: matrix
- rounding: nearest
- exclude: `out.*`
- tensors: 2 perturbed, 1 copied

`surgery.json` has the rest: every tensor's standard deviation, why some were copied, every file's blake3.

## Verify and repeat

With the command of model-surgery:

```sh
REPO=ORG/NAME  # this repository's id, or the folder that holds it
surgery verify "$REPO"  # recompute every tensor, and compare it bit for bit
surgery materialize "$REPO" -o again  # write the same bytes, from the source and surgery.json alone
surgery perturb org/tiny.model-v1 --lam 0.1 --seed 3 --revision {commit} --exclude 'out.*'  # do the same to the source
```

## Load

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("ORG/NAME")  # this repository's id, or the folder that holds it
```

If this repository holds only the recipe and no weights, `surgery materialize` writes them.
"""


def card_of(source: Path, out: Path, **settings: Any) -> str:
    perturb_checkpoint(source, out, **settings)
    return (out / "README.md").read_text(encoding="utf-8")


# -- what it says -------------------------------------------------------------------------------------------------


def test_card_of_a_hub_model(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    with Hub() as hub:
        files = {
            "README.md": SOURCE_CARD.encode(),
            "config.json": b'{"model_type": "bert"}',
            "model.safetensors": save(tensors()),
        }
        repo = hub.add(MODEL, files)
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        ran = run_cli("perturb", MODEL, "-o", "out", "--lam", "0.1", "--seed", "3", "--exclude", "out.*", env=env)
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "out/README.md").read_text() == CARD.replace("{commit}", repo.commit)
    recipe = Recipe.read(tmp_path / "out/surgery.json")
    assert recipe.card == f"blake3:{blake3((tmp_path / 'out/README.md').read_bytes()).hexdigest()}"
    assert recipe.left_out == {"README.md": "replaced by a card of its own"}
    assert set(recipe.companions) == {"config.json"}


def test_card_of_a_local_model_does_not_say_where_it_was(source: Path, tmp_path: Path) -> None:
    card = card_of(source, tmp_path / "out")
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "The weights of `source`, with" in card
    assert '\nsurgery verify "$REPO" --source source  #' in card
    assert "\n# --source: where source is on your machine\n" in card


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"noise": "normal"}, "w' = w + N(0, lam^2/12) * std(w)"),
        ({"scale": "global"}, "w' = w + U(-lam/2, lam/2) * std(all perturbed weights)"),
    ],
    ids=["normal", "global"],
)
def test_card_has_the_formula_of_its_settings(
    settings: dict[str, str], formula: str, source: Path, tmp_path: Path
) -> None:
    assert f"\n- formula: `{formula}`\n" in card_of(source, tmp_path / "out", **settings)


def test_hub_client_reads_the_card(source: Path, tmp_path: Path) -> None:
    data = ModelCard(card_of(source, tmp_path / "out")).data
    assert data.to_dict() == {"library_name": "transformers", "tags": ["noisytune", "model-surgery"]}


def test_same_run_writes_the_same_card(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(SOURCE_CARD)
    assert card_of(source, tmp_path / "one", workers=1) == card_of(source, tmp_path / "two", workers=4)


@pytest.mark.parametrize("options", [["--lam", "0.12345678"], ["--scale", "global", "--exclude", "*.bias"]])
def test_command_in_the_card_repeats_the_run(
    options: list[str], run_cli: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    assert run_cli("perturb", source, "-o", "out", *options).code == 0
    line = re.search(r"^surgery perturb .*", (tmp_path / "out/README.md").read_text(), re.M)
    assert line
    assert run_cli(*shlex.split(line[0], comments=True)[1:], "-o", "again").code == 0
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")


def test_card_of_a_variant_loads_it(tmp_path: Path) -> None:
    write_weights(tmp_path / "source/model.fp16.safetensors")
    write_json(tmp_path / "source/config.json", {"model_type": "bert"})
    card = card_of(tmp_path / "source", tmp_path / "out", variant="fp16")
    assert 'AutoModel.from_pretrained("ORG/NAME", variant="fp16")' in card
    assert "\n- variant: `fp16`\n" in card
    assert "\nsurgery perturb source --lam 0.15 --seed 0 --variant fp16  #" in card


def test_source_of_a_name_that_is_no_utf8(source: Path, tmp_path: Path) -> None:
    odd = source.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 `x`\n$y")))
    card = card_of(odd, tmp_path / "out")
    assert r"caf\udce9 `x`\n$y" in card
    assert r"""--source "$(printf %b 'caf\0351 `x`\0012$y')" """ in card
    assert ModelCard(card).data.tags == ["noisytune", "model-surgery"]


# -- what it takes over -------------------------------------------------------------------------------------------

_NONE = {"library_name": "transformers"}
_METADATA = {
    "all": (
        SOURCE_CARD,
        _NONE | {"license": "other", "license_name": "tiny-1", "license_link": "LICENSE", "pipeline_tag": "fill-mask"},
    ),
    "two licences": ("---\nlicense: [mit, apache-2.0]\n---\n", _NONE | {"license": ["mit", "apache-2.0"]}),
    "two libraries": ("---\nlibrary_name: [timm, peft]\nlicense: mit\n---\n", _NONE | {"license": "mit"}),
    "two tasks": ("---\npipeline_tag: [fill-mask]\n---\n", _NONE),
    "other library": ("---\nlibrary_name: timm\n---\n", {"library_name": "timm"}),
    "windows": ("\ufeff---\r\nlicense: mit\r\n---\r\n# x\r\n", _NONE | {"license": "mit"}),
    "no body": ("---\nlicense: mit\n---", _NONE | {"license": "mit"}),
    "wrong types": ("---\nlicense: no\npipeline_tag: {a: b}\nlicense_name: [1]\nlicense_link: ''\n---\n", _NONE),
    "no metadata": ("# just text\n\n---\n\nlicense: mit\n", _NONE),
    "empty metadata": ("---\n\n---\n", _NONE),
    "odd date elsewhere": ("---\nlicense: mit\ndate: 2023-99-99\n---\n", _NONE | {"license": "mit"}),
    "odd number elsewhere": ("---\nx: " + "1:" * 200_000 + "1\nlicense: mit\n---\n", _NONE | {"license": "mit"}),
    "aliases elsewhere": (
        "---\nlicense: mit\na0: &a0 [x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 60))
        + "---\n",
        _NONE | {"license": "mit"},
    ),
    "alias": ("---\nlicense: &a mit\nlicense_name: *a\n---\n", _NONE | {"license": "mit"}),
    "numbers as text": ("---\nlicense: '1.0'\nlicense_name: 1.0\n---\n", _NONE | {"license": "1.0"}),
    "nested keys": (
        "---\na: {license: gpl}\n? [b, c]\n: [[d], {e: f}]\nlicense: mit\n---\n",
        _NONE | {"license": "mit"},
    ),
    "long body": ("---\nlicense: mit\n---\n" + "x" * 10_000_000, _NONE | {"license": "mit"}),
    "model-index": ("---\nlicense: mit\nmodel-index: nonsense\n---\n", _NONE | {"license": "mit"}),
}


@pytest.mark.parametrize(("text", "expected"), _METADATA.values(), ids=_METADATA)
def test_card_takes_over_what_still_holds(
    text: str, expected: dict[str, Any], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "README.md").write_text(text, encoding="utf-8", newline="")
    data = ModelCard(card_of(source, tmp_path / "out")).data.to_dict()
    assert data == expected | {"tags": ["noisytune", "model-surgery"]}
    assert caplog.messages == []


_DAMAGED = {
    "yaml": b"---\nlicense: [mit\n---\n",
    "list": b"---\n- license\n---\n",
    "text": b"---\nlicense\n---\n",
    "tag": b"---\nlicense: !!python/object/apply:os.system [ls]\n---\n",
    "bool of another kind": b"---\nlicense: mit\nx: !!bool maybe\n---\n",
    "merge keys": b"---\na0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 40))
    + b"license: mit\n---\n",
    "merge of itself": b"---\n&a\n<<: *a\nlicense: mit\n---\n",
    "long": b"---\nlicense: mit\n" + b"x: y\n" * 2_000_000 + b"---\n",
    "endless": b"---\nlicense: mit\n" + b"- x\n" * 2_500_000,
    "bytes": b"---\nlicense: \xff\n---\n",
    "deep": b"---\nlicense: " + b"[" * 100_000 + b"]" * 100_000 + b"\n---\n",
    "cut": b"---\nlicense: " + b"[" * 100_000 + b"\n---\n",
}


@pytest.mark.parametrize("text", _DAMAGED.values(), ids=_DAMAGED)
def test_damaged_card_is_not_taken_over(text: bytes, run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_bytes(text)
    ran = run_cli("perturb", "source", "-o", "out")
    card = source / "README.md"
    assert ran.err == f"{card}: its metadata is damaged, so its licence and task are not in the new card\n"
    assert ran.code == 0
    data = ModelCard((tmp_path / "out/README.md").read_text()).data.to_dict()
    assert data == _NONE | {"tags": ["noisytune", "model-surgery"]}


def test_card_in_a_sub_folder_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "1_Dense").mkdir()
    (source / "1_Dense/README.md").write_text("# dense\n")
    recipe = perturb_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out/1_Dense/README.md").read_text() == "# dense\n"
    assert "1_Dense/README.md" in recipe.companions


def test_card_beside_a_lone_file_is_not_its_own(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(SOURCE_CARD)
    recipe = perturb_checkpoint(source / "model.safetensors", tmp_path / "out")
    assert recipe.left_out == {}
    assert "license" not in (tmp_path / "out/README.md").read_text()


def test_perturbed_model_is_perturbed_again(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(SOURCE_CARD)
    perturb_checkpoint(source, tmp_path / "once")
    recipe = perturb_checkpoint(tmp_path / "once", tmp_path / "twice", seed=1)
    card = (tmp_path / "twice/README.md").read_text()
    assert "# once with NoisyTune's noise, lam 0.15, seed 1" in card
    assert ModelCard(card).data.license_name == "tiny-1"
    assert recipe.left_out == {"README.md": "replaced by a card of its own"}
    assert set(recipe.companions) == {"config.json", "tokenizer.json"}
    assert Recipe.read(tmp_path / "twice/surgery.json").source == str(tmp_path / "once")


# -- its owner's edits --------------------------------------------------------------------------------------------


@pytest.fixture
def edited(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> Path:
    """A finished folder with a line added to its card."""
    assert run_cli("perturb", source, "-o", "out").code == 0
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text() + "My own words.\n")
    return card


def test_same_command_leaves_an_edited_card(edited: Path, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    before = tree_digest(tmp_path / "out")
    ran = run_cli("perturb", "source", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert "nothing: this command had finished here before" in ran.out
    assert tree_digest(tmp_path / "out") == before
    edited.unlink()
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert not edited.exists()


@pytest.mark.parametrize("options", [[], ["--seed", "1"]], ids=["same", "other"])
def test_overwrite_spares_an_edited_card(
    options: list[str], edited: Path, run_cli: Callable[..., Ran], refuses: Callable[..., None], tmp_path: Path
) -> None:
    command = ("source", "-o", "out", "--overwrite", *options)
    refuses(f"{edited}: expected the card that was written here, got one edited since. Move it away first.", *command)
    edited.rename(tmp_path / "mine.md")
    assert run_cli("perturb", *command).code == 0
    assert run_cli("perturb", *command[:2], "fresh", *options).code == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


def test_card_of_a_stranger_is_spared(refuses: Callable[..., None], source: Path, tmp_path: Path) -> None:
    assert source.exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("# mine\n")
    message = (
        f"{tmp_path}/out: expected a new or empty folder, got 1 files, such as 'README.md'. Choose another with -o."
    )
    refuses(message, "source", "-o", "out")
    refuses(message, "source", "-o", "out", "--overwrite")


def test_dry_run_leaves_the_sources_card_out(run_cli: Callable[..., Ran], source: Path) -> None:
    (source / "README.md").write_text("# tiny\n")
    rows = json.loads(run_cli("perturb", source, "--dry-run", "--json").out)
    assert rows["left_out"] == {"README.md": "replaced by a card of its own"}
    assert rows["companions"] == ["config.json", "tokenizer.json"]
