"""The site's configuration file and the paths inside a node's folder.

nodes/<institution>/
  config.toml      written by `minga node join`, edited by people
  policy.toml      what the site allows, policy.cedar its rules: they never leave the site
  approvals/       plans that a person approved
  keys/            tls.pem (key, certificate, chain), signing.pem, root.pem: mode 0600
  journal.sqlite   what this node decided, sent and was answered
  log.sqlite       the round log as this node verified it, and what it signed
  witness/         key and memory of this node's witness: a lost memory retires the key
  trust-policy.txt which log and which witnesses: only where a person pinned them
  privacy.sqlite   what this site's data have spent, by its own account
  spool/           between agent and worker; spool/uploads holds encoded vectors
  models/          the models this node holds, one folder per run
  paused           when this file is there, the node declines new rounds
  status.json      what the agent is doing, for `minga node status`
  agent.lock       held while an agent works here

institution = "usach"
federation = "andes"
coordinator = "minga.example:443"   # or a list, where several processes serve one federation
enrolment = "minga.example:8444"
[data]
train = ["text/train"]             # JSONL or Parquet: files, folders or globs
weights = [1.0]                    # shares of sequences, one for each of train; left out: one text
valid = ["text/valid"]
dataset = "default"                # whose budget training spends
valid_public = false               # the held-out text may be scored without noise
[[privacy.budget]]                 # a data set and unit without one has nothing to spend
dataset = "default"
unit = "document"                  # "document" | "sequence" | "institution"
epsilon = 8.0
delta = 1e-6
starts = 2026-01-01                # left out: since ever
ends = 2027-01-01                  # left out: for ever
[worker]
ranks = 1
device = "auto"                    # "auto" | "cpu" | "cuda"
threads = 4                        # CPU threads of each rank; left out: the library decides
base_model = "models/llama-8b"     # folder of the base model that plans may name
network_interface = "ib0"          # for NCCL and gloo; left out: they decide
checkpoint_every_s = 600           # in mid-round, for a worker that is killed; 0: never
carry_over = true                  # work that came too late is added to the next update
finish_within_s = 300              # for a worker in mid-step, when the round went on without it
start_within_s = 300
hangs_after_s = 120
[allow]
local_steps = ["builtin", "synthetic"]
flower_apps = []                   # "package.module:app", each by name
[flower]
python_path = ["apps"]             # where apps come from; left out: whatever Python can import
node_config = "partition-id=3"     # node_config of an app's Context, in Flower's own notation
[limits]
cpu_threads = 1                    # for encoding and for the outer step
[capability]
gpus = 96                          # node_agent/capability.py; left out: found on this machine
[resources]
report = "named"                   # node_agent/resources.py has its keys
[launcher]
kind = "local"                     # "slurm": node_agent/launchers/slurm_config.py has its keys
[governance]
require = true                     # left out: required where the invitation named a first root
[log]
require = true                     # left out: required where the enrolment brought the log's key
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from node_agent.capability import CapabilityConfig
from node_agent.launchers.slurm_config import LauncherConfig
from node_agent.resources import ResourcesConfig
from policies.privacy.budget import Allowance, midnight
from policies.privacy.sensitivity import Unit
from protocols.decimals import split_address
from protocols.errors import ConfigurationError
from protocols.identifiers import (
    FederationId,
    NodeId,
    RunId,
    parse_federation_id,
    parse_node_id,
)
from protocols.plan import MODES, Mode


def parse_address(value: str) -> str:
    """Check HOST:PORT; an IPv6 host stands in brackets."""
    found = split_address(value)
    if found is None or found[1] == 0:
        raise ValueError(f"an address is HOST:PORT, got {value!r:.80}")
    return value


Address = Annotated[str, AfterValidator(parse_address)]
Addresses = Annotated[tuple[Address, ...], Field(min_length=1, max_length=8)]
LocalStepKind = Literal["builtin", "flower", "synthetic"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """Where the site's text is."""

    train: tuple[str, ...] = ()
    weights: tuple[
        Annotated[float, Field(gt=0, le=1e6)], ...
    ] = ()  # one for each of train, or none
    valid: tuple[str, ...] = ()
    dataset: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    valid_public: bool = False

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError("weights has one number for each of train, or is left out")
        return self


class WorkerConfig(_Section):
    """How the worker is started and when it counts as hung."""

    ranks: int = Field(default=1, ge=1, le=1024)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    base_model: str | None = None  # folder of the base model that plans may name
    network_interface: str | None = Field(default=None, pattern=r"^[\w.:=^,-]{1,60}$")
    checkpoint_every_s: float = Field(default=600.0, ge=0, le=86_400)
    carry_over: bool = True
    finish_within_s: float = Field(default=300.0, gt=0, le=86_400)
    start_within_s: float = Field(default=300.0, gt=0, le=86_400)
    hangs_after_s: float = Field(default=120.0, gt=0, le=86_400)


class AllowConfig(_Section):
    """What this site is willing to run. It can only narrow what the federation allows."""

    local_steps: tuple[LocalStepKind, ...] = ("builtin", "synthetic")
    flower_apps: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = MODES


class BudgetConfig(_Section):
    """How much privacy one data set may lose, for one unit, in a period."""

    dataset: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    unit: Unit = Unit.DOCUMENT
    epsilon: float = Field(gt=0, le=1e6)
    delta: float = Field(gt=0, lt=1)
    starts: date | None = None  # inclusive, at 00:00 UTC; None: since ever
    ends: date | None = None  # exclusive; None: for ever

    def allowance(self) -> Allowance:
        """For decisions."""
        return Allowance(
            dataset=self.dataset,
            unit=self.unit,
            epsilon=self.epsilon,
            delta=self.delta,
            starts_at=midnight(self.starts),
            ends_at=midnight(self.ends),
        )


class PrivacyConfig(_Section):
    """Budgets. A data set and unit without one has nothing to spend."""

    budget: tuple[BudgetConfig, ...] = ()

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        kinds = [(budget.dataset, budget.unit) for budget in self.budget]
        if len(set(kinds)) != len(kinds):
            raise ValueError("privacy.budget: a data set and unit have one budget")
        for budget in self.budget:
            if budget.starts and budget.ends and budget.starts >= budget.ends:
                raise ValueError("privacy.budget: a period ends after it starts")
        return self


class FlowerConfig(_Section):
    """What the site lends to Flower apps."""

    python_path: tuple[str, ...] = ()
    node_config: str = Field(default="", max_length=10_000)


class LimitsConfig(_Section):
    """What the agent itself may use."""

    cpu_threads: int = Field(default=1, ge=1, le=256)


class GovernanceConfig(_Section):
    """Whether only what the admins signed is taken part in; never set to false by a command."""

    require: bool | None = None  # None: where the invitation named a first root


class LogConfig(_Section):
    """Whether this node acts only on what the witnessed round log bears out."""

    require: bool | None = None  # None: where the enrolment brought the log's key


class _File(_Section):
    institution: Annotated[str, AfterValidator(parse_node_id)]
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    coordinator: Address | Addresses
    enrolment: Address
    data: DataConfig = DataConfig()
    worker: WorkerConfig = WorkerConfig()
    allow: AllowConfig = AllowConfig()
    flower: FlowerConfig = FlowerConfig()
    limits: LimitsConfig = LimitsConfig()
    launcher: LauncherConfig = LauncherConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    governance: GovernanceConfig = GovernanceConfig()
    resources: ResourcesConfig = ResourcesConfig()
    log: LogConfig = LogConfig()
    capability: CapabilityConfig = CapabilityConfig()


@dataclass(frozen=True, slots=True)
class NodeFolder:
    """The paths of one node."""

    root: Path

    @property
    def config(self) -> Path:
        """What people write."""
        return self.root / "config.toml"

    @property
    def policy(self) -> Path:
        """What the site allows: never leaves it."""
        return self.root / "policy.toml"

    @property
    def rules(self) -> Path:
        """The site's rules in Cedar."""
        return self.root / "policy.cedar"

    @property
    def approvals(self) -> Path:
        """Plans that a person approved, one file each."""
        return self.root / "approvals"

    @property
    def keys(self) -> Path:
        """Keys and certificates."""
        return self.root / "keys"

    @property
    def journal(self) -> Path:
        """The journal's database."""
        return self.root / "journal.sqlite"

    @property
    def privacy(self) -> Path:
        """The privacy ledger's database."""
        return self.root / "privacy.sqlite"

    @property
    def spool(self) -> Path:
        """Shared with the training worker."""
        return self.root / "spool"

    @property
    def flower_spool(self) -> Path:
        """Shared with the Flower host: another process, so another spool."""
        return self.spool / "flower"

    @property
    def uploads(self) -> Path:
        """Encoded vectors on their way out."""
        return self.spool / "uploads"

    @property
    def models(self) -> Path:
        """Models by run and root."""
        return self.root / "models"

    @property
    def secagg(self) -> Path:
        """States of secure sums: secrets, never to be backed up."""
        return self.root / "secagg"

    @property
    def trust(self) -> Path:
        """What the admins signed, as this node verified it."""
        return self.root / "trust"

    @property
    def trust_root(self) -> Path:
        """The first root of the trust repository, from the invitation."""
        return self.keys / "trust-root.json"

    @property
    def paused(self) -> Path:
        """Its presence pauses the node."""
        return self.root / "paused"

    @property
    def status(self) -> Path:
        """Written by the agent, read by `minga node status`."""
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        """Held by the one agent that works here."""
        return self.root / "agent.lock"

    def run_models(self, run: RunId) -> Path:
        """The models of one run."""
        return self.models / run

    def make(self) -> NodeFolder:
        """Create the folders; private, because states and updates are derived from the data."""
        for folder in (self.root, self.keys, self.spool, self.uploads, self.models):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Everything the agent is told by its site; data paths are absolute."""

    institution: NodeId
    federation: FederationId
    coordinators: tuple[str, ...]  # HOST:PORT, at least one, the preferred first
    enrolment: str  # HOST:PORT
    data: DataConfig
    worker: WorkerConfig
    allow: AllowConfig
    limits: LimitsConfig
    flower: FlowerConfig = field(default_factory=FlowerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    governance: GovernanceConfig = field(default_factory=GovernanceConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    log: LogConfig = field(default_factory=LogConfig)
    capability: CapabilityConfig = field(default_factory=CapabilityConfig)

    @property
    def coordinator(self) -> str:
        """For people: the address, or all of them."""
        return ", ".join(self.coordinators)


def _absolute(paths: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    return tuple(str(folder / path) for path in paths)


def load_config(folder: NodeFolder) -> NodeConfig:
    """Read ``config.toml``.

    Raises:
        ConfigurationError: missing, not TOML, an unknown or wrong key; the sentence names it.
    """
    path = folder.config
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"{path} is missing: make it with `minga node join`") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{path}: {where}: {reason}") from None
    if file.launcher.slurm and "flower" in file.allow.local_steps:
        raise ConfigurationError(
            f"{path}: allow.local_steps: Flower apps run beside the agent, which on a login node"
            ' they must not; leave out "flower" or set [launcher] kind = "local"'
        )
    base = path.resolve().parent
    return NodeConfig(
        institution=NodeId(file.institution),
        federation=FederationId(file.federation),
        coordinators=(
            (file.coordinator,) if isinstance(file.coordinator, str) else file.coordinator
        ),
        enrolment=file.enrolment,
        data=file.data.model_copy(
            update={
                "train": _absolute(file.data.train, base),
                "valid": _absolute(file.data.valid, base),
            }
        ),
        privacy=file.privacy,
        worker=file.worker.model_copy(
            update={
                "base_model": None
                if file.worker.base_model is None
                else str(base / file.worker.base_model)
            }
        ),
        allow=file.allow,
        limits=file.limits,
        governance=file.governance,
        log=file.log,
        flower=FlowerConfig(
            python_path=_absolute(file.flower.python_path, base),
            node_config=file.flower.node_config,
        ),
        launcher=file.launcher,
        resources=file.resources,
        capability=file.capability,
    )


# What a new node allows: a site that wants more, less or a period writes it.
DEFAULT_PRIVACY: Final = PrivacyConfig(budget=(BudgetConfig(epsilon=8.0, delta=1e-6),))


def render_config(
    *,
    institution: NodeId,
    federation: FederationId,
    coordinator: str | Sequence[str],
    enrolment: str,
    data: DataConfig,
    worker: WorkerConfig,
    privacy: PrivacyConfig | None = None,
) -> str:
    """The text of a new ``config.toml``; the optional keys stand there as comments."""

    def text(value: object) -> str:  # a JSON string or list is TOML as well
        return json.dumps(value, ensure_ascii=False)

    budgets = "".join(
        f"""[[privacy.budget]]
dataset = {text(budget.dataset)}
unit = {text(budget.unit.value)}
epsilon = {budget.epsilon!r}
delta = {budget.delta!r}
"""
        for budget in (privacy or DEFAULT_PRIVACY).budget
    )
    threads = f"threads = {worker.threads}" if worker.threads else "# threads = 4"
    return f"""\
institution = {text(institution)}
federation = {text(federation)}
coordinator = {text(coordinator)}
enrolment = {text(enrolment)}

[data]
# JSONL or Parquet: files, folders or globs; relative to this file.
train = {text(list(data.train))}
# weights = [1.0]  # shares of training sequences, one for each of train; else all is one text
valid = {text(list(data.valid))}
dataset = {text(data.dataset)}  # whose budget training spends
valid_public = {text(data.valid_public)}  # true: the held-out text may be scored without noise

[worker]
ranks = {worker.ranks}
device = {text(worker.device)}  # "auto", "cpu" or "cuda"
{threads}  # CPU threads of each rank
# network_interface = "ib0"

[allow]
# What this site is willing to run. Flower apps are allowed by name.
local_steps = ["builtin", "synthetic"]
flower_apps = []

# How much privacy a data set may lose over all runs. Without a budget nothing may be spent, and
# plans in private modes are declined.
{budgets}
# [flower]
# python_path = ["apps"]  # folders that Flower apps come from

[limits]
cpu_threads = 1  # for encoding and for the outer step
"""
