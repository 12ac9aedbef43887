"""The sitecustomize of `surgery run`, in every Python of a command: what it hides still runs, and it costs little."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from commands import clean_env
from runs import ROOT, python

from surgery.hooks.run.launch import SITE

RUN = ("run", "--mixout", "0.7", "--allow-inactive", "--")
CHECK = """
import os, sys
from pathlib import Path
from surgery.hooks.imports import _waiting
def check():
    record = Path(os.environ["SURGERY_RUN_DIR"], f"{os.getpid()}.json")
    print(record.is_file(), list(_waiting)[:1], flush=True)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def ran_with(folders, *command, **env):
    """Run a command with these folders as PYTHONPATH; return its exit code, stdout and stderr."""
    env = clean_env(**env) | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("home", ["user", "system"])
@pytest.mark.parametrize(
    "text",
    [
        "print('here', __name__, __file__)",
        "import sys; sys.seen = 1; sys.path.append('/more')",
        "raise RuntimeError('no')",
        "import nothing_of_this_name",
        "def broken(:",
    ],
    ids=["prints", "sets", "raises", "misses", "broken"],
)
def test_the_hidden_sitecustomize_runs_as_without_ours(text, home, bare, tmp_path):
    folder = tmp_path if home == "user" else next(bare.parent.parent.glob("lib/python*/site-packages"))
    (folder / "sitecustomize.py").write_text(text + "\n")
    show = (
        "import sys; m = sys.modules.get('sitecustomize'); print(m and m.__file__, getattr(sys, 'seen', 0)); "
        f"print([one for one in sys.path if one not in {[str(SITE), str(ROOT)]!r}])"
    )
    users = [tmp_path] if home == "user" else []
    try:
        plain = ran_with([*users, ROOT], bare, "-c", show)
        assert ran_with([SITE, *users, ROOT], bare, "-c", show) == plain
        record = tmp_path / "records"
        record.mkdir()
        ran_with([SITE, *users, ROOT], bare, "-c", "1", SURGERY_RUN_DIR=str(record))
        assert len(list(record.iterdir())) == 1, "ours did not start"
    finally:
        (folder / "sitecustomize.py").unlink()


def test_the_module_is_the_hidden_one_or_ours_if_there_is_none(bare):
    code = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', ''))"
    _, hidden, _ = ran_with([], bare, "-c", code)  # Debian has one
    ours = f"{SITE / 'sitecustomize.py'}\n"
    assert ran_with([SITE, ROOT], bare, "-c", code) == (0, hidden if hidden.strip() else ours, "")


def test_usercustomize_still_runs(tmp_path):
    venv.create(tmp_path / "venv", symlinks=True, system_site_packages=True)  # others have no user's packages
    (tmp_path / "usercustomize.py").write_text("print('user')\n")
    (tmp_path / "sitecustomize.py").write_text("print('site')\n")
    ran = ran_with([SITE, tmp_path, ROOT], tmp_path / "venv" / "bin" / "python", "-c", "1")
    assert ran == (0, "site\nuser\n", "")


def test_another_python_without_surgery_says_so_and_goes_on(bare, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('user')\n")
    assert ran_with([SITE, tmp_path], bare, "-c", "print('trained')") == (
        0,
        "user\ntrained\n",
        f"surgery: {bare}: expected a Python with model-surgery, got none (No module named 'surgery'). Install it "
        "there: nothing that this Python trains is regularized.\n",
    )


@pytest.mark.parametrize(
    "start",
    [
        "check()",
        "import subprocess; subprocess.run([sys.executable, '-c', sys.argv[1] + 'check()', sys.argv[1]])",
        "import subprocess; subprocess.run(['sh', '-c', f\"'{sys.executable}' -c '{sys.argv[1]}check()'\"])",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=check_fork); p.start(); p.join()",
    ],
    ids=["itself", "subprocess", "shell", "fork"],
)
def test_processes_of_the_command_are_reached(start, run_cli):
    fork = "def check_fork():\n    print(True, list(_waiting)[:1], flush=True)\n"
    ran = run_cli(*RUN, sys.executable, "-c", CHECK + fork + start, CHECK)
    assert ran.out == "True ['torch']\n", ran.err


def test_spawned_processes_are_reached(run_cli, tmp_path):
    spawn = "import multiprocessing as m\nif __name__ == '__main__':\n    m.get_context('spawn').Pool(1).apply(check)\n"
    (tmp_path / "train.py").write_text(CHECK + spawn)
    ran = run_cli(*RUN, sys.executable, "train.py")
    assert ran.out == "True ['torch']\n", ran.err


def test_a_python_without_sitecustomize_in_a_script_is_told_at_the_end(run_cli):
    ran = run_cli("run", "--mixout", "0.7", "--", "sh", "-c", f"'{sys.executable}' -I -c 1")
    assert ran.code == 3
    assert ran.err.startswith("surgery: INACTIVE: command: expected a Python that reads PYTHONPATH")


def test_the_hooks_import_nothing_heavy():
    code = "import sys; print(*sorted(sys.modules))"
    modules = {
        name: set(ran_with([*folders, ROOT], sys.executable, "-c", code, SURGERY_MIXOUT="0.7")[1].split())
        for name, folders in {"plain": [], "hooked": [SITE]}.items()
    }
    new = {name.partition(".")[0] for name in modules["hooked"] - modules["plain"]}
    assert "surgery" in new
    assert not new & {"torch", "numpy", "transformers", "click", "huggingface_hub", "ctypes", "subprocess"}


def cheapest(*command, **env) -> float:
    """Return what a command and its processes cost in seconds of CPU time, which others on the machine do not raise."""
    costs = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, env=clean_env(**env), check=True, capture_output=True)
        after = os.times()
        costs.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(costs)


def test_start_up_costs_at_most_a_fifth_of_a_second():
    plain = cheapest(*python("1"))
    unit = max(0.02, plain) / 0.02  # of a machine on which Python itself takes 0.02 s
    path = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", str(ROOT))])
    assert cheapest(*python("1"), PYTHONPATH=path, SURGERY_MIXOUT="0.7") - plain < 0.1 * unit
    assert cheapest(sys.executable, "-m", "surgery", *RUN, *python("1")) - plain < 0.2 * unit


# -- waiting for a module -------------------------------------------------------------------------------------------


def test_call_after_import_calls_when_the_module_has_run_and_leaves_its_loader_as_it_is(tmp_path):
    (tmp_path / "late.py").write_text("done = 1\n")
    code = (
        "import importlib.util, sys\nfrom surgery.hooks.imports import call_after_import\n"
        "call_after_import('late', lambda: print('called', sys.modules['late'].done))\n"
        "assert importlib.util.find_spec('late') and 'late' not in sys.modules\n"
        "print('now')\nimport late\nprint(type(late.__loader__).__name__, vars(late.__loader__).keys())\n"
        "assert late.__spec__.loader is late.__loader__\n"
        "from importlib.machinery import PathFinder; assert late.__spec__ == PathFinder.find_spec('late')\n"
        "import late\nimport importlib; importlib.reload(late)\ncall_after_import('late', lambda: print('at once'))\n"
    )
    code, out, err = ran_with([tmp_path, ROOT], sys.executable, "-c", code)
    assert out == "now\ncalled 1\nSourceFileLoader dict_keys(['name', 'path'])\nat once\n", err


def test_call_after_import_waits_on_when_an_import_fails(tmp_path):
    (tmp_path / "late.py").write_text("import sys\nif not hasattr(sys, 'ready'): raise ImportError('not yet')\n")
    code = (
        "import sys\nfrom surgery.hooks.imports import call_after_import\n"
        "call_after_import('late', lambda: print('called'))\n"
        "try: import late\nexcept ImportError as error: print(error)\nsys.ready = 1\nimport late\n"
    )
    code, out, err = ran_with([tmp_path, ROOT], sys.executable, "-c", code)
    assert out == "not yet\ncalled\n", err


def test_call_after_import_waits_for_a_package_that_is_half_run(tmp_path):
    (tmp_path / "late").mkdir()
    inner = "from surgery.hooks.imports import call_after_import\nimport sys\n"
    (tmp_path / "late" / "inner.py").write_text(
        inner + "call_after_import('late', lambda: print('called', sys.modules['late'].done))\n"
    )
    (tmp_path / "late" / "__init__.py").write_text(
        "import sys\nfrom . import inner\nprint('half')\nsys.ready\ndone = 1\n"
    )
    code = (
        "import sys\nfrom surgery.hooks.imports import watch_import\nwatch_import('late')\n"
        "try: import late\nexcept AttributeError: sys.ready = 1\nimport late\n"
    )
    code, out, err = ran_with([tmp_path, ROOT], sys.executable, "-c", code)
    assert out == "half\nhalf\ncalled 1\n", err


FINDERS = """
import importlib.machinery as machinery, importlib.util, sys
from surgery.hooks.imports import call_after_import

class Own:  # finds modules, and is the only loader of all of them
    def find_spec(self, name, path, target=None):
        return machinery.ModuleSpec(name, self) if name in ('late', 'other') else None
    def create_module(self, spec): return None
    def exec_module(self, module): print('runs', module.__name__)

class OfClass:
    find_spec, create_module, exec_module = map(classmethod, (Own.find_spec, Own.create_module, Own.exec_module))

class Old:  # of the time before find_spec
    def find_module(self, name, path=None): return None

def check(finder):
    sys.meta_path[:0] = [Old(), finder]
    before = dict(vars(finder))
    call_after_import('late', lambda: print('called', sys.modules['late'].__loader__ is finder))
    importlib.util.find_spec('late')
    import other, late
    assert late.__spec__ == machinery.ModuleSpec('late', finder)
    assert dict(vars(finder)) == before
"""


@pytest.mark.parametrize("finder", ["Own()", "OfClass"])
def test_call_after_import_hears_a_loader_that_is_its_own_finder(finder):
    code, out, err = ran_with([ROOT], sys.executable, "-W", "ignore", "-c", f"{FINDERS}check({finder})")
    assert (code, out) == (0, "runs other\nruns late\ncalled True\n"), err
