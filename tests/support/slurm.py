"""A SLURM cluster of two nodes on this machine, made of Debian's daemons.

It needs root. Each node has its own network, name and processes, so that a whole node can die; both
share the file system, as the nodes of a cluster do. All files of the cluster are in one folder.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support import hosts

ROOT = Path(__file__).resolve().parents[2]
# The kernel kills a daemon with all that it started as soon as pytest dies.
_APART = ["setpriv", "--pdeathsig", "KILL"]
_APART += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """Why this machine cannot run SLURM, or None."""
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)
    ]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"needs {', '.join(missing)} (apt-get install --no-install-recommends {packages})"
    return hosts.why_not()


class Slurm:
    """A cluster with the partitions `all` and `urgent`; jobs of `urgent` preempt those of `all`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._hosts = hosts.TwoHosts(["node-0"], ["node-1"])
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Slurm":
        with self._stack:
            self._stack.callback(self._hosts.down)
            self._hosts.up()
            (self._folder / "slurm.conf").write_text(self._conf())
            # SLURM would otherwise look for cgroups, which the hosts' /sys does not have.
            (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            (self._folder / "state").mkdir()
            key = self._folder / "munge.key"
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
            files = ("key-file", "pid-file", "log-file", "seed-file", "socket")
            words = [f"--{file}={self._folder}/munge.{file.split('-')[0]}" for file in files]
            self._daemon(0, "munged", "--foreground", "--force", *words)
            self._until((self._folder / "munge.socket").exists)
            self._daemon(0, "slurmctld", "-D")
            for index in (0, 1):
                self.start_node(index)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _conf(self) -> str:
        first, second = self._hosts.addresses
        # A requeued job waits for cred_expire, which is at least 5.
        return f"""
            ClusterName=test
            SlurmctldHost=node-0({first})
            SlurmUser=root
            AuthInfo=socket={self._folder}/munge.socket,cred_expire=5
            StateSaveLocation={self._folder}/state
            SlurmctldPidFile={self._folder}/slurmctld.pid
            SlurmctldLogFile={self._folder}/slurmctld.log
            SlurmdPidFile={self._folder}/slurmd-%n.pid
            SlurmdLogFile={self._folder}/slurmd-%n.log
            SlurmdSpoolDir={self._folder}/spool-%n
            MailProg={shutil.which("true")}
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SelectType=select/linear
            SlurmdParameters=config_overrides
            ReturnToService=2
            SlurmdTimeout=10
            KillWait=5
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            NodeName=node-0 NodeAddr={first}
            NodeName=node-1 NodeAddr={second}
            PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
            PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
        """

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self._folder / "slurm.conf")}

    def _daemon(self, index: int, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{words[0]}-{index}.out").open("a") as out:
            process = subprocess.Popen(
                [*self._hosts.inside(index), *_APART, *words],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def start_node(self, index: int) -> None:
        self._nodes[index] = self._daemon(index, "slurmd", "-D")
        self._until(lambda: self.command("sinfo", "-hN", "-n", f"node-{index}", "-t", "idle"))

    def kill_node(self, index: int) -> None:
        """Kill all processes of a node at once."""
        self._nodes[index].kill()
        self._nodes[index].wait()

    def processes(self, index: int, of: str) -> list[psutil.Process]:
        """The processes of a node whose command line has a certain word."""
        found = []
        for process in psutil.Process(self._nodes[index].pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended, and is perhaps a zombie
                if of in process.cmdline():
                    found.append(process)
        return found

    def command(self, *words: str, **environment: str) -> str:
        """What a command prints on the first node; nothing if it fails."""
        done = subprocess.run(
            [*self._hosts.inside(0), *words],
            env={**self._environment(), **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def submit(self, *words: str, **environment: str) -> "Job":
        """Submit a job with these words of sbatch."""
        log = self._folder / "%j.log"
        number = self.command("sbatch", "--parsable", f"--output={log}", *words, **environment)
        assert number, "sbatch refused it"
        return Job(self, number, self._folder / f"{number}.log")

    def until_idle(self) -> None:
        """Wait until both nodes are free; each is listed in two partitions."""
        self._until(lambda: set(self.command("sinfo", "-hN", "-o", "%T").split()) == {"idle"})

    def _until(self, what: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline, [
                path.read_text() for path in self._folder.glob("*.out")
            ]
            time.sleep(0.1)


class Job:
    def __init__(self, slurm: Slurm, number: str, log: Path) -> None:
        self._slurm, self.number, self._log = slurm, number, log

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def seen(self) -> dict[str, str]:
        """What SLURM says of the job, such as JobState, Restarts and ExitCode."""
        said = self._slurm.command("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def until(self, what: Callable[[], Any], seconds: float = 600) -> Any:
        """Wait for something while the job runs, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            over = time.monotonic() > deadline or self.seen().get("JobState") in _ENDS
            assert not over or what(), f"{self.seen()}\n{self.log()}"
            time.sleep(0.2)
        return found

    def ended(self) -> tuple[str, str, int]:
        """Wait for the end; the state, CODE:SIGNAL and how often the job was requeued."""
        self.until(lambda: self.seen().get("JobState") in _ENDS)
        seen = self.seen()
        return seen["JobState"], seen["ExitCode"], int(seen["Restarts"])

    def cancel(self, *words: str) -> None:
        """Call scancel, which is no error if the job is over."""
        self._slurm.command("scancel", *words, self.number)


_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
