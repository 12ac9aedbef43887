"""Whether a file is still the one that was found: a source may be replaced, cut or rewritten while it is read."""

import os
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SourceError


@dataclass(frozen=True)
class Stamp:
    """What a file system says of a file, without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """Take it of a path, through links. Raises OSError."""
        return cls.of_stat(path.stat())

    @classmethod
    def of_stat(cls, stat: os.stat_result) -> "Stamp":
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, (stat.st_dev, stat.st_ino))

    def is_same(self, other: "Stamp") -> bool:
        """Tell whether nothing was written between the two.

        A link or a change of mode moves ctime alone, and some network file systems number a file anew at each opening:
        either by itself is no change, while a file put in place of another moves both.
        """
        if (self.size, self.mtime_ns) != (other.size, other.mtime_ns):
            return False
        return self.inode == other.inode or self.ctime_ns == other.ctime_ns


def refuse_changed(path: Path, then: Stamp) -> None:
    """Refuse a file that is not the one it was.

    Raises:
        SourceError: it was removed, replaced or written to.
    """
    try:
        is_same = Stamp.of(path).is_same(then)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: expected a file at rest, got one that was removed meanwhile. Run again.") from error
    if not is_same:
        raise SourceError(f"{path}: expected a file at rest, got one that changed while it was read. Run again.")
