"""A private cluster for tests: munged, slurmctld and one slurmd a node in a temporary folder.

Debian builds Slurm so that several slurmd of one machine are several nodes, each with its own name,
port and folders. Nodes are named as this machine is, because torchrun looks their names up.

Own ports, own munge socket and key, own slurm.conf: nothing of the machine's is used or changed,
and exactly what was started is stopped. Needs Debian's slurm-wlm and munge, and root (slurmd runs
jobs as their users). Jobs, too, are ended before the daemons.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node_agent.launchers.processes import end_family
from node_agent.launchers.slurm_commands import Slurm, slurm_environment
from node_agent.resident import Process

PATIENCE_S = 180.0
_DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str:
    """Why no cluster can be started here; empty: it can."""
    missing = [name for name in (*_DAEMONS, "sbatch") if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a private Slurm cluster needs root"
    return ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


@dataclass
class Cluster:
    """A running cluster."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def slurm(self) -> Slurm:
        """Its commands, as the launcher uses them."""
        return Slurm(slurm_environment(self.environment))

    def run(self, *command: str) -> str:
        """Run a command of Slurm."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the controller remembers."""
        return json.loads(self.run("squeue", "--json", "--states=all"))["jobs"]

    def states(self) -> dict[int, str]:
        """State of each job."""
        return {job["job_id"]: job["job_state"] for job in self.jobs()}

    def under_way(self) -> list[int]:
        """Jobs that wait or run."""
        return [
            job for job, state in self.states().items()
            if state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        ]  # fmt: skip

    def hog(self) -> int:
        """A stranger's job that holds the whole machine."""
        script = self.folder / "hog.sh"
        script.write_text("#!/bin/bash\nsleep 3600\n")
        options = ("--parsable", "--exclusive", "--job-name=stranger", "--output=/dev/null")
        return int(self.run("sbatch", *options, str(script)))

    def until_idle(self) -> None:
        """Cancel everything and wait until the node is free."""
        for job in self.under_way():
            self.run("scancel", str(job))
        wait(lambda: not self.under_way(), "the queue to be empty")


def wait(condition, what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until something is so."""
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.1)


def _names(nodes: int) -> list[str]:
    """Names of nodes that all lead to this machine."""
    known = [socket.gethostname(), "localhost"]
    if nodes > len(known):
        raise ValueError(f"at most {len(known)} nodes")
    return known[:nodes]


def _configuration(folder: Path, controller: int, ports: list[int]) -> str:
    host = socket.gethostname()
    cores = os.cpu_count() or 1
    names = _names(len(ports))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores}"
        " State=UNKNOWN"
        for name, port in zip(names, ports, strict=True)
    )
    return f"""\
ClusterName=minga
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/d-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
KillWait=15
MinJobAge=300
{nodes}
PartitionName=arica Nodes={",".join(names)} Default=YES MaxTime=1:00:00 State=UP
"""


def _ports(nodes: int) -> tuple[int, list[int]]:
    controller, *others = _free_ports(1 + nodes)
    return controller, others


@contextmanager
def cluster(folder: Path, *, nodes: int = 1) -> Iterator[Cluster]:
    """Start a cluster; stop it."""
    # The names of sockets in there may have 108 bytes.
    for name in ("state", *(f"d-{node}" for node in _names(nodes))):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    (folder / "slurm.conf").write_text(_configuration(folder, *_ports(nodes)))
    environment = {
        **os.environ,
        "PATH": _PATH,
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    made = Cluster(folder, environment)
    munge = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}"
        for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
    ]
    commands = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"])
    try:
        for command in (*commands, *(["slurmd", "-D", "-N", node] for node in _names(nodes))):
            with (folder / f"{len(made.daemons)}-{command[0]}.out").open("wb") as out:
                made.daemons.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out)
                )
            if command[0] == "munged":
                wait((folder / "munge.socket").exists, "munged")

        def idle() -> bool:
            with suppress(AssertionError):
                states = made.run("sinfo", "--noheader", "--Node", "--format=%T").split()
                return states == ["idle"] * nodes
            return False

        wait(idle, "the nodes to be idle")
        yield made
        with suppress(AssertionError):
            made.until_idle()
    finally:
        for daemon in reversed(made.daemons):
            end_family(Process.of(daemon.pid), reap=daemon.poll)
            daemon.wait(timeout=20)
