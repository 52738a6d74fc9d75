"""Bringing the tables up to date, or back.

Migrations lie in ``migrations/versions``, in pairs of up and down. All that are needed run in one
transaction: a crash in between leaves the ledger as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import Connection

from protocols.errors import ConfigurationError

_FOLDER: Final = Path(__file__).with_name("migrations")
_LOCK: Final = 0x6D696E6761  # "minga": PostgreSQL advisory lock, so that one process migrates


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def revisions() -> list[str]:
    """All revisions, the oldest first."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    walked = ScriptDirectory.from_config(config).walk_revisions()
    return [script.revision for script in walked][::-1]


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the tables to ``revision`` inside the connection's open transaction.

    Raises:
        ConfigurationError: the ledger was written by a newer version of Minga.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    try:
        command.upgrade(_config(connection), revision)
    except (CommandError, ResolutionError) as error:
        raise ConfigurationError(
            f"the ledger was written by another version of minga: {error!s:.120}"
        ) from None


def downgrade(connection: Connection, revision: str) -> None:
    """Bring the tables back to ``revision``; ``base`` removes them all."""
    command.downgrade(_config(connection), revision)
