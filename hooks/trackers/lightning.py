"""A callback for Lightning's Trainer, made by the entry point callbacks_factory and added to Trainers without one.

Lightning loads the entry point for every Trainer, whoever made it, so that nothing heavy stands at the top.
"""

import sys
from functools import cache, wraps
from typing import Any


def make_callbacks() -> list[Any]:
    """Return the callback for a Trainer of `lightning`; none in a process without a model that may be patched."""
    return _make_callbacks("lightning.pytorch")


def make_standalone_callbacks() -> list[Any]:
    """Return the same for a Trainer of `pytorch_lightning`."""
    return _make_callbacks("pytorch_lightning")


def _make_callbacks(package: str) -> list[Any]:
    return [_callback_class(package)()] if "surgery.hooks.patch" in sys.modules else []


def wrap_fit(package: str) -> None:
    """Add the callback to Trainers that were made before patch_model was imported."""
    from .figures import lenient

    with lenient():
        trainer = sys.modules[f"{package}.trainer.trainer"].Trainer
        fit = trainer.fit

        @wraps(fit)
        def fit_with_callback(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(one, Figures) for one in self.callbacks):
                self.callbacks += _make_callbacks(package)
            return fit(self, *args, **kwargs)

        trainer.fit = fit_with_callback


@cache
def _callback_class(package: str) -> Any:
    """Derive from the Callback of a package: `lightning` and `pytorch_lightning` have one each."""
    return type("SurgeryFigures", (Figures, sys.modules[package].Callback), {})


class Figures:
    """Logs figures where Lightning logs a training step, and settings with the hyperparameters."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Log settings, together with what Lightning logs next: TensorBoard shows the first hyperparameters alone."""
        from .figures import lenient, settings_of

        if stage != "fit":
            return
        with lenient():
            if settings := settings_of([pl_module]):
                for logger in trainer.loggers:
                    logger.log_hyperparams({**_hyperparameters(trainer, pl_module), **settings})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log figures, on all ranks, if the loggers are about to get those of this batch."""
        from .figures import figures_of, lenient

        with lenient():
            if _is_logged(trainer):
                for name, value in figures_of([pl_module]).items():
                    pl_module.log(name, value)


def _is_logged(trainer: Any) -> bool:
    """Tell whether Lightning passes on what is logged in this batch, as it will decide after it."""
    if not trainer.loggers or not (trainer._logger_connector.should_update_logs or trainer.fast_dev_run):
        return False
    return not (trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate())


def _hyperparameters(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Return those that the module and the datamodule have saved for loggers."""
    savers = [one for one in (pl_module, trainer.datamodule) if getattr(one, "_log_hyperparams", False)]
    return {name: value for one in savers for name, value in one.hparams_initial.items() if name != "_class_path"}
