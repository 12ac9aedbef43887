"""class Candidates: the models whose parameters are in optimizers, and which of them are to be regularized."""

from collections.abc import Iterator, Sequence

from torch import nn

from surgery.errors import some
from surgery.live.names import pretrained_parts

from ...patch import find_patch
from ...weights.sources import is_loaded
from ..messages import NO_OPTIMIZER
from .filters import Filters
from .owners import find_tops
from .reporter import Reporter


class Candidates:
    """Finds the models that optimizers train, and remembers whether any was selected.

    Args:
        filters: what leaves models out.
        reporter: is told of new layers beside a pretrained model.
    """

    def __init__(self, filters: Filters, reporter: Reporter) -> None:
        self._filters = filters
        self._reporter = reporter
        self._is_any_selected = False
        self._excluded: set[str] = set()  # classes

    def select(self, owned: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """Yield the models to regularize that hold some of these parameters, each with those that it holds."""
        tops = find_tops(owned) if owned else []
        pretrained = [top for top, _ in tops if _is_pretrained(top)]
        for top, parameters in tops:
            name = type(top).__name__
            if find_patch(top) is not None:
                continue
            if pretrained and top not in pretrained:
                beside = type(pretrained[0]).__name__
                self._reporter.add_note(f"{name}: new, beside a pretrained {beside}: left as it is.")
            elif not self._filters.is_included(top):
                self._excluded.add(name)
            else:
                self._is_any_selected = True
                yield top, parameters

    @property
    def are_all_excluded(self) -> bool:
        """Models are trained, and --include or --exclude leaves each of them out."""
        return bool(self._excluded) and not self._is_any_selected

    def report_missing(self) -> None:
        """Report globs that have matched nothing, and why no model was selected."""
        if not self._is_any_selected and not self._excluded:
            self._reporter.add_fault(NO_OPTIMIZER)
            return
        if self.are_all_excluded:
            names = some(sorted(self._excluded))
            self._reporter.add_fault(f"model: expected one to regularize, got those that are left out ({names}).")
        self._reporter.record.unmatched = sorted(self._filters.unmatched)


def _is_pretrained(top: nn.Module) -> bool:
    """Tell whether a model has a part of transformers or diffusers, or one that a load has filled."""
    return next(iter(pretrained_parts(top)), None) is not None or any(map(is_loaded, top.parameters()))
