"""What patch_model refuses, in one line each; the model is as it was after any of them."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_patch import bert, fingerprint
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from surgery import Anchor, Mixout, SettingError, SourceError, describe, patch_model, perturb_model

NAN = float("nan")


def refuses(message: str, error: type[Exception], model: Any, **settings: Any) -> None:
    """Assert that patch_model says exactly this, and that nothing of the model has changed."""
    before = fingerprint(model)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        patch_model(model, **settings)
    assert fingerprint(model) == before


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.1, NAN, float("inf"), True, "0.7", [0.7], torch.tensor(0.7)], ids=str)
def test_patch_model_refuses_p_that_is_no_probability(p: Any) -> None:
    message = f"mixout: expected a probability p in [0, 1], got {p!r}. Give one such as 0.7."
    refuses(message, SettingError, bert(), mixout=p)
    with pytest.raises(SettingError, match=re.escape(message)):
        Mixout(p)


@pytest.mark.parametrize("weight", [-0.1, NAN, float("inf"), True, "0.01"], ids=str)
def test_patch_model_refuses_an_anchor_of_no_weight(weight: Any) -> None:
    message = f"anchor: expected a weight of at least 0, got {weight!r}. Give one such as 0.01."
    refuses(message, SettingError, bert(), anchor=weight)
    with pytest.raises(SettingError, match=re.escape(message)):
        Anchor(weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "row"}, "granularity: expected neuron or element, got 'row'. Choose one of them."),
        ({"gradient": "wrong"}, "gradient: expected exact or official, got 'wrong'. Choose one of them."),
        ({"replace_dropout": "no"}, "replace_dropout: expected True or False, got 'no'. Choose one of them."),
    ],
    ids=["granularity", "gradient", "replace-dropout"],
)
def test_mixout_refuses_unknown_choices(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        Mixout(0.5, **settings)


_GLOBS = "`*` stays within one dotted part of a name, `**` spans several."
_NOTHING = "model: expected a trainable weight to mix, got none"
_BIASES = "bias, norm or another vector"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_pre_device": "gpu"}, "w_pre_device: expected same or cpu, got 'gpu'. Choose one of them."),
        (
            {"include": "2.*"},
            "include '2.*': expected a glob that matches a parameter or a module, got none of 4, such as '0.weight'. "
            + _GLOBS,
        ),
        (
            {"exclude": ["0", "head"]},
            "exclude 'head': expected a glob that matches a parameter or a module, got none of 4, such as '0.weight'. "
            + _GLOBS,
        ),
        ({"include": "*.bias"}, f"{_NOTHING} (2 not in include; 2 {_BIASES}). Correct include and exclude."),
        ({"exclude": "**"}, f"{_NOTHING} (4 in exclude). Correct include and exclude."),
        ({"include": 3}, "include: expected a glob or several, got 3. Give strings."),
        ({"exclude": 3}, "exclude: expected a glob or several, got 3. Give strings."),
        ({"include": ["0", 3]}, "include: expected a glob or several, got ['0', 3]. Give strings."),
        ({"include": b"0"}, "include: expected a glob or several, got b'0'. Give strings."),
        (
            {"include": ""},
            "include '': expected a glob that matches a parameter or a module, got none of 4, such as '0.weight'. "
            + _GLOBS,
        ),
    ],
    ids=[
        "w_pre_device",
        "include",
        "exclude",
        "include-biases",
        "exclude-all",
        "3",
        "exclude-3",
        "mixed",
        "bytes",
        "empty",
    ],
)
def test_patch_model_refuses_settings_that_cannot_take_effect(settings: dict[str, Any], message: str) -> None:
    refuses(message, SettingError, two(), **settings)


@pytest.mark.parametrize("none", [None, (), [], iter(())], ids=["None", "tuple", "list", "iterator"])
def test_no_globs_choose_everything(none: Any) -> None:
    assert len(describe(patch_model(two(), include=none, exclude=none)).mixed) == 2


def test_patch_model_refuses_an_embedding_that_renormalizes_itself() -> None:
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=0.5), nn.Linear(2, 2))
    reason = "embedding with max_norm, which renormalizes its weight in place as it is used"
    told = f"2 not in include; 1 {reason}"
    refuses(f"{_NOTHING} ({told}). Correct include and exclude.", SettingError, model, include="0")
    assert describe(patch_model(model, include=["0", "1"])).left["0.weight"] == reason
    tied = nn.Sequential(nn.Embedding(3, 2, max_norm=0.5), nn.Linear(2, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert describe(patch_model(tied)).mixed == ("2.weight",)


def test_complex_weights_are_named_and_not_mixed() -> None:
    model = two().append(nn.Linear(3, 3, dtype=torch.complex64))
    assert describe(patch_model(model)).left["2.weight"] == "of complex numbers"


def test_patch_model_refuses_a_frozen_model() -> None:
    remedy = "Unfreeze a weight."
    refuses(f"{_NOTHING} (2 {_BIASES}; 2 frozen). {remedy}", SettingError, two().requires_grad_(False))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(), "no parameters). Unfreeze a weight."),
        (nn.Embedding(3, 2), "1 embedding: name it in include to mix it). Name an embedding in include."),
    ],
    ids=["empty", "embedding"],
)
def test_patch_model_refuses_a_model_without_layers(model: nn.Module, told: str) -> None:
    refuses(f"{_NOTHING} ({told}", SettingError, model)


def test_patch_model_refuses_what_is_no_model() -> None:
    with pytest.raises(SettingError, match=r"^model: expected an nn.Module, got dict. Pass the model itself.$"):
        patch_model({})  # type: ignore[type-var]


def test_refused_settings_leave_the_former_patch() -> None:
    model = patch_model(bert(), mixout=0.5)
    refuses("mixout: expected a probability p in [0, 1], got 2. Give one such as 0.7.", SettingError, model, mixout=2)
    with pytest.raises(SettingError, match="include 'nothing'"):
        patch_model(model, include="nothing")
    assert describe(model).mixout == Mixout(0.5)
    torch.manual_seed(0)
    before = fingerprint(model)
    with pytest.raises(SourceError, match="w_pre: expected a Hub id, a folder, a file or a state_dict, got int"):
        patch_model(model, w_pre=5)  # type: ignore[arg-type]
    assert fingerprint(model) == before


# -- w_pre ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w_pre", "message"),
    [
        (
            {"0.weight": torch.zeros(3, 4)},
            "w_pre: 0.weight: expected shape (4, 3), got (3, 4). Give the checkpoint it was trained from, or name it "
            "in exclude.",
        ),
        (
            {"0.weight": torch.zeros(4, 3, dtype=torch.float64)},
            "w_pre: 0.weight: expected torch.float32, got torch.float64. Cast it with .to(torch.float32).",
        ),
        (
            {"0.weight": torch.zeros(4, 3), "model.0.weight": torch.zeros(4, 3)},
            "w_pre: expected names of the model's tensors, such as '0.weight', got 'model.0.weight'. "
            "Rename or leave out 1, or give the checkpoint.",
        ),
        (
            {"0.weight": torch.zeros(4, 3, device="meta")},
            "w_pre: 0.weight: expected values, got a tensor on the meta device. Load it first.",
        ),
        ({"0.weight": [0.0]}, "w_pre: 0.weight: expected a tensor, got list. Give a state_dict."),
        (
            [torch.zeros(4, 3)],
            "w_pre: expected a Hub id, a folder, a file or a state_dict, got list. Give one of them.",
        ),
    ],
    ids=["shape", "dtype", "name", "meta", "value", "type"],
)
def test_patch_model_refuses_w_pre_that_does_not_fit(w_pre: Any, message: str) -> None:
    refuses(message, SourceError, two(), w_pre=w_pre)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")], ids=str)
def test_patch_model_refuses_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    model = two().to(dtype)
    w_pre = deepcopy(model.state_dict())
    w_pre["1.weight"][2, 1] = value
    fault = "1.weight: expected finite values, got NaN or Inf. Repair it, or name it in exclude."
    with pytest.raises(SourceError, match=f"^w_pre: {re.escape(fault)}$"):
        patch_model(model, w_pre=w_pre)
    assert not any("surgery" in name for module in model.modules() for name in vars(module))
    with torch.no_grad():
        model[1].weight[0, 2] = value
    for settings in ({}, {"w_pre": two().to(dtype).state_dict()}, {"anchor": 0.1}):
        with pytest.raises(SourceError, match=f"^{re.escape(fault)}$"):
            patch_model(model, **settings)
    assert not any("surgery" in name for module in model.modules() for name in vars(module))
    patch_model(model, exclude="1")


def test_patch_model_refuses_w_pre_of_which_it_has_no_weight() -> None:
    told = "4 new: it has no pretrained value"
    refuses(f"{_NOTHING} ({told}). Unfreeze a weight.", SettingError, two(), w_pre={})


def test_patch_model_refuses_w_pre_that_is_not_there(tmp_path: Path) -> None:
    model = two()
    before = fingerprint(model)
    with pytest.raises(SourceError, match="missing"):
        patch_model(model, w_pre=tmp_path / "missing")
    assert fingerprint(model) == before


# -- models that hooks cannot work with ----------------------------------------------------------------------------


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model)


def _compiled_in_place(model: nn.Module) -> Any:
    model.compile()
    return model


def _compiled_part(model: Any) -> Any:
    model[1] = torch.compile(model[1])
    return model


def _compiled_part_in_place(model: Any) -> Any:
    model[1].compile()
    return model


@pytest.mark.filterwarnings("ignore:.*jit.script_method:DeprecationWarning")  # torch's own, as it imports its compiler
@pytest.mark.parametrize(
    ("compiled", "path"),
    [
        (_compiled, "OptimizedModule"),
        (_compiled_in_place, "Sequential"),
        (_compiled_part, "1"),
        (_compiled_part_in_place, "1"),
    ],
    ids=["model", "in-place", "part", "part-in-place"],
)
def test_patch_model_refuses_what_is_compiled(compiled: Callable[[Any], Any], path: str) -> None:
    message = (
        f"{path}: expected a model that is not compiled, got one that is: its hooks would never run. "
        "Call patch_model before torch.compile."
    )
    refuses(message, SourceError, compiled(two()))


def test_patch_model_refuses_the_meta_device() -> None:
    message = (
        "0.weight: expected a weight in memory, got one on the meta device. Load the model without offloading, and "
        "patch it then."
    )
    before = (model := two().to("meta")).__dict__.copy()
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        patch_model(model)
    assert model.__dict__ == before


def test_patch_model_refuses_data_parallel() -> None:
    message = (
        "Sequential: expected a model in one place, got DataParallel, whose replicas are not its layers. "
        "Use DistributedDataParallel."
    )
    refuses(message, SourceError, nn.DataParallel(two()))


_TAKEN = (
    "weight: expected the layer's own parameter, got none. DataParallel, FSDP 1 and parametrizations take it away: use "
    "DistributedDataParallel or fully_shard, and patch after parametrizing."
)


def test_replica_of_data_parallel_is_refused_in_forward() -> None:
    layer = patch_model(nn.Linear(3, 4), mixout=0.5)
    replica = layer._replicate_for_data_parallel()
    replica.weight = layer.weight.clone()  # as torch.nn.parallel.replicate gives it a weight on another device
    message = (
        "Linear: expected the model itself, got a replica by DataParallel. Use DistributedDataParallel, or one GPU."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        replica(torch.ones(1, 3))
    layer(torch.ones(1, 3))


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original", "flat"])
def test_fsdp_1_is_refused_before_and_after_patching(use_orig_params: bool) -> None:
    def shard(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    message = "FullyShardedDataParallel: expected whole weights or FSDP 2, got FSDP 1, which flattens them. Use fully"
    with pytest.raises(SourceError, match=f"{message}.* `accelerate launch --fsdp_version 2`"):
        patch_model(shard(two()))
    with pytest.raises(SourceError, match=f"^0.{re.escape(_TAKEN)}$"):
        shard(patch_model(two(), mixout=0.5))(torch.ones(1, 3))


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original", "flat"])
def test_fsdp_1_is_refused_before_noise(use_orig_params: bool) -> None:
    model = FullyShardedDataParallel(two(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    message = (
        "FullyShardedDataParallel: expected whole weights, got FSDP 1, which flattens them. Perturb the model before"
    )
    with pytest.raises(SourceError, match=message):
        perturb_model(model)
    assert all(map(torch.equal, model.parameters(), before))


def move_to_nvme(w: Any) -> None:
    """Leave of a weight what DeepSpeed's ZeRO-3 does that keeps its shares on a disk."""
    w.ds_shape, w.ds_numel, w.ds_tensor = w.shape, w.numel(), torch.empty(1)
    w.ds_tensor.final_location = "nvme"
    w.data = torch.empty(0)


ON_NVME = (
    "1.weight: expected a weight in memory, got one that ZeRO-3 has put on NVMe. Keep the weights in memory as they"
)


def test_weight_that_zero_3_has_put_on_nvme_is_refused() -> None:
    model = two()
    move_to_nvme(model[1].weight)
    refuses(f"{ON_NVME} are, or use ZeRO 1 or 2.", SourceError, model)
    with pytest.raises(
        SourceError, match=r"^1\.weight: expected a dense tensor in memory, got one that ZeRO-3 has put"
    ):
        perturb_model(model)


def test_weight_that_is_put_on_nvme_after_patching_is_refused_in_forward() -> None:
    model = patch_model(two(), mixout=0.5)
    move_to_nvme(model[1].weight)
    with pytest.raises(SourceError, match=f"^{ON_NVME}"):
        model(torch.ones(1, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_patch_model_refuses_torchscript() -> None:
    scripted = torch.jit.script(two())
    with pytest.raises(
        SourceError, match=r"expected Python modules, got TorchScript\. Patch the model before scripting"
    ):
        patch_model(scripted)


# -- weights that another tool has swapped -------------------------------------------------------------------------


def _put_before(layer: nn.Module) -> None:
    layer.__dict__["weight"] = layer._parameters["weight"]


_SWAPPED = "one that another tool swaps in (spectral_norm, FSDP 1, pruning)"


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), Conv1D(4, 3), nn.Conv1d(3, 4, 1)], ids=["Linear", "Conv1D", "conv"])
@pytest.mark.parametrize(
    ("swap", "fault"),
    [
        (nn.utils.spectral_norm, _SWAPPED),
        (lambda layer: prune.identity(layer, "weight"), _SWAPPED),
        (_put_before, "one that another tool put before it"),
    ],
    ids=["spectral-norm", "prune", "attribute"],
)
def test_patch_model_refuses_swapped_weights(layer: nn.Module, swap: Callable[[Any], Any], fault: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), deepcopy(layer))
    swap(model[1])
    message = f"1.weight: expected the layer's own parameter, got {fault}. Remove it first, or name '1' in exclude."
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        patch_model(model)
    patch_model(model, exclude="1")
    assert describe(model).mixed == ("0.weight",)


def test_patch_model_refuses_a_weight_that_an_interrupted_forward_of_ours_left() -> None:
    model = patch_model(two(), mixout=0.5)
    model[0].register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 3))
    patch_model(model, mixout=0.9)
    assert model[0].weight is model[0]._parameters["weight"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# -- weights that are left out, by name ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_weight_is_named_and_not_mixed(dtype: torch.dtype) -> None:
    model = two()
    model[0].weight = nn.Parameter(torch.zeros(4, 3).to(dtype), requires_grad=False)
    patch_model(model, mixout=0.5)
    assert describe(model).mixed == ("1.weight",)
    name = str(dtype).removeprefix("torch.")
    assert describe(model).left["0.weight"] == f"quantized to {name}"
    assert f"not mixed    1 (quantized to {name}): 0.weight" in str(describe(model))


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyBatchNorm1d()], ids=["Linear", "BatchNorm"])
def test_patch_model_refuses_lazy_layers_until_they_have_run(lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), lazy)
    message = (
        "1: expected layers that know their shapes, got one that waits for its first input. "
        "Run a forward before patch_model."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        patch_model(model)
    model(torch.ones(2, 3))
    patch_model(model)


# -- a model that has changed since --------------------------------------------------------------------------------


def test_resized_weight_is_refused_in_forward() -> None:
    model = patch_model(two(), mixout=0.5)
    model[0].weight = nn.Parameter(torch.zeros(5, 3))
    message = "0.weight: expected shape (4, 3) as when it was patched, got (5, 3). Patch the model after resizing it; "
    with pytest.raises(SourceError, match=re.escape(message)):
        model(torch.ones(1, 3))


def test_anchor_without_an_optimizer_of_torch_is_refused() -> None:
    model = patch_model(two(), anchor=0.1)

    def step() -> None:
        model(torch.ones(1, 3)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad

    step()
    step()
    message = (
        "anchor: expected a step of a torch.optim.Optimizer that holds 0.weight, got weights that change without one. "
        "Use such an optimizer, built from the model's own parameters."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        step()


def test_model_that_calls_none_of_its_layers_is_refused() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.layer.weight.T

    message = (
        "layer.weight: expected a call of the layer in forward, got none of any. "
        "Patch the model whose forward calls its layers."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        patch_model(Reading(), mixout=0.5)(torch.ones(1, 3))
