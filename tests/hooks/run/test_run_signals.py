"""Signals and terminals under `surgery run`: what the command would get without it, once."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import clean_env
from commands import command as surgery
from runs import python

RUN = ("run", "--mixout", "0.7", "--allow-inactive", "--")
LISTEN = """
import os, signal, time
got = []
left = {signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD}
for number in signal.valid_signals() - left:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, _: got.append(number))
print("pid", os.getpid(), flush=True)
end = time.monotonic() + 30
while not got and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.2)
print("got", got, flush=True)
"""
WITHOUT_SIGWAITINFO = (
    "import signal, sys; vars(signal).pop('sigwaitinfo'); sys.argv[0] = 'surgery'; from surgery.cli import main; main()"
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def heard():
    """A pytest that runs in the background, or under nohup, ignores some signals, and what it starts does too."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGQUIT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=["sigwaitinfo", "sigwait"])
def launcher(request):
    """Both ways to wait for signals: of Linux, and of macOS."""
    return surgery() if request.param == "sigwaitinfo" else python(WITHOUT_SIGWAITINFO)


def after(code, command):
    """A command that runs in a process which `code` has made ready."""
    return python(f"import os, signal\n{code}\nos.execvp({command[0]!r}, {list(command)!r})")


def start(command, tmp_path):
    """Start a command; return its process when it has said its number, which comes too."""
    env = clean_env(TMPDIR=str(tmp_path))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    return process, int(process.stdout.readline().split()[1])


def wait_until(is_true) -> None:
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 1],
    ids=lambda number: signal.Signals(number).name if number < 32 else "SIGRTMIN+1",
)
def test_a_signal_for_the_launcher_reaches_the_command_once(number, tmp_path):
    process, _ = start([*surgery(), *RUN, *python(LISTEN)], tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, f"got [{int(number)}]\n")
    assert err.startswith("surgery: INACTIVE")
    assert not list(tmp_path.iterdir())


def test_a_signal_reaches_the_command_without_sigwaitinfo(launcher, tmp_path):
    process, _ = start([*launcher, *RUN, *python(LISTEN)], tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "got [15]\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL", "SIGSEGV", "SIGUSR1"])
def test_the_launcher_ends_by_the_signal_that_ended_the_command(name, run_cli, tmp_path):
    ran = run_cli(*RUN, "sh", "-c", f"kill -{name.removeprefix('SIG')} $$", env={"TMPDIR": str(tmp_path)})
    assert (ran.code, ran.err) == (-signal.Signals[name], "surgery: INACTIVE: the command failed before it trained.\n")
    assert not list(tmp_path.glob("surgery-run-*"))


def test_an_ignored_signal_is_not_passed_on(tmp_path):
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    hear_all = LISTEN.replace("signal.getsignal(number) is not signal.SIG_IGN", "True")
    process, _ = start(after(nohup, [*surgery(), *RUN, *python(hear_all)]), tmp_path)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == f"got [{int(signal.SIGUSR1)}]\n"


@on_linux
@pytest.mark.parametrize("ignored", ["", "SIGCHLD SIGHUP"], ids=["none", "ignored"])
def test_the_command_starts_with_the_signals_of_a_plain_one(ignored, tmp_path):
    ready = [
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL); signal.signal(signal.SIGXFSZ, signal.SIG_DFL)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})",
        *(f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ignored.split()),
    ]

    def signals(*command: str) -> list[str]:
        done = subprocess.run(
            after("\n".join(ready), command), env=clean_env(), cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.splitlines() if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]

    plain = signals("cat", "/proc/self/status")
    assert plain
    assert signals(*surgery(), *RUN, "cat", "/proc/self/status") == plain


def test_the_code_comes_where_dead_children_are_ignored():
    command = after("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", [*surgery(), *RUN, *python("raise SystemExit(9)")])
    assert subprocess.run(command, env=clean_env()).returncode == 9


@on_linux
def test_a_command_that_is_stopped_is_waited_for(tmp_path):
    process, pid = start([*surgery(), *RUN, *python(LISTEN)], tmp_path)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")
    time.sleep(0.1)
    assert process.poll() is None
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == f"got [{int(signal.SIGUSR1)}]\n"


@on_linux
def test_the_command_ends_with_a_launcher_that_is_killed(tmp_path):
    process, pid = start([*surgery(), *RUN, *python(LISTEN)], tmp_path)
    process.kill()
    wait_until(lambda: state_of(pid) in ("gone", "Z"))
    process.communicate()


# -- with a terminal ------------------------------------------------------------------------------------------------


TAKE = "os.close(os.open(os.ttyname(0), os.O_RDWR))"
"""The leader of a new session takes the first terminal that it opens."""

SHELL = """
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv({program!r}, {command!r})
while os.WIFSTOPPED(status := os.waitpid(job, os.WUNTRACED)[1]):
    os.tcsetpgrp(0, os.getpgrp())
    print("stopped", flush=True)
    input()
    os.tcsetpgrp(0, job)
    os.killpg(job, signal.SIGCONT)
    print("continued", flush=True)
print("ended", os.waitstatus_to_exitcode(status), flush=True)
os._exit(0)
"""


class Terminal:
    """A command at a terminal, as the leader of its session or, as under a shell with job control, as a job."""

    def __init__(self, command, *, is_job: bool) -> None:
        ready = TAKE + (SHELL.format(program=command[0], command=command) if is_job else "")
        self.file, other = pty.openpty()
        files = {"stdin": other, "stdout": other, "stderr": other}
        self.process = subprocess.Popen(after(ready, command), **files, env=clean_env(), start_new_session=True)
        os.close(other)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def read(self) -> str:
        assert select.select([self.file], [], [], 20)[0], f"nothing more came: {self.text}"
        with suppress(OSError):  # closed at the other side
            return os.read(self.file, 4096).decode()
        return ""

    def read_until(self, text: str) -> None:
        while text not in self.text:
            new = self.read()
            assert new, f"{text!r} never came: {self.text}"
            self.text += new
        self.text = self.text.partition(text)[2]

    def end(self) -> int:
        """Wait for the end. Return the exit code."""
        while self.read():
            pass
        return self.hang_up()

    def hang_up(self) -> int:
        os.close(self.file)
        return self.process.wait(timeout=20)


@pytest.mark.parametrize("is_job", [False, True], ids=["leader", "job"])
@pytest.mark.parametrize(("key", "number"), [("\x03", signal.SIGINT), ("\x1c", signal.SIGQUIT)], ids=["^C", "^\\"])
def test_a_key_reaches_the_command_once(key, number, is_job, launcher):
    terminal = Terminal([*launcher, *RUN, *python(LISTEN)], is_job=is_job)
    terminal.read_until("pid")
    terminal.type(key)
    terminal.read_until(f"got [{int(number)}]")
    terminal.read_until("surgery: INACTIVE")
    if is_job:
        terminal.read_until("ended 0")
    assert terminal.end() == 0


def test_ctrl_c_ends_the_launcher_as_it_ends_the_command():
    code = "import time; print('pid', flush=True); time.sleep(20)"
    terminal = Terminal([*surgery(), *RUN, *python(code)], is_job=True)
    terminal.read_until("pid")
    terminal.type("\x03")
    terminal.read_until("KeyboardInterrupt")
    terminal.read_until("surgery: INACTIVE: the command failed before it trained.")
    terminal.read_until(f"ended {-signal.SIGINT}")
    terminal.end()


def test_ctrl_z_stops_and_fg_continues(launcher):
    terminal = Terminal([*launcher, *RUN, *python(LISTEN)], is_job=True)
    terminal.read_until("pid")
    for _ in range(2):
        terminal.type("\x1a")
        terminal.read_until("stopped")
        terminal.type("\n")
        terminal.read_until("continued")
    terminal.type("\x03")
    terminal.read_until("got [2]")
    terminal.read_until("ended 0")
    terminal.end()


def test_a_terminal_that_goes_away_ends_the_command(tmp_path):
    """The kernel tells the leader of the session alone."""
    code = LISTEN.replace('print("got"', f'print("got", got, file=open({str(tmp_path / "got")!r}, "w"))\nprint("got"')
    terminal = Terminal([*surgery(), *RUN, *python(code)], is_job=False)
    terminal.read_until("pid")
    terminal.read_until("\n")  # else the command may still be at writing it
    terminal.hang_up()
    assert (tmp_path / "got").read_text() == f"got [{int(signal.SIGHUP)}]\n"
