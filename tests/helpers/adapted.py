"""One layer of each kind with LoRA on it, and the weight that it stands for, written out as a whole in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A and B by adapter."""


@dataclass(frozen=True)
class Case:
    """A layer and the adapters on it.

    Args:
        kind: of the layer.
        settings: of each adapter; the first is the default one.
    """

    kind: str
    settings: tuple[dict[str, Any], ...] = ({"r": 2},)

    def __str__(self) -> str:
        words = (str(value) for one in self.settings for key, value in one.items() if key == "init_lora_weights")
        more = ["rslora"] * any("use_rslora" in one for one in self.settings) + ["two"] * (len(self.settings) > 1)
        return "-".join([self.kind, *words, *more])


LINEAR = Case("Linear")
CASES = (
    LINEAR,
    Case("Conv1D"),
    Case("Conv1d"),
    Case("Conv2d"),
    Case("grouped"),
    Case("Linear", ({"r": 4, "use_rslora": True, "lora_alpha": 3},)),
    Case("Linear", ({"r": 2}, {"r": 3, "lora_alpha": 5})),
    Case("Linear", ({"r": 2, "init_lora_weights": "pissa"},)),
    Case("Linear", ({"r": 2, "init_lora_weights": "olora"},)),
    Case("Conv1D", ({"r": 2, "init_lora_weights": "pissa"},)),
)

_LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (4, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (3, 4, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 5)),
}


def make(case: Case = LINEAR, *, dtype: torch.dtype = torch.float64, **more: Any) -> PeftModel:
    """A model of this layer and nothing else, whose adapters have been trained away from their start."""
    torch.manual_seed(0)
    layer = _LAYERS[case.kind][0]()
    nn.init.normal_(layer.weight)  # Conv1D begins near 0
    more |= {"target_modules": ["0"], "fan_in_fan_out": case.kind == "Conv1D"}
    configs = [LoraConfig(**one, **more) for one in case.settings]
    model = get_peft_model(nn.Sequential(layer), configs[0])
    names = ["default"]
    for number, config in enumerate(configs[1:]):
        model.add_adapter(f"other{number}", config)
        names.append(f"other{number}")
    model.base_model.set_adapter(names)
    return model.to(dtype).train()


@torch.no_grad()
def train_away(model: PeftModel) -> PeftModel:
    """Move the adapters from where they began."""
    generator = torch.Generator().manual_seed(1)
    for w in trainable(model):
        w.add_(0.3 * torch.randn(w.shape, generator=generator, dtype=torch.float64))
    return model


def inputs(case: Case = LINEAR, *, seed: int = 2) -> torch.Tensor:
    return torch.randn(_LAYERS[case.kind][1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(model: PeftModel) -> Any:
    """PEFT's layer."""
    return model.base_model.model[0]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [w for w in model.parameters() if w.requires_grad]


def factors(model: PeftModel) -> Factors:
    """Copies of A and B."""
    layer = layer_of(model)
    return {
        name: (layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone())
        for name in layer.lora_A
    }


def delta(case: Case, layer: Any, of: Factors) -> torch.Tensor:
    """The sum of s B A in the shape of the layer's weight: out, in, ..., but Conv1D's, which is in, out.

    A grouped convolution's is that of the convolution without groups that it is with LoRA: each input channel reaches
    every rank, and each rank the outputs of its group.
    """
    total: Any = 0
    for name, (a, b) in of.items():
        whole = torch.block_diag(*b.flatten(1).chunk(2)) if case.kind == "grouped" else b.flatten(1)
        total = total + layer.scaling[name] * torch.tensordot(whole, a, dims=1)
    return total.T if case.kind == "Conv1D" else total


def base_weight(case: Case, layer: Any) -> torch.Tensor:
    """W0, whose groups are blocks of a whole weight."""
    w: torch.Tensor = layer.base_layer.weight.detach()
    if case.kind != "grouped":
        return w
    halves = [F.pad(half, (0, 0, 0, 0, 2 * n, 2 - 2 * n)) for n, half in enumerate(w.chunk(2))]
    return torch.cat(halves)


def apply(case: Case, layer: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a layer of the weight `w` computes."""
    bias = layer.base_layer.bias
    if case.kind in ("Linear", "Conv1D"):
        return F.linear(x, w.T if case.kind == "Conv1D" else w, bias)
    conv = F.conv1d if case.kind == "Conv1d" else F.conv2d
    return conv(x, w, bias, stride=layer.base_layer.stride, padding=layer.base_layer.padding)


def mixed(case: Case, layer: Any, of: Factors, start: Factors, m: torch.Tensor, p: float) -> torch.Tensor:
    """Mixout of the merged weight: w_pre + (w - w_pre) * m / (1 - p), m of one value for each input feature."""
    w0 = base_weight(case, layer)
    w, w_pre = w0 + delta(case, layer, of), w0 + (delta(case, layer, start) if start else 0)
    shape = (-1, 1) if case.kind == "Conv1D" else (1, -1, *(1,) * (w.dim() - 2))
    return w_pre + (w - w_pre) * m.reshape(shape) / (1 - p)


class Spy:
    """Notes the m of each call, by which columns of A are 0; all adapters must show the same."""

    def __init__(self, model: PeftModel) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.model = model
        for name, module in layer_of(model).lora_A.items():
            module.register_forward_pre_hook(lambda module, _, name=name: self._note(name, module))

    def _note(self, name: str, module: nn.Module) -> None:
        if not self.seen or name in self.seen[-1]:
            self.seen.append({})
        rank = layer_of(self.model).r[name]  # of a moved start, A0 comes below
        shown = module.weight.detach()[:rank]
        self.seen[-1][name] = (shown != 0).transpose(0, 1).flatten(1).any(1).double()

    @property
    def last(self) -> torch.Tensor:
        first, *others = self.seen[-1].values()
        assert all(torch.equal(first, other) for other in others)
        return first


def init_of(case: Case) -> Sequence[Any]:
    return [one.get("init_lora_weights", True) for one in case.settings]


def start_of(case: Case, model: PeftModel) -> Factors:
    """What is kept of a start that was taken out of the base: nothing, unless it was."""
    return factors(model) if init_of(case)[0] in ("pissa", "olora") else {}
