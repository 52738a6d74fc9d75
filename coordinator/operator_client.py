"""The operator's own connection to the coordinator, for commands on its machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from coordinator.config import load_config
from protocols.errors import UnreachableError, error_from_code
from protocols.gen import admin_pb2_grpc


@contextmanager
def operator_stub(folder: Path) -> Iterator[admin_pb2_grpc.AdminStub]:
    """A stub of the admin service with the certificate in ``coordinator/keys/operator.*``.

    Raises:
        ConfigurationError: there is no coordinator in the folder.
        FederationError: what the coordinator answered, rebuilt.
    """
    config = load_config(folder / "coordinator" / "config.toml")
    keys = config.keys
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(keys / "ca.crt").read_bytes(),
        private_key=(keys / "operator.key").read_bytes(),
        certificate_chain=(keys / "operator.crt").read_bytes(),
    )
    with grpc.secure_channel(config.public_address, credentials) as channel:
        try:
            yield admin_pb2_grpc.AdminStub(channel)
        except grpc.RpcError as error:
            trailing = {key: str(value) for key, value in error.trailing_metadata() or ()}
            code = trailing.pop("minga-code", None)
            if code is None:
                raise UnreachableError(
                    f"no answer from {config.public_address}: {error.details()}"
                ) from None
            details = {k.removeprefix("minga-").replace("-", "_"): v for k, v in trailing.items()}
            raise error_from_code(code, error.details() or "", details) from None
