"""fork, execve and wait: the command gets the terminal and the signals that it would have had in our place."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from .command import CommandError

_JOB_CONTROL = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT}
"""Left alone: the terminal stops and continues us together with the child."""

_SI_KERNEL = 0x80  # linux/include/uapi/asm-generic/siginfo.h
_PR_SET_PDEATHSIG = 1  # linux/include/uapi/linux/prctl.h


@dataclass(frozen=True)
class HeldSignals:
    """Signals that wait until we ask for them.

    Args:
        watched: their numbers.
        mask: what was blocked before.
        is_child_ignored: SIGCHLD was ignored before.
    """

    watched: frozenset[int]
    mask: frozenset[int]
    is_child_ignored: bool


def hold_signals() -> HeldSignals:
    """Keep all signals but those of job control and those that are ignored waiting, from now to our end."""
    caught = signal.valid_signals() - _JOB_CONTROL - {signal.SIGKILL, signal.SIGSTOP}
    watched = {number for number in caught if signal.getsignal(number) is not signal.SIG_IGN} | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    # a handler, for BSDs drop what is ignored by default, also if it is blocked
    was = signal.signal(signal.SIGCHLD, lambda *_: None)
    return HeldSignals(frozenset(watched), frozenset(mask), was is signal.SIG_IGN)


def supervise(program: str, command: Sequence[str], environment: dict[str, str], *, held: HeldSignals) -> int:
    """Run a command to its end in our process group, with our files; pass on what signals we alone are sent.

    Args:
        program: path of the file to execute.
        command: its arguments, the first its name.
    Returns:
        its exit code, or minus the number of the signal that ended it.
    Raises:
        CommandError: it could not be executed.
    """
    prctl = _find_prctl()
    reader, writer = os.pipe()  # closed by exec; else it brings the error
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _exec_in_child(program, command, environment, held=held, writer=writer, prctl=prctl, parent=parent)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123
        failure = pipe.read()
    if failure:
        os.waitpid(child, 0)
        raise _exec_error(int(failure), command[0])
    return _wait(child, held.watched)


def die(number: int) -> int:
    """End as the child did, by a signal. Return the exit code that stands for it where that is impossible."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # keep the child's core
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number  # process 1 of a container


def _exec_error(number: int, name: str) -> CommandError:
    return CommandError(
        f"{name}: expected a program, got {os.strerror(number)}. See its first line.",
        127 if number == errno.ENOENT else 126,
    )


def _wait(child: int, watched: frozenset[int]) -> int:
    while True:
        number, is_known = _next_signal(watched)
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:  # else it has only stopped or continued
                return os.waitstatus_to_exitcode(status)
        elif not is_known:
            with suppress(PermissionError):  # sudo
                os.kill(child, number)


def _next_signal(watched: frozenset[int]) -> tuple[int, bool]:
    """Wait for a signal. Return it, and whether the child has it too: the terminal signals all in its foreground."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        number = signal.sigwait(watched)
        return number, number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP) and _is_foreground()
    info = signal.sigwaitinfo(watched)
    assert info is not None
    # a terminal that goes away tells the leader of its session alone
    is_leader = info.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
    return info.si_signo, info.si_code == _SI_KERNEL and not is_leader


def _is_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _find_prctl() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    return prctl


def _exec_in_child(
    program: str,
    command: Sequence[str],
    environment: dict[str, str],
    *,
    held: HeldSignals,
    writer: int,
    prctl: Callable[..., int] | None,
    parent: int,
) -> NoReturn:
    """Execute the command in this new process, with the signals as they were before Python started."""
    try:
        for number in held.watched:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if held.is_child_ignored:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)
        os.execve(program, list(command), environment)
    except OSError as error:
        os.write(writer, str(error.errno).encode())
    finally:
        os._exit(127)
