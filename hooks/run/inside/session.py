"""What a process does at each event that instrument.py reports from torch, from the first optimizer to its exit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SurgeryError
from surgery.live.parts import unwrap

from ...lifecycle import Patch
from ...patch import find_patch
from ...stepped import Stepped, find_stepped, parameters_of
from ...steps import watch
from ...weights.sources import move_marks
from ..messages import BY_HAND, FROM_SCRATCH, NO_OPTIMIZER_YET, UNSEEN, WAITING
from ..options import NOISYTUNE, Options
from .candidates import Candidates
from .filters import Filters
from .loads import Loads
from .models import Model, Models
from .owners import find_gradients
from .patcher import Patcher
from .pending import Pending
from .perturber import Perturber
from .reporter import Reporter
from .weakset import WeakSet

_LOOKS = 10
"""How many backward passes are searched for models after a module was first called: a GAN has shown both by then."""


class Session:
    """Passes the events of a process on to those who act on them.

    An optimizer tells which models are trained: their pretrained parts get noise as soon as it is made. The first of
    their modules that is called in training mode tells what the script calls: that is patched.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._reporter = Reporter(options)
        filters = Filters(options.include, options.exclude)
        self._pending = Pending()
        self._without_pending = WeakSet()  # modules without a parameter that is pending
        self._loads = Loads()
        self._candidates = Candidates(filters, self._loads, self._reporter)
        self._perturber = Perturber(options, filters, self._loads, self._reporter)
        original = self._perturber.original if options.w_pre == "original" else None
        pretrained = original if original is not None else self._loads.overwritten
        self._patcher = Patcher(options, filters, pretrained, self._reporter)
        self._models = Models()
        self._loaders = 0  # calls of from_pretrained that have not returned
        self._has_optimizer = False
        self._is_by_hand = False
        self._looks = 0  # at backward passes without one, since a module was first called
        self._gradients: dict[int, tuple[nn.Parameter, int, int]] = {}  # before a backward pass
        self._called = WeakSet()  # modules, since a model was found by hand

    @property
    def is_waiting(self) -> bool:
        """A model is trained whose forward has not been seen, or may be, where no optimizer tells."""
        return bool(self._pending.parameters) or self._is_by_hand

    # -- optimizers -----------------------------------------------------------------------------------------------

    def on_optimizer_made(self, optimizer: Optimizer) -> None:
        """Find the models whose parameters an optimizer owns, and perturb them."""
        watch(self)  # imports torch's compiler, which takes a second, and which optimizers import anyway
        self._has_optimizer, self._is_by_hand = True, False
        owned = [
            one
            for one in _parameters(optimizer)
            if isinstance(one, nn.Parameter) and one.requires_grad and one not in self._pending.parameters
        ]
        self._train_late(owned)
        for _ in self._take(owned):
            pass
        self._without_pending.clear()

    def _take(self, trained: Iterable[nn.Parameter]) -> Iterator[nn.Module]:
        """Perturb the models of parameters that are to be trained, and wait for a call of each; yield them."""
        for top, parameters in self._candidates.select([one for one in trained if not self._models.hold(one)]):
            if self._candidates.may_be_new(top):
                self._perturber.defer(parameters)
            else:
                self._perturber.perturb(top, parameters)
            self._pending.add(top, parameters)
            yield top

    def _train_late(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do to weights that were frozen when they were patched what is asked for, before they are trained."""
        waiting = [model for model in self._models if model.waiting]
        trained = list(parameters) if waiting else []
        for model in waiting:
            root, own = model.root, [one for one in trained if one in model.waiting]
            if root is not None and own:
                self._perturber.perturb(root, own)
                self._patcher.take_w_pre(root, own)
                self._loads.overwritten.drop(own)
                self._perturber.after_patch(root.parameters())
                model.stop_waiting(own, self._perturber.records(root), self._perturber.noisy(root))

    def on_param_group_added(self, optimizer: Optimizer) -> None:
        """Do the same for what an optimizer got later."""
        self.on_optimizer_made(optimizer)

    def on_optimizer_state_loaded(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note that a run is resumed.

        Args:
            groups: the param_groups that were loaded.
        """
        self._perturber.on_optimizer_state_loaded(optimizer, groups)
        held = (one for _, parameters in parameters_of(optimizer) for one in parameters)
        self._loads.on_optimizer_state_loaded(one for one in held if one in self._pending.parameters)

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Look at a step, once it has its gradients."""
        self._reporter.record.has_trained = True
        self._train_late(one for one in _parameters(optimizer) if one.requires_grad)
        if is_closure:
            self._patcher.open_step = optimizer
        else:
            self._on_gradients(optimizer)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Look at a step whose closure has brought the gradients; write the record now and then, lest we be killed."""
        self._patcher.open_step = None
        if is_closure:
            self._on_gradients(optimizer, has_stepped=True)
        self._perturber.mark(optimizer)
        self._reporter.write_again(self._models)

    def _on_gradients(self, optimizer: Optimizer, *, has_stepped: bool = False) -> None:
        """Count a step, patch what has been trained unseen, and end a run that nothing is regularized in.

        Args:
            has_stepped: the optimizer has changed the weights already.
        """
        changed = list(find_stepped(optimizer))
        self._models.count_step(changed)
        held = [one.w for one in changed]
        if self._pending.parameters.has_any(held):
            self._patch_unseen(held, has_stepped=has_stepped)
        self._exit_if_in_vain()

    # -- weights --------------------------------------------------------------------------------------------------

    @contextmanager
    def from_pretrained(self) -> Iterator[None]:
        """Note that weights are loaded, by the body of a `with`, which itself marks those that are no new ones."""
        self._reporter.record.has_loaded = True
        self._loaders += 1
        try:
            yield
        finally:
            self._loaders -= 1

    def after_from_pretrained(self, loaded: Any) -> None:
        """Know a model as pretrained; with output_loading_info it is the first of two."""
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model, nn.Module):
            self._loads.pretrained.add(model)
            self._perturber.keep_loaded(model.parameters())

    def before_load(self, module: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Keep what load_state_dict is about to overwrite; return the parameters that there are."""
        self._reporter.record.has_loaded = True
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if self._loaders:
            return parameters
        touched = (parameters[name] for name in names if name in parameters)
        self._loads.before_load(
            parameters, [one for one in touched if not self._models.hold(one)], self._pending.parameters
        )
        return parameters

    def after_load(self, module: nn.Module, names: Sequence[str], before: Mapping[str, nn.Parameter]) -> None:
        """Note what load_state_dict has done.

        Args:
            names: the keys of the state_dict.
            before: what before_load has returned.
        """
        after = dict(module.named_parameters(remove_duplicate=False))
        self._follow(before, after)
        if self._loaders:  # transformers 4 gives new layers their memory by load_state_dict, too
            return
        self._loads.after_load(module, after, names)
        self._perturber.after_load([after[name] for name in names if name in after], self._models)

    def before_fully_shard(self, module: nn.Module) -> None:
        """Perturb what fully_shard is about to split."""
        self._perturber.before_fully_shard(module)

    def after_fully_shard(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Know the parameters of a module by what fully_shard has put in their places."""
        self._follow(before, after)

    def _follow(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names, by fully_shard or an assigning load."""
        replaced = {name: w for name, w in before.items() if name in after and after[name] is not w}
        move_marks(replaced, after)
        if replaced:
            for follower in (self._loads, self._perturber, self._pending, self._models):
                follower.move(replaced, after)

    # -- forward and backward -------------------------------------------------------------------------------------

    def on_forward(self, module: nn.Module) -> None:
        """Patch the model that `module` is or holds, if it is about to be trained and was waited for."""
        if self._is_by_hand and module not in self._called:
            self._called.add([module])
            self._looks = 0
        if module in self._without_pending or not torch.is_grad_enabled():
            return
        inner = unwrap(module)
        if self._patcher.is_asked and not inner.training:
            return
        parameters = list(inner.parameters())
        if not self._pending.parameters.has_any(parameters) or any(find_patch(child) for child in inner.modules()):
            self._without_pending.add([module])
            return
        self._patch(self._pending.find_whole(module, parameters))

    def before_backward(self) -> None:
        """Note that something is trained."""
        self._reporter.record.has_trained = True
        self._gradients = {} if self._has_optimizer or self._looks >= _LOOKS else find_gradients()

    def after_backward(self, inputs: Sequence[nn.Parameter] | None = None) -> bool:
        """Regularize what is trained without an optimizer of torch; tell whether to be called again.

        Args:
            inputs: what the gradients were asked for; None: they are where backward leaves them.
        """
        if self._has_optimizer:
            if not self._candidates.is_any_known:
                self._reporter.say(NO_OPTIMIZER_YET)
            return False
        if self._looks < _LOOKS:
            self._looks += 1
            for top in self._take(self._find_trained() if inputs is None else inputs):
                self._is_by_hand = True
                self._patch(top)
                torch.compiler.reset()
                self._reporter.add_note(f"{type(top).__name__}: {BY_HAND}")
        trained = self._models.trained() if inputs is None else inputs
        self._train_late(trained)
        self._models.act_on_gradients()
        self._models.count_step([Stepped(one, {}, one, one.grad) for one in trained])
        self._reporter.write_again(self._models)
        self._exit_if_in_vain()
        return True

    def _find_trained(self) -> list[nn.Parameter]:
        """Return the parameters that the last backward pass has brought a gradient; others may have one of long ago."""
        before, self._gradients = self._gradients, {}
        return [found[0] for key, found in find_gradients().items() if before.get(key) != found]

    def _patch(self, module: nn.Module, *, has_stepped: bool = False) -> None:
        """Do to a model all that is asked for."""
        root = unwrap(module)
        parameters = list(root.parameters())
        self._pending.parameters.remove(parameters)
        if self._candidates.is_beside_trained(root):
            return
        is_head = self._candidates.is_head(root)
        if not is_head:
            self._perturber.before_patch(root, has_stepped=has_stepped)
        is_only = not self._models.is_any_complete(self._options.asked)
        patch = self._patcher.patch(module, root, is_head=is_head, is_only=is_only)
        self._loads.overwritten.drop(one for one in parameters if one.requires_grad)  # w_pre of others is taken later
        self._perturber.after_patch(parameters)
        if patch is not None and patch.weights is not None and not self._reporter.record.has_loaded:
            names = " and ".join(one.name for one in patch.settings if one.acts_on is not None)
            self._reporter.add_note(f"{type(root).__name__}: {FROM_SCRATCH.format(names)}")
        noise, is_resumed = self._perturber.records(root), self._perturber.is_undone(root)
        model = Model(root, noise, patch, noisy=self._perturber.noisy(root), is_resumed=is_resumed)
        if model.methods or model.acts or model.waiting:
            self._models.add(model)
            self._reporter.report_model(model)
            self._report_waiting(model, patch)

    def _report_waiting(self, model: Model, patch: Patch | None) -> None:
        """Report the regularizers that have nothing to act on as long as weights are frozen."""
        if not model.waiting or self._reporter.has_refused:
            return
        names = [NOISYTUNE] if self._perturber.is_asked and NOISYTUNE not in model.acts else []
        if patch is not None and patch.weights is not None and patch.weights.are_all_frozen:
            names += [one.name for one in patch.settings if one.acts_on is not None]
        if names:
            self._reporter.add_note(f"{model.name}: {WAITING.format(' and '.join(names))}")

    def _patch_unseen(self, held: Sequence[torch.Tensor], *, has_stepped: bool) -> None:
        """Patch the models of these parameters, which are trained without a call that on_forward was told of."""
        for top in self._pending.models_of(held):
            if self._patcher.is_asked:
                self._reporter.add_fault(f"{type(top).__name__}: {UNSEEN}")
            self._patch(top, has_stepped=has_stepped)
            torch.compiler.reset()

    # -- the end --------------------------------------------------------------------------------------------------

    def _exit_if_in_vain(self) -> None:
        """End a process in which nothing can take effect, before it trains for hours."""
        if not (self._reporter.has_refused or self._candidates.are_all_excluded):
            return
        if self._pending.parameters or self._options.allow_inactive:
            return
        if self._models.is_any_complete(self._options.asked):
            return
        self._candidates.report_missing()
        self._reporter.exit_inactive(self._models)

    def on_error(self, error: SurgeryError) -> None:
        """Note why a regularizer cannot go on, whoever may catch its error."""
        self._reporter.refuse_process(str(error), self._models)

    def on_fork(self) -> None:
        """Begin a record anew, in a child process."""
        self._reporter.on_fork()

    def on_exit(self) -> None:
        """Report the process for the last time."""
        if self._reporter.has_nothing_to_report:
            return
        if self._reporter.record.has_trained:
            self._candidates.report_missing()
            self._perturber.at_end(self._models)
        self._reporter.end(self._models)


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
