"""Admins' keys: files with a passphrase, or tokens.

KEY            PKCS#8 PEM, Ed25519, encrypted with a passphrase; mode 0600, never overwritten
KEY.card.json  its public half and its holder: what other people may have

A key in a token (PKCS#11) has a card only, which says where it is; the token makes the signatures.
Passphrases and PINs come from a prompt, a file or a variable, never from the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import Field
from securesystemslib.signer import CryptoSigner, Signer, SSlibKey

from protocols.canonical import parse_json
from protocols.crypto.signatures import public_bytes
from protocols.errors import ConfigurationError, ExistsError, MalformedMessageError
from protocols.governance.documents import Document
from protocols.governance.keys import (
    Holder,
    ed25519_key,
    holder_of,
    key_to_value,
    parse_key,
    with_holder,
)

PASSPHRASE_VARIABLE: Final = "MINGA_ADMIN_PASSPHRASE"  # noqa: S105 - its name
MODULE_VARIABLE: Final = "PYKCS11LIB"  # where securesystemslib looks for the PKCS#11 module
_MIN_PASSPHRASE: Final = 8  # characters
Secret = Callable[[], str]  # asks for a passphrase or PIN when it is needed


class Card(Document):
    """A public key and who holds it."""

    schema_: Literal["minga.key-card/1"] = Field(default="minga.key-card/1", alias="schema")
    key: dict[str, Any]
    signer: Annotated[str, Field(max_length=300)] = "file:"  # "hsm:…" for a token

    @property
    def public(self) -> SSlibKey:
        """The key, its id computed anew. Raises: MalformedMessageError, TrustRefusedError."""
        return parse_key(self.key)

    @property
    def holder(self) -> Holder:
        """Who holds it."""
        return holder_of(self.public)


def card_path(key: Path) -> Path:
    """Where the card of a key file lies."""
    return key.with_name(f"{key.name}.card.json")


def read_card(path: Path) -> Card:
    """Read a card. Raises: ConfigurationError, MalformedMessageError, TrustRefusedError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    card = Card.from_value(parse_json(data, limit=65_536))
    holder_of(card.public)
    return card


def _write_new(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ExistsError(f"{path} exists; keys are never overwritten") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_key(path: Path, holder: Holder, passphrase: str) -> Card:
    """Make an Ed25519 key and its card.

    Raises:
        ExistsError: there is one already.
        MalformedMessageError: the passphrase is too short.
    """
    if len(passphrase) < _MIN_PASSPHRASE:
        raise MalformedMessageError(f"a passphrase has {_MIN_PASSPHRASE} characters or more")
    if card_path(path).exists():
        raise ExistsError(f"{card_path(path)} exists; keys are never overwritten")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase.encode())
    )
    card = Card(key=key_to_value(ed25519_key(public_bytes(private), holder)))
    _write_new(path, pem, 0o600)
    _write_new(card_path(path), card.to_bytes(), 0o644)
    return card


def import_token(
    path: Path, holder: Holder, *, label: str | None, keyid: int, module: Path, pin: Secret
) -> Card:
    """Write the card of a key that a PKCS#11 token holds.

    Args:
        path: of the key file there would be; only its card is written.
        holder: whose it is.
        label: of the token; None: the only one there is.
        keyid: of the key in the token (YubiKey PIV slot 9c: 2).
        module: the PKCS#11 library.
        pin: asked for if the public key is private to the token.

    Raises:
        ConfigurationError: no such token or key, or python-pkcs11 is not installed.
    """
    hsm = _hsm(module)
    try:
        uri, public = hsm.import_(keyid, label, lambda _: pin())
    except Exception as error:  # noqa: BLE001 - the library and its module fail in many ways
        raise ConfigurationError(f"the token cannot be used: {error!s:.200}") from None
    card = Card(key=key_to_value(with_holder(public, holder)), signer=uri)
    _write_new(card_path(path), card.to_bytes(), 0o644)
    return card


def _hsm(module: Path) -> Any:
    from securesystemslib.signer import HSMSigner

    if not module.exists():
        raise ConfigurationError(f"{module} is no PKCS#11 module")
    os.environ[MODULE_VARIABLE] = str(module)
    return HSMSigner


def load_private(path: Path, passphrase: Secret) -> Ed25519PrivateKey:
    """Open a key file.

    Raises:
        ConfigurationError: missing, damaged, or the passphrase is wrong; never says which bytes.
    """
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    if path.stat().st_mode & 0o077:
        raise ConfigurationError(f"{path} can be read by others: chmod 600 {path}")
    try:
        key = load_pem_private_key(pem, passphrase().encode())
    except (ValueError, TypeError):
        raise ConfigurationError(
            f"{path} cannot be opened: wrong passphrase, or no encrypted key"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"{path} is not an Ed25519 key")
    return key


def load_signer(path: Path, secret: Secret, *, module: Path | None = None) -> Signer:
    """What signs for a key: its file, or its token.

    Raises:
        ConfigurationError: it cannot be opened, or card and key do not belong together.
    """
    card = read_card(card_path(path))
    public = card.public
    if card.signer.startswith("hsm:"):
        chosen = module or Path(os.environ.get(MODULE_VARIABLE, ""))
        made: Signer = _hsm(chosen).from_priv_key_uri(card.signer, public, lambda _: secret())
        return made
    private = load_private(path, secret)
    if public_bytes(private).hex() != public.keyval["public"]:
        raise ConfigurationError(f"{card_path(path)} is not the card of {path}")
    return CryptoSigner(private, public)
