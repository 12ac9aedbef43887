"""Arms of a study: `plain`, the command without us, and the flags of `surgery run` as name=value."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import product
from typing import Any

from surgery.errors import SettingError
from surgery.hooks.run.options import Options, make_options, variable_readers

PLAIN = "plain"
_REFUSED = {
    "report": "every arm has one of its own",
    "allow_inactive": "an arm without effect is an error",
    "debug": "its place is `surgery study --debug`",
    "seed": "its name is noise-seed now",
}
_UNSAFE = re.compile(r"[^A-Za-z0-9=.,_-]+")
_LONGEST_FOLDER = 100


@dataclass(frozen=True)
class Arm:
    """One way to run the command.

    Args:
        name: as the user wrote it, with single spaces; "plain" for the command without us.
        options: what to regularize with; None for nothing.
        swept: the settings that a sweep gave it, by flag, with the value as the user wrote it.
        has_own_seed: the noise has a seed of the arm's own, instead of the trial's.
    """

    name: str
    options: Options | None = None
    swept: Mapping[str, str] = field(default_factory=dict)
    has_own_seed: bool = False

    @property
    def folder(self) -> str:
        """A name for its folder: legible, and another for each arm."""
        text = self.name.replace(" ", "+")
        safe = "+".join(_UNSAFE.sub("_", part) for part in text.split("+"))
        if safe == text and len(safe) <= _LONGEST_FOLDER:
            return safe
        digest = blake2b(self.name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        return f"{safe[:_LONGEST_FOLDER]}-{digest}"

    def flags(self, seed: int) -> list[str]:
        """Return the flags of `surgery run` for a trial. NoisyTune's noise follows the trial's seed."""
        words: list[str] = []
        for name, value in _parse(self.name):
            words += [f"--{name.replace('_', '-')}", value]
        if self.options and self.options.noisytune is not None and not self.has_own_seed:
            words += ["--noise-seed", str(seed)]
        return words


def make_arms(arms: Sequence[str], sweeps: Sequence[str]) -> tuple[Arm, ...]:
    """Make all arms of a study, plain first.

    Args:
        arms: such as "mixout=0.7" or "rdrop=1 mixout=0.7".
        sweeps: such as "noisytune=0.05,0.1"; of several names, all combinations.
    Raises:
        SettingError: a flag is unknown, a value is out of range, or two arms are the same.
    """
    made = [_make(text) for text in arms] + [arm for text in sweeps for arm in _sweep(text)]
    found: dict[Any, Arm] = {}
    for arm in made:
        key = arm.options, arm.has_own_seed
        if key in found:
            raise SettingError(
                f"arm: expected each arm once, got {found[key].name!r} and {arm.name!r}. Leave one of them out."
            )
        found[key] = arm
    if not made:
        raise SettingError('arm: expected one to compare with plain, got none. Add one, such as --arm "mixout=0.7".')
    return Arm(PLAIN), *made


def _make(text: str, swept: Mapping[str, str] | None = None) -> Arm:
    name = shlex.join(_split(text))
    if not name:
        raise SettingError('arm: expected flags such as "mixout=0.7", got nothing. The arm `plain` is always there.')
    values: dict[str, Any] = {}
    readers = variable_readers()
    for flag, value in _parse(name):
        where = f"arm {name!r}"
        if flag in _REFUSED:
            raise SettingError(f"{where}: expected no {flag} in an arm, got one: {_REFUSED[flag]}. Leave it out.")
        if flag not in readers:
            known = ", ".join(one.replace("_", "-") for one in readers if one not in _REFUSED)
            raise SettingError(f"{where}: expected flags of `surgery run` ({known}), got {flag!r}. Correct it.")
        read = _within(where, readers[flag], flag, value)
        if flag in values and not isinstance(read, tuple):
            raise SettingError(f"{where}: expected {flag} once, got it twice. Give one value.")
        values[flag] = (*values.get(flag, ()), *read) if isinstance(read, tuple) else read
    options = _within(f"arm {name!r}", lambda: make_options(**values))
    return Arm(name, options, dict(swept or {}), "noise_seed" in values)


def _within(where: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingError(f"arm {text!r}: expected name=value, got {error}. Mend the quotes.") from error


def _parse(name: str) -> Iterable[tuple[str, str]]:
    for word in _split(name):
        flag, equals, value = word.partition("=")
        if not equals or not value:
            raise SettingError(f"arm {name!r}: expected name=value, such as mixout=0.7, got {word!r}. Correct it.")
        yield flag.removeprefix("--").replace("-", "_"), value


def _sweep(text: str) -> Iterable[Arm]:
    """Make an arm of each value, or of each combination of several names' values."""
    axes = [(word.partition("=")[0], word.partition("=")[2].split(",")) for word in _split(text)]
    if not axes or any(not name or not all(values) for name, values in axes):
        raise SettingError(f"sweep {text!r}: expected name=value,value,..., got something else. Correct it.")
    if len({name for name, _ in axes}) < len(axes):
        raise SettingError(
            f"sweep {text!r}: expected each name once, got one twice. Write its values after one another."
        )
    for values in product(*(values for _, values in axes)):
        chosen = {name: value for (name, _), value in zip(axes, values, strict=True)}
        yield _make(shlex.join(f"{name}={value}" for name, value in chosen.items()), chosen)
