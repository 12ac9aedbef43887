"""Who may import whom. Every import counts: at the top of a file, inside a function, under TYPE_CHECKING."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from surgery.hooks import registry

ROOT = Path(__file__).resolve().parent.parent
Graph = Mapping[str, set[str]]

# A room imports rooms of the rows below its own, and no other room of its own row.
SURGERY = (
    ("__main__",),
    ("cli",),
    ("report",),
    ("inspect", "study"),
    ("perturb", "push", "live"),
    ("recipe",),
    ("noisytune", "checkpoint", "kernels", "interrupts", "lock", "engines"),
    ("storage",),
    (
        "noise",
        "errors",
        "files",
        "exit_codes",
        "dtypes",
        "globs",
        "caches",
        "progress",
        "threads",
        "roles",
        "display",
        "json_values",
        "sizes",
    ),
    ("io_errors",),
    ("escapes",),
)
METHODS = tuple(kind.name for kind in registry.METHODS)
HOOKS = (
    ("site",),
    ("run",),
    ("trainer",),
    ("description",),
    ("patch",),
    ("trackers", "checks"),
    ("lifecycle", "registry"),
    METHODS,
    ("step_methods",),
    ("steps",),
    ("regularizer", "stepped"),
    ("weights",),
    ("marks", "compiling", "imports", "active_calls", "refusals"),
)
TO_HOOKS = (
    "surgery",
    "surgery.cli.run",
    "surgery.cli.env",
    "surgery.cli.run_options",
    "surgery.study.arms",
    "surgery.study.command",
)
"""The front door hands on patch_model and its siblings; these commands start what hooks/run does."""


def modules(root: Path) -> dict[str, Path]:
    """Return the files of surgery/ and hooks/ by the names that they are imported under."""
    found = {}
    for folder, name in (("surgery", "surgery"), ("hooks", "surgery.hooks")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return what each module imports of the others.

    A lazy table for `import_module` is none, for it is the front door; the registry's, which binds methods, counts.
    """
    known = modules(root)
    graph = {name: set(imports(name, path, known)) - {name} for name, path in known.items()}
    if "surgery.hooks.registry" in graph:
        graph["surgery.hooks.registry"] |= {f"surgery.hooks.{method}.regularizer" for method in METHODS}
    return graph


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            named = {f"{source}.{alias.name}" for alias in node.names}
            yield from named & known.keys()
            if source in known and not named <= known.keys():
                yield source


def circles(graph: Graph) -> list[list[str]]:
    """Return the strongly connected components of more than one module: Tarjan, SIAM J. Comput. 1(2), 1972."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def arrows(component: Sequence[str], graph: Graph) -> str:
    """Write one way around: a -> b -> a."""
    way = [component[0]]
    while way.count(way[-1]) < 2:
        # straight home where that can be, else on to where we have not been
        way.append(min(graph[way[-1]] & set(component), key=lambda name: (name in way[1:], name != way[0], name)))
    return " -> ".join(way[way.index(way[-1]) :])


def strays(graph: Graph, prefix: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Name the imports among the rooms of a package that do not go to a row below, and the rooms that are in none."""
    row_of = {room: row for row, rooms in enumerate(rows) for room in rooms}
    found = []
    for name in sorted(graph):
        room = room_of(name, prefix)
        if room and room not in row_of:
            found.append(f"{name} is in no row")
            continue
        for other in sorted(graph[name]):
            there = room_of(other, prefix)
            if room and there and there != room and row_of.get(there, -1) <= row_of[room]:
                found.append(f"{name} -> {other}")
    return found


def room_of(name: str, prefix: str) -> str:
    """Return the folder or file at the top of a package that a module is in; none for another package's, or its own."""
    if prefix == "surgery" and name.startswith("surgery.hooks"):
        return ""
    return name.removeprefix(f"{prefix}.").split(".")[0] if name.startswith(f"{prefix}.") else ""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


def assert_no_circle(graph: Graph) -> None:
    found = circles(graph)
    assert not found, "\n".join(f"{len(circle)} modules: {arrows(circle, graph)}" for circle in found)


def test_there_is_no_circle(graph):
    assert_no_circle(graph)


def test_surgery_imports_downwards(graph):
    assert not strays(graph, "surgery", SURGERY)


def test_hooks_import_downwards(graph):
    assert not strays(graph, "surgery.hooks", HOOKS)


def test_no_method_imports_another_or_what_attaches_it(graph):
    for method in METHODS:
        banned = {*METHODS, "patch", "lifecycle"} - {method}
        mine = [name for name in graph if room_of(name, "surgery.hooks") == method]
        found = [f"{name} -> {o}" for name in mine for o in graph[name] if room_of(o, "surgery.hooks") in banned]
        assert not found


def test_surgery_does_not_import_hooks(graph):
    found = {name for name, others in graph.items() if any(o.startswith("surgery.hooks") for o in others)}
    assert {name for name in found if not name.startswith("surgery.hooks")} <= {*TO_HOOKS}


def test_hooks_do_not_import_the_front_door_or_the_command_line(graph):
    hooks = [name for name in graph if name.startswith("surgery.hooks")]
    above = ("cli", "report", "inspect", "perturb", "push", "__main__")
    found = [
        f"{name} -> {o}" for name in hooks for o in graph[name] if o == "surgery" or room_of(o, "surgery") in above
    ]
    assert not found


def write(root: Path, files: Mapping[str, str]) -> Graph:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return import_graph(root)


@pytest.mark.parametrize(
    ("files", "way"),
    [
        (
            {"surgery/a.py": "from surgery.b import x\n", "surgery/b.py": "def late():\n    from surgery import a\n"},
            "surgery.a -> surgery.b -> surgery.a",
        ),
        (
            {
                "hooks/rdrop/a.py": "from typing import TYPE_CHECKING\n\nfrom .. import b\n",
                "hooks/b.py": "if TYPE_CHECKING:\n    from .rdrop.a import x\n",
            },
            "surgery.hooks.b -> surgery.hooks.rdrop.a -> surgery.hooks.b",
        ),
        (
            {
                "surgery/a.py": "import surgery.b.c\n",
                "surgery/b/__init__.py": "from .. import a\n",
                "surgery/b/c.py": "from . import anything\n",
                "surgery/d.py": "from surgery import a\n",
            },
            "surgery.a -> surgery.b.c -> surgery.b -> surgery.a",
        ),
    ],
    ids=["late", "type-checking", "package"],
)
def test_circles_are_found(tmp_path, files, way):
    graph = write(tmp_path, files)
    (circle,) = circles(graph)
    assert set(arrows(circle, graph).split(" -> ")) == set(circle)
    assert arrows(sorted(circle), graph) == way


def test_a_tree_without_a_circle_has_none(tmp_path):
    files = {"surgery/a.py": "from surgery import b, c\n", "surgery/b.py": "import surgery.c\n", "surgery/c.py": ""}
    assert not circles(write(tmp_path, files))


def test_imports_in_the_wrong_direction_are_found(tmp_path):
    files = {
        "surgery/errors.py": "def late():\n    from surgery.cli import main\n",
        "surgery/cli/__init__.py": "from surgery.cli import main\n",
        "surgery/cli/main.py": "from surgery.errors import SurgeryError\n",
        "surgery/push/push.py": "if TYPE_CHECKING:\n    from surgery.perturb.plan import Plan\n",
        "surgery/perturb/plan.py": "from surgery.recipe import Recipe\n",
        "surgery/recipe.py": "",
        "surgery/attic.py": "",
    }
    assert strays(write(tmp_path, files), "surgery", SURGERY) == [
        "surgery.attic is in no row",
        "surgery.errors -> surgery.cli.main",
        "surgery.push.push -> surgery.perturb.plan",
    ]


def test_lazy_imports_by_name_are_known():
    users = {name for name, path in modules(ROOT).items() if "import_module(" in path.read_text(encoding="utf-8")}
    assert users == {"surgery", "surgery.hooks", "surgery.hooks.registry", "surgery.engines.inside"}  # a job's function


def test_nothing_is_imported_from_conftest():
    """A folder may have its own, and pytest calls each `conftest`: what is shared is in tests/helpers."""
    found = [
        path
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__) and "from conftest" in path.read_text()
    ]
    assert found == []
