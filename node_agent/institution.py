"""The institution's own key, where it is at hand when the node joins.

It belongs on another machine (`minga node join --request-out`, `minga admin member approve`); a
small institution may have it here for the length of one command.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from getpass import getpass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from protocols.errors import ConfigurationError
from protocols.governance.approval import Approval, Statement, approve


def approver(path: Path, passphrase_file: Path | None) -> Callable[[Statement], Approval]:
    """What approves with a key file; the passphrase is asked for when it is needed.

    Raises:
        ConfigurationError: when it approves: the key cannot be opened.
    """

    def work(statement: Statement) -> Approval:
        try:
            pem = path.read_bytes()
            if passphrase_file is not None:
                secret = passphrase_file.read_text("utf-8").strip("\r\n")
            else:
                secret = os.environ.get("MINGA_ADMIN_PASSPHRASE") or getpass("passphrase: ")
        except OSError as error:
            raise ConfigurationError(f"{error.filename}: {error.strerror}") from None
        try:
            key = load_pem_private_key(pem, secret.encode())
        except (ValueError, TypeError):
            raise ConfigurationError(f"{path} cannot be opened: wrong passphrase?") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{path} is not an Ed25519 key")
        return approve(statement, key)

    return work
