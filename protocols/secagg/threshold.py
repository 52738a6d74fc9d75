"""How many members must agree before a masked sum is opened.

Table of section 5 of the privacy note; ``n`` is the size of the plan's roster, not of the set
that happened to be ready, so that quorums of different attempts meet in the same roster.

    n    3   4   5   8   10  16  33  64
    t    3   3   4   6   7   11  22  43
    c    1   1   2   3   3   5   10  21
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.errors import PlanRefusedError

MIN_ROSTER: Final = 3  # nodes: with two, each learns the other's update from the sum
MAX_ROSTER: Final = 64  # nodes: the graph of pairwise masks is complete
RULE: Final = "secagg.threshold"


def default_threshold(roster_size: int) -> int:
    """Members that must agree: ceil(2n/3), and 3 of 3.

    With 3 members ceil(2n/3) is 2, and 2 * 2 > 3 + 1 is false: one colluder would do.

    Raises:
        PlanRefusedError: fewer than 3 members, or more than 64.
    """
    _check_size(roster_size)
    return max(-(-2 * roster_size // 3), roster_size // 2 + 1 + roster_size % 2)


def most_colluders(roster_size: int, threshold: int, min_surviving: int) -> int:
    """The largest number of colluding members that secrecy withstands: min(2t-n-1, m-2)."""
    return min(2 * threshold - roster_size - 1, min_surviving - 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecaggTerms:
    """The sizes of a secure sum, valid by construction.

    Let n = ``roster_size``, t = ``threshold``, c = ``colluders``, m = ``min_surviving``.

    *One verdict per round.* A sum is opened only with t signed commits to one survivor list, and
    an attempt may be repeated after uploads only with t signed aborts. An honest member signs one
    verdict per round; each of the c colluders may sign several, so at most n + c verdicts can be
    shown for two different outcomes together. Because 2t > n + c, two different survivor lists,
    or a list and an abort, never both gather t. Two opened sums could differ by one member's
    update; there are never two.

    *One secret per member.* Opening member v's self mask takes t shares of b_v, opening its pair
    masks t shares of RK_v. An honest member reveals one of the two; a colluder both: at most
    n + c < 2t shares of either kind, so never both secrets of one v, and its upload alone stays
    masked.

    *Aborted stays closed.* After a aborts at most n - a + c shares of a kind can still be
    revealed, which is below t when a >= t, again because 2t > n + c.

    *No sum of few.* Every opened sum has at least ``least_survivors`` >= m addends; without the
    colluders' own, at least m - c >= 2 honest ones remain hidden in each other.
    """

    roster_size: int  # nodes on the plan's roster
    threshold: int  # nodes that must commit, reveal, or abort
    colluders: int  # nodes assumed to side with the coordinator
    min_surviving: int  # nodes in any opened sum

    def __post_init__(self) -> None:
        n, t, c, m = self.roster_size, self.threshold, self.colluders, self.min_surviving
        _check_size(n)
        if not 0 <= c < t <= n:
            raise PlanRefusedError(
                f"want 0 <= colluders={c} < threshold={t} <= roster={n}", rule=RULE
            )
        if 2 * t <= n + c:
            raise PlanRefusedError(
                f"threshold={t} of {n} does not withstand {c} colluders: 2t must be above n + c",
                rule=RULE,
            )
        if not c + 2 <= m <= n:
            raise PlanRefusedError(
                f"min_surviving={m} must be from colluders + 2 = {c + 2} to roster={n}", rule=RULE
            )

    @classmethod
    def for_roster(cls, roster_size: int) -> SecaggTerms:
        """The terms a plan takes unless it says otherwise: most losses tolerated, then most
        colluders withstood.

        Raises:
            PlanRefusedError: fewer than 3 members, or more than 64.
        """
        t = default_threshold(roster_size)
        return cls(
            roster_size=roster_size,
            threshold=t,
            colluders=most_colluders(roster_size, t, t),
            min_surviving=t,
        )

    @property
    def least_survivors(self) -> int:
        """Smallest survivor list that may be opened: t survivors must sign it, m must be in it."""
        return max(self.threshold, self.min_surviving)

    def losses_tolerated(self, dealt: int) -> int:
        """Nodes of ``dealt`` that may be lost after Dealing while the sum can still be opened."""
        return dealt - self.least_survivors


def _check_size(roster_size: int) -> None:
    if not MIN_ROSTER <= roster_size <= MAX_ROSTER:
        raise PlanRefusedError(
            f"a secure sum needs {MIN_ROSTER} to {MAX_ROSTER} members, not {roster_size}",
            rule=RULE,
        )
