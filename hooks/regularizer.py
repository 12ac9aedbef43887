"""The contract of a method: Settings, what was asked for, and Regularizer, the method at work on one model.

No torch at import: `surgery run` and its flags need the settings before the script imports it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from surgery.errors import SettingError, SourceError
from surgery.escapes import get_logger

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.optimizer import Optimizer

    from .weights.chosen import ChosenWeights
    from .weights.selection import Scope

_log = get_logger(__name__)
MISSED_STEPS = "optimizer steps: no forward in training mode came before them"


@dataclass(frozen=True)
class Flag:
    """An option of `surgery run` for a setting that is not the method's number.

    Args:
        field: the setting: "every" of rdrop makes --rdrop-every, SURGERY_RDROP_EVERY and rdrop_every.
        kind: int, float, or the words to choose from.
        help: what --help says.
    """

    field: str
    kind: type[int] | type[float] | tuple[str, ...]
    help: str


class Settings(ABC):
    """What was asked of one method: a frozen dataclass, whose numbers are checked when it is made.

    Attributes:
        name: patch_model's keyword, the flag, the SURGERY_ variable, and the key in reports.
        number: the field that a bare number fills.
        paper: its arXiv id.
        help: what --help says of the flag.
        acts_on: the weights that it wants with their w_pre, "layers" for those of layers that can be mixed,
            "parameters" for all; None: it acts on none, and w_pre and include are idle.
        verb: what it does to these weights, as in "37 weights mixed".
        flags: what `surgery run` adds for it.
        missing: what a run says where it had no effect and nothing else says why.
        idle_facts: its fields of Description, as they are where it is not at work.
        idle_report: its fields of a model in --report, likewise.
        counts: those of idle_report that are said as "37 mixed".
    """

    name: ClassVar[str]
    number: ClassVar[str]
    paper: ClassVar[str]
    help: ClassVar[str]
    acts_on: "ClassVar[Scope | None]"
    verb: ClassVar[str] = ""
    flags: ClassVar[tuple[Flag, ...]] = ()
    missing: ClassVar[str]
    idle_facts: ClassVar[Mapping[str, Any]] = {}
    idle_report: ClassVar[Mapping[str, Any]] = {}
    counts: ClassVar[tuple[str, ...]] = ()

    @property
    def is_per_batch(self) -> bool:
        """Whether it draws once for a whole batch, so that two passes cannot share one doubled batch."""
        return False

    def refuse_beside(self, others: Sequence["Settings"]) -> None:
        """Raise a SettingError where the method cannot be at work together with one of the others."""

    def lines(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:  # noqa: ARG002
        """Return its lines of str(describe(model)), each with its label.

        Args:
            facts: of a Description.
        """
        return []

    def lines_below(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:  # noqa: ARG002
        """Return those that come after the lines on weights."""
        return []

    @abstractmethod
    def announcement(self, entry: Mapping[str, Any]) -> str:
        """Say what was done to a model, for the line of `surgery run` when training begins.

        Args:
            entry: the model's, as in --report.
        """

    @classmethod
    def summary(cls, entry: Mapping[str, Any]) -> list[str]:  # noqa: ARG003
        """Say what came out, for the last line of `surgery run`, beside `counts`."""
        return []


class Handle(Protocol):
    """Undoes one change of a model."""

    def remove(self) -> None: ...


class Regularizer(ABC):
    """One method at work on one model. Every event has an empty default.

    It is made without touching the model, and copied and pickled with it, as is all that it holds: hooks are functions
    of a module that look up what they need on the module they are handed.

    Args:
        settings: what was asked for.
        weights: those to act on; None if `settings.acts_on` is.
        others: the settings of all methods on this model, these among them.
    """

    may_step_aside: bool = False
    """Where it cannot have an effect, the training goes on without it."""
    is_aside: bool = False
    """It goes on without it."""

    @abstractmethod
    def __init__(self, settings: Any, weights: "ChosenWeights | None", others: Sequence[Settings]) -> None: ...

    def refuse(self, reason: str) -> None:
        """Raise a SourceError, or log it once and step aside."""
        if self.is_aside:
            return
        error = SourceError(reason)
        if not self.may_step_aside:
            raise error
        _log.warning("%s", error)
        self.is_aside = True

    def attach(self, root: "nn.Module") -> list[Handle]:  # noqa: ARG002
        """Change the model. Each handle undoes one change; the patch removes them in reverse.

        Hooks of the root see it between those of the patch, which is `root.__dict__[marks.PATCH]` already.
        """
        return []

    def begin_forward(self, root: "nn.Module") -> None:
        """A forward of the root begins, in training mode or not; torch.compile may be tracing it."""

    def next_pass(self) -> None:
        """A second pass of the same forward begins."""

    def end_forward(self, root: "nn.Module", output: Any) -> None:
        """A forward of the root ends; output is None if it has raised."""

    def abort(self) -> None:
        """Do away with what a forward that was interrupted has left: a KeyboardInterrupt runs no hooks."""

    def before_step(self, optimizer: "Optimizer", *, is_closure: bool) -> None:
        """Any torch optimizer of the process is about to step.

        Args:
            is_closure: the step is handed a closure, which computes the gradients only then.
        """

    def after_step(self, optimizer: "Optimizer", *, is_closure: bool) -> None:
        """It has stepped."""

    def act_on_gradients(self) -> list[Handle]:
        """Act in backward passes from now on, where it can: the weights are changed without an optimizer of torch."""
        return []

    def resume(self, steps: int) -> None:
        """Go on as after so many optimizer steps of a run that is resumed."""

    @property
    @abstractmethod
    def has_acted(self) -> bool:
        """Whether it had an effect: what exit code 3 and the report ask."""

    def facts(self, root: "nn.Module") -> dict[str, Any]:  # noqa: ARG002
        """Return its fields of Description."""
        return {}

    def figures(self) -> dict[str, Any]:
        """Return its part of stats(); means are over the forwards since they were last read."""
        return {}

    def report(self) -> dict[str, Any]:
        """Return its fields of a model in --report; reading them changes nothing."""
        return {}

    def remarks(self) -> list[str]:
        """Return what should be known of it when a training has ended, in sentences."""
        return []

    def logs(self, root: "nn.Module") -> dict[str, float]:  # noqa: ARG002
        """Return what goes beside a training loss in a log; means are over the forwards since they were last read."""
        return {}


def is_number(value: object) -> bool:
    """Tell a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def refuse_unknown(option: str, value: object, known: tuple[str, ...]) -> None:
    """Raise a SettingError for a word that is none of those to choose from."""
    if value not in known:
        raise SettingError(f"{option}: expected {' or '.join(known)}, got {value!r}. Choose one of them.")


def first_of(names: Sequence[str]) -> str:
    """Shorten names to the first of them."""
    return ", ".join([*names[:1], *["..."] * (len(names) > 1)])
