"""One process of a run: from an optimizer to the model whose parameters it owns, and from there to its patch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SurgeryError, some
from surgery.live.names import pretrained_parts, unwrap

from ...lifecycle import Patch
from ...patch import find_patch, is_compiled, put_patch, take_root
from ...steps import watch
from ...weights.sources import is_loaded, move_marks
from ..messages import NO_OPTIMIZER, NOISE_OFF, UNSEEN
from ..options import Options
from .filters import Choice
from .loads import Loads
from .models import Model
from .noise import Noise
from .owners import find_tops
from .pending import Trained
from .reporter import Account
from .weakset import WeakSet

EXIT_INACTIVE = 3


class Session:
    """Watches a process train, and regularizes what it trains.

    An optimizer tells which models are trained: their pretrained parts get noise as soon as it is made. The first of
    their modules that is called in training mode tells what the script calls: that is patched.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.account = Account(options)
        self._choice = Choice(options.include, options.exclude)
        self._models: list[Model] = []
        self._trained = Trained()
        self._barren = WeakSet()
        self._loads = Loads()
        self._noise: Noise | None = None
        if options.noisytune is not None:
            self._noise = Noise(options.noisytune, options.seed or 0, self._loads.overwritten)
        self._refusals: list[str] = []
        self._open_step: Optimizer | None = None
        """One whose closure is at work."""
        self._passed_over: set[str] = set()  # classes of models that are trained, and not taken

    # -- what is trained ------------------------------------------------------------------------------------------

    def meet(self, optimizer: Optimizer) -> None:
        """Look whose parameters a new optimizer owns, or one that got more of them."""
        watch(self)  # imports torch's compiler, which takes a second, and which optimizers import anyway
        owned = [
            one
            for one in _parameters(optimizer)
            if isinstance(one, nn.Parameter) and one.requires_grad and one not in self._trained.waiting
        ]
        owned = [one for one in owned if not self._covers(one)]
        tops = find_tops(owned) if owned else []
        pretrained = [top for top, _ in tops if _is_pretrained(top)]
        for top, parameters in tops:
            if find_patch(top) is not None:
                continue
            if pretrained and top not in pretrained:
                beside = type(pretrained[0]).__name__
                self.account.note(f"{type(top).__name__}: new, beside a pretrained {beside}: left as it is.")
            elif not self._choice.takes(top):
                self._passed_over.add(type(top).__name__)
            else:
                self._perturb(top, parameters)
                self._trained.add(top, parameters)
        self._barren.clear()

    def _covers(self, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter is one of a model that is regularized."""
        return any(model.holds([parameter]) for model in self._models)

    @property
    def is_waiting(self) -> bool:
        """A model is trained whose forward has not been seen."""
        return bool(self._trained.waiting)

    # -- noise ----------------------------------------------------------------------------------------------------

    def before_shard(self, module: nn.Module) -> None:
        """Perturb what fully_shard is about to split, which is too late for it then."""
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self._noise is None or self._noise.knows(trainable):
            return
        for top, parameters in find_tops(trainable):
            if not any(parameter.is_meta for parameter in top.parameters()) and self._choice.takes(top):
                self._perturb(top, parameters)

    def _perturb(self, top: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        if self._noise is None:
            return
        try:
            self._noise.add(top, trained, list(self._loads.filled), *self._choice.of_model(top))
        except SurgeryError as error:
            self._refuse("noisytune", top, error)
            return
        if any(hasattr(module, "adapter_layer_names") for module in top.modules()):  # PEFT's
            flags = f"--lam {self.options.noisytune:g} --seed {self.options.seed or 0}"
            self.account.note(
                f"{type(top).__name__}: noise is on frozen weights, which an adapter is saved without: merge them, or "
                f"load it onto what surgery perturb makes with {flags}."
            )

    # -- loads ----------------------------------------------------------------------------------------------------

    def before_load(self, module: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Keep what a load is about to overwrite; return the parameters that there are."""
        self.account.record.has_loaded = True
        parameters = dict(module.named_parameters(remove_duplicate=False))
        touched = (parameters[name] for name in names if name in parameters)
        self._loads.keep(parameters, [one for one in touched if not self._covers(one)], self._trained.waiting)
        return parameters

    def after_load(self, module: nn.Module, names: Sequence[str], before: dict[str, nn.Parameter]) -> None:
        """Note what a load has done."""
        after = dict(module.named_parameters(remove_duplicate=False))
        self.move(before, after)
        self._loads.mark(module, after, names)
        self._look_for_noise([after[name] for name in names if name in after])

    def _look_for_noise(self, loaded: Sequence[nn.Parameter]) -> None:
        """Blame a load that has taken the noise off a model that is trained already, as between the folds of a loop."""
        for model in self._models:
            own = [one for one in loaded if model.holds([one])]
            if self._noise is not None and self._noise.is_off(own):
                model.acts.discard("noisytune")
                self.account.blame(f"noisytune: {model.name}: {NOISE_OFF}")

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names, by fully_shard or an assigning load."""
        replaced = {name: w for name, w in before.items() if name in after and after[name] is not w}
        move_marks(replaced, after)
        for follower in (self._loads, self._noise, self._trained, *(model.parameters for model in self._models)):
            if follower is not None and replaced:
                follower.move(replaced, after)

    def resume(self, optimizer: Optimizer) -> None:
        """Note that an optimizer has got its state back."""
        self._loads.resume(one for one in _parameters(optimizer) if one in self._trained.waiting)

    def _settle_noise(self, root: nn.Module) -> None:
        """Add noise to what came after the optimizer; take it off again if it was added to a resumed run's weights."""
        parameters = list(root.parameters())
        if not self._loads.is_resumed(parameters):
            self._loads.settle(parameters)
        if self._noise is not None and self._loads.unnoised.has_any(parameters):
            self._noise.forget(parameters)
            self._perturb(root, parameters)
        if not self._loads.is_blind(parameters):
            return
        self.account.note(
            f"{type(root).__name__}: resumed, without the pretrained weights in sight: w_pre is what the weights "
            "were then, and noise is what the run began with."
        )
        if self._noise is not None:
            self._noise.undo(parameters)

    # -- patching -------------------------------------------------------------------------------------------------

    def see(self, module: nn.Module) -> None:
        """Patch the model that `module` is or holds, if it is about to be trained and was waited for."""
        if module in self._barren or not torch.is_grad_enabled():
            return
        inner = unwrap(module)
        if self._is_patching and not inner.training:
            return
        parameters = list(inner.parameters())
        if not self._trained.waiting.has_any(parameters) or any(find_patch(child) for child in inner.modules()):
            self._barren.add([module])
            return
        self._patch(self._trained.root(module, parameters))

    def _patch(self, module: nn.Module) -> None:
        root = unwrap(module)
        parameters = list(root.parameters())
        self._trained.waiting.remove(parameters)
        self._settle_noise(root)
        patch = self._put_patch(module, root) if self._is_patching else None
        self._loads.overwritten.drop(parameters)
        records, is_resumed = [], False
        if self._noise is not None:
            self._noise.original.drop(parameters)
            records, is_resumed = self._noise.records(root), self._noise.is_undone(root)
        model = Model(root, records, patch, is_resumed=is_resumed)
        if model.is_patched or model.acts:
            self._models.append(model)
            self.account.tell(model)

    @property
    def _is_patching(self) -> bool:
        """There is more to do than to add noise."""
        return self.options.asked != ("noisytune",)

    def _put_patch(self, module: nn.Module, root: nn.Module) -> Patch | None:
        """Patch a model, with the weights it has now or had before a load; None if it is refused."""
        options = self.options
        past = self._noise.original if options.w_pre == "original" and self._noise else self._loads.overwritten
        globs = (
            self._choice.of_model(root) if options.mixout is not None or options.anchor is not None else (None, None)
        )
        try:
            take_root(module, may_be_compiled=True)
            with past.restored(root.parameters()):
                put_patch(
                    root,
                    mixout=options.mixout_setting,
                    rdrop=options.rdrop_setting,
                    anchor=options.anchor_setting,
                    include=globs[0],
                    exclude=globs[1],
                )
        except SurgeryError as error:
            self._refuse("patch_model", root, error)
        patch = find_patch(root)
        if patch is not None and self._open_step is not None:
            patch.join_step(self._open_step)
        if any(map(is_compiled, module.modules())):
            torch.compiler.reset()  # graphs made before know nothing of the patch
        return patch

    def _refuse(self, what: str, root: nn.Module, error: SurgeryError) -> None:
        self._refusals.append(f"{what}: {type(root).__name__}: {error}")
        self.account.blame(self._refusals[-1])

    # -- optimizer steps ------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Look at a step, once it has its gradients."""
        self.account.record.has_trained = True
        if is_closure:
            self._open_step = optimizer
        else:
            self._judge(optimizer)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Look at a step whose closure has brought the gradients; write the record now and then, lest we be killed."""
        self._open_step = None
        if is_closure:
            self._judge(optimizer)
        self.account.write(self._models, is_last=False)

    def _judge(self, optimizer: Optimizer) -> None:
        """Count a step, patch what has been trained unseen, and end a run that nothing is regularized in."""
        held = [parameter for parameter in _parameters(optimizer) if parameter.grad is not None]
        for model in self._models:
            model.steps += model.holds(held)
        if self._trained.waiting.has_any(held):
            self._patch_unseen(held)
        is_vain = self._refusals or (self._passed_over and not self._trained)
        if is_vain and not (self.is_waiting or self._is_any_whole or self.options.allow_inactive):
            self._stop()

    def _patch_unseen(self, held: Sequence[nn.Parameter]) -> None:
        for top in self._trained.unseen(held):
            if self._is_patching:
                self.account.blame(f"{type(top).__name__}: {UNSEEN}")
            self._patch(top)
            torch.compiler.reset()

    @property
    def _is_any_whole(self) -> bool:
        """There is a model that everything was done to that was asked for."""
        has_noise = self._noise is not None
        return any(
            model.is_patched >= self._is_patching and ("noisytune" in model.acts) >= has_noise for model in self._models
        )

    def _stop(self) -> NoReturn:
        self._blame_choice()
        self.account.record.is_refused = True
        self.account.write(self._models, is_last=True)
        raise SystemExit(EXIT_INACTIVE)

    # -- the end --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Give account of the process."""
        if self.account.is_idle:
            return
        if self.account.record.has_trained:
            self._blame_choice()
        self.account.end(self._models)

    def _blame_choice(self) -> None:
        """Say which globs, or models, have come to nothing."""
        if not self._trained and not self._passed_over:
            self.account.blame(NO_OPTIMIZER)
            return
        if not self._trained:
            names = some(sorted(self._passed_over))
            self.account.blame(f"model: expected one to regularize, got those that are left out ({names}).")
        self.account.record.unmatched = sorted(self._choice.unmatched)


def _is_pretrained(top: nn.Module) -> bool:
    """Tell whether a model has a part of transformers or diffusers, or one that a load has filled."""
    return next(iter(pretrained_parts(top)), None) is not None or any(map(is_loaded, top.parameters()))


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
