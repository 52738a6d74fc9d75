"""What makes a simulation quick and changes nothing that is simulated.

Opening a database costs more than a round: compiled statements are shared between engines, and the
tables of the template are not looked for again. A privacy curve that was computed is remembered.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import sqlalchemy as sa

from coordinator.ledger import migrate
from policies.privacy import accounting

_compiled: dict[Any, Any] = {}
_dialects: dict[str, Any] = {}
_create_engine = sa.create_engine
_create_all = sa.MetaData.create_all
_upgrade = migrate.upgrade


def _engine(url: Any, **arguments: Any) -> sa.Engine:
    made = _create_engine(url, **arguments)
    if made.dialect.name == "sqlite":
        known = _dialects.get("sqlite")
        if known is None:
            with made.connect():
                pass  # initialises the dialect
            made.dispose()  # that connection has not the settings that are yet to come
            known = _dialects["sqlite"] = made.dialect
        else:
            made.dialect.initialize = _nothing  # type: ignore[method-assign]
            made.dialect = known
        made._compiled_cache = _compiled  # type: ignore[assignment]
    return made


def _nothing(_connection: Any) -> None:
    """Done once."""


_renyi = accounting.renyi
_curves: dict[Any, list[float]] = {}


def _remembered(charges: Any, orders: Any) -> list[float]:
    key = (tuple(charges), tuple(orders))
    if key not in _curves:
        _curves[key] = _renyi(charges, orders)
    return list(_curves[key])


def _tables(metadata: sa.MetaData, bind: Any, **arguments: Any) -> None:
    database = bind.url.database
    if database is None or not os.path.exists(database) or os.path.getsize(database) == 0:  # noqa: PTH110, PTH202
        _create_all(metadata, bind, **arguments)


def _migrated(connection: sa.Connection, revision: str = "head") -> None:
    if not connection.dialect.has_table(connection, "alembic_version"):
        _upgrade(connection, revision)


@contextmanager
def quick() -> Iterator[None]:
    """Within it, databases open quickly."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sa, "create_engine", _engine))
        stack.enter_context(mock.patch.object(sa.MetaData, "create_all", _tables))
        stack.enter_context(mock.patch.object(migrate, "upgrade", _migrated))
        stack.enter_context(mock.patch.object(accounting, "renyi", _remembered))
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()
