"""``[launcher]`` in the site's config.toml: what to ask Slurm for.

[launcher]
kind = "slurm"                 # "local": the worker is a child of the agent
partition = "gpu"
account = "latam"
qos = "normal"
nodes = 12
gpus_per_node = 8              # 0: none; then [worker] ranks processes on each node
cpus_per_task = 64             # of each node's share
memory = "0"                   # as --mem; "0": all of a node
time_minutes = 1440
warn_s = 300                   # before the time limit: the worker puts its state away
sbatch = ["--exclusive", "--constraint=h200"]
setup = ["module load cuda/12.6"]      # shell lines, run on the first node before the worker
environment = { NCCL_DEBUG = "WARN" }
python = "/shared/minga/.venv/bin/python"
idle_release_s = 900           # give an allocation back when it had nothing to do for so long
agent_lost_after_s = 3600      # the job ends by itself when no agent was seen for so long
when_late = "keep"             # or "cancel": the queued job of a round that is over
on_stop = "cancel"             # or "keep": the allocation when `minga node run` is told to stop
poll_s = 15                    # between two questions to Slurm

Every value goes into a batch script, so each is held to characters that mean nothing to a shell or
to sbatch; only ``setup`` is shell, written by the people who run the site.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_WORD: Final = r"^[A-Za-z0-9][A-Za-z0-9_.,+-]{0,99}$"
_OPTION: Final = re.compile(
    r"--[a-z][a-z0-9-]{1,40}(=[A-Za-z0-9_.,:/@%+\[\]&|*()-]{1,200})?", re.ASCII
)
_VARIABLE: Final = re.compile(r"[A-Z_a-z][A-Z_a-z0-9]{0,99}", re.ASCII)
# What the launcher itself decides: another value would break adoption, the warning or the restart.
_OURS: Final = frozenset(
    (
        "account", "array", "batch", "chdir", "comment", "cpus-per-task", "error", "export",
        "export-file", "gpus-per-node", "input", "job-name", "mem", "no-requeue", "nodes",
        "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos",
        "quiet", "requeue", "signal", "test-only", "time", "uid", "wait", "wrap",
    )
)  # fmt: skip
Word = Annotated[str, Field(pattern=_WORD)]


def _option(value: str) -> str:
    if _OPTION.fullmatch(value) is None:
        raise ValueError(f"an option of sbatch is --NAME or --NAME=VALUE, got {value!r:.80}")
    name = value[2:].partition("=")[0]
    if name in _OURS:
        raise ValueError(f"--{name} is for the launcher to set")
    return value


def _line(value: str) -> str:
    if any(ord(character) < 32 and character != "\t" for character in value):
        raise ValueError("a set-up command is one line")
    return value


def _python(value: str) -> str:
    if value and (not value.startswith("/") or set(value) & set("\n\r\0")):
        raise ValueError("python must be an absolute path")
    return value


class LauncherConfig(BaseModel):
    """Where the worker runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local", "slurm"] = "local"
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    nodes: int = Field(default=1, ge=1, le=4096)
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    cpus_per_task: int | None = Field(default=None, ge=1, le=1024)
    memory: Annotated[str, Field(pattern=r"^[0-9]{1,9}[KMGT]?$")] | None = None
    time_minutes: int = Field(default=1440, ge=1, le=100_000)
    warn_s: int = Field(default=300, ge=5, le=65_535)  # Slurm's own limit
    sbatch: tuple[Annotated[str, AfterValidator(_option)], ...] = ()
    setup: tuple[Annotated[str, AfterValidator(_line)], ...] = ()
    environment: dict[str, Annotated[str, AfterValidator(_line)]] = Field(default_factory=dict)
    python: Annotated[str, AfterValidator(_python)] = ""  # empty: the agent's own
    idle_release_s: float = Field(default=900.0, ge=0, le=30 * 86_400)
    agent_lost_after_s: int = Field(default=3600, ge=10, le=30 * 86_400)
    when_late: Literal["keep", "cancel"] = "keep"
    on_stop: Literal["keep", "cancel"] = "cancel"
    poll_s: float = Field(default=15.0, ge=0.2, le=3600)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.environment:
            if _VARIABLE.fullmatch(name) is None:
                raise ValueError(f"environment: {name!r:.80} is no name of a variable")
        if self.kind == "local" and self.model_fields_set - {"kind"}:
            odd = min(self.model_fields_set - {"kind"})
            raise ValueError(f'{odd} has a meaning only with kind = "slurm"')
        # Slurm may be a minute early: an allocation that is warned as it starts trains nothing.
        if self.warn_s + 60 >= 60 * self.time_minutes:
            raise ValueError("time_minutes must be more than a minute longer than warn_s")
        return self

    @property
    def slurm(self) -> bool:
        """Whether the worker runs in an allocation."""
        return self.kind == "slurm"
