"""sitecustomize of every Python under `surgery run`: run the one that it hides, then wait for the import of torch."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _run_hidden() -> None:
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path).resolve() != here])
    if spec is not None and spec.loader is not None:
        sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[__name__])


try:
    _run_hidden()
finally:
    try:
        from surgery.hooks.run.inside.start import start
    except ImportError as error:
        print(  # noqa: T201
            f"surgery: {sys.executable}: expected a Python with model-surgery, got none ({error}). Install it there: "
            "nothing that this Python trains is regularized.",
            file=sys.stderr,
        )
    else:
        start()
