"""The round log of one coordinator: its keys, and what a process needs to keep it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.ca import write_private
from coordinator.clock import Clock
from coordinator.config import CoordinatorConfig, LogConfig
from coordinator.ledger import Ledger, Sequencer, Tx
from coordinator.log_files import LogFiles, Ratchet
from coordinator.log_hub import LogHub
from coordinator.log_writer import LogWriter, load_signer
from protocols.canonical import sha256_hex
from protocols.crypto.signatures import public_bytes
from protocols.errors import ConfigurationError, MalformedMessageError
from protocols.identifiers import FederationId
from protocols.tlog.kinds import Genesis
from protocols.tlog.note import KeyType, SignerKey, VerifierKey

LOG_KEY = "log.key"
STATEMENT_KEY = "statement.pem"
OPERATOR_KEY = "operator-signing.pem"
RATCHET = "log-ratchet"


def default_origin(federation: FederationId, now: datetime) -> str:
    """The origin carries a year: shards end with it."""
    return f"log.minga.example/{federation}/{now:%Y}"


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_ed25519(path: Path) -> Ed25519PrivateKey:
    """Raises: ConfigurationError: missing, unreadable, or another kind of key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{path} cannot be read as a private key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"{path} does not hold an Ed25519 key")
    return key


def parse_witness(text: str) -> tuple[str, str]:
    """``VKEY=URL``: key and address of a witness that listens over HTTP.

    Raises:
        ConfigurationError: it is not that.
    """
    vkey, found, rest = text.partition("=http")
    url = f"http{rest}"
    if not found or not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"{text!r:.200} is not VKEY=URL of a witness")
    try:
        key = VerifierKey.parse(vkey)
    except MalformedMessageError as error:
        raise ConfigurationError(f"not the key of a witness: {error}") from None
    if key.type is not KeyType.ED25519_COSIGNATURE:
        raise ConfigurationError(f"{key.name} is not the key of a witness")
    return vkey, url


def make_keys(keys: Path, origin: str) -> None:
    """Make the keys of log, coordinator and operator.

    Raises:
        ExistsError: there is one already.
    """
    seed = Ed25519PrivateKey.generate().private_bytes_raw()
    signer = SignerKey(name=origin, type=KeyType.ED25519, seed=seed)
    write_private(keys / LOG_KEY, signer.to_private().encode() + b"\n")
    write_private(keys / STATEMENT_KEY, _pem(Ed25519PrivateKey.generate()))
    write_private(keys / OPERATOR_KEY, _pem(Ed25519PrivateKey.generate()))


def genesis(
    keys: Path,
    federation: FederationId,
    operator: str,
    certificate: x509.Certificate,
    witnesses: tuple[str, ...] = (),
) -> Genesis:
    """The first leaf.

    Args:
        keys: the coordinator's key folder.
        federation: whose log it is.
        operator: name of the first operator.
        certificate: the authority's.
        witnesses: vkeys beside those of nodes; each must cosign.
    """
    log = load_signer(keys / LOG_KEY).verifier
    return Genesis(
        federation=federation,
        origin=log.name,
        log_vkey=log.to_text(),
        coordinator_key=public_bytes(read_ed25519(keys / STATEMENT_KEY)).hex(),
        operator_keys={operator: public_bytes(read_ed25519(keys / OPERATOR_KEY)).hex()},
        witnesses=witnesses,
        ca_sha256=sha256_hex(certificate.public_bytes(serialization.Encoding.DER)),
    )


def say_genesis(tx: Tx, said: Genesis) -> None:
    """Begin the log; again is no error."""
    if tx.log_size() == 0:
        digest = sha256_hex(said.log_vkey.encode())
        tx.append_own(said, subject=f"log/{said.origin}", digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogParts:
    """The log of one process."""

    config: LogConfig
    signer: SignerKey = field(repr=False)
    hub: LogHub
    files: LogFiles
    ratchet: Ratchet

    @property
    def vkey(self) -> str:
        """What nodes are told at enrolment."""
        return self.signer.verifier.to_text()

    def writer(
        self,
        ledger: Ledger,
        clock: Clock,
        members: Callable[[], Collection[str] | None] = lambda: None,
    ) -> LogWriter:
        """The driver of this process.

        Args:
            members: active members by the signed list; None: there is none.
        """
        return LogWriter(
            ledger=ledger,
            clock=clock,
            hub=self.hub,
            files=self.files,
            ratchet=self.ratchet,
            signer=self.signer,
            auditors=[VerifierKey.parse(each.vkey) for each in self.config.witnesses],
            members=members,
        )


def open_log(config: CoordinatorConfig) -> tuple[LogParts, Sequencer] | None:
    """The log's parts and the sequencer of the ledger; None: this federation keeps no log.

    Raises:
        ConfigurationError: a key is missing.
    """
    if config.log is None:
        return None
    signer = load_signer(config.keys / LOG_KEY)
    hub = LogHub(signer.verifier)
    parts = LogParts(
        config=config.log,
        signer=signer,
        hub=hub,
        files=LogFiles(config.log.folder),
        ratchet=Ratchet(config.folder / RATCHET),
    )
    key = read_ed25519(config.keys / STATEMENT_KEY)
    return parts, Sequencer(key=key, origin=signer.name, seen=hub.seen)
