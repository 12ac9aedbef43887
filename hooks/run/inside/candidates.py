"""class Candidates: the models whose parameters are in optimizers, and which of them are to be regularized."""

import weakref
from collections.abc import Iterator, Sequence

from torch import nn

from surgery.errors import some
from surgery.live.parts import pretrained_parts

from ...patch import find_patch
from ...weights.sources import is_loaded
from ..messages import NEW_BESIDE, NO_OPTIMIZER
from .filters import Filters
from .loads import Loads
from .owners import find_tops, is_head
from .reporter import Reporter


class Candidates:
    """Finds the models that optimizers train, and remembers whether any was selected.

    Args:
        filters: what leaves models out.
        loads: what was loaded.
        reporter: is told of new layers beside a pretrained model.
    """

    def __init__(self, filters: Filters, loads: Loads, reporter: Reporter) -> None:
        self._filters = filters
        self._loads = loads
        self._reporter = reporter
        self._is_any_selected = False
        self._excluded: set[str] = set()  # classes
        self._pretrained: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that optimizers have

    def select(self, owned: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """Yield the models to regularize that hold some of these parameters, each with those that it holds."""
        tops = find_tops(owned) if owned else []
        self._pretrained.update(top for top, _ in tops if _is_pretrained(top))
        for top, parameters in tops:
            if find_patch(top) is not None or self.is_new(top):
                continue
            if not self._filters.is_included(top):
                self._excluded.add(type(top).__name__)
            else:
                self._is_any_selected = True
                yield top, parameters

    def is_new(self, top: nn.Module) -> bool:
        """Tell whether a model is a new head of a pretrained one, which may have an optimizer or a phase of its own."""
        if _is_pretrained(top):
            return False
        trained = [one for one in self._pretrained if type(one) is not type(top)]  # not that of another fold
        loaded = [one for one in self._loads.pretrained if is_head(top.parameters(), one.parameters())]
        beside = next(iter([*trained, *loaded]), None)
        if beside is not None:
            self._reporter.add_note(NEW_BESIDE.format(type(top).__name__, type(beside).__name__))
        return beside is not None

    def may_be_new(self, top: nn.Module) -> bool:
        """Tell whether a model without pretrained weights may turn out to be the head of one: some were loaded."""
        return self._reporter.record.has_loaded and not _is_pretrained(top)

    @property
    def are_all_excluded(self) -> bool:
        """Models are trained, and --include or --exclude leaves each of them out."""
        return bool(self._excluded) and not self._is_any_selected

    @property
    def is_any_known(self) -> bool:
        """An optimizer of torch has the parameters of a model."""
        return self._is_any_selected or bool(self._excluded) or bool(self._pretrained)

    def report_missing(self) -> None:
        """Report globs that have matched nothing, and why no model was selected."""
        if not self.is_any_known:
            self._reporter.add_fault(NO_OPTIMIZER)
            return
        if self.are_all_excluded:
            names = some(sorted(self._excluded))
            self._reporter.add_fault(f"model: expected one to regularize, got those that are left out ({names}).")
        self._reporter.record.unmatched = sorted(self._filters.unmatched)


def _is_pretrained(top: nn.Module) -> bool:
    """Tell whether a model has a part of transformers or diffusers, or one that a load has filled."""
    return next(iter(pretrained_parts(top)), None) is not None or any(map(is_loaded, top.parameters()))
