"""Metrics in TensorBoard's event files, where tensorboard is installed."""

from pathlib import Path

FILES = ("events.out.tfevents.*",)


def read_scalars(path: Path) -> dict[str, list[float]]:
    """Return the scalars of one event file by tag, in the order of steps; {} without tensorboard."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        return {}
    found: dict[str, list[tuple[int, float]]] = {}
    try:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                array = make_ndarray(value.tensor)
                if array.size == 1 and array.dtype.kind in "fiu":
                    found.setdefault(value.tag, []).append((event.step, float(array.reshape(()))))
    except Exception:
        return {}
    return {tag: [number for _, number in sorted(values, key=lambda entry: entry[0])] for tag, values in found.items()}
