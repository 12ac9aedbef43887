"""Find the dropout that Mixout replaces: that of the layers it mixes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .targets import EXCLUDED, NEW


@dataclass(frozen=True)
class Rate:
    """A dropout rate: `attribute` of `module`, known as `name` in the model, with the value that it had."""

    name: str
    module: nn.Module
    attribute: str
    value: float


def find_rates(model: nn.Module, mixed: Collection[str], left: Mapping[str, str]) -> tuple[list[Rate], list[Rate]]:
    """Find the dropout to replace, and the dropout to keep.

    A nn.Dropout works on what the next layer reads, so it is kept if the layer after it, among its siblings, is new or
    excluded; where none comes after, the layer before decides. A rate that is a number, such as BART's, belongs to the
    module that holds it, and is kept if nothing in there is mixed.

    Args:
        mixed: names of the weights that are mixed.
        left: why each other parameter is not mixed, by name.
    """
    matrices = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.dim() > 1}
    with_mixed = _around(mixed)
    spared = _around(name for name, reason in left.items() if reason in (NEW, EXCLUDED) and name in matrices)
    replaced: list[Rate] = []
    kept: list[Rate] = []
    for rate, neighbours in _rates(model):
        if "lora_dropout" in rate.name.split("."):  # before PEFT's adapter, which is not mixed
            is_kept = True
        elif neighbours is None:
            is_kept = rate.name.rpartition(".")[0] not in with_mixed
        else:
            is_kept = next((path not in with_mixed for path in neighbours if path in with_mixed | spared), False)
        (kept if is_kept else replaced).append(rate)
    return replaced, kept


def _around(names: Collection[str] | Iterator[str]) -> set[str]:
    """Return the paths of all modules that hold one of these parameters."""
    return {name[:end] for name in names for end in [0, *(i for i, letter in enumerate(name) if letter == ".")]}


def _rates(model: nn.Module) -> Iterator[tuple[Rate, Sequence[str] | None]]:
    """Yield every rate above 0, and for a nn.Dropout the paths of its siblings: those after it, then those before."""
    for path, module in model.named_modules():
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        for index, (child_path, child) in enumerate(children):
            if isinstance(child, _DropoutNd) and child.p > 0:
                siblings = [other for other, _ in [*children[index + 1 :], *reversed(children[:index])]]
                yield Rate(child_path, child, "p", child.p), siblings
        for attribute, value in vars(module).items():
            if isinstance(value, float) and 0 < value <= 1 and _is_rate(attribute):
                yield Rate(f"{path}.{attribute}".lstrip("."), module, attribute, value), None


def _is_rate(attribute: str) -> bool:
    """Tell dropout from what drops whole layers or paths, such as layerdrop and drop_path, which mixout is not."""
    return "dropout" in attribute or "pdrop" in attribute
