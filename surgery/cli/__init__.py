"""The command line, one file a command: parse, call, print. Importing a file adds its command to the group."""

from surgery.cli import diff as diff
from surgery.cli import doctor as doctor
from surgery.cli import env as env
from surgery.cli import inspect as inspect
from surgery.cli import materialize as materialize
from surgery.cli import perturb as perturb
from surgery.cli import push as push
from surgery.cli import run as run
from surgery.cli import study as study
from surgery.cli import verify as verify
from surgery.cli.group import main

__all__ = ["main"]
