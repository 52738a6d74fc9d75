"""The real coordinator with a clock that a test may set, as a process of its own.

    python -m tests.support.faulty_coordinator --dir D --clock FILE [--faults FOLDER]

If ``D/upgraded`` exists it acts as a later version: the ledger gets one more migration, and every
answer carries a field that the nodes do not know.

If ``FOLDER`` holds ``points.json`` it kills itself at those commit points (tests/matrix/arming.py).
``FILE`` holds seconds that are added to the machine's time, read at each look at the clock; a
missing or empty file adds nothing. So a test lets a deadline pass when everything that must come
before it has come, instead of hoping that it comes in time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from coordinator.app import serve
from coordinator.config import load_config
from coordinator.ledger import migrate
from tests.matrix.lives import live


class ShiftedClock:
    """The machine's time plus what a file says."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def now(self) -> datetime:
        """The time now, aware, UTC."""
        return datetime.now(UTC) + timedelta(seconds=read_shift(self._file))


def read_shift(file: Path) -> float:
    """Seconds that are added; 0 where nothing is said."""
    try:
        return float(file.read_text() or 0)
    except FileNotFoundError:
        return 0.0


def shift(file: Path, by_s: float) -> None:
    """Let the clock jump by some seconds, forwards or backwards."""
    fresh = file.with_suffix(".tmp")
    fresh.write_text(repr(read_shift(file) + by_s))
    fresh.replace(file)


UNKNOWN = b"\xc2\x3e\x03new"  # field 1000, three bytes: no message of this version has it
_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", {last!r}, None, None


def upgrade() -> None:
    op.create_table("of_the_next_version", sa.Column("id", sa.Integer(), primary_key=True))
    op.add_column("runs", sa.Column("of_the_next_version", sa.Text()))


def downgrade() -> None:
    op.drop_column("runs", "of_the_next_version")
    op.drop_table("of_the_next_version")
"""


def become_newer(folder: Path) -> None:
    """Act as a later version that adds a migration and a field to every answer."""
    last = migrate.revisions()[-1]
    if not folder.exists():
        shutil.copytree(migrate._FOLDER, folder)
    (folder / "versions" / "9999_next.py").write_text(_MIGRATION.format(last=last))
    migrate._FOLDER = folder  # type: ignore[misc]
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        name = f"{kind}_rpc_method_handler"
        setattr(grpc, name, _with_unknown_field(getattr(grpc, name)))


def _with_unknown_field(make: Any) -> Any:
    def made(
        behavior: Any, request_deserializer: Any = None, response_serializer: Any = None
    ) -> Any:
        if response_serializer is None:  # raw bytes
            return make(behavior, request_deserializer, response_serializer)

        def serialize(message: Any) -> bytes:
            return bytes(response_serializer(message)) + UNKNOWN

        return make(behavior, request_deserializer, serialize)

    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--clock", type=Path, required=True)
    parser.add_argument("--faults", type=Path, default=None)
    parser.add_argument("--config", default="coordinator", help="folder with config.toml")
    options = parser.parse_args()
    if (options.dir / "upgraded").exists():
        become_newer(options.dir / "migrations-of-the-next-version")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("coordinator").setLevel(logging.INFO)
    config = load_config(options.dir / options.config / "config.toml")

    def work() -> None:
        asyncio.run(serve(config, ShiftedClock(options.clock)))

    if options.faults is not None and (options.faults / "points.json").exists():
        live(work, options.faults, config.ledger_url)
    else:
        work()


if __name__ == "__main__":
    main()
