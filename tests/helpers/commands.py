"""The command line under test, in an environment without the user's settings."""

import os
import sys
from dataclasses import dataclass

_OF_THE_USER = ("HF_", "HUGGING", "SURGERY_")


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


def clean_env(**extra: str) -> dict[str, str]:
    """The environment of a command under test: none of the user's Hub settings, and no Hub at all unless given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_USER)}
    return env | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | extra


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "surgery", *map(str, args)]
