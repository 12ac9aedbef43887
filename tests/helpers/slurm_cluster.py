"""A Slurm of our own on this machine: its controller and two nodes, in a folder, without root's configuration."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "sinfo")
_SBIN = "/usr/sbin:/sbin"
_LONGEST_START = 30.0

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=5
KillWait=5
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class CannotStartError(Exception):
    """Why there is no Slurm."""


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:{_SBIN}")


class SlurmCluster:
    """Slurm's daemons as children of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_SBIN}"}
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._others: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        if missing := [program for program in PROGRAMS if which(program) is None]:
            raise CannotStartError(f"not installed: {', '.join(missing)} (Debian's slurm-wlm)")
        if os.getuid():
            raise CannotStartError("slurmd starts jobs as root alone")
        self._write()
        self._others.append(self._munged())
        self._others.append(self._daemon("slurmctld", "-D"))
        for node in ("n1", "n2"):
            self.start_node(node)
        self._wait(lambda: self.output("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"])

    def start_node(self, node: str) -> None:
        self.nodes[node] = self._daemon("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node and all that runs on it at once, as a power cut does."""
        here = f"{self.folder}/spool.{node}"
        daemon = self.nodes.pop(node)
        steps = [each for each in psutil.process_iter() if is_step_of(each, node, here)]
        below = [child for step in steps for child in step.children(recursive=True)]
        for process in [psutil.Process(daemon.pid), *steps, *below]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()

    def output(self, *command: str) -> str:
        """Return what a command of Slurm prints; nothing where its controller does not answer."""
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=60).stdout
        return ""

    def stop(self) -> None:
        if self.nodes:  # else nobody would answer, which takes Slurm's commands a minute to find out
            self.output("scancel", "--quiet", f"--user={os.getuid()}")
            self._wait(lambda: not self.output("squeue", "-h").strip(), fails=False)
        everything = [*self.nodes.values(), *self._others]
        for daemon in everything:
            daemon.send_signal(signal.SIGTERM)
        for daemon in everything:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for each in psutil.process_iter():  # slurmstepd, which has left its slurmd
            with suppress(psutil.Error):
                if each.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    each.kill()

    def _write(self) -> None:
        ports = free_ports(3)
        conf = _CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], user=_user(), ports=ports)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("")
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir()

    def _munged(self) -> "subprocess.Popen[bytes]":
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "key-file": key.name, "log-file": "munge.log", "pid-file": "munge.pid"}
        files["seed-file"] = "munge.seed"
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        daemon = self._daemon("munged", "--foreground", "--force", *options)
        self._wait((self.folder / "munge.socket").exists)
        return daemon

    def _daemon(self, *command: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            return subprocess.Popen([str(which(command[0])), *command[1:]], env=self.env, stdin=subprocess.DEVNULL,
                                    stdout=log, stderr=log, start_new_session=True)  # fmt: skip

    def _wait(self, is_so, *, fails: bool = True) -> None:
        until = time.monotonic() + _LONGEST_START
        while not is_so():
            if time.monotonic() > until:
                if fails:
                    raise CannotStartError(f"not up in {_LONGEST_START:.0f} s: {self._last_lines()}")
                return
            time.sleep(0.2)

    def _last_lines(self) -> str:
        outs = sorted(self.folder.glob("*.out"))
        return " | ".join(f"{out.stem}: {(out.read_text().splitlines() or ['-'])[-1]}" for out in outs)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def is_step_of(process: psutil.Process, node: str, spool: str) -> bool:
    try:
        if not process.name().startswith("slurmstepd"):
            return False
        return spool in " ".join(process.cmdline()) or process.environ().get("SLURMD_NODENAME") == node or any(
            child.environ().get("SLURMD_NODENAME") == node for child in process.children())  # fmt: skip
    except psutil.Error:
        return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
