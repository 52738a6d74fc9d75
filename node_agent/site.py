"""Everything an agent works with, in one value: tests and the command line build it alike."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from random import Random
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.capability import (
    Capability,
    capability,
    gpus_of_machine,
    memory_of_machine,
)
from node_agent.client import Connection
from node_agent.config import NodeConfig, NodeFolder
from node_agent.journal import Journal
from node_agent.keys import KeyStore
from node_agent.launchers.jobs import Launcher
from node_agent.launchers.local import (
    LocalLauncher,
    flower_command,
    worker_arguments,
    worker_command,
    worker_environment,
)
from node_agent.launchers.slurm import SlurmLauncher
from node_agent.log import NodeLog, open_node_log
from node_agent.models import Models
from node_agent.privacy import PrivacyGuard
from node_agent.privacy_ledger import PrivacyLedger
from node_agent.spool import Spool
from node_agent.trust import Trust
from protocols.errors import ConfigurationError
from protocols.identifiers import Digest, NodeId

_PATIENT: Final = ("--lock-wait-s", "120")  # the worker of the allocation before may be leaving


def utc_now() -> datetime:
    """The machine's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One node's folder, opened."""

    folder: NodeFolder
    config: NodeConfig
    keys: KeyStore
    signing_key: Ed25519PrivateKey = field(repr=False)
    journal: Journal
    privacy: PrivacyGuard
    models: Models
    connection: Connection
    launchers: Mapping[str, Launcher]  # by kind of local step
    capability: Capability
    rng: Random  # jitter only
    now: Callable[[], datetime]  # UTC
    monotonic: Callable[[], float]  # seconds
    random_bytes: Callable[[int], bytes]  # secret: seeds of the dither
    log: NodeLog | None = None  # None: this node takes part without a round log
    trust: Trust | None = None  # None: this node takes part without governance

    @property
    def node(self) -> NodeId:
        """This node."""
        return self.config.institution


def site_capability(config: NodeConfig) -> Capability:
    """What this site can train. Blocking: asks nvidia-smi, where the worker may use GPUs."""
    launcher = config.launcher
    return capability(
        config.capability,
        uses_gpus=config.worker.device != "cpu",
        elsewhere=(launcher.nodes, launcher.gpus_per_node) if launcher.slurm else None,
        gpus_here=gpus_of_machine,
        memory_here=memory_of_machine,
    )


def make_launchers(folder: NodeFolder, config: NodeConfig, *, rng: Random) -> dict[str, Launcher]:
    """The workers of a site: one for training, one for Flower client apps."""
    if config.launcher.slurm:
        return {"builtin": slurm_launcher(folder, config, rng=rng)}
    environment = worker_environment(config.worker, os.environ)
    common = {
        "environment": environment,
        "start_within_s": config.worker.start_within_s,
        "hangs_after_s": config.worker.hangs_after_s,
        "finish_within_s": config.worker.finish_within_s,
        "rng": rng,
    }
    builtin, flower = Spool(folder.spool.resolve()), Spool(folder.flower_spool.resolve())
    pid = os.getpid()
    return {
        "builtin": LocalLauncher(
            spool=builtin,
            command=lambda: worker_command(config.worker, builtin, parent=pid),
            **common,  # type: ignore[arg-type]
        ),
        "flower": LocalLauncher(
            spool=flower,
            command=lambda: flower_command(config.flower, flower, parent=pid),
            **common,  # type: ignore[arg-type]
        ),
    }


def slurm_launcher(folder: NodeFolder, config: NodeConfig, *, rng: Random) -> SlurmLauncher:
    """The worker of a site with Slurm."""
    launcher = config.launcher
    if not launcher.python:
        launcher = launcher.model_copy(update={"python": sys.executable})
    spool = Spool(folder.spool.resolve())  # where compute nodes see it, whatever links lead there
    return SlurmLauncher(
        spool=spool,
        config=launcher,
        institution=config.institution,
        worker=("node_agent.worker", *worker_arguments(config.worker, spool), *_PATIENT),
        ranks=launcher.gpus_per_node or config.worker.ranks,
        environment=worker_environment(config.worker, {}),
        start_within_s=config.worker.start_within_s,
        hangs_after_s=config.worker.hangs_after_s,
        finish_within_s=config.worker.finish_within_s,
        rng=rng,
    )


def open_trust(
    folder: NodeFolder,
    config: NodeConfig,
    connection: Connection,
    journal: Journal,
    log: NodeLog | None,
) -> Trust | None:
    """What the admins signed, as this node verifies it; None: the site does not ask for it.

    Raises:
        ConfigurationError: it is required, and the first root is missing.
    """
    required, root = config.governance.require, folder.trust_root
    if required is False or (required is None and not root.exists()):
        return None
    try:
        bootstrap = root.read_bytes()
    except OSError:
        raise ConfigurationError(
            f"{root} is missing: governance is required, join again with a new invitation"
        ) from None
    return Trust(
        folder=folder.trust,
        bootstrap=bootstrap,
        federation=config.federation,
        node=config.institution,
        connection=connection,
        now=utc_now,
        monotonic=time.monotonic,
        logged=None if log is None else partial(_published, log),
        heard=None if log is None else partial(_heard, log),
        logged_at=None if log is None else partial(_published_at, log),
        on_change=lambda changes: journal.note(
            "in force", {"reason": "; ".join(change.words for change in changes)[:2000]}
        ),
    )


def _published(log: NodeLog, role: str, version: int) -> frozenset[Digest]:
    """What the witnessed log has for a version of a role of the trust repository."""
    return log.verifier.log.published.get((role, version), frozenset())


def _heard(log: NodeLog, name: str, at: datetime) -> bool:
    """Whether the witnessed log shows that a member was heard by then."""
    return log.verifier.log.heard(name, at)


def _published_at(log: NodeLog, role: str, version: int) -> datetime | None:
    """When it came into the witnessed log, by its leaf."""
    return log.verifier.log.published_at.get((role, version))


def open_site(folder: NodeFolder, config: NodeConfig, *, rng: Random) -> Site:
    """Open a node's folder; a running event loop is needed for the connection.

    Raises:
        NotEnrolledError, ConfigurationError: keys are missing or unreadable.
        CorruptStateError, LedgerBusyError: the journal cannot be used.
    """
    folder.make()
    keys = KeyStore(folder.keys)
    identity, signing_key = keys.tls(), keys.signing_key()
    journal = Journal(folder.journal, now=utc_now)
    ledger = PrivacyLedger(folder.privacy, now=utc_now)
    connection = Connection(config.coordinators, identity, rng=rng)
    log = open_node_log(
        folder.root,
        node=config.institution,
        federation=config.federation,
        key=signing_key,
        connection=connection,
        rng=rng,
        require=config.log.require,
    )
    trust = open_trust(folder, config, connection, journal, log)
    if log is not None and trust is not None:
        trust.remember()
        log.verifier.members = trust.active_members
    return Site(
        folder=folder,
        config=config,
        keys=keys,
        signing_key=signing_key,
        journal=journal,
        privacy=PrivacyGuard(ledger=ledger, journal=journal, config=config),
        models=Models(folder.models.resolve()),
        connection=connection,
        launchers=make_launchers(folder, config, rng=rng),
        capability=site_capability(config),
        rng=rng,
        now=utc_now,
        monotonic=time.monotonic,
        random_bytes=os.urandom,
        trust=trust,
        log=log,
    )
