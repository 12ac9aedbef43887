"""What pyproject.toml cannot say: hooks/ is installed as surgery.hooks, and the kernels are C without Python in it."""

import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Builds a library that ctypes loads: it has none of a module's symbols to export."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


# after CFLAGS: -ffast-math would change the bits of the noise, and linked with it, those of all floats in the process
exact = ["-O2", "-fno-fast-math", "-ffp-contract=off"]
fast = ["-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
kernels = Extension(
    "surgery.kernels._native",
    ["surgery/kernels/native.c"],
    extra_compile_args=["/O2", "/fp:precise"] if sys.platform == "win32" else exact + fast,
    extra_link_args=[] if sys.platform == "win32" else exact,
    py_limited_api=True,  # one wheel for every Python
    optional=True,  # NumPy does the same, slower, where there is no compiler
)
hooks = ["surgery.hooks", "surgery.hooks.site", *(f"surgery.hooks.{name}" for name in find_packages("hooks"))]
setup(
    packages=[*find_packages(include=["surgery", "surgery.*"]), *hooks],
    package_dir={"surgery.hooks": "hooks"},
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
