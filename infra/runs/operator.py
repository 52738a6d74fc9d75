"""Where the coordinator is and who asks: what an operator's commands need to connect.

On the coordinator's own machine everything is in its folder (``--dir``, as `minga coordinator
init` and `minga demo` make it). On another machine a small file says it (``--config``):

    coordinator = "coordinator.example.org:8443"
    ca = "ca.crt"                  # relative to this file
    certificate = "operator.crt"
    key = "operator.key"
    signing_key = "operator-signing.pem"   # where the federation keeps a round log
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from protocols.canonical import sha256_hex
from protocols.crypto.signatures import Context, sign
from protocols.decimals import split_address
from protocols.errors import ConfigurationError
from protocols.plan import Plan
from protocols.tlog.kinds import RunRequest

DIR_VARIABLE: Final = "MINGA_DIR"
_KEYS: Final = {"coordinator", "ca", "certificate", "key"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An address and an identity. The key is never printed."""

    address: str  # HOST:PORT
    ca: bytes  # PEM
    certificate: bytes  # PEM
    key: bytes = field(repr=False)  # PEM
    signing_key: bytes | None = field(default=None, repr=False)  # PEM; None: signs for no run

    def sign_request(self, plan: Plan, now: datetime) -> tuple[bytes, bytes] | None:
        """What the operator signs when it submits a plan, and the signature; None: it cannot.

        Raises:
            ConfigurationError: the signing key cannot be read.
        """
        if self.signing_key is None:
            return None
        try:
            key = load_pem_private_key(self.signing_key, None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError("the operator's signing key is not an Ed25519 key")
        body = RunRequest(
            federation=plan.federation,
            run=plan.run,
            plan_sha256=sha256_hex(plan.to_bytes()),
            model_root=plan.model.initial,
            time=f"{now:%Y-%m-%dT%H:%M:%SZ}",
        ).to_bytes()
        return body, sign(key, Context.RUN_REQUEST, body)


def find_operator(
    *, folder: Path | None, config: Path | None, environment: Mapping[str, str]
) -> Operator:
    """The operator's connection from ``--config``, ``--dir`` or MINGA_DIR, in this order.

    Raises:
        ConfigurationError: nothing says where the coordinator is, or a file is missing or wrong.
    """
    if config is not None:
        return _from_file(config)
    if folder is None and environment.get(DIR_VARIABLE):
        folder = Path(environment[DIR_VARIABLE])
    if folder is None:
        raise ConfigurationError(
            f"say where the coordinator is: --dir DIR, --config FILE or {DIR_VARIABLE}=DIR"
        )
    return _from_folder(folder)


def _from_folder(folder: Path) -> Operator:
    from coordinator.config import load_config

    loaded = load_config(folder / "coordinator" / "config.toml")
    return Operator(
        address=loaded.public_address,
        ca=_read(loaded.keys / "ca.crt"),
        certificate=_read(loaded.keys / "operator.crt"),
        key=_read(loaded.keys / "operator.key"),
        signing_key=_read_if(loaded.keys / "operator-signing.pem"),
    )


def _from_file(path: Path) -> Operator:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path} is missing") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    if set(raw) - {"signing_key"} != _KEYS or not all(
        isinstance(value, str) for value in raw.values()
    ):
        raise ConfigurationError(f"{path} must hold exactly the texts {', '.join(sorted(_KEYS))}")
    if split_address(raw["coordinator"]) is None:
        raise ConfigurationError(f"{path}: coordinator must be HOST:PORT")
    folder = path.parent
    return Operator(
        address=raw["coordinator"],
        ca=_read(folder / raw["ca"]),
        certificate=_read(folder / raw["certificate"]),
        key=_read(folder / raw["key"]),
        signing_key=_read(folder / raw["signing_key"]) if "signing_key" in raw else None,
    )


def _read_if(path: Path) -> bytes | None:
    return _read(path) if path.exists() else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
