"""A callback for transformers' Trainer that checks that the model is patched, and tells what came of it at the end."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from surgery.errors import SettingError
from surgery.escapes import get_logger

from .patch import find_patch, unpatch_model
from .trackers.figures import is_under_run
from .trackers.install import install

_log = get_logger(__name__)


class SurgeryCallback(TrainerCallback):
    """Check that a Trainer's model is patched, and go on where a resumed run was.

    The figures come with and without it: every log that has a training loss gets, with methods that act on weights,
    `w_pre_distance`, ||w - w_pre||_2 over the weights chosen by patch_model, and what each method logs, as its card
    says: of Mixout `mixed_share`, the share of the model's trainable elements that are mixed; of R-Drop `rdrop_kl` and
    `rdrop_ce`, the KL and the cross-entropy, means over the forwards since the last log.

    Args:
        unpatch: call unpatch_model when training ends.
    """

    def __init__(self, *, unpatch: bool = False) -> None:
        self.unpatch = unpatch
        install()  # of a model that was patched in another process

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Check that there is something to log. `surgery run` patches its models later, in their first forward.

        In a resumed run the methods go on where the saved one was: R-Drop with its `every`, for instance.

        Raises:
            SettingError: the model is not patched.
        """
        model: nn.Module = kwargs["model"]
        patch = find_patch(model)
        if patch is not None:
            patch.resume(state.global_step)
        elif not is_under_run():
            raise SettingError(
                f"SurgeryCallback: expected a patched model, got {type(model).__name__} as it is. "
                "Call patch_model(model) before training."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Warn of what should be known of the methods at the end; take the patch off, if asked to."""
        patch = find_patch(kwargs["model"])
        for regularizer in patch.regularizers if patch is not None else ():
            for text in regularizer.remarks():
                _log.warning(text)
        if self.unpatch:
            unpatch_model(kwargs["model"])
