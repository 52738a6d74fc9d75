"""Where the coordinator is and who asks: what an operator's commands need to connect.

On the coordinator's own machine everything is in its folder (``--dir``, as `minga coordinator
init` and `minga demo` make it). On another machine a small file says it (``--config``):

    coordinator = "coordinator.example.org:8443"
    ca = "ca.crt"                  # relative to this file
    certificate = "operator.crt"
    key = "operator.key"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from protocols.errors import ConfigurationError

DIR_VARIABLE: Final = "MINGA_DIR"
_KEYS: Final = {"coordinator", "ca", "certificate", "key"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An address and an identity. The key is never printed."""

    address: str  # HOST:PORT
    ca: bytes  # PEM
    certificate: bytes  # PEM
    key: bytes = field(repr=False)  # PEM


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
    )


def _from_file(path: Path) -> Operator:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path} is missing") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    if set(raw) != _KEYS or not all(isinstance(value, str) for value in raw.values()):
        raise ConfigurationError(f"{path} must hold exactly the texts {', '.join(sorted(_KEYS))}")
    host, colon, port = raw["coordinator"].rpartition(":")
    if not host or not colon or not port.isdigit():
        raise ConfigurationError(f"{path}: coordinator must be HOST:PORT")
    folder = path.parent
    return Operator(
        address=raw["coordinator"],
        ca=_read(folder / raw["ca"]),
        certificate=_read(folder / raw["certificate"]),
        key=_read(folder / raw["key"]),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
