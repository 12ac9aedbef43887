"""Layers whose weights are not called `weight`, each with what it reads, its masks, and its forward written by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from kinds_by_hand import (
    Weights,
    attend,
    experts,
    experts_of_gpt_oss,
    experts_of_llama4,
    gru,
    gru_cell,
    lstm,
    rnn,
)
from torch import nn
from torch.func import functional_call


@dataclass(frozen=True)
class Kind:
    """A layer in float64.

    Args:
        make: the layer.
        read: what its forward is given.
        masks: shapes of the masks per input feature, in the order in which they are drawn.
        forward: its output by its parameters and what it reads; None: torch's, of a plain layer.
    """

    make: Callable[[], nn.Module]
    read: Callable[[], tuple[Any, ...]]
    masks: Mapping[str, tuple[int, ...]]
    forward: Callable[..., torch.Tensor] | None = None

    def plain(self, weights: Weights, inputs: tuple[Any, ...]) -> torch.Tensor:
        """Compute the output without any hook."""
        if self.forward is not None:
            return self.forward(weights, *inputs)
        return first_of(functional_call(self.make(), dict(weights), inputs))


class Holder(nn.Module):
    """A model of one layer, which it returns the first output of."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return first_of(self.layer(*inputs))


def first_of(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def loss(output: torch.Tensor) -> torch.Tensor:
    return (output + 1).square().sum()


class Seen:
    """The weights that each call of the layer computes with."""

    def __init__(self, model: Holder, kind: Kind) -> None:
        self.found: list[dict[str, torch.Tensor]] = []
        self._names = [name.removeprefix("layer.") for name in kind.masks]
        model.layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, _: Any) -> None:
        parts = {name: name.rpartition(".") for name in self._names}
        seen = {name: getattr(layer.get_submodule(path), last) for name, (path, _, last) in parts.items()}
        self.found.append({name: w.detach().clone() for name, w in seen.items()})


def build(kind: Kind, *, seed: int = 0) -> Holder:
    torch.manual_seed(seed)
    return Holder(kind.make()).train()


def draw(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXPERTS, HIDDEN, INNER, TOKENS = 3, 6, 4, 7
_SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1}
OUT_IN = {"layer.gate_up_proj": (EXPERTS, 1, HIDDEN), "layer.down_proj": (EXPERTS, 1, INNER)}
IN_OUT = {"layer.gate_up_proj": (EXPERTS, HIDDEN, 1), "layer.down_proj": (EXPERTS, INNER, 1)}


def filled(layer: nn.Module) -> nn.Module:
    """Fill what a layer of transformers leaves empty."""
    for w in layer.parameters():
        nn.init.normal_(w, std=0.3)
    return layer.double()


def mixtral(implementation: str, *, hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = _SIZES | {"hidden_size": hidden, "intermediate_size": inner}
    config = transformers.MixtralConfig(**sizes, num_local_experts=EXPERTS, hidden_act="gelu")
    config._experts_implementation = implementation
    return filled(MixtralExperts(config))


def gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(**_SIZES, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    return filled(GptOssExperts(config))


def llama4() -> nn.Module:
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    return filled(Llama4TextExperts(transformers.Llama4TextConfig(**_SIZES, num_local_experts=EXPERTS)))


def routed(hidden: int = HIDDEN) -> tuple[torch.Tensor, ...]:
    """Tokens, which two experts each of them goes to, and with what weight."""
    index = torch.tensor([[token % EXPERTS, (token + 1) % EXPERTS] for token in range(TOKENS)])
    return draw(TOKENS, hidden), index, draw(TOKENS, 2, seed=8).softmax(-1)


def jetmoe() -> nn.Module:
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    return filled(JetMoeParallelExperts(EXPERTS, HIDDEN, INNER))


def inkling() -> nn.Module:
    from transformers.models.inkling.modeling_inkling import InklingSharedExperts

    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "n_shared_experts": EXPERTS, "hidden_act": "silu"}
    return filled(InklingSharedExperts(SimpleNamespace(**sizes)))


def longcat() -> nn.Module:
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    sizes = {"hidden_size": HIDDEN, "expert_ffn_hidden_size": INNER, "n_routed_experts": EXPERTS, "zero_expert_num": 0}
    return filled(LongcatFlashExperts(SimpleNamespace(**sizes, hidden_act="silu")))


def xlnet() -> nn.Module:
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    layer = XLNetRelativeAttention(transformers.XLNetConfig(d_model=6, n_head=2, d_inner=8, n_layer=1, dropout=0.0))
    return filled(layer)


def _lstm_masks() -> dict[str, tuple[int, ...]]:
    read = {0: 4, 1: 6}
    ways = [(layer, way) for layer in (0, 1) for way in ("", "_reverse")]
    return {
        f"layer.weight_{kind}_l{layer}{way}": (1, size)
        for layer, way in ways
        for kind, size in (("ih", read[layer]), ("hh", 3), ("hr", 5))
    }


def _three(size: int = 8) -> tuple[torch.Tensor, ...]:
    return draw(2, 3, 8), draw(2, 4, size, seed=8), draw(2, 4, size + (size != 8), seed=9)


KINDS = {
    "lstm": Kind(
        lambda: nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3).double(),
        lambda: (draw(3, 2, 4),),
        _lstm_masks(),
        lstm,
    ),
    "gru": Kind(
        lambda: nn.GRU(4, 5).double(),
        lambda: (draw(3, 2, 4),),
        {"layer.weight_ih_l0": (1, 4), "layer.weight_hh_l0": (1, 5)},
        gru,
    ),
    "rnn": Kind(
        lambda: nn.RNN(4, 5, nonlinearity="relu", bias=False).double(),
        lambda: (draw(3, 2, 4),),
        {"layer.weight_ih_l0": (1, 4), "layer.weight_hh_l0": (1, 5)},
        rnn,
    ),
    "cell": Kind(
        lambda: nn.GRUCell(4, 5).double(),
        lambda: (draw(2, 4), draw(2, 5, seed=8)),
        {"layer.weight_ih": (1, 4), "layer.weight_hh": (1, 5)},
        gru_cell,
    ),
    "attention": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True).double(),
        lambda: _three(),
        {"layer.in_proj_weight": (1, 8), "layer.out_proj.weight": (1, 8)},
        attend,
    ),
    "attention of other sizes": Kind(
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True).double(),
        lambda: _three(5),
        {
            "layer.q_proj_weight": (1, 8),
            "layer.k_proj_weight": (1, 5),
            "layer.v_proj_weight": (1, 6),
            "layer.out_proj.weight": (1, 8),
        },
        attend,
    ),
    "experts": Kind(lambda: mixtral("eager"), routed, OUT_IN, experts),
    "batched experts": Kind(lambda: mixtral("batched_mm"), routed, OUT_IN, experts),
    "experts of GPT-OSS": Kind(gpt_oss, routed, IN_OUT, experts_of_gpt_oss),
    "experts of Llama 4": Kind(llama4, lambda: (draw(6, HIDDEN),), IN_OUT, experts_of_llama4),
    "xlnet": Kind(
        xlnet,
        lambda: (
            draw(3, 2, 6),
            draw(3, 2, 6, seed=8),
            *torch.zeros(2, 3, 3, 2, 1).double(),
            draw(6, 2, 6, seed=9),
            None,
        ),
        {f"layer.{name}": (1, 2, 3) if name == "o" else (6, 1, 1) for name in "qkvor"},
    ),
}

OTHER_EXPERTS = {
    "experts of JetMoe": Kind(jetmoe, lambda: (draw(6, HIDDEN), [1, 2, 3]), {"layer.weight": (EXPERTS, 1, HIDDEN)}),
    "experts of Inkling": Kind(
        inkling,
        lambda: (draw(2, 3, HIDDEN), draw(2, 3, EXPERTS, seed=8)),
        {
            "layer.gate_proj": (EXPERTS, 1, HIDDEN),
            "layer.up_proj": (EXPERTS, 1, HIDDEN),
            "layer.down_proj": (EXPERTS, 1, INNER),
        },
    ),
    "experts of LongCat": Kind(longcat, routed, OUT_IN),
}
"""Those that are known by their class's name alone; the forward is theirs."""
