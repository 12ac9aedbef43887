"""--include and --exclude: fnmatch globs of model classes, or of parameters and the modules around them."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from surgery.live.parts import pretrained_parts

from ...weights.selection import is_match


class Filters:
    """Which models a run regularizes, and which of their parameters.

    Args:
        include, exclude: the globs.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = include
        self._exclude = exclude
        self.unmatched = {f"{flag} {glob!r}" for flag, globs in self._flags() for glob in globs}
        """Flags that have matched nothing yet, each with its glob."""

    def is_included(self, root: nn.Module) -> bool:
        """Tell whether a model is to be regularized at all; what matches it leaves `unmatched`."""
        include, exclude = self.parameter_globs(root)
        self.unmatched -= {
            f"{flag} {glob!r}"
            for flag, globs in self._flags()
            for glob in globs
            if _is_class(glob, root) or glob in (*include, *exclude)
        }
        if any(_is_class(glob, root) for glob in self._exclude):
            return False
        return not self._include or bool(include) or any(_is_class(glob, root) for glob in self._include)

    def parameter_globs(self, root: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the include and exclude globs that match a parameter of this model, or a module around it."""
        names = [name for name, _ in root.named_parameters(remove_duplicate=False)]

        def matching(globs: Iterable[str]) -> tuple[str, ...]:
            return tuple(glob for glob in globs if any(is_match(glob, name) for name in names))

        return matching(self._include), matching(self._exclude)

    def _flags(self) -> tuple[tuple[str, Sequence[str]], ...]:
        return (("--include", self._include), ("--exclude", self._exclude))


def _is_class(glob: str, root: nn.Module) -> bool:
    """Tell whether a glob matches the class of a model, or that of a pretrained part of it."""
    return any(fnmatchcase(type(module).__name__, glob) for module in (root, *(p for _, p in pretrained_parts(root))))
