"""Making a coordinator's folder: keys, certificates, configuration, an empty ledger."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
from coordinator.leaves import say_certificate
from coordinator.ledger import Ledger, Tx
from coordinator.log_parts import default_origin, genesis, make_keys, open_log, say_genesis
from coordinator.trust_repository import ONLINE_KEY
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.crypto.identity import Identity, spki_digest
from protocols.crypto.signatures import public_bytes
from protocols.errors import ExistsError
from protocols.governance.keys import ed25519_key, key_to_value
from protocols.identifiers import FederationId, parse_federation_id, parse_node_id
from protocols.tlog.kinds import Genesis

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
    governed: bool = False,
    now: datetime | None = None,
    log: bool = True,
    http: str | None = None,
    witnesses: tuple[tuple[str, str], ...] = (),
) -> Path:
    """Make ``folder/coordinator``.

    With ``governed`` nothing runs before the federation is founded: its admins sign a root that
    gives snapshot and timestamp to the online key made here, which ``founding.json`` names.

    Args:
        log: whether the federation keeps a round log.
        http: HOST:PORT that serves it.
        witnesses: vkey and URL of each witness beside the nodes; each must cosign.

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

    online = Ed25519PrivateKey.generate()
    write_private(
        keys / ONLINE_KEY,
        online.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    (home / "founding.json").write_bytes(founding_statement(name, online, authority.certificate))

    listen = {"address": address, "enrolment": enrolment, "public_address": public}
    document: dict[str, Any] = {"federation": name, "listen": listen, "ledger": {"url": ledger}}
    if governed:
        document["governance"] = {"require": True}
    if log:
        make_keys(keys, default_origin(name, at))
        document["log"] = {"folder": "../log", **({"http": http} if http else {})}
        if witnesses:
            listed = [{"vkey": vkey, "url": url} for vkey, url in witnesses]
            document["log"]["witness"] = listed
    (home / "config.toml").write_bytes(tomli_w.dumps(document).encode())
    config = load_config(home / "config.toml")

    first = None
    if log:
        vkeys = tuple(vkey for vkey, _ in witnesses)
        first = genesis(keys, name, operator_name, authority.certificate, vkeys)
    asyncio.run(_register(config, person, operator_name, first))
    return home


def founding_statement(
    federation: FederationId, online: Ed25519PrivateKey, root: x509.Certificate
) -> bytes:
    """What admins need to know of a coordinator before they sign the first root: all public."""
    return canonical_bytes(
        {
            "schema": "minga.founding/1",
            "federation": federation,
            "online": key_to_value(ed25519_key(public_bytes(online))),
            "ca_sha256": sha256_hex(root.public_bytes(serialization.Encoding.DER)),
        }
    )


async def _register(
    config: CoordinatorConfig, person: x509.Certificate, name: str, first: Genesis | None
) -> None:
    """Begin the log; enter the operator's certificate: only those in the ledger are answered."""
    opened = open_log(config)
    sequencer = opened[1] if opened else None

    def register(tx: Tx) -> None:
        if first is not None:
            say_genesis(tx, first)
        tx.add_certificate(
            serial=person.serial_number,
            spki_sha256=spki_digest(person),
            subject_role="operator",
            subject_name=name,
            not_after=person.not_valid_after_utc,
            der=person.public_bytes(serialization.Encoding.DER),
        )
        if tx.logs:
            say_certificate(tx, person, config.federation, None)

    async with Ledger(config.ledger_url, clock=SystemClock(), sequencer=sequencer) as ledger:
        await ledger.run("register_operator", register)
