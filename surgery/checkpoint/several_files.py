"""One weight file that several files on the disk make up: their stamps, and one digest of them all."""

from collections.abc import Sequence
from pathlib import Path

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.descriptors import Descriptor
from surgery.checkpoint.digests import algorithm_of, digest_of, digest_of_list
from surgery.errors import SourceError


class SeveralFiles:
    """What the readers of such files have in common; the first file stands for all in messages."""

    descriptor: Descriptor | None = None
    """There is not one file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stamps = {path: Stamp.of(path) for path in paths}

    def digest(self, algorithm: str) -> str | None:
        """Hash the files: their bytes are not those that pass when tensors are read."""
        return digest_of_list({path: digest_of(path, algorithm) for path in self._stamps})

    def settle(self, digest: str) -> None:
        """Check that the files are still what they were when opened.

        Raises:
            SourceError: they are not.
        """
        self.refuse_changed()
        if digest != self.digest(algorithm_of(digest)):
            raise SourceError(
                f"{next(iter(self._stamps))}: expected files at rest, got some that changed while they were read. "
                "Run again."
            )

    def refuse_changed(self) -> None:
        """Refuse files one of which has been removed, replaced or written to since they were opened.

        Raises:
            SourceError: one has.
        """
        for path, stamp in self._stamps.items():
            refuse_changed(path, stamp)

    def refuse_cut(self) -> None:
        """Refuse files one of which has become shorter: reading a mapped page that is gone would end the process."""
        for path, stamp in self._stamps.items():
            if not path.exists() or path.stat().st_size < stamp.size:
                refuse_changed(path, stamp)
