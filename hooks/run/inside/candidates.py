"""class Candidates: the models whose parameters are in optimizers, and which of them are to be regularized."""

import weakref
from collections.abc import Iterator, Sequence

from torch import nn

from surgery.errors import some
from surgery.live.parts import pretrained_parts

from ...patch import find_patch
from ...weights.sources import is_loaded
from ..messages import NEW_BESIDE, NEW_HEAD, NO_OPTIMIZER
from .filters import Filters
from .loads import Loads
from .owners import find_tops, is_small_beside
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
            if find_patch(top) is not None or self.is_beside_trained(top):
                continue
            if not self._filters.is_included(top):
                self._excluded.add(type(top).__name__)
            else:
                self._is_any_selected = True
                yield top, parameters

    def is_beside_trained(self, top: nn.Module) -> bool:
        """Tell whether a model is new beside a pretrained one that is trained, be it by another optimizer: leave it."""
        bodies = (one for one in self._pretrained if type(one) is not type(top))  # not that of another fold
        return not _is_pretrained(top) and self._is_noted(top, next(bodies, None), NEW_BESIDE)

    def is_head(self, top: nn.Module) -> bool:
        """Tell whether a model is a new head of a pretrained one that is loaded, and not trained yet, if ever."""
        bodies = (one for one in self._loads.pretrained if is_small_beside(top.parameters(), one.parameters()))
        return not _is_pretrained(top) and self._is_noted(top, next(bodies, None), NEW_HEAD)

    def _is_noted(self, top: nn.Module, body: nn.Module | None, text: str) -> bool:
        """Report a new model with its body, if it has one; tell whether it has."""
        if body is not None:
            self._reporter.add_note(text.format(type(top).__name__, type(body).__name__))
        return body is not None

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
            self._reporter.record.faults.append(NO_OPTIMIZER)  # which the first backward pass has said
            return
        if self.are_all_excluded:
            names = some(sorted(self._excluded))
            self._reporter.add_fault(f"model: expected one to regularize, got those that are left out ({names}).")
        self._reporter.record.unmatched = sorted(self._filters.unmatched)


def _is_pretrained(top: nn.Module) -> bool:
    """Tell whether a model has a part of transformers or diffusers, or one that a load has filled."""
    return next(iter(pretrained_parts(top)), None) is not None or any(map(is_loaded, top.parameters()))
