"""class Options: what `surgery run` is asked for, checked, from the values of flags and from SURGERY_* variables."""

import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from surgery.errors import SettingError
from surgery.escapes import get_logger

from ..registry import METHODS, as_settings
from ..regularizer import Settings
from .folder import RUN_DIR

PREFIX = "SURGERY_"
_log = get_logger(__name__)
_FORMER = "seed"
_OF_KUBERNETES = re.compile(r"\w+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)")
NOISYTUNE = "noisytune"
"""Beside the methods of the registry: it acts once, before training."""


@dataclass(frozen=True)
class Options:
    """The regularizers of a run. Validated when made; raises SettingError. `make_options` takes them by flag.

    Args:
        noisytune: lam of the noise, in [0, 1].
        methods: the settings of the others, in the order of the registry.
        noise_seed: in [0, 2^64); of no use, and no error, without noise. Masks follow torch.manual_seed.
        include: globs of model classes or parameters; if any, only these are regularized.
        exclude: globs of model classes or parameters that are not.
        w_pre: "perturbed", what the noise has made of the weights, or "original", what they were before.
        report: the JSON file to write, an absolute path; None for none.
        allow_inactive: a regularizer that had no effect is no failure.
        debug: show the traceback of an error.
    """

    noisytune: float | None = None
    methods: tuple[Settings, ...] = ()
    noise_seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    w_pre: Literal["perturbed", "original"] | None = None
    report: str | None = None
    allow_inactive: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.asked:
            *names, last = NOISYTUNE, *(kind.name for kind in METHODS)
            raise SettingError(
                f"regularizer: expected {', '.join(names)} or {last}, got none. Give one, such as --mixout 0.7."
            )
        if self.noisytune is not None and not 0 < self.noisytune <= 1:
            raise SettingError(
                f"noisytune: expected a lam above 0, up to 1, got {self.noisytune:g}. The paper uses 0.1 to 0.15."
            )
        if not 0 <= self.noise_seed < 2**64:
            raise SettingError(
                f"noise_seed: expected an integer from 0 to 2^64 - 1, got {self.noise_seed}. Choose another."
            )
        if self.w_pre not in (None, "perturbed", "original"):
            raise SettingError(f"w_pre: expected perturbed or original, got {self.w_pre!r}. Choose one of them.")
        acting = next((one.name for one in self.methods if one.acts_on is not None), "mixout")
        if self.w_pre is not None:
            _refuse_without("w_pre", (NOISYTUNE, acting), self.asked)

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the regularizers that are asked for."""
        noise = (NOISYTUNE,) if self.noisytune is not None else ()
        return (*noise, *(one.name for one in self.methods))

    @property
    def others(self) -> dict[str, Any]:
        """What is asked for beside the settings of methods and the report, by the names of flags."""
        noise = (NOISYTUNE, "noise_seed") if self.noisytune is not None else ()
        return {name: getattr(self, name) for name in (*noise, "include", "exclude", "w_pre")}

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that say the same."""
        values: dict[str, Any] = {NOISYTUNE: self.noisytune}
        for one in self.methods:
            defaults = {field.name: field.default for field in fields(one)}  # type: ignore[arg-type]
            values[one.name] = getattr(one, one.number)
            given = {flag.field: getattr(one, flag.field) for flag in one.flags}
            values |= {f"{one.name}_{name}": value for name, value in given.items() if value != defaults[name]}
        values |= {name: getattr(self, name) for name in _OWN if getattr(self, name) != getattr(Options, name)}
        return {PREFIX + name.upper(): _write(value) for name, value in values.items() if not _is_empty(value)}


_OWN = ("noise_seed", "include", "exclude", "w_pre", "report", "allow_inactive", "debug")


def make_options(**values: Any) -> Options:
    """Make options of the values of flags, by name: `mixout`, `rdrop_every`, `noise_seed`; None, () and False are none.

    Raises:
        SettingError: a value is out of range, or of no use without another flag.
    """
    given = {name: value for name, value in values.items() if not _is_empty(value)}
    wanted: dict[str, Settings] = {}
    for kind in METHODS:
        flags = {flag.field: f"{kind.name}_{flag.field}" for flag in kind.flags}
        flags = {field: name for field, name in flags.items() if name in given}
        for name in flags.values():
            _refuse_without(name, (kind.name,), tuple(given))
        if kind.name in given:
            numbers = {kind.number: given[kind.name], **{field: given[name] for field, name in flags.items()}}
            wanted[kind.name] = kind(**numbers)
    own = {name: given[name] for name in (NOISYTUNE, *_OWN) if name in given}
    return Options(methods=as_settings(wanted), **own)


def _refuse_without(option: str, needed: tuple[str, ...], asked: tuple[str, ...]) -> None:
    """Refuse an option that would do nothing without a regularizer that is not asked for."""
    if any(name not in asked for name in needed):
        raise SettingError(
            f"{option}: expected {' and '.join(needed)} with it, got none. Add it, or leave {option} out."
        )


def read_options(variables: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Options | None:
    """Read the options of environment variables; None if they ask for nothing.

    Args:
        variables: the environment; an empty variable is none.
        flags: values that win over the variables, as `make_options` takes them.
    Raises:
        SettingError: a value is of the wrong kind or out of range, or a SURGERY_ variable is unknown.
    """
    given = {name: value for name, value in variables.items() if is_own(name) and name != RUN_DIR}
    known = {PREFIX + name.upper(): (name, read) for name, read in variable_readers().items()}
    for name in given.keys() - known.keys():
        raise SettingError(f"{name}: expected one of {', '.join(known)}, got an unknown variable. Correct its name.")
    values = {known[name][0]: known[name][1](name, value) for name, value in given.items() if value}
    values |= {name: value for name, value in (flags or {}).items() if not _is_empty(value)}
    values = _rename_seed(values)
    return make_options(**values) if values else None


def _rename_seed(values: dict[str, Any]) -> dict[str, Any]:
    """Take `seed`, the former name of noise_seed, as that, with a line that says so."""
    if _FORMER not in values:
        return values
    _log.warning("surgery: --seed and SURGERY_SEED are --noise-seed and SURGERY_NOISE_SEED now: taken as these.")
    return {"noise_seed": values[_FORMER]} | {name: value for name, value in values.items() if name != _FORMER}


def is_own(variable: str) -> bool:
    """Tell whether a variable is meant for us: Kubernetes sets some of its own for a Service that is named surgery."""
    return variable.startswith(PREFIX) and not _OF_KUBERNETES.fullmatch(variable)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == ()  # 0 is a value


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.join(value)
    return "1" if value is True else str(value)


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SettingError(f"{name}: expected a number, got {value!r}. Correct it.")
    return number


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise SettingError(f"{name}: expected a whole number, got {value!r}. Correct it.") from error


def _flag(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise SettingError(f"{name}: expected 1 or 0, got {value!r}. Choose one of them.")
    return value == "1"


def _globs(name: str, value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise SettingError(f"{name}: expected globs with spaces between, got {value!r}. Mend the quotes.") from error


def _text(name: str, value: str) -> str:  # noqa: ARG001
    return value


def variable_readers() -> dict[str, Callable[[str, str], Any]]:
    """Return how the value of each variable is read, by the name of its flag."""
    flags = {f"{kind.name}_{flag.field}": flag.kind for kind in METHODS for flag in kind.flags}
    kinds = {name: _whole if kind is int else _number if kind is float else _text for name, kind in flags.items()}
    numbers = dict.fromkeys((NOISYTUNE, *(kind.name for kind in METHODS)), _number)
    own = {"noise_seed": _whole, _FORMER: _whole, "include": _globs, "exclude": _globs, "w_pre": _text, "report": _text}
    return {**numbers, **kinds, **own, "allow_inactive": _flag, "debug": _flag}
