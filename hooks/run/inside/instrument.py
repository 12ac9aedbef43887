"""Wrappers around functions of torch that tell a Session what a script calls: the only file that changes torch."""

import pickle
import sys
import weakref
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ...imports import PRETRAINED_CLASSES, call_after_import
from .owners import find_modules
from .saving import plain_pickle
from .session import Session

_CALL = nn.Module._call_impl


def instrument(session: Session) -> None:
    """Have torch tell a session of optimizers, loads, backward passes and calls of models."""
    _wrap_optimizers(session)
    _wrap_load_state_dict(session)
    _wrap_backward(session)
    _wrap_module_compile(session)
    _wrap_compile(session)
    _wrap_save()
    call_after_import("torch.distributed.fsdp", lambda: _wrap_fully_shard(session))
    for module, name in PRETRAINED_CLASSES.items():
        call_after_import(module, partial(_wrap_from_pretrained, session, module, name))


def _wrap_calls(session: Session) -> None:
    """Tell the session of every call of a module, while it waits for one; leave calls as they are else."""
    nn.Module._call_impl = _CALL  # type: ignore[method-assign]
    if not session.is_waiting:
        return

    @wraps(_CALL)
    def _call_impl(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            session.on_forward(self)
            if not session.is_waiting:
                _wrap_calls(session)
        return _CALL(self, *args, **kwargs)  # type: ignore[no-untyped-call]

    nn.Module._call_impl = _call_impl  # type: ignore[method-assign, assignment]


def _wrap_optimizers(session: Session) -> None:
    begin, add, load = Optimizer.__init__, Optimizer.add_param_group, Optimizer.load_state_dict
    known: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    @wraps(begin)
    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        begin(self, *args, **kwargs)
        known.add(self)
        session.on_optimizer_made(self)
        _wrap_calls(session)

    @wraps(add)
    def add_param_group(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        add(self, *args, **kwargs)
        if self in known:  # else it is being made
            session.on_param_group_added(self)
            _wrap_calls(session)

    @wraps(load)
    def load_state_dict(self: Optimizer, state_dict: Any) -> None:
        load(self, state_dict)
        if state_dict["state"] or _has_mark(state_dict):
            session.on_optimizer_state_loaded(self, state_dict["param_groups"])

    Optimizer.__init__ = __init__  # type: ignore[method-assign]
    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _has_mark(state_dict: Any) -> bool:
    """Tell whether a method has written to the param_groups before they were saved: plain SGD has no other state."""
    return any(str(key).startswith("surgery_") for group in state_dict["param_groups"] for key in group)


def _wrap_load_state_dict(session: Session) -> None:
    load = nn.Module.load_state_dict

    @wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        names = list(state_dict)
        before = session.before_load(self, names)
        result = load(self, state_dict, *args, **kwargs)
        session.after_load(self, names, before)
        return result

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _wrap_save() -> None:
    save = torch.save

    @wraps(save)
    def save_plain(obj: Any, f: Any, pickle_module: Any = pickle, *args: Any, **kwargs: Any) -> None:
        save(obj, f, plain_pickle if pickle_module is pickle else pickle_module, *args, **kwargs)

    torch.save = torch.serialization.save = save_plain


def _wrap_backward(session: Session) -> None:
    backward, grad = torch.autograd.backward, torch.autograd.grad

    @wraps(backward)
    def watched_backward(*args: Any, **kwargs: Any) -> None:
        session.before_backward()
        backward(*args, **kwargs)
        if not _goes_on(session) and torch.autograd.backward is watched_backward:  # nobody has wrapped it since
            torch.autograd.backward = backward

    @wraps(grad)
    def watched_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        of = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        parameters = [one for one in of if isinstance(one, nn.Parameter)]
        if not parameters:
            return grad(outputs, of, *args, **kwargs)
        session.before_backward()
        found = grad(outputs, of, *args, **kwargs)
        if not _goes_on(session, parameters) and torch.autograd.grad is watched_grad:
            torch.autograd.grad = grad
        return found

    torch.autograd.backward = watched_backward
    torch.autograd.grad = watched_grad


def _goes_on(session: Session, inputs: list[nn.Parameter] | None = None) -> bool:
    """Tell the session of a backward pass, and of calls if it waits for them; return whether to go on doing so."""
    goes_on = session.after_backward(inputs)
    if session.is_waiting and nn.Module._call_impl is _CALL:
        _wrap_calls(session)
    return goes_on


def _wrap_module_compile(session: Session) -> None:
    compile_ = nn.Module.compile

    @wraps(compile_)
    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nn.Module._call_impl = _CALL  # type: ignore[method-assign]
        compile_(self, *args, **kwargs)
        run: Any = self._compiled_call_impl
        _wrap_calls(session)

        def call(*args: Any, **kwargs: Any) -> Any:
            if session.is_waiting and not torch.compiler.is_compiling():
                session.on_forward(self)
                _wrap_calls(session)
            return run(*args, **kwargs)

        self._compiled_call_impl = call  # a module that has one is called without _call_impl

    nn.Module.compile = compile  # type: ignore[method-assign]


def _wrap_compile(session: Session) -> None:
    compile_ = torch.compile

    @wraps(compile_)
    def compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        compiled: Any = compile_(model, *args, **kwargs)
        if model is None or isinstance(model, nn.Module):  # a decorator calls this again
            return compiled

        @wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and session.is_waiting:
                for module in find_modules(model, [*args, *kwargs.values()]):
                    session.on_forward(module)
                _wrap_calls(session)
            return compiled(*args, **kwargs)

        return call

    torch.compile = compile


def _wrap_fully_shard(session: Session) -> None:
    from torch.distributed import fsdp

    shard = fsdp.fully_shard

    @wraps(shard)
    def fully_shard(module: Any, *args: Any, **kwargs: Any) -> Any:
        modules = [module] if isinstance(module, nn.Module) else list(module)
        before = []
        for one in modules:
            session.before_fully_shard(one)
            before.append(dict(one.named_parameters(remove_duplicate=False)))
        result = shard(module, *args, **kwargs)
        for one, were in zip(modules, before, strict=True):
            session.after_fully_shard(were, dict(one.named_parameters(remove_duplicate=False)))
        return result

    fsdp.fully_shard = fully_shard


def _wrap_from_pretrained(session: Session, module: str, name: str) -> None:
    kind = getattr(sys.modules[module], name)
    load = kind.from_pretrained.__func__

    @wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with session.from_pretrained():
            loaded = load(cls, *args, **kwargs)
        session.after_from_pretrained(loaded)
        return loaded

    kind.from_pretrained = classmethod(from_pretrained)
