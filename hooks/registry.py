"""All methods, in the order in which they attach to a model; a new one is its folder and its line here."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .anchor.settings import Anchor
from .mixout.settings import Mixout
from .rdrop.settings import RDrop
from .recadam.settings import RecAdam
from .regularizer import Regularizer, Settings

if TYPE_CHECKING:
    from .weights.chosen import ChosenWeights

METHODS: tuple[type[Settings], ...] = (Mixout, RDrop, Anchor, RecAdam)


def as_settings(given: Mapping[str, Any]) -> tuple[Settings, ...]:
    """Make the settings of the methods that are asked for.

    Args:
        given: by the name of a method, its number or its settings; None: it is not asked for.
    Raises:
        SettingError: a number is out of range, or two methods cannot be together.
    """
    asked = [(kind, given[kind.name]) for kind in METHODS if given.get(kind.name) is not None]
    made = tuple(value if isinstance(value, kind) else kind(value) for kind, value in asked)  # type: ignore[call-arg]
    for one in made:
        one.refuse_beside(made)
    return made


def bind(settings: Settings, weights: "ChosenWeights | None", others: Sequence[Settings]) -> Regularizer:
    """Make the method for one model: the class NAMERegularizer of its folder, whose torch half is imported only now."""
    module = import_module(f".{settings.name}.regularizer", __package__)
    kind = getattr(module, f"{type(settings).__name__}Regularizer")
    made: Regularizer = kind(settings, weights, others)
    return made
