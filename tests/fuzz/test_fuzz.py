"""Mutated files of every kind are read or refused in one line, in bounded time and memory, and never end the process.

SURGERY_FUZZ=100000 takes that many cases of each kind. A finding names its case: `fuzz_worker.py KIND NUMBER 1` repeats
it.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import clean_env

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are those of Linux")

_HERE = Path(__file__).resolve().parent
_IN_CI = {"headers": 300, "pickles": 100, "cards": 150, "indexes": 150, "recipes": 60}  # about a second each
_MANY = 3000
_START = "import runpy, sys\n{}\nsys.argv[0] = {!r}; runpy.run_path(sys.argv[0], run_name='__main__')"


def count_of(kind: str) -> int:
    if "SURGERY_FUZZ" in os.environ:
        return int(os.environ["SURGERY_FUZZ"])
    return _MANY if "SURGERY_TEST_ALL" in os.environ else _IN_CI[kind]


def fuzz(kind: str, count: int, *, before: str = "pass") -> tuple[Counter[str], list[str]]:
    """Take cases 0 to count - 1 of a kind; return what came of them and the findings, deaths of the process too."""
    verdicts: Counter[str] = Counter()
    findings: list[str] = []
    first = 0
    while first < count:
        lines, code = _work(kind, first, count - first, before)
        first = next((line for line in reversed(lines) if type(line) is int), first) + 1
        notes = [line for line in lines if isinstance(line, dict)]
        findings += [f"{kind} {note['number']}: {note['finding']}" for note in notes if "finding" in note]
        if code:
            findings.append(f"{kind} {first - 1}: ended the process, {code}")
        else:
            verdicts.update(notes[-1]["verdicts"])
    return verdicts, findings


def _work(kind: str, first: int, count: int, before: str) -> tuple[list[object], str]:
    start = _START.format(before, str(_HERE / "fuzz_worker.py"))
    words = [sys.executable, "-W", "ignore", "-c", start, kind, str(first), str(count)]
    environment = clean_env(OMP_NUM_THREADS="1", PYTHONPATH=str(_HERE))
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60 + count, check=False)
    except subprocess.TimeoutExpired as late:
        return _parse((late.stdout or b"").decode()), "hangs"
    return _parse(done.stdout), "" if done.returncode == 0 else f"{done.returncode}: {done.stderr[-500:]}"


def _parse(text: str) -> list[object]:
    return [json.loads(line) for line in text.splitlines() if line.endswith(("}", *"0123456789"))]


_SWEEP = pytest.param("pickled indexes", marks=pytest.mark.sweep)  # they take as long to start as to run


@pytest.mark.parametrize("kind", [*_IN_CI, _SWEEP])
def test_mutated_file_is_read_or_refused_in_one_line(kind: str) -> None:
    count = count_of(kind)
    verdicts, findings = fuzz(kind, count)
    print(kind, json.dumps(verdicts))
    assert findings == []
    assert verdicts.total() == count
    assert len(verdicts) > 1, "all came to the same"


def test_check_that_is_missing_is_found() -> None:
    """Of ranges that leave gaps: our own, and safetensors' parser, which has the last word."""
    before = (
        "import contextlib, surgery.checkpoint.tensorfile as t\n"
        "t.safe_open = lambda *_, **__: contextlib.nullcontext()\n"
        "t.parse_entries = lambda entries, start, label: "
        "tuple(sorted((t._tensor(*each, start, label) for each in entries.items()), key=lambda tensor: tensor.end))"
    )
    _, findings = fuzz("headers", 300, before=before)
    assert any("read what its oracle refuses: SafetensorError" in f and "not fully covered" in f for f in findings)


def test_end_of_the_process_is_a_finding() -> None:
    before = "import os, surgery.checkpoint.tensorfile as t; t.read_header = lambda *_, **__: os.kill(os.getpid(), 11)"
    assert fuzz("headers", 1, before=before) == ({}, ["headers 0: ended the process, -11: "])
