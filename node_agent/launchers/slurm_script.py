"""The batch script of an allocation: our own short writer, a pure function of the site's config.

One allocation serves many rounds: the script starts the worker on all nodes and waits. It ends

    status 0   the worker left because it was told to: the time limit is near (USR1), the agent
               gives the allocation back, or no agent was seen for a long time
    otherwise  the worker died ``RESTARTS`` times

A script whose nonce is not the one in ``spool/slurm/nonce`` does nothing: whatever happens between
sbatch and the agent's own notes, two allocations never serve one spool, and none is left behind
for long.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node_agent.launchers.last_words import start_line
from node_agent.launchers.slurm_config import LauncherConfig
from protocols.errors import ConfigurationError

RESTARTS: Final = 3  # starts of the worker in one allocation
_PATH: Final = re.compile(
    r"/[A-Za-z0-9_./+@=-]{0,400}", re.ASCII
)  # sbatch expands % and splits words
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,99}", re.ASCII)
_VARIABLE: Final = re.compile(r"[A-Z_a-z][A-Z_a-z0-9]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Marks:
    """Files between the agent and the batch script, in ``spool/slurm``."""

    root: Path

    @property
    def record(self) -> Path:
        """What the agent knows of its allocation."""
        return self.root / "allocation.json"

    @property
    def nonce(self) -> Path:
        """Which allocation may serve the spool."""
        return self.root / "nonce"

    @property
    def agent(self) -> Path:
        """Touched by the agent while it runs."""
        return self.root / "agent"

    @property
    def ends(self) -> Path:
        """One line for each end of the worker: job, restarts, start, status, why."""
        return self.root / "ends"

    @property
    def held(self) -> Path:
        """Keeps the node from asking for an allocation; `minga node resume` removes it."""
        return self.root / "held"

    @property
    def script(self) -> Path:
        """The batch script, as it was handed in."""
        return self.root / "job.sh"

    def log_of(self, job: int) -> Path:
        """What one job printed."""
        return self.root / f"job-{job}.log"


def job_name(institution: str, nonce: str) -> str:
    """The name by which an allocation is found again: ``minga-<institution>-<nonce>``."""
    name = f"minga-{institution}-{nonce}"
    if _NAME.fullmatch(name) is None:
        raise ConfigurationError(f"{name!r:.120} cannot be the name of a job")
    return name


def check_path(path: Path, what: str) -> str:
    """A path that neither sbatch nor a shell reads as something else.

    Raises:
        ConfigurationError: it holds other characters than letters, digits and ``_./+@=-``.
    """
    text = str(path)
    if _PATH.fullmatch(text) is None:
        raise ConfigurationError(
            f"{what} {text!r:.200} cannot be handed to Slurm:"
            " use letters, digits and _ . / + @ = - only"
        )
    return text


def write_script(
    config: LauncherConfig,
    *,
    name: str,
    nonce: str,
    spool: Path,
    worker: tuple[str, ...],
    ranks: int,
    environment: Mapping[str, str],
    beat_s: float = 15.0,
) -> str:
    """The text of the batch script.

    Args:
        config: of the launcher.
        name: of the job.
        nonce: of the allocation; letters and digits.
        spool: shared between this machine and the nodes.
        worker: module and arguments, after ``python -m``.
        ranks: processes on each node.
        environment: for the worker.
        beat_s: between two looks at whether an agent is there.

    Raises:
        ConfigurationError: a path or a name cannot be handed to Slurm.
    """
    if _NAME.fullmatch(nonce) is None or _NAME.fullmatch(name) is None:
        raise ConfigurationError("a job's name and nonce are small letters, digits and -")
    marks = Marks(spool / "slurm")
    text = check_path(spool, "the spool's path")
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(config, name, marks))]
    lines += ["# Written by minga; a new one is written for every submission.", "set -uo pipefail"]
    for variable, value in sorted({**environment, **config.environment}.items()):
        if _VARIABLE.fullmatch(variable) is None or set(value) & set("\n\r\0"):
            raise ConfigurationError(f"{variable!r:.80} cannot be set in a batch script")
        lines.append(f"export {variable}={shlex.quote(value)}")
    lines += [f"spool={shlex.quote(text)}", f"nonce={nonce}", 'mark="$spool/slurm"']
    lines += [_MINE]
    lines += list(config.setup)
    lines += [_before(config.agent_lost_after_s, beat_s)]
    lines += [_loop(_srun(config, worker, ranks))]
    return "\n".join(lines) + "\n"


def _options(config: LauncherConfig, name: str, marks: Marks) -> list[str]:
    log = check_path(marks.root, "the spool's path") + "/job-%j.log"
    made = [
        f"--job-name={name}",
        f"--comment={name}",
        f"--nodes={config.nodes}",
        "--ntasks-per-node=1",
        f"--time={config.time_minutes}",
        f"--signal=B:USR1@{config.warn_s}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={marks.root.parent}",
        f"--output={log}",
    ]
    given = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "gpus-per-node": config.gpus_per_node or None,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.memory,
    }
    made += [f"--{option}={value}" for option, value in given.items() if value is not None]
    return [*made, *config.sbatch]


_MINE: Final = """\
mine() { [ "$(cat "$mark/nonce" 2>/dev/null)" = "$nonce" ]; }
mine || { echo "minga: another allocation serves this spool"; exit 0; }"""


def _before(lost_after_s: int, beat_s: float) -> str:
    """Start clean; let the warning and a missing agent end the worker through the drain file."""
    return f"""\
rm -f "$spool/drain" "$spool/worker.json" "$spool/alive"
drain() {{ [ -e "$spool/drain" ] || echo "$1" >"$spool/drain"; }}
trap 'drain walltime' USR1
seen() {{ stat -c %Y "$mark/agent" 2>/dev/null || echo 0; }}
(
  while sleep {beat_s:g}; do
    mine || drain superseded
    [ $(($(date +%s) - $(seen))) -lt {lost_after_s} ] || drain agent
  done
) &
watch=$!
trap 'kill "$watch" 2>/dev/null' EXIT"""


def _srun(config: LauncherConfig, worker: tuple[str, ...], ranks: int) -> str:
    python = shlex.quote(config.python)
    words = " ".join(shlex.quote(word) for word in worker)
    step = "srun --kill-on-bad-exit=1 --ntasks-per-node=1"
    if config.cpus_per_task is not None:  # not inherited from the job since Slurm 22.05
        step += f" --cpus-per-task={config.cpus_per_task}"
    if config.nodes == 1 and ranks == 1:
        return f"{step} {python} -m {words}"
    return (
        f'{step} {python} -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES"'
        f" --nproc-per-node {ranks} --max-restarts 0 --rdzv-backend c10d"
        ' --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$attempt"'
        ' --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))"'
        f" -m {words}"
    )


def _loop(srun: str) -> str:
    """Run the worker, again when it dies. bash runs a trap in ``wait`` only, hence the ``&``."""
    return f"""\
hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST")); head=${{hosts[0]}}
attempt=0
while :; do
  attempt=$((attempt + 1))
  echo "{start_line("${SLURM_RESTART_COUNT:-0}", "$attempt")}"
  {srun} &
  pid=$!; rc=0; wait "$pid" || rc=$?
  while [ "$rc" -gt 128 ] && kill -0 "$pid" 2>/dev/null; do rc=0; wait "$pid" || rc=$?; done
  if [ "$rc" -gt 128 ]; then  # interrupted by the trap just as it ended: bash remembers its status
    again=0; wait "$pid" || again=$?
    if [ "$again" -ne 127 ]; then rc=$again; fi
  fi
  why=$(cat "$spool/drain" 2>/dev/null) || why=none
  echo "$SLURM_JOB_ID ${{SLURM_RESTART_COUNT:-0}} $attempt $rc ${{why:-drain}}" >>"$mark/ends"
  if [ "$rc" -eq 0 ] || [ -e "$spool/drain" ] || [ "$attempt" -ge {RESTARTS} ]; then break; fi
done
exit "$rc"
"""
