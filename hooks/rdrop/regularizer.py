"""Forward hooks that make two passes of each training forward, whose losses become R-Drop's."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.optimizer import Optimizer

from surgery.errors import SettingError, SourceError

from ..active_calls import count_active_calls
from ..compiling import between_graphs, eagerly, run_uncompiled, trace_cross_entropy
from ..marks import PATCH
from ..regularizer import Handle, Regularizer, Settings
from ..stepped import Stepped
from ..steps import Activity, AuditedRegularizer
from ..weights.chosen import ChosenWeights
from . import divergence, doubling
from .fused_calls import HeadCall
from .fused_loss import result_of_head
from .interception import LossFunctionMode, LossInterception, find_fault
from .logprobs import (
    FusedLogProbs,
    PairedLogProbs,
    UnreducedLoss,
    as_log_probs,
    as_unreduced_loss,
)
from .loss_calls import USE_TWO_PASSES, LossCall, check_is_doubled, doubled_batch_loss, read_call, two_pass_loss
from .metrics import Metrics
from .objective import Objective, RDropLoss
from .outputs import copy_containers
from .paired import PairedForward, PairedTensor, forwards_in, pair_outputs, split_passes
from .randomness import HostStates, Randomness, restore_host_states, save_host_states
from .schedule import Schedule
from .settings import RDrop


class RDropRegularizer(AuditedRegularizer):
    """R-Drop on one model.

    The first pass is made before the forward that the script has called, which is the second. Losses that the model
    calls are intercepted; those that the script calls get both passes from the outputs, which are PairedTensors.
    """

    idle = (
        "rdrop: expected a forward of the patched model in training mode before the optimizer's step, got none "
        "whose loss it could reach. Call model.train(), and patch what the script calls as model(...)."
    )
    is_strict = True

    def __init__(self, settings: RDrop, weights: ChosenWeights | None, others: Sequence[Settings]) -> None:  # noqa: ARG002
        super().__init__()
        self.settings = settings
        self.metrics = Metrics()
        self.unjoined: set[str] = set()
        self._objective = Objective(
            float(settings.alpha), 2.0 if settings.scale == "paper" else 1.0, settings.kl_reduction == "sum"
        )
        self.schedule = Schedule(settings.every)
        self._spared = 0
        self._is_without_steps = False
        self._is_drawn_per_batch = any(one.is_per_batch for one in others)
        self._mode = LossFunctionMode()
        self._randomness = Randomness()
        self._host_states: HostStates = ()

    def attach(self, root: nn.Module) -> list[Handle]:
        """Put R-Drop on the model; return the handles of its hooks."""
        run_uncompiled(PairedTensor, PairedLogProbs, UnreducedLoss, FusedLogProbs)
        trace_cross_entropy()
        self.schedule.find_weights(root)
        return [
            root.register_forward_pre_hook(_begin_passes, with_kwargs=True),
            # before all others, FSDP's for instance, so that they see what the script will get
            root.register_forward_hook(_end_passes, prepend=True, always_call=True),
        ]

    # -- the forward ----------------------------------------------------------------------------------------------

    @eagerly
    def begin(self, root: nn.Module, arguments: doubling.Arguments) -> tuple[Any, Any]:
        """Intercept the losses of the passes to come.

        Returns:
            The arguments of a first pass, None if there is none, and those of the forward that the script has called,
            None for those that it has.
        """
        is_idle = self.is_aside or not root.training or not torch.is_grad_enabled()
        if is_idle or self._is_nested_call(root) or self._is_refused(root):
            return None, None
        if not self.schedule.is_due:
            self._spared += 1
            return None, None
        self.metrics.end_forward()
        self._randomness.save_rng_states()
        is_doubled = self._is_doubled(root, arguments)
        batch_sizes = doubling.batch_sizes(root, arguments) if is_doubled else None
        forward = PairedForward(
            self._make_loss, self.metrics.count_forward, self.refuse, self.unjoined, forwards_in(arguments)
        )
        self._mode.start(LossInterception(root, forward, batch_sizes))
        if is_doubled:
            return None, doubling.double_batch(arguments)
        self._host_states = save_host_states()
        first, second = split_passes(arguments)
        return copy_containers(first), second

    @eagerly
    def turn(self, output: Any) -> None:
        """Go from the first pass to the second."""
        assert self._mode.interception is not None
        self._mode.interception.begin_second_pass(output)
        restore_host_states(self._host_states)

    @eagerly
    def end(self, root: nn.Module, output: Any) -> Any:
        """Return the outputs of the second pass in the shapes that the script expects, paired with those of the first.

        Args:
            output: None if forward has raised.
        """
        interception = self._mode.interception
        if interception is None or interception.root is not root or count_active_calls(root) > 1:
            return None
        self.abort()
        if output is None:
            return None
        interception.check_all_matched()
        if fault := find_fault(output, interception.forward):
            self.refuse(fault)
        if interception.batch_sizes is None:
            return pair_outputs(output, interception.first_output, interception.forward)
        first, second = doubling.halve_output(output, interception.batch_sizes)
        return pair_outputs(second, first, interception.forward)

    def _is_nested_call(self, root: nn.Module) -> bool:
        """Tell whether the model is called by itself."""
        return self._mode.interception is not None and count_active_calls(root) > 1

    def abort(self) -> None:
        """Intercept no more losses."""
        self._mode.stop()

    def _is_refused(self, root: nn.Module) -> bool:
        """Begin a forward in training; tell whether R-Drop cannot be in it, and steps aside."""
        self.abort()  # a KeyboardInterrupt has left it open
        if torch._C._are_functorch_transforms_active():
            self.refuse(
                "rdrop: expected a backward pass of autograd's, got torch.func, whose tensors hide that they want a "
                "gradient. Use loss.backward(), or train without rdrop."
            )
        else:
            try:
                self.schedule.begin_forward(root)
            except SourceError as error:
                self.refuse(str(error))
        return self.is_aside

    def _is_doubled(self, root: nn.Module, arguments: doubling.Arguments) -> bool:
        is_paired = bool(forwards_in(arguments))  # each pass has inputs of its own
        if self.settings.passes == "auto":
            return not self._is_drawn_per_batch and not is_paired and doubling.is_equivalent(root, arguments)
        if self.settings.passes == "doubled" and is_paired:
            raise SettingError(
                f"passes: expected inputs without R-Drop, got outputs of a patched model. {USE_TWO_PASSES}"
            )
        return self.settings.passes == "doubled"

    # -- the loss -------------------------------------------------------------------------------------------------

    def _make_loss(
        self, first: LossCall | HeadCall | None, second: LossCall | HeadCall, on_loss: Callable[[], None]
    ) -> Any:
        """Return the loss for a call in each pass, or for one of a doubled batch; of a fused head, all it returns."""
        if isinstance(second, HeadCall):
            assert isinstance(first, HeadCall)
            return self._make_result_of_head(first, second, on_loss)
        assert not isinstance(first, HeadCall)
        with torch._C.DisableTorchFunction():  # another patched model, that calls this one, would intercept these
            return self._make_loss_unintercepted(first, second, on_loss)

    def _make_loss_unintercepted(
        self, first: LossCall | None, second: LossCall, on_loss: Callable[[], None]
    ) -> torch.Tensor:
        if first is None:
            check_is_doubled(second, compares_labels=not self.metrics.fired)
        if self._objective.alpha and not self._do_passes_differ(first, second):
            return second.torch_loss(is_doubled=first is None)
        if second.name == "log_softmax":
            assert first is not None
            return self._pair_log_probs(first, second, on_loss)
        on_loss()
        if first is not None:
            loss = self._record_terms(second.name, two_pass_loss(first, second, self._objective))
            return as_unreduced_loss(loss) if second.arguments["reduction"] == "none" else loss
        if self._objective.alpha:
            return self._record_terms(second.name, doubled_batch_loss(second, self._objective))
        with torch.no_grad():
            self._record_terms(second.name, doubled_batch_loss(second, self._objective))
        return self._objective.factor * second.torch_loss(
            is_doubled=True
        )  # to the bit what the doubled batch gives without R-Drop

    def _make_result_of_head(self, first: HeadCall, second: HeadCall, on_loss: Callable[[], None]) -> Any:
        with torch._C.DisableTorchFunction():
            if self._objective.alpha and not self._do_passes_differ(first, second):
                return second.call_own()
            on_loss()
            return result_of_head(first, second, self._objective, self.metrics.add, self._refuse_made_loss)

    def _refuse_made_loss(self, reason: str) -> None:
        """Refuse what is made of log-probabilities, after they were counted as a loss."""
        self.metrics.fired -= not self.is_aside
        self.refuse(reason)

    def _do_passes_differ(self, first: LossCall | HeadCall | None, second: LossCall | HeadCall) -> bool:
        """Tell whether R-Drop has two predictions to compare; refuse what will stay equal."""
        a, b = (first.prediction, second.prediction) if first is not None else second.prediction.chunk(2)
        try:
            self._randomness.check_passes_differ(a.detach(), b.detach(), steps=self.schedule.steps)
        except SourceError as error:
            self.refuse(str(error))
        return not self.is_aside

    def _pair_log_probs(self, first: LossCall, second: LossCall, on_loss: Callable[[], None]) -> torch.Tensor:
        dim = second.dim
        a, b = (call.input.to(call.arguments["dtype"] or call.input.dtype) for call in (first, second))
        log_p, log_q = F.log_softmax(a, dim), F.log_softmax(b, dim)

        def make_nll_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
            first, second = (read_call(F.nll_loss, (log, *args), kwargs) for log in (log_p, log_q))
            loss: torch.Tensor = self._make_loss(first, second, on_loss)
            return loss

        def make_combined() -> torch.Tensor:
            on_loss()
            with torch._C.DisableTorchFunction():
                return divergence.log_softmax(a, b, dim, self._objective, self.metrics.add)

        # cached: all functions of one loss share it, so that the metrics count it once
        return as_log_probs(log_q, make_nll_loss, cache(make_combined))

    def _record_terms(self, name: str, joined: RDropLoss) -> torch.Tensor:
        self.metrics.add(joined.ce, joined.kl, is_mse=name == "mse_loss")
        return joined.loss

    # -- training steps -------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Note that a step begins."""
        super().before_step(optimizer, is_closure=is_closure)
        self.schedule.begin_step(optimizer, is_closure=is_closure)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Note that there was one."""
        super().after_step(optimizer, is_closure=is_closure)
        self.schedule.end_step(optimizer)

    def held(self, optimizer: Optimizer) -> Iterator[Stepped]:
        return self.schedule.held(optimizer)

    def resume(self, steps: int) -> None:
        """Go on with `every` where a saved run was."""
        self.schedule.resume(steps)

    def activity(self) -> Activity:
        """Return what changes with each forward that R-Drop is in, or leaves out for `every`."""
        fired = self.metrics.fired
        if not fired and (self.schedule.is_due or not self._spared):
            return Activity()
        return Activity((fired, self._spared), acted=fired)

    # -- what came of it ------------------------------------------------------------------------------------------

    @property
    def has_acted(self) -> bool:
        return self.metrics.fired > 0 and (self._randomness.has_differed or not self._objective.alpha)

    def facts(self, root: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        return {"fired": self.metrics.fired, "missed": self.missed, "unjoined": tuple(sorted(self.unjoined))}

    def figures(self) -> dict[str, Any]:
        return self.metrics.read()

    def report(self) -> dict[str, Any]:
        fired = self.metrics.fired if self._is_without_steps else self.acted_steps
        return self.metrics.report() | {"rdrop_fired": fired}

    def act_on_gradients(self) -> list[Handle]:
        """Count forwards, since no optimizer's steps can be."""
        self._is_without_steps = True
        return []

    def logs(self, root: nn.Module) -> dict[str, float]:  # noqa: ARG002
        means = {name: value for name, value in self.metrics.read().items() if name.endswith("_mean")}
        return {f"rdrop_{name.removesuffix('_mean')}": value for name, value in means.items() if value is not None}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "metrics": Metrics(), "_randomness": Randomness(), "_host_states": (), "_spared": 0}


# torch.compile skips this frame and ours within it, and compiles the two passes
@between_graphs
def _begin_passes(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make the first pass; the last of the root's forward pre-hooks."""
    own = _own(root)
    assert own is not None
    first, arguments = own.begin(root, (args, kwargs))
    if first is not None:
        try:
            output = root.forward(*first[0], **first[1])
        except BaseException:
            own.abort()
            raise
        own.turn(output)
        root.__dict__[PATCH].next_pass()
    return arguments


@between_graphs
def _end_passes(root: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
    """Pair the outputs; the first of the root's forward hooks, also called when forward raises."""
    own = _own(root)
    is_here = not root.__dict__[PATCH].is_open_elsewhere(root)
    return own.end(root, output) if own is not None and is_here else None


def _own(root: nn.Module) -> RDropRegularizer | None:
    """Return the R-Drop of a patched model: hooks are functions of a module, which copies of a model share."""
    at_work: tuple[Regularizer, ...] = root.__dict__[PATCH].regularizers
    return next((one for one in at_work if isinstance(one, RDropRegularizer)), None)
