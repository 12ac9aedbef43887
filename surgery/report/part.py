"""`--array` of perturb and materialize as rows and as a table: one part is done, and which shards others have left."""

from collections.abc import Mapping
from typing import Any

from surgery.errors import some
from surgery.perturb.parts import PartDone
from surgery.perturb.plan import Plan
from surgery.report.tables import Terminal
from surgery.report.text import line


def rows(done: PartDone, plan: Plan, seconds: float) -> dict[str, Any]:
    """Describe a part of a run that others have yet to finish."""
    return {
        "source": plan.checkpoint.id,
        "commit": plan.checkpoint.commit,
        "out": str(plan.out),
        "array": str(done.part),
        "shards": list(done.shards),
        "left": list(done.left),
        "seconds": seconds,
    }


def table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out rows for people."""
    left = rows["left"]
    lines = [
        f"part {rows['array']} of {rows['source']} perturbed into {rows['out']}",
        line("shards", f"{len(rows['shards'])} of this part, finished"),
        line("left", f"{len(left)} ({some(left)}), to other parts: the last to end completes the folder"),
    ]
    return "\n".join(terminal.wrap_all(lines))
