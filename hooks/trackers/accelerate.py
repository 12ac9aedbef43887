"""Wrappers around Accelerator.log and init_trackers, for loops that log through accelerate's trackers."""

import re
import sys
from collections.abc import Mapping
from functools import wraps
from typing import Any

from .figures import figures_of, lenient, settings_of

_NOT_TRAINING = {"eval", "evaluation", "val", "valid", "validation", "test", "dev"}


def wrap_accelerator() -> None:
    """Add figures to the logs that have a training loss, and settings to the config, of every Accelerator."""
    with lenient():
        accelerator = sys.modules["accelerate.accelerator"].Accelerator
        _wrap_log(accelerator)
        _wrap_init_trackers(accelerator)


def _wrap_log(accelerator: Any) -> None:
    log = accelerator.log

    @wraps(log)
    def log_with_figures(self: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        figures: dict[str, float] = {}
        with lenient():
            if self.is_main_process and self.trackers and _has_training_loss(values):
                # scripts call it on the main process alone
                figures = figures_of(self._models, is_collective=False)
        return log(self, {**values, **figures} if figures else values, *args, **kwargs)

    accelerator.log = log_with_figures


def _wrap_init_trackers(accelerator: Any) -> None:
    start = accelerator.init_trackers

    @wraps(start)
    def init_trackers(self: Any, project_name: str, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        with lenient():
            if settings := settings_of(self._models):
                config = {**(config or {}), **settings}
        return start(self, project_name, config, *args, **kwargs)

    accelerator.init_trackers = init_trackers


def _has_training_loss(values: Mapping[str, Any]) -> bool:
    words = [set(re.findall("[a-z]+", str(name).lower())) for name in values]
    return any("loss" in one and not one & _NOT_TRAINING for one in words)
