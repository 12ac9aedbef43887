"""Did every regularizer of a command take effect, by the records of its processes: active, or inactive and why."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..registry import METHODS
from .options import NOISYTUNE, Options
from .record import Record

_HELP = ("-h", "--help", "--version")
_MISSING = {
    NOISYTUNE: "noisytune: no pretrained weights were trained, so that none were perturbed",
    **{kind.name: f"{kind.name}: {kind.missing}" for kind in METHODS},
}
_UNREACHED = (
    "command: expected a Python that reads PYTHONPATH, in an environment with model-surgery, got none. Neither python "
    "-I or -E within a script is reached, nor a container or another machine: there, use surgery env"
)
_NO_TORCH = "command: expected a Python that imports torch, got none"
_UNTRAINED = "command: expected a training, got neither a backward pass of torch.autograd nor an optimizer's step"
_FAILED = "the command failed before it trained"
_HELPED = "the command was asked for help or a version, and trained nothing"
_EVALUATED = "the command loaded weights, but trained nothing"

_SHOWN_FAULTS, _SHOWN_RANKS = 5, 8


@dataclass(frozen=True)
class Outcome:
    """Whether the regularizers of a command took effect. `judge` makes it.

    Args:
        ranks: the processes that trained or have a model, in the order of their ranks.
        reasons: why it is inactive, in sentences; none if it is active.
        notes: what else should be known.
        is_idle: inactive, and no failure: nothing was to be trained.
        is_refused: surgery itself refused to go on in a process.
    """

    ranks: tuple[Record, ...]
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_idle: bool = False
    is_refused: bool = False

    @property
    def is_active(self) -> bool:
        return not self.reasons

    @property
    def reason(self) -> str | None:
        return f"{_few(self.reasons)}." if self.reasons else None

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said at the end of a run."""
        if not self.is_active:
            acted = (f"surgery: in effect: {_models(one)}" for one in self.ranks[:_SHOWN_RANKS] if one.acts)
            return (f"surgery: {'nothing to do' if self.is_idle else 'INACTIVE'}: {self.reason}", *acted)
        notes = (f"surgery: note: {note}" for note in self.notes[:_SHOWN_FAULTS])
        if len(self.ranks) == 1:
            return (f"surgery: active: {_models(self.ranks[0])}", *notes)
        shown = (f"surgery: {self._name(one)}: {_models(one)}" for one in self.ranks[:_SHOWN_RANKS])
        more = len(self.ranks) - _SHOWN_RANKS
        rest = (f"surgery: and {more} more",) if more > 0 else ()
        return (f"surgery: active: in {len(self.ranks)} processes", *shown, *rest, *notes)

    def _name(self, record: Record) -> str:
        """Tell a process from the others: several trainings of one command are all rank 0."""
        is_clear = sum(one.rank == record.rank for one in self.ranks) == 1
        return f"rank {record.rank}" if is_clear else f"rank {record.rank}, process {record.pid}"


def judge(
    records: Sequence[Record], options: Options, command: Sequence[str] = (), *, has_failed: bool = False
) -> Outcome:
    """Say whether every regularizer acted in every process that trained.

    Args:
        records: of all processes, or of the one that asks.
        options: what was asked for.
        command: its arguments, the first the program.
        has_failed: it ended with another exit code than 0, for reasons of its own.
    """
    ranks = tuple(one for one in records if one.has_trained or one.models)
    trained = [one for one in records if one.has_trained]
    faults = _distinct(fault for one in records for fault in one.faults)
    faults += _unmatched(trained)
    if any(one.is_refused for one in records):
        return Outcome(ranks, faults or _missing(trained, options) or (_UNTRAINED,), is_refused=True)
    if _unmatched(trained) or any(name not in one.acts for one in trained for name in options.asked):
        return Outcome(ranks, (*faults, *_missing(trained, options)))
    if trained:
        return Outcome(ranks, notes=(*faults, *_distinct(note for one in records for note in one.notes)))
    if has_failed:
        return Outcome(ranks, (_FAILED, *faults))
    if any(argument in _HELP for argument in command[1:]):
        return Outcome(ranks, (_HELPED,), is_idle=True)
    if any(one.has_loaded for one in records):
        return Outcome(ranks, (_EVALUATED, *faults), is_idle=True)
    if any(one.has_torch for one in records):
        return Outcome(ranks, (*faults, _UNTRAINED))
    return Outcome(ranks, (_NO_TORCH,) if records else (_UNREACHED,))


def _unmatched(trained: Sequence[Record]) -> tuple[str, ...]:
    """Name the globs that matched nothing in any process: what they were for has not happened."""
    flags = set.intersection(*(set(one.unmatched) for one in trained)) if trained else set()
    return tuple(
        f"{flag}: expected a glob of a model's class or of a parameter that is trained, got one that matches none"
        for flag in sorted(flags)
    )


def _missing(trained: Sequence[Record], options: Options) -> tuple[str, ...]:
    """Say which regularizers did not act, and on which ranks, but for those of which faults say why."""
    found = []
    for name in options.asked:
        without = [one for one in trained if name not in one.acts]
        if any(not _is_explained(name, one) for one in without):
            found.append(_MISSING[name] + _on(without, trained))
    return tuple(found)


def _is_explained(name: str, record: Record) -> bool:
    """Tell whether a fault says why a regularizer did not act: one of it, or of all, for no model is known."""
    of_all = ("model:", "optimizer:")
    return name in record.refused or any(fault.startswith((f"{name}:", *of_all)) for fault in record.faults)


def _on(some: Sequence[Record], all: Sequence[Record]) -> str:
    if len(some) == len(all):
        return ""
    ranks = sorted({one.rank for one in some})
    named = ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")
    return f" on rank{'s' if len(ranks) > 1 else ''} {named}"


def _distinct(sentences: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sentence.strip().removesuffix(".") for sentence in sentences))


def _few(sentences: Sequence[str]) -> str:
    more = len(sentences) - _SHOWN_FAULTS
    return "; ".join(sentences[:_SHOWN_FAULTS]) + (f"; and {more} more" if more > 0 else "")


def _models(record: Record) -> str:
    known = "" if record.is_final else " (not final: the process was ended before it could report)"
    return ("; ".join(_model(model) for model in record.models) or "no model") + known


def _model(model: dict[str, Any]) -> str:
    counts = ("perturbed", *(name for kind in METHODS for name in kind.counts), "steps")
    figures = [model["class"], *(_counted(model[name], name) for name in counts if model[name])]
    for kind in METHODS:
        figures += kind.summary({**kind.idle_report, **model})
    if model["distance"] is not None:
        figures.append(f"distance {model['distance']:.4g}")
    return ", ".join(figures)


def _counted(count: int, what: str) -> str:
    return "1 step" if (count, what) == (1, "steps") else f"{count:,} {what}"
