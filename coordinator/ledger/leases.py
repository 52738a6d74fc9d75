"""Leases in a ledger transaction: which process drives what, and proof that it still does.

A lease bounds how long a dead process can hold a task up. It does not by itself stop a slow one: a
process may sleep through its lease and wake up believing in it. So every holder gets a *fence*, a
number that grows with each new holder, and each of its writes checks the fence inside the same
transaction. The check locks the lease's row against a takeover until that transaction ends.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.schema import leases
from coordinator.ledger.statements import Statements
from protocols.errors import LedgerBusyError
from protocols.rounds_codec import to_ms

FAR: Final = timedelta(minutes=1)  # beyond every lease, and every clock that is nearly right
_TAKE = (
    sa.update(leases)
    .where(
        leases.c.name == bindparam("which"),
        sa.or_(
            leases.c.expires_at <= bindparam("at"),
            leases.c.expires_at > bindparam("beyond"),
        ),
    )
    .values(holder=bindparam("who"), fence=leases.c.fence + 1, expires_at=bindparam("until"))
    .returning(leases.c.fence)
)
_RENEW = (
    sa.update(leases)
    .where(
        leases.c.name == bindparam("which"),
        leases.c.fence == bindparam("number"),
        leases.c.expires_at > 0,
    )
    .values(expires_at=bindparam("until"))
)
_RELEASE = (
    sa.update(leases)
    .where(leases.c.name == bindparam("which"), leases.c.fence == bindparam("number"))
    .values(expires_at=0)
)
_FENCE = (
    sa.select(leases.c.fence)
    .where(leases.c.name == bindparam("which"), leases.c.expires_at > 0)
    .with_for_update(read=True)
)


class LeaseLostError(LedgerBusyError):
    """Another process took over; what was to be written was not."""

    code = "lease_lost"


class Leases(Statements):
    """Who drives."""

    def take_lease(self, name: str, holder: str, now: datetime, ttl: timedelta) -> int | None:
        """Become the holder, if there is none or its lease ran out.

        A lease that ends later than any could was taken before the clock was set back: it counts
        as run out, or a process that is long dead would hold the others up for as long.

        Args:
            name: what is leased.
            holder: this process.
            now: UTC.
            ttl: how long others wait for a holder that stopped renewing.

        Returns:
            The fence, from 1; None while somebody else holds the lease.
        """
        until = to_ms(now + ttl)
        first = self._insert_once(leases, name=name, holder=holder, fence=1, expires_at=until)
        if first:
            return 1
        row = self._one(
            _TAKE, which=name, who=holder, at=to_ms(now), until=until, beyond=to_ms(now + FAR)
        )
        return None if row is None else int(row.fence)

    def renew_lease(self, name: str, fence: int, now: datetime, ttl: timedelta) -> bool:
        """Hold on for another ``ttl``; False: another process took over."""
        return self._write(_RENEW, which=name, number=fence, until=to_ms(now + ttl)) > 0

    def release_lease(self, name: str, fence: int) -> None:
        """Give the lease up, so that the next holder need not wait."""
        self._write(_RELEASE, which=name, number=fence)

    def void_leases(self) -> None:
        """End every lease; only for who knows that no other process is alive."""
        self._write(sa.update(leases).values(expires_at=0))

    def check_fence(self, name: str, fence: int) -> None:
        """Make sure that this process still drives, until this transaction ends.

        Raises:
            LeaseLostError: another process took over, or the lease was given up.
        """
        row = self._one(_FENCE, which=name)
        if row is None or row.fence != fence:
            raise LeaseLostError(f"another process took over {name}; nothing was written")
