"""Find the dropout that Mixout replaces: that of the layers it mixes."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from surgery.live.zero3 import shape_of

from ..marks import Mark, Marked, put
from ..weights.layers import feature_axes
from ..weights.selection import EXCLUDED, NEW, NOT_INCLUDED


@dataclass(frozen=True)
class Rate:
    """A dropout rate: `attribute` of `module`, known as `name` in the model, with the value that it had."""

    name: str
    module: nn.Module
    attribute: str
    value: float


class Replaced(Mark):
    """Left on a module whose dropout rates are replaced: what they were, by attribute."""

    attribute = "_surgery_rates"

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def restore(self, attributes: MutableMapping[str, Any]) -> None:
        """Set the rates back, but for those that somebody has set since."""
        super().restore(attributes)
        for attribute, value in self.rates.items():
            if attributes.get(attribute) == 0:
                attributes[attribute] = value


def replace_rate(rate: Rate) -> Marked:
    """Set a rate to 0, and leave a mark that tells what it was; return the handle of the mark."""
    mark: Replaced = rate.module.__dict__.get(Replaced.attribute) or Replaced()
    mark.rates[rate.attribute] = rate.value
    setattr(rate.module, rate.attribute, 0.0)
    return put(rate.module, mark)


def find_rates(model: nn.Module, mixed: Collection[str], left: Mapping[str, str]) -> tuple[list[Rate], list[Rate]]:
    """Find the dropout to replace, which is that of the layers that are mixed, and the dropout to keep.

    A nn.Dropout works on what the next layer reads: the first one after it among its siblings decides; where none
    comes after, the last one before; where there is none, the weights that its parent holds itself, as XLNet's
    attention does, and then those beside its parent. A rate that is a number, such as BART's, belongs to the module
    that holds it, and is replaced if a layer of its own is mixed, or, if all it has are lists of blocks, the first one
    in there. Layers that are never mixed, such as embeddings, decide nothing.

    Args:
        mixed: names of the weights that are mixed.
        left: why each other parameter is not, by name; those in neither are frozen.
    """
    spared = (NEW, EXCLUDED, NOT_INCLUDED, None)
    is_mixed = {
        name: name in mixed
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if len(shape_of(parameter)) > 1 and (name in mixed or left.get(name) in spared)
    }
    replaced: list[Rate] = []
    kept: list[Rate] = []
    for rate in _rates(model):
        if "lora_dropout" in rate.name.split("."):
            path, _, adapter = rate.name.rpartition("lora_dropout.")
            is_replaced = f"{path}lora_A.{adapter}.weight" in mixed
        elif isinstance(rate.module, _DropoutNd):
            is_replaced = next(_beside(model, rate.name, is_mixed), True)
        else:
            is_replaced = _is_mixed_in(rate, is_mixed)
        (replaced if is_replaced else kept).append(rate)
    return replaced, kept


def _beside(model: nn.Module, path: str, is_mixed: Mapping[str, bool]) -> Iterator[bool]:
    """Yield whether each layer after a module is mixed, then those before it, nearest first; then of its parent."""
    while path:
        path, _, name = path.rpartition(".")
        parent = model.get_submodule(path)
        siblings = list(parent._modules)
        index = siblings.index(name)
        for after in siblings[index + 1 :]:
            yield from _within(f"{path}.{after}", is_mixed)
        for before in reversed(siblings[:index]):
            yield from reversed(_within(f"{path}.{before}", is_mixed))
        own = (f"{path}.{attribute}".lstrip(".") for attribute in feature_axes(parent))
        yield from (is_mixed[one] for one in own if one in is_mixed)


def _is_mixed_in(rate: Rate, is_mixed: Mapping[str, bool]) -> bool:
    """Tell whether the layers are mixed that the module has whose rate this is."""
    path = rate.name.rpartition(".")[0]
    lists = [name for name, child in rate.module.named_children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    blocks = [value for name in lists for value in _within(f"{path}.{name}", is_mixed)]
    every = _within(path, is_mixed)
    if len(every) > len(blocks):
        return sum(every) > sum(blocks)
    return next(iter(every), False)


def _within(path: str, is_mixed: Mapping[str, bool]) -> list[bool]:
    prefix = f"{path}.".lstrip(".")
    return [value for name, value in is_mixed.items() if name.startswith(prefix)]


def _rates(model: nn.Module) -> Iterator[Rate]:
    """Yield every rate above 0."""
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(module, _DropoutNd):
                if attribute == "p" and value > 0:
                    yield Rate(path, module, attribute, value)
            elif isinstance(value, float) and 0 < value <= 1 and _is_rate(attribute):
                yield Rate(f"{path}.{attribute}".lstrip("."), module, attribute, value)


def _is_rate(attribute: str) -> bool:
    """Tell dropout from what drops whole layers or paths, such as layerdrop and drop_path, which mixout is not."""
    return "dropout" in attribute or "pdrop" in attribute
