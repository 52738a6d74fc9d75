"""The coordinator's configuration file, read once and strictly.

federation = "demo"
[listen]
address = "0.0.0.0:8443"            # mutual TLS: every service
enrolment = "0.0.0.0:8444"          # server TLS: Enrolment only, callers hold a token
public_address = "127.0.0.1:8443"   # what nodes are told
[ledger]
url = "sqlite:///ledger.sqlite"     # relative to this file; or postgresql+psycopg://…
[storage]
blobs = "../blobs"
spool = "spool"
min_free_mb = 256
upload_retention_days = 30          # masked or open uploads kept for audit
[certificates]
node_hours = 168                       # renewed by the agent from two thirds of it on
person_hours = 24                      # of admins, auditors, partners; they ask again
[prices]                            # for the costs in `minga run show`; left out: no money is shown
currency = "USD"                    # printed as it stands
gpu_hour = 2.5
kwh = 0.15
[governance]
require = true                      # nothing runs before the admins have signed a root
folder = "../tuf"
[[privacy.budget]]                  # joins beyond it are refused; nodes have budgets of their own
institution = "*"                   # or one, before "*"
dataset = "default"
unit = "document"
epsilon = 8.0
delta = 1e-6
starts = 2026-01-01                 # left out: since ever
ends = 2027-01-01                   # left out: for ever
[log]                               # no section: the federation keeps no round log
folder = "../log"                   # the static directory
http = "0.0.0.0:8080"               # serves log/ and tuf/ read-only; left out: nobody
[limits]                            # of one caller; coordinator/limits.py has all of them
calls_per_s = 100.0
[[log.witness]]                     # beside those of nodes; each must cosign
vkey = "witness.example/w1+…"
url = "https://witness.example"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from coordinator.limits import Limits
from policies.privacy.budget import Allowance, midnight
from policies.privacy.caps import EVERYBODY, Cap
from policies.privacy.sensitivity import Unit
from protocols.decimals import split_address
from protocols.errors import ConfigurationError
from protocols.identifiers import FederationId, parse_federation_id, parse_node_id


def _address(value: str) -> str:
    if split_address(value) is None:
        raise ValueError("an address is HOST:PORT")
    return value


def _institution(value: str) -> str:
    return value if value == EVERYBODY else parse_node_id(value)


Address = Annotated[str, AfterValidator(_address)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Listen(_Section):
    address: Address
    enrolment: Address
    public_address: Address


class _Ledger(_Section):
    url: str


class _Storage(_Section):
    blobs: Path = Path("../blobs")
    spool: Path = Path("spool")
    min_free_mb: int = Field(default=256, ge=0)
    upload_retention_days: int = Field(default=30, ge=0)


class _Certificates(_Section):
    node_hours: int = Field(default=168, ge=1, le=8760)
    person_hours: int = Field(default=24, ge=1, le=168)


class _Governance(_Section):
    require: bool = False
    folder: Path = Path("../tuf")


class _Budget(_Section):
    institution: Annotated[str, AfterValidator(_institution)] = EVERYBODY
    dataset: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    unit: Unit = Unit.DOCUMENT
    epsilon: float = Field(gt=0, le=1e6)
    delta: float = Field(gt=0, lt=1)
    starts: date | None = None
    ends: date | None = None

    def cap(self) -> Cap:
        return Cap(
            institution=self.institution,
            allowance=Allowance(
                dataset=self.dataset,
                unit=self.unit,
                epsilon=self.epsilon,
                delta=self.delta,
                starts_at=midnight(self.starts),
                ends_at=midnight(self.ends),
            ),
        )


class _Privacy(_Section):
    budget: tuple[_Budget, ...] = ()


class Witness(_Section):
    """A witness that listens over HTTP."""

    vkey: str
    url: Annotated[str, Field(pattern=r"^https?://")]


class _Log(_Section):
    folder: Path = Path("../log")
    http: Address | None = None
    witness: tuple[Witness, ...] = ()


class Prices(_Section):
    """What things cost, for people to read: never part of a decision."""

    currency: str = Field(min_length=1, max_length=12, pattern=r"^[^\s\x00-\x1f]+$")
    gpu_hour: float = Field(default=0.0, ge=0, le=1e6)
    kwh: float = Field(default=0.0, ge=0, le=1e6)


class _File(_Section):
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    listen: _Listen
    ledger: _Ledger
    storage: _Storage = _Storage()
    certificates: _Certificates = _Certificates()
    prices: Prices | None = None
    governance: _Governance = _Governance()
    privacy: _Privacy = _Privacy()
    log: _Log | None = None
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Where the round log is, who serves it, who cosigns beside the nodes."""

    folder: Path
    http: str | None
    witnesses: tuple[Witness, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """Everything ``serve`` needs; paths are absolute."""

    federation: FederationId
    folder: Path  # of the config file
    address: str
    enrolment_address: str
    public_address: str
    ledger_url: str
    blobs: Path
    spool: Path
    keys: Path
    min_free_bytes: int
    upload_retention_days: int
    node_certificate_hours: int
    person_certificate_hours: int
    prices: Prices | None = None
    trust: Path
    governed: bool  # a run, an invitation and a certificate need what the admins signed
    log: LogConfig | None  # None: no round log
    caps: tuple[Cap, ...] = ()  # privacy that the federation allows
    limits: Limits = field(default_factory=Limits)  # what one caller may use


def ledger_url(url: str, folder: Path) -> str:
    """Resolve a relative SQLite path against the config's folder."""
    prefix = "sqlite:///"
    if url.startswith(prefix) and not url.startswith(prefix + "/"):
        return f"{prefix}{(folder / url.removeprefix(prefix)).resolve()}"
    return url


def load_config(path: Path) -> CoordinatorConfig:
    """Read ``config.toml``.

    Raises:
        ConfigurationError: missing, not TOML, an unknown or wrong key; the sentence names it.
    """
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} is missing: make it with `minga coordinator init`"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"{path}: {where}: {first['msg']}") from None
    folder = path.resolve().parent
    return CoordinatorConfig(
        federation=FederationId(file.federation),
        folder=folder,
        address=file.listen.address,
        enrolment_address=file.listen.enrolment,
        public_address=file.listen.public_address,
        ledger_url=ledger_url(file.ledger.url, folder),
        blobs=(folder / file.storage.blobs).resolve(),
        spool=(folder / file.storage.spool).resolve(),
        keys=folder / "keys",
        min_free_bytes=file.storage.min_free_mb * 2**20,
        upload_retention_days=file.storage.upload_retention_days,
        node_certificate_hours=file.certificates.node_hours,
        person_certificate_hours=file.certificates.person_hours,
        prices=file.prices,
        trust=(folder / file.governance.folder).resolve(),
        governed=file.governance.require,
        caps=tuple(budget.cap() for budget in file.privacy.budget),
        limits=file.limits,
        log=(
            LogConfig(
                folder=(folder / file.log.folder).resolve(),
                http=file.log.http,
                witnesses=file.log.witness,
            )
            if file.log
            else None
        ),
    )
