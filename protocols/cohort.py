"""Who takes part in a round, and how many must see it through."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from protocols.errors import MalformedMessageError, PlanRefusedError
from protocols.identifiers import NodeId
from protocols.plan import Plan
from protocols.secagg.threshold import SecaggTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum:
    """Sizes of a secure sum over a roster.

    A sum is opened only on a survivor list that ``threshold`` nodes signed. An honest node signs
    one verdict per round, a commit to one list or an abort; each of ``colluders`` may sign two, so
    at most ``roster + colluders`` verdicts exist. With ``2 * threshold`` above that count no two
    verdicts both gather their quorum: no second list is opened, and none after an abort. Two
    opened sums could differ by a single node's update.
    """

    roster: int  # nodes on the plan's roster, not only in the ready set
    threshold: int  # nodes
    colluders: int  # nodes assumed to side with the coordinator
    min_surviving: int  # nodes in any opened sum

    def __post_init__(self) -> None:
        try:  # one rule for plans, rounds and masks: protocols.secagg.threshold
            SecaggTerms(
                roster_size=self.roster,
                threshold=self.threshold,
                colluders=self.colluders,
                min_surviving=self.min_surviving,
            )
        except PlanRefusedError as error:
            raise MalformedMessageError(str(error)) from None

    @property
    def to_open(self) -> int:
        """Survivors needed before a sum may be opened."""
        return max(self.threshold, self.min_surviving)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the plan says about the course of one round."""

    roster: tuple[NodeId, ...]  # ascending, unique: every party hashes this order
    min_participants: int  # nodes ready at the end of Training
    quorum: Quorum | None  # None: plan mode "open", no masks
    train: timedelta
    deal: timedelta
    upload: timedelta
    commit: timedelta
    reveal: timedelta

    def __post_init__(self) -> None:
        if not self.roster or list(self.roster) != sorted(set(self.roster)):
            raise MalformedMessageError("the roster must be unique, ascending and not empty")
        if not 1 <= self.min_participants <= len(self.roster):
            raise MalformedMessageError("min_participants must be 1 to the size of the roster")

    @property
    def to_start(self) -> int:
        """Ready nodes needed before anything is dealt or uploaded."""
        return max(self.min_participants, self.quorum.to_open if self.quorum else 1)


def terms_of(plan: Plan) -> Terms:
    """The course of a round under ``plan``."""
    secagg, limits = plan.secagg, plan.deadlines
    quorum = (
        Quorum(
            roster=len(plan.roster),
            threshold=secagg.threshold,
            colluders=secagg.colluders,
            min_surviving=secagg.min_surviving,
        )
        if secagg
        else None
    )
    return Terms(
        roster=plan.roster_ids,
        min_participants=plan.min_participants,
        quorum=quorum,
        train=timedelta(seconds=limits.train),
        deal=timedelta(seconds=limits.deal),
        upload=timedelta(seconds=limits.upload),
        commit=timedelta(seconds=limits.commit),
        reveal=timedelta(seconds=limits.reveal),
    )
