"""A callback for transformers' Trainer that logs what the regularizers do."""

import logging
import sys
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from surgery.errors import SettingError
from surgery.live.names import unwrap

from .patch import find_patch, unpatch_model

_log = logging.getLogger(__name__)


class SurgeryCallback(TrainerCallback):
    """Log what the regularizers do beside the training loss, for all reporters.

    Adds to every log that has a training loss, with methods that act on weights, `w_pre_distance`, ||w - w_pre||_2 over
    the weights chosen by patch_model, and what each method logs, as its card says: of Mixout `mixed_share`, the share
    of the model's trainable elements that are mixed; of R-Drop `rdrop_kl` and `rdrop_ce`, the KL and the cross-entropy,
    means over the forwards since the last log.

    Args:
        unpatch: call unpatch_model when training ends.
    """

    def __init__(self, *, unpatch: bool = False) -> None:
        self.unpatch = unpatch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Check that there is something to log, and go before the callbacks that report logs.

        In a resumed run the methods go on where the saved one was: R-Drop with its `every`, for instance.

        Raises:
            SettingError: the model is not patched.
        """
        model: nn.Module = kwargs["model"]
        patch = find_patch(model)
        if patch is None:
            raise SettingError(
                f"SurgeryCallback: expected a patched model, got {type(model).__name__} as it is. "
                "Call patch_model(model) before training."
            )
        patch.resume(state.global_step)
        # the Trainer puts a user's callbacks after its reporters, and hands no callback the list
        handler = sys._getframe(1).f_locals.get("self")
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the figures to a training log, and to the Trainer's history of it."""
        model: nn.Module = kwargs["model"]
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs or (patch := find_patch(model)) is None:
            return
        added: dict[str, float] = {}
        if patch.weights is not None:
            added["w_pre_distance"] = patch.weights.distance()
        for regularizer in patch.regularizers:
            added |= regularizer.logs(unwrap(model))
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Warn of what should be known of the methods at the end; take the patch off, if asked to."""
        patch = find_patch(kwargs["model"])
        for regularizer in patch.regularizers if patch is not None else ():
            for text in regularizer.remarks():
                _log.warning(text)
        if self.unpatch:
            unpatch_model(kwargs["model"])
