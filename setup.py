"""The packages: hooks/ is installed as surgery.hooks, which pyproject.toml alone cannot find."""

from setuptools import find_packages, setup

hooks = ["surgery.hooks", "surgery.hooks.site", *(f"surgery.hooks.{name}" for name in find_packages("hooks"))]
setup(packages=[*find_packages(include=["surgery", "surgery.*"]), *hooks], package_dir={"surgery.hooks": "hooks"})
