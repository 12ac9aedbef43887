"""Wrappers around what logs a training loss, put on once a script has imported it; imports nothing heavy itself."""

from collections.abc import Callable

from ..imports import call_after_import

_is_installed = False


def install() -> None:
    """Have the figures logged by transformers, Lightning and accelerate, imported already or later."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    for module, wrap in _WRAPPERS.items():
        call_after_import(module, wrap)


def _wrap_transformers() -> None:
    from .transformers import wrap_callback_handler

    wrap_callback_handler()


def _wrap_lightning() -> None:
    from .lightning import wrap_fit

    wrap_fit("lightning.pytorch")


def _wrap_pytorch_lightning() -> None:
    from .lightning import wrap_fit

    wrap_fit("pytorch_lightning")


def _wrap_accelerate() -> None:
    from .accelerate import wrap_accelerator

    wrap_accelerator()


_WRAPPERS: dict[str, Callable[[], None]] = {
    "transformers.trainer_callback": _wrap_transformers,
    "lightning.pytorch.trainer.trainer": _wrap_lightning,
    "pytorch_lightning.trainer.trainer": _wrap_pytorch_lightning,
    "accelerate.accelerator": _wrap_accelerate,
}
