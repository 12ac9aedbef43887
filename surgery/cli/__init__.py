"""The command line: parse, call, print."""

from surgery.cli import check as check  # each module adds its commands to the group
from surgery.cli import write as write
from surgery.cli.group import main

__all__ = ["main"]
