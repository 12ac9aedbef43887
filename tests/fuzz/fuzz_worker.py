"""Takes the cases of one kind, each under limits of time and memory: python fuzz_worker.py KIND FIRST COUNT.

Prints the number of each case before it is tried, so that whoever started this knows which one ended it; then what came
of all of them.
"""

import importlib
import json
import logging
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from outcomes import FindingError, Kind, attempt

KINDS = {
    "headers": ("fuzz_headers", "Headers"),
    "pickles": ("fuzz_pickles", "Pickles"),
    "cards": ("fuzz_cards", "Cards"),
    "indexes": ("fuzz_indexes", "Indexes"),
    "pickled indexes": ("fuzz_indexes", "PickledIndexes"),
    "recipes": ("fuzz_recipes", "Recipes"),
}
"""Module and class of each."""

_SECONDS = 2.0  # of the processor, for one case
_KILOBYTES = 200_000  # that one case may add to the most memory there was
_ADDRESSES = 3 << 30  # bytes of address space beyond what libraries take


class _Late(BaseException):
    """Not an Exception: readers catch those."""


def _raise_late(*_: object) -> None:
    raise _Late


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limit_addresses() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _read(kind: Kind) -> tuple[Any, float]:
    """Read one case under the limits; return what came of it, and the seconds it took."""
    before, begin = _peak(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        ours = attempt(kind.read)
    except _Late:
        raise FindingError(f"took more than {_SECONDS} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if _peak() - before > _KILOBYTES:
        raise FindingError(f"took {(_peak() - before) >> 10} MB, and then: {ours!r:.100}")
    return ours, time.process_time() - begin


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "surgery" in f.filename), "")
    return str(error) if isinstance(error, FindingError) else f"{type(error).__name__} {where}: {str(error)[:200]}"


def main(name: str, first: int, count: int) -> None:
    logging.disable()
    signal.signal(signal.SIGPROF, _raise_late)
    verdicts: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        module, of_kind = KINDS[name]
        kind = getattr(importlib.import_module(module), of_kind)(Path(folder))
        _limit_addresses()
        for number in range(first, first + count):
            print(number, flush=True)
            kind.write(Random(f"{name} {number}"))
            try:
                ours, seconds = _read(kind)
                verdicts[kind.judge(ours)] += 1
                slowest = max(slowest, seconds)
            except Exception as error:
                print(json.dumps({"number": number, "finding": _describe(error)}), flush=True)
    print(json.dumps({"verdicts": verdicts, "slowest": round(slowest, 3), "peak_mb": _peak() >> 10}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
