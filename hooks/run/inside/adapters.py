"""PEFT's adapters in a model that gets noise: they are saved without it, so what repeats it when one is loaded again.

Noise is added when the optimizer is made, after PEFT has made its adapters. A saved one fits a base that `surgery
perturb` has given the same noise, unless PEFT has computed something from the base before the noise was in it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from surgery.errors import SourceError, some
from surgery.escapes import shell_quote
from surgery.live.parts import LIVE_NAMES
from surgery.recipe import Recipe

from ...weights.lora import REWRITING
from ...weights.peft_layers import is_wrapper
from ...weights.pretrained import local

REPEATED = frozenset(
    "ADALORA BEFT BOFT C3A CPT DEFT DELORA FOURIERFT GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR LORA MISS "
    "OFT PEANUT PREFIX_TUNING PROMPT_TUNING PVERA P_TUNING RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS "
    "UNILORA VBLORA VERA WAVEFT".split()
)
"""Types of PEFT whose adapter needs no more than the base to be what it was. Not FRoD, OSF, PSOFT, AdaMSS: they keep
what they compute from the base out of what they save, and compute it anew when it is loaded."""

_REMEDY = "Run `surgery perturb` on the checkpoint, train on what it makes, and leave noisytune out."
_SAMPLED, _SHOWN_EXCLUDES = 16, 8


class LoadedValues:
    """A few elements of each parameter as it was loaded. They go with the parameters."""

    def __init__(self) -> None:
        self._values: Any = WeakIdKeyDictionary()

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep what they are now."""
        for parameter in parameters:
            if not parameter.is_meta:
                self._values[parameter] = _sample(parameter)

    def is_changed(self, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter has other elements than it was loaded with, but for a change of its dtype."""
        loaded = self._values.get(parameter)
        if loaded is None or parameter.is_meta:
            return False
        now = _sample(parameter)
        dtypes = (now.dtype, torch.bfloat16, torch.float16)  # it may have been in one of these for a while
        return now.shape != loaded.shape or not any(torch.equal(loaded.to(one).to(now.dtype), now) for one in dtypes)


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    flat = local(parameter).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].to("cpu", copy=True)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether PEFT has added something to a model."""
    return any(is_wrapper(module) for module in model.modules()) or next(_configs(model), None) is not None


def refuse_unrepeatable(model: nn.Module, loaded: LoadedValues) -> None:
    """Refuse noise that would be lost, or be another one, where a saved adapter is loaded again.

    Raises:
        SourceError: PEFT has computed something from the base weights, or they are not what was loaded.
    """
    for config in _configs(model):
        kind, init = str(getattr(config.peft_type, "value", config.peft_type)), getattr(config, "init_lora_weights", "")
        if kind not in REPEATED or str(init).lower().startswith(REWRITING):
            what = kind if kind not in REPEATED else f"{kind} with init_lora_weights={init!r}"
            raise SourceError(
                f"adapter: expected one that is made without the base weights, or saved with all that it takes from "
                f"them, got {what}: noise that is added later is not in there. {_REMEDY}"
            )
    if not has_adapter(model):
        return
    frozen = {name: w for name, w in model.named_parameters() if not w.requires_grad}
    if changed := [name for name, w in frozen.items() if loaded.is_changed(w)]:
        raise SourceError(
            f"{some(changed)}: expected base weights as they were loaded, got {len(changed)} that were rewritten "
            f"since, so that an adapter cannot be loaded onto their noise. {_REMEDY}"
        )


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configs of PEFT's adapters; several modules have the same ones."""
    held = (getattr(module, "peft_config", None) for module in model.modules())
    yield from {id(one): one for configs in held if isinstance(configs, dict) for one in configs.values()}.values()


def advise(model: nn.Module, recipes: Sequence[Recipe]) -> str:
    """Say how the noise of a model comes with an adapter that is saved.

    Args:
        recipes: what was done to the parts of the model.
    """
    said = "noise is on base weights, which an adapter is saved without: "
    merge = "merge them" if any(is_wrapper(module) for module in model.modules()) else ""
    excluded = sorted({name for recipe in recipes for name in recipe.settings.exclude})
    if any(LIVE_NAMES in note for recipe in recipes for note in recipe.notes) or len(excluded) > _SHOWN_EXCLUDES:
        return f"{said}{merge or 'save the whole model'}, for surgery perturb does not repeat this noise."
    settings = recipes[0].settings
    flags = [f"--lam {settings.lam:g} --seed {settings.seed}", *(f"--exclude {shell_quote(name)}" for name in excluded)]
    return f"{said}{merge and f'{merge}, or '}load it onto what surgery perturb makes with {' '.join(flags)}."
