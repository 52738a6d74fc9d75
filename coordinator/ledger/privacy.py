"""What each institution's data have spent, over all runs: the coordinator's own account.

Nodes keep theirs and believe it alone; this one lets people see what is spent and left, and
refuses what the federation does not allow. A spend is reserved in the transaction that takes a
node's join, and settled in the one that ends its round, so no crash can lose it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.schema import privacy_claims, privacy_spends
from coordinator.ledger.statements import Statements
from policies.privacy.budget import Spend, SpendStatus
from policies.privacy.claim import Claim
from protocols.canonical import canonical_bytes, parse_canonical
from protocols.errors import CorruptStateError, EquivocationError, MalformedMessageError
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds_codec import from_ms, to_ms

_of = privacy_spends.c
_THIS = sa.and_(
    _of.run_id == bindparam("run"), _of.number == bindparam("n"), _of.node_id == bindparam("node")
)
_ORDER = (_of.reserved_at, _of.run_id, _of.number, _of.node_id)
_CLAIM = sa.select(privacy_claims.c.claim).where(privacy_claims.c.run_id == bindparam("run"))
_ONE = sa.select(privacy_spends).where(_THIS)
_OF_DATA = (
    sa.select(privacy_spends)
    .where(_of.node_id == bindparam("node"), _of.dataset == bindparam("data"))
    .order_by(*_ORDER)
)
_OF_ROUND = (
    sa.select(privacy_spends)
    .where(_of.run_id == bindparam("run"), _of.number == bindparam("n"))
    .order_by(*_ORDER)
)
_SETTLE = (
    sa.update(privacy_spends)
    .where(_THIS, _of.status == SpendStatus.RESERVED.value)
    .values(status=bindparam("became"), settled_at=bindparam("at"))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendRow:
    """One institution's cost of one round."""

    round: RoundId
    node: NodeId
    dataset: str
    claim: Claim
    status: SpendStatus
    reserved_at: datetime  # UTC

    @property
    def spend(self) -> Spend:
        """For decisions."""
        return Spend(
            key=str(self.round),
            charge=self.claim.charge(),
            status=self.status,
            reserved_at=self.reserved_at,
        )


class PrivacySpends(Statements):
    """Claims of runs and spends of institutions."""

    def add_claim(self, run: RunId, claim: Claim) -> None:
        """What a training round of a run costs each institution; in the transaction that adds
        the run."""
        self._insert_once(privacy_claims, run_id=run, claim=canonical_bytes(claim.to_value()))

    def claim(self, run: RunId) -> Claim | None:
        """The claim of a run's training rounds; None: it is not private."""
        row = self._one(_CLAIM, run=run)
        return None if row is None else _claim(bytes(row.claim))

    def reserve_spend(self, round_id: RoundId, node: NodeId, claim: Claim, now: datetime) -> None:
        """Reserve what a round costs a node. Again is no error.

        Raises:
            EquivocationError: the round was reserved at another cost.
        """
        self._insert_once(
            privacy_spends,
            run_id=round_id.run,
            number=round_id.number,
            node_id=node,
            dataset=claim.dataset,
            claim=canonical_bytes(claim.to_value()),
            status=SpendStatus.RESERVED.value,
            reserved_at=to_ms(now),
        )
        row = self._one(_ONE, run=round_id.run, n=round_id.number, node=node)
        if row is None or _claim(bytes(row.claim)) != claim:
            raise EquivocationError(f"round {round_id} was reserved at another cost before")

    def settle_spend(
        self, round_id: RoundId, node: NodeId, status: SpendStatus, now: datetime
    ) -> None:
        """Say what became of a reserved spend; the first word stands."""
        self._write(
            _SETTLE,
            run=round_id.run,
            n=round_id.number,
            node=node,
            became=status.value,
            at=to_ms(now),
        )

    def spends_of_round(self, round_id: RoundId) -> list[SpendRow]:
        """All spends of a round, by node."""
        return _rows(self._all(_OF_ROUND, run=round_id.run, n=round_id.number))

    def spends_of_data(self, node: NodeId, dataset: str) -> list[SpendRow]:
        """All spends of an institution's data set, over all runs."""
        return _rows(self._all(_OF_DATA, node=node, data=dataset))


def _claim(data: bytes) -> Claim:
    try:
        return Claim.from_value(parse_canonical(data))
    except MalformedMessageError as error:
        raise CorruptStateError(f"the ledger's {error}") from None


def _rows(found: Iterable[sa.Row[tuple[object, ...]]]) -> list[SpendRow]:
    return [
        SpendRow(
            round=RoundId(RunId(row.run_id), row.number),
            node=NodeId(row.node_id),
            dataset=row.dataset,
            claim=_claim(bytes(row.claim)),
            status=SpendStatus(row.status),
            reserved_at=from_ms(row.reserved_at),
        )
        for row in found
    ]
