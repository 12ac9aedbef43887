"""The forward of layers whose weights are not called `weight`, written by hand from their weights, without torch.nn."""

from collections.abc import Mapping

import torch
from torch.nn import functional as F  # noqa: N812

Weights = Mapping[str, torch.Tensor]

# -- recurrent layers ----------------------------------------------------------------------------------------------


def lstm(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Two layers of two directions with projections, arXiv 1402.1128."""
    for layer in (0, 1):
        x = torch.cat([_lstm_direction(w, f"l{layer}{way}", x) for way in ("", "_reverse")], -1)
    return x


def _lstm_direction(w: Weights, way: str, x: torch.Tensor) -> torch.Tensor:
    times = range(len(x))
    h, c = x.new_zeros(x.shape[1], w[f"weight_hr_{way}"].shape[0]), x.new_zeros(x.shape[1], 5)
    found = {}
    for time in reversed(times) if way.endswith("_reverse") else times:
        gates = x[time] @ w[f"weight_ih_{way}"].T + w[f"bias_ih_{way}"]
        i, f, g, o = (gates + h @ w[f"weight_hh_{way}"].T + w[f"bias_hh_{way}"]).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = found[time] = (o.sigmoid() * c.tanh()) @ w[f"weight_hr_{way}"].T
    return torch.stack([found[time] for time in times])


def gru(w: Weights, x: torch.Tensor) -> torch.Tensor:
    h, found = x.new_zeros(x.shape[1], 5), []
    for step in x:
        h = gru_cell({name.removesuffix("_l0"): values for name, values in w.items()}, step, h)
        found.append(h)
    return torch.stack(found)


def gru_cell(w: Weights, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    ir, iz, ig = (x @ w["weight_ih"].T + w["bias_ih"]).chunk(3, -1)
    hr, hz, hg = (h @ w["weight_hh"].T + w["bias_hh"]).chunk(3, -1)
    z = (iz + hz).sigmoid()
    return (1 - z) * (ig + (ir + hr).sigmoid() * hg).tanh() + z * h


def rnn(w: Weights, x: torch.Tensor) -> torch.Tensor:
    h, found = x.new_zeros(x.shape[1], 5), []
    for step in x:
        h = (step @ w["weight_ih_l0"].T + h @ w["weight_hh_l0"].T).relu()
        found.append(h)
    return torch.stack(found)


# -- attention -----------------------------------------------------------------------------------------------------


def attend(w: Weights, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Two heads; batch first."""
    separate = [w.get(f"{name}_proj_weight") for name in "qkv"]
    projections = w["in_proj_weight"].chunk(3) if separate[0] is None else separate
    biases = w["in_proj_bias"].chunk(3)
    read = zip((query, key, value), projections, biases, strict=True)
    q, k, v = ((x @ one.T + bias).unflatten(-1, (2, -1)).transpose(1, 2) for x, one, bias in read)  # type: ignore[union-attr]
    heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return heads.transpose(1, 2).flatten(2) @ w["out_proj.weight"].T + w["out_proj.bias"]


# -- experts -------------------------------------------------------------------------------------------------------


def experts(w: Weights, x: torch.Tensor, index: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Mixtral's, token by token."""
    rows = []
    for token in range(len(x)):
        row = torch.zeros_like(x[0])
        for expert, weight in zip(index[token].tolist(), share[token], strict=True):
            gate, up = (w["gate_up_proj"][expert] @ x[token]).chunk(2)
            row = row + weight * (w["down_proj"][expert] @ (F.gelu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def experts_of_gpt_oss(w: Weights, x: torch.Tensor, index: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """GPT-OSS', whose matrices are (in, out), token by token."""
    rows = []
    for token in range(len(x)):
        row = torch.zeros_like(x[0])
        for expert, weight in zip(index[token].tolist(), share[token], strict=True):
            both = x[token] @ w["gate_up_proj"][expert] + w["gate_up_proj_bias"][expert]
            gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
            inner = (up + 1) * gate * (1.702 * gate).sigmoid()
            row = row + weight * (inner @ w["down_proj"][expert] + w["down_proj_bias"][expert])
        rows.append(row)
    return torch.stack(rows)


def experts_of_llama4(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Llama 4's: every expert reads rows of its own."""
    rows = []
    for expert, own in enumerate(x.chunk(len(w["down_proj"]))):
        gate, up = (own @ w["gate_up_proj"][expert]).chunk(2, -1)
        rows.append((up * F.silu(gate)) @ w["down_proj"][expert])
    return torch.cat(rows)
