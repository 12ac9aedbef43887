"""What a class of transformers holds, read off a model on the meta device: its parameters, buffers and tied weights."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any
from warnings import catch_warnings

from surgery.checkpoint.buffer_rules import role_by_rules
from surgery.checkpoint.model_types import NUMBER, ModelType, as_pattern
from surgery.escapes import get_logger

_PARTS = re.compile(r"layers?$|experts$|blocks$|stages$|heads$|depths?$")
_MOST_PARTS = 4096
_log = get_logger(__name__)


@dataclass(frozen=True)
class Described:
    """The floating-point tensors of one class, shapes by name, under live names and those that it is saved under.

    Args:
        prefix: its base_model_prefix.
        names: of all tensors, of any dtype.
        transient: buffers that are not saved, by live name; older versions of the class may have saved them.
        ties: the name that a tied weight is saved under, by its other names.
    """

    class_name: str
    prefix: str
    names: frozenset[str]
    parameters: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    transient: dict[str, tuple[int, ...]]
    ties: dict[str, str]


@contextmanager
def quiet() -> Iterator[None]:
    """Hear nothing of what transformers says of its own models."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(disabled)


def build(kind: Any, config: Any) -> Any:
    """Build a model without memory for its weights. Raises whatever its own code does."""
    import torch

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined, no-redef]

    with quiet(), no_init_weights(), torch.device("meta"):
        return kind(config)


def build_model_type(config: Mapping[str, Any]) -> ModelType | None:
    """Build the class that a config names, and return what it tells; None if transformers cannot.

    Code that comes with a model is not run.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    name = config["model_type"]
    if name not in CONFIG_MAPPING:
        return None
    try:
        _refuse_endless(config)
        with quiet():
            made = CONFIG_MAPPING[name].from_dict(dict(config))
        named = [str(kind) for kind in config.get("architectures") or ()]
        kinds = [getattr(transformers, kind) for kind in named if hasattr(transformers, kind)]
        found = [describe(kind.__name__, build(kind, made)) for kind in kinds[:1] or [MODEL_MAPPING[type(made)]]]
    except Exception as error:  # whatever a model's own code raises
        reason = str(error).strip().partition("\n")[0]
        _log.warning("config.json: %s: could not be built: names tell what is a buffer (%s)", name, reason)
        return None
    return replace(model_type_of(name, found), is_tied=bool(getattr(made, "tie_word_embeddings", False)))


def _refuse_endless(config: Mapping[str, Any]) -> None:
    """Refuse a config whose model has more parts than any: each of them takes time and memory to build.

    Raises:
        ValueError: it does.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_endless(value)
        elif isinstance(value, int) and value > _MOST_PARTS and _PARTS.search(key):
            raise ValueError(f"expected at most {_MOST_PARTS} {key}, got {value}")


def describe(class_name: str, model: Any) -> Described:
    """Return what one class holds."""
    saved = _saved_names(model)
    hidden = transient(model)
    found: dict[str, dict[str, tuple[int, ...]]] = {"parameters": {}, "buffers": {}, "transient": {}}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *buffers.items()]:
        if tensor.is_floating_point():
            kind = "parameters" if name not in buffers else "transient" if name in hidden else "buffers"
            found[kind] |= dict.fromkeys([name, *saved.get(name, ())], tuple(tensor.shape))
    names = frozenset(name for own, others in saved.items() for name in (own, *others)) | model.state_dict().keys()
    prefix = getattr(model, "base_model_prefix", "")
    return Described(class_name, prefix, names, **found, ties=_ties(model))


def _saved_names(model: Any) -> dict[str, list[str]]:
    """Return the names that save_pretrained would give to each tensor, by live name; of equal layers, the first's."""
    named: dict[str, list[str]] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (pattern := as_pattern(name)) not in seen:
            seen.add(pattern)
            named[name] = _saved_as(model, name, tensor)
    return named


def _saved_as(model: Any, name: str, tensor: Any) -> list[str]:
    try:
        from transformers.core_model_loading import revert_weight_conversion

        with quiet():
            return list(revert_weight_conversion(model, {name: tensor}))
    except Exception:  # what is made of several tensors; transformers 4 converts nothing
        return [name]


def _ties(model: Any) -> dict[str, str]:
    """Return which names stand for another tensor, under live names and those that are saved."""
    tensors = model.state_dict(keep_vars=True)
    ties = {}
    for target, source in _tied_names(model).items():
        if target in tensors and source in tensors:
            ties[target] = source
            pairs = zip(
                _saved_as(model, target, tensors[target]), _saved_as(model, source, tensors[source]), strict=False
            )
            ties |= {one: other for one, other in pairs if one != other}
    return ties


def _tied_names(model: Any) -> dict[str, str]:
    """Return what transformers ties: as it says itself, or, in transformers 4, which names are of one parameter."""
    if (known := getattr(model, "all_tied_weights_keys", None)) is not None:
        return dict(known)
    model.tie_weights()  # left out with the initialization
    first: dict[int, str] = {}
    named = [(name, first.setdefault(id(w), name)) for name, w in model.named_parameters(remove_duplicate=False)]
    return {name: source for name, source in named if name != source}


def transient(model: Any) -> set[str]:
    """Return the names of buffers that a checkpoint of the model does not hold."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def model_type_of(name: str, found: Iterable[Described], *, nested: ModelType | None = None) -> ModelType:
    """Return what the classes of a model type tell together.

    Args:
        nested: what is known of the model types of the configs within its config.
    """
    found = list(found)
    buffers = {_shorten(as_pattern(_strip(n, one.prefix))) for one in found for n in one.buffers}
    for one in found:  # what the class no longer saves, an older file may hold
        hidden = (n for n, shape in one.transient.items() if not role_by_rules(n, shape, one.names).is_buffer)
        buffers |= {as_pattern(_strip(n, one.prefix)) for n in hidden}
    known = ModelType("", frozenset(buffers) | (nested.buffers if nested else frozenset()), frozenset())
    parameters = set()
    for one in found:
        for n, shape in one.parameters.items():
            if known.is_buffer(n) or role_by_rules(n, shape, one.names).is_buffer:
                parameters.add(as_pattern(_strip(n, one.prefix)))
    pairs = [(_strip(a, one.prefix), _strip(b, one.prefix)) for one in found for a, b in one.ties.items()]
    return ModelType(name, frozenset(buffers), frozenset(parameters), _tie_patterns(pairs))


def _shorten(pattern: str) -> str:
    """Keep of a batch norm's statistics, which are most of all buffers, the last name alone: no parameter bears it."""
    last = pattern.rpartition(".")[2]
    return last if last in ("running_mean", "running_var") else pattern


def _strip(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.") if prefix else name


def _tie_patterns(ties: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Put `*` for numbers, in a source for those alone that are the target's at the same place."""
    patterns: dict[str, tuple[str, ...]] = {}
    for target, source in ties:
        pattern = as_pattern(target)
        patterns[pattern] = _add_template(patterns.get(pattern, ()), _template(target, source))
    return patterns


def _template(target: str, source: str) -> str:
    numbers, own = NUMBER.findall(target), NUMBER.findall(source)
    if len(numbers) != len(own):
        return source
    slots = iter(["*" if his == mine else mine for his, mine in zip(numbers, own, strict=True)])
    return NUMBER.sub(lambda _: next(slots), source)


def _add_template(known: tuple[str, ...], template: str) -> tuple[str, ...]:
    """Add a source to those of a target; of two that differ in numbers alone, keep what holds for both."""
    alike = next((one for one in known if as_pattern(one) == as_pattern(template)), None)
    if alike is None:
        return (*known, template)
    return tuple(min(one, template, key=lambda t: t.count("*")) if one == alike else one for one in known)
