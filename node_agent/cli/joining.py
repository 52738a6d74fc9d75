"""What `minga node join` does, apart from reading its arguments."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import SystemRandom
from typing import Any, get_args

from cryptography import x509

from node_agent.config import (
    BudgetConfig,
    DataConfig,
    NodeConfig,
    NodeFolder,
    PrivacyConfig,
    WorkerConfig,
    load_config,
    parse_address,
    render_config,
)
from node_agent.enrol import Enrolled, request_for
from node_agent.enrol import join as enrol
from node_agent.keys import KeyStore
from node_agent.log import LogPaths
from node_agent.site_policy import STARTING_RULES, starting_policy
from node_agent.spool import atomic_write
from node_agent.status import iso
from protocols.crypto.signatures import public_bytes
from protocols.enrolment import Invitation
from protocols.errors import (
    ConfigurationError,
    ExistsError,
    MalformedMessageError,
    NotReadyError,
)
from protocols.governance.approval import Approval, Statement, statement_for
from protocols.identifiers import FederationId, parse_federation_id


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """The arguments of the command."""

    folder: Path
    token: str = field(repr=False)
    coordinator: str  # HOST:PORT, or several with commas: processes of one federation
    enrolment: str | None
    train: tuple[str, ...]
    valid: tuple[str, ...]
    ranks: int
    device: str
    threads: int | None
    epsilon: float = 8.0
    delta: float = 1e-6
    held_out_public: bool = False
    country: str = "XX"  # ISO 3166-1; XX: not said
    time_zone: str = "UTC"
    approval: Path | None = None  # the institution's statement, as a file
    approve: Callable[[Statement], Approval] | None = field(default=None, repr=False)
    request_out: Path | None = None  # write what the institution has to approve, and stop


def _address(text: str) -> str:
    try:
        return parse_address(text)
    except ValueError as error:
        raise MalformedMessageError(str(error)) from None


def _next_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}"


def _worker(request: JoinRequest) -> WorkerConfig:
    devices = get_args(WorkerConfig.model_fields["device"].annotation)
    if request.device not in devices:
        raise MalformedMessageError(f"--device is one of {', '.join(devices)}")
    return WorkerConfig.model_validate(
        {"ranks": request.ranks, "device": request.device, "threads": request.threads}
    )


def _check_folder(node: NodeFolder, invitation: Invitation) -> NodeConfig | None:
    """The configuration that is here already, if the folder is this institution's.

    Raises:
        ExistsError: the folder is another institution's.
    """
    if not node.config.exists():
        return None
    config = load_config(node)
    if config.institution != invitation.institution:
        raise ExistsError(
            f"{node.root} belongs to {config.institution}; the invitation is for"
            f" {invitation.institution}"
        )
    return config


def _write_policy(node: NodeFolder, request: JoinRequest) -> None:
    """A site policy to start from; one that is there already is never touched."""
    paths = [str(Path(path).absolute()) for path in (*request.train, *request.valid)]
    text = starting_policy(
        paths=list(dict.fromkeys(paths)),
        jurisdiction=request.country,
        time_zone=request.time_zone,
        salt=os.urandom(32),
        residency="in-institution",
    )
    for path, content in ((node.policy, text), (node.rules, STARTING_RULES)):
        if not path.exists():
            atomic_write(path, content.encode())


def _approval(request: JoinRequest, keys: KeyStore, invitation: Invitation) -> bytes:
    """What the institution says about the keys made here; empty: it says nothing.

    Raises:
        NotReadyError: what it has to approve was written; join again with its approval.
        ConfigurationError: the approval cannot be read.
    """
    if request.approval is not None:
        try:
            return request.approval.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{request.approval}: {error.strerror}") from None
    if request.approve is None and request.request_out is None:
        return b""
    signing_key, asked, _ = request_for(keys, invitation)
    statement = statement_for(
        federation=federation_of_root(invitation.root_der),
        institution=invitation.institution,
        csr=asked.csr,
        signing_key=public_bytes(signing_key),
        now=datetime.now(UTC),
    )
    if request.approve is not None:
        return request.approve(statement).to_bytes()
    if request.request_out is not None:
        atomic_write(request.request_out, statement.to_bytes())
    raise NotReadyError(
        f"{request.request_out} waits for the institution's key: `minga admin member approve`, "
        "then join again with --approval"
    )


def federation_of_root(der: bytes) -> FederationId:
    """Whose root certificate an invitation carries. Raises: MalformedMessageError."""
    try:
        names = x509.load_der_x509_certificate(der).subject
        found = names.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return parse_federation_id(found[0].value)
    except (ValueError, IndexError):
        raise MalformedMessageError("the invitation's certificate names no federation") from None


def join_folder(request: JoinRequest) -> dict[str, Any]:
    """Join a federation with a folder; safe to repeat.

    A config.toml that is there already is kept as people wrote it, and only completed keys are
    renewed: joining again after a certificate expired changes nothing else.

    Raises:
        TokenRefusedError, NotEnrolledError, UnreachableError: as ``enrol.join``.
        ExistsError: the folder is another institution's.
    """
    invitation = Invitation.parse(request.token)
    coordinators = [_address(part.strip()) for part in request.coordinator.split(",")]
    coordinator = coordinators[0]
    enrolment = _address(request.enrolment) if request.enrolment else _next_port(coordinator)
    worker = _worker(request)
    if not re.fullmatch("[A-Z]{2}", request.country):
        raise MalformedMessageError("--country is an ISO 3166-1 code of two capital letters")
    node = NodeFolder(request.folder)
    before = _check_folder(node, invitation)
    node.make()
    keys = KeyStore(node.keys)
    approval = _approval(request, keys, invitation)
    enrolled: Enrolled = asyncio.run(
        enrol(
            keys,
            invitation,
            enrolment=enrolment,
            rng=SystemRandom(),
            approval=approval,
            log=LogPaths(node.root),
        )
    )
    if enrolled.trust_root is not None:
        atomic_write(node.trust_root, enrolled.trust_root)
    if before is None:
        text = render_config(
            institution=enrolled.node,
            federation=enrolled.federation,
            coordinator=coordinator if len(coordinators) == 1 else coordinators,
            enrolment=enrolment,
            data=DataConfig(
                train=tuple(str(Path(path).absolute()) for path in request.train),
                valid=tuple(str(Path(path).absolute()) for path in request.valid),
                valid_public=request.held_out_public,
            ),
            worker=worker,
            privacy=PrivacyConfig(
                budget=(BudgetConfig(epsilon=request.epsilon, delta=request.delta),)
            ),
        )
        atomic_write(node.config, text.encode())
        _write_policy(node, request)
    elif before.federation != enrolled.federation:
        raise ConfigurationError(
            f"{node.config} names federation {before.federation}, the certificate is of"
            f" {enrolled.federation}: correct the file"
        )
    return {
        "institution": enrolled.node,
        "federation": enrolled.federation,
        "folder": str(request.folder),
        "keys": str(node.keys),
        "coordinator": coordinator,
        "certificate_until": iso(enrolled.identity.not_after),
    }
