"""The command line: parse, call, print."""

from surgery.cli import run as run  # each module adds its commands to the group
from surgery.cli import see as see
from surgery.cli import share as share
from surgery.cli import write as write
from surgery.cli.group import main

__all__ = ["main"]
