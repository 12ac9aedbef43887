"""Wrappers around CallbackHandler, which passes each event of a Trainer on, so that they come before all reporters.

A callback would come too late for a Trainer that was made before patch_model, and behind reporters put in front of it.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import nn

from .figures import figures_of, lenient, settings_of

_told: ContextVar[Mapping[str, Any]] = ContextVar("_told", default={})  # noqa: B039
"""Settings that TrainingArguments.to_dict tells while training begins, when reporters read the config of the run."""


def wrap_callback_handler() -> None:
    """Add figures to the logs that have a training loss, and settings to the config, of every Trainer."""
    with lenient():
        from transformers.trainer_callback import CallbackHandler
        from transformers.training_args import TrainingArguments

        _wrap_on_log(CallbackHandler)
        _wrap_on_train_begin(CallbackHandler)
        _wrap_to_dict(TrainingArguments)


def _wrap_on_log(handler: Any) -> None:
    handle = handler.on_log

    @wraps(handle)
    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        with lenient():
            _add_figures(self.model, state, logs)
        return handle(self, args, state, control, logs, **kwargs)

    handler.on_log = on_log


def _wrap_on_train_begin(handler: Any) -> None:
    handle = handler.on_train_begin

    @wraps(handle)
    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings: dict[str, Any] = {}
        with lenient():
            settings = settings_of([self.model])
        token = _told.set(settings)
        try:
            return handle(self, *args, **kwargs)
        finally:
            _told.reset(token)

    handler.on_train_begin = on_train_begin


def _wrap_to_dict(arguments: Any) -> None:
    to_dict = arguments.to_dict

    @wraps(to_dict)
    def to_dict_with_settings(self: Any) -> Any:
        return {**to_dict(self), **_told.get()}

    arguments.to_dict = to_dict_with_settings


def _add_figures(model: nn.Module, state: Any, logs: dict[str, Any]) -> None:
    """Add the figures to a training log, and to the Trainer's history of it."""
    if "loss" not in logs:
        return
    figures = figures_of([model])
    logs.update(figures)
    if state.log_history and "loss" in state.log_history[-1]:
        state.log_history[-1].update(figures)
