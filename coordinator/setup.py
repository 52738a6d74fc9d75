"""Making a coordinator's folder: keys, certificates, configuration, an empty ledger."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from coordinator.ca import (
    COORDINATOR_DAYS,
    CertificateAuthority,
    certificate_pem,
    key_pem,
    new_tls_key,
    write_private,
)
from coordinator.clock import SystemClock
from coordinator.config import CoordinatorConfig, load_config
from coordinator.ledger import Ledger
from protocols.crypto.identity import Identity, spki_digest
from protocols.errors import ExistsError
from protocols.identifiers import parse_federation_id, parse_node_id

OPERATOR_DAYS = 365


def initialise(
    *,
    folder: Path,
    federation: str,
    address: str,
    enrolment: str,
    public: str,
    hosts: tuple[str, ...],
    ledger: str,
    operator: str,
    now: datetime | None = None,
) -> Path:
    """Make ``folder/coordinator``.

    Raises:
        ExistsError: there is one already; nothing is overwritten.
        MalformedMessageError, ConfigurationError: a name or address is wrong.
    """
    name = parse_federation_id(federation)
    operator_name = parse_node_id(operator)
    at = now or datetime.now(UTC)
    home = folder / "coordinator"
    if home.exists():
        raise ExistsError(f"{home} exists; a federation is never overwritten")
    keys = home / "keys"
    keys.mkdir(parents=True, mode=0o700)
    authority = CertificateAuthority.create(name, now=at)
    write_private(keys / "ca.key", key_pem(authority.key))
    (keys / "ca.crt").write_bytes(certificate_pem(authority.certificate))

    own_hosts = {"localhost", "127.0.0.1", *hosts}
    own_hosts |= {item.rpartition(":")[0].strip("[]") for item in (address, enrolment, public)}
    own_hosts -= {"0.0.0.0", "::", ""}  # noqa: S104 - wildcards are not names
    server_key = new_tls_key()
    server = authority.issue(
        server_key.public_key(),
        Identity("coordinator", "coordinator"),
        now=at,
        lifetime=timedelta(days=COORDINATOR_DAYS),
        hosts=tuple(sorted(own_hosts)),
    )
    write_private(keys / "coordinator.key", key_pem(server_key))
    (keys / "coordinator.crt").write_bytes(certificate_pem(server))

    person_key = new_tls_key()
    person = authority.issue(
        person_key.public_key(),
        Identity("operator", operator_name),
        now=at,
        lifetime=timedelta(days=OPERATOR_DAYS),
    )
    write_private(keys / "operator.key", key_pem(person_key))
    (keys / "operator.crt").write_bytes(certificate_pem(person))

    listen = {"address": address, "enrolment": enrolment, "public_address": public}
    document = {"federation": name, "listen": listen, "ledger": {"url": ledger}}
    (home / "config.toml").write_bytes(tomli_w.dumps(document).encode())
    config = load_config(home / "config.toml")

    asyncio.run(_register(config, person, operator_name))
    return home


async def _register(config: CoordinatorConfig, person: x509.Certificate, name: str) -> None:
    """Enter the operator's certificate: only certificates in the ledger are answered."""
    async with Ledger(config.ledger_url, clock=SystemClock()) as ledger:
        await ledger.run(
            "register_operator",
            lambda tx: tx.add_certificate(
                serial=person.serial_number,
                spki_sha256=spki_digest(person),
                subject_role="operator",
                subject_name=name,
                not_after=person.not_valid_after_utc,
                der=person.public_bytes(serialization.Encoding.DER),
            ),
        )
