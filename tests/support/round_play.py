"""Plays schedules against the round machine: nodes that lose messages, a server, and an oracle.

A schedule is a list of moves. Nodes follow the round as honest nodes do, but their requests and
answers are lost, they repeat themselves, and old messages arrive late. The server keeps uploads as
the coordinator does: one receipt for each node and attempt, a sum over the survivors of the
released attempt. The vector of node i in attempt a is 4**(i + a * N), so the base-4 digits of a sum
name who was counted, and of which attempt: a 2 is a double count, a 1 in another place a stranger
or an old vector.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from protocols.cohort import Quorum, Terms
from protocols.errors import RefusedError
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.rounds import (
    AbortArrived,
    Aborted,
    AgreementArrived,
    Burned,
    CommitArrived,
    Committing,
    DealArrived,
    Dealing,
    DeclineArrived,
    Event,
    JoinArrived,
    LeaveArrived,
    Open,
    Opened,
    Phase,
    ReadyArrived,
    Released,
    Revealing,
    SharesArrived,
    Step,
    StopRequested,
    SumOpened,
    TimePassed,
    Training,
    UploadArrived,
    Uploading,
    deadline,
    is_final,
    open_round,
    step,
)

ROUND = RoundId(RunId("play"), 0)
START = datetime(2026, 3, 1, tzinfo=UTC)
ROSTER = tuple(NodeId(name) for name in ("a", "b", "c", "d", "e"))
STRANGER = NodeId("z")
PLAYERS = (*ROSTER, STRANGER)
MINUTE = timedelta(minutes=1)

_LIMITS = dict.fromkeys(("train", "deal", "upload", "commit", "reveal"), MINUTE)
SECURE = Terms(
    roster=ROSTER,
    min_participants=3,
    quorum=Quorum(roster=5, threshold=3, colluders=0, min_surviving=3),
    **_LIMITS,
)
PUBLIC = Terms(roster=ROSTER, min_participants=2, quorum=None, **_LIMITS)

ORDER = (Open, Training, Dealing, Uploading, Committing, Revealing, Released, Aborted, Burned)
MESSAGES: dict[str, Callable[[NodeId, int], Event]] = {
    "join": lambda node, _: JoinArrived(node),
    "decline": lambda node, _: DeclineArrived(node),
    "ready": lambda node, _: ReadyArrived(node),
    "leave": lambda node, _: LeaveArrived(node),
    "deal": DealArrived,
    "agree": AgreementArrived,
    "upload": UploadArrived,
    "commit": CommitArrived,
    "abort": AbortArrived,
    "shares": SharesArrived,
}


class Move(NamedTuple):
    """One move of a schedule."""

    kind: str  # "act", "again", "late", "contrary", "wait", "sleep", "expire", or a message's name
    who: int = 0  # index in PLAYERS
    fate: str = "arrives"  # or "request lost", "answer lost"
    attempt: int = 1  # of a message that is named


@dataclass(slots=True)
class Server:
    """Takes messages as the coordinator does; ``step`` may be a broken one."""

    terms: Terms
    step: Callable[[RoundId, Phase, Event, datetime], Step] = step
    receipts: dict[tuple[NodeId, int], int] = field(default_factory=dict)
    sum: int | None = None

    def store(self, node: NodeId, attempt: int) -> None:
        """Keep a vector once."""
        self.receipts.setdefault((node, attempt), vector(node, attempt))

    def add_up(self, released: Released) -> int:
        """The sum over the survivors of the attempt."""
        return sum(self.receipts.get((node, released.attempt), 0) for node in released.survivors)


def vector(node: NodeId, attempt: int) -> int:
    """What a node contributes in an attempt."""
    return 4 ** (PLAYERS.index(node) + attempt * len(PLAYERS))


def counted(total: int) -> dict[tuple[NodeId, int], int]:
    """Who is in a sum, of which attempt, and how often: its digits that are not zero."""
    found, place = {}, 0
    while total:
        total, digit = divmod(total, 4)
        if digit:
            attempt, index = divmod(place, len(PLAYERS))
            found[(PLAYERS[index], attempt)] = digit
        place += 1
    return found


class Mistake(AssertionError):
    """The oracle convicts."""


def convict(guilty: bool, charge: str) -> None:
    """Raise if guilty."""
    if guilty:
        raise Mistake(charge)


@dataclass(slots=True)
class Play:
    """One schedule being played."""

    server: Server
    phase: Phase
    now: datetime = START
    seen: dict[NodeId, Phase] = field(default_factory=dict)  # what each node knows of the round
    sent: dict[NodeId, list[Event]] = field(default_factory=dict)
    accepted: list[Event] = field(default_factory=list)
    visited: list[str] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=lambda: {"request lost": 0, "answer lost": 0})

    def deliver(self, event: Event) -> bool:
        """Give an event to the server and check what became of it."""
        before = self.phase
        try:
            after = self.server.step(ROUND, before, event, self.now).phase
        except RefusedError:
            return False
        check_step(before, event, after, self.now)
        self.phase = after
        self.accepted.append(event)
        if isinstance(event, UploadArrived) and event.node in _received(after):
            self.server.store(event.node, event.attempt)
        name = f"{type(after).__name__}{getattr(after, 'attempt', '')}"
        if not self.visited or self.visited[-1] != name:
            self.visited.append(name)
        self._repeat(event)
        return True

    def _repeat(self, event: Event) -> None:
        """The same event at the same moment changes nothing more, or is refused."""
        if isinstance(event, TimePassed):
            return
        try:
            again = self.server.step(ROUND, self.phase, event, self.now).phase
        except RefusedError:
            return
        convict(again != self.phase, f"a repeated {event} was counted twice")

    def send(self, node: NodeId, event: Event, fate: str) -> None:
        """A node sends; what it does not hear back it does not know."""
        self.sent.setdefault(node, []).append(event)
        if fate == "request lost":
            self.lost[fate] += 1
            return
        self.deliver(event)
        if fate == "answer lost":
            self.lost[fate] += 1
            return
        self.seen[node] = self.phase

    def move(self, move: Move) -> None:
        """Play one move."""
        node = PLAYERS[move.who]
        match move.kind:
            case "wait":
                self.now += MINUTE / 4
            case "sleep":  # the deadline passes and the driver has not noticed
                self.now = max(self.now, deadline(self.phase) or self.now)
            case "expire":
                self.now = max(self.now, deadline(self.phase) or self.now)
                self.deliver(TimePassed())
            case "tick":
                self.deliver(TimePassed())
            case "stop":
                self.deliver(StopRequested("enough"))
            case "act":
                event = honest(node, self.seen.get(node, self.phase))
                if event is None:
                    self.seen[node] = self.phase  # it looks again
                    event = honest(node, self.phase)
                if event is not None:
                    self.send(node, event, move.fate)
            case "again" | "late":
                old = self.sent.get(node)
                if old:
                    self.send(node, old[-1] if move.kind == "again" else old[0], move.fate)
            case "contrary":
                spoken = self.sent.get(node)
                if spoken and (event := contrary(spoken[-1])) is not None:
                    self.send(node, event, move.fate)
            case name:
                self.send(node, MESSAGES[name](node, move.attempt), move.fate)

    def finish(self) -> None:
        """Add up what was released, and ask the oracle."""
        phase = self.phase
        if isinstance(phase, Released) and phase.opened is None:
            self.server.sum = self.server.add_up(phase)
            opened = Opened(
                sum=Digest(f"{self.server.sum:064x}"[-64:]), model_root=Digest("0" * 64)
            )
            self.deliver(SumOpened(opened))
        check_end(self)


def _received(phase: Phase) -> frozenset[NodeId]:
    match phase:
        case Uploading(received=nodes):
            return nodes
        case Committing(survivors=nodes) | Revealing(survivors=nodes) | Released(survivors=nodes):
            return nodes
        case _:
            return frozenset()


def honest(node: NodeId, phase: Phase) -> Event | None:
    """What an honest node says when it sees this phase; None: nothing is asked of it."""
    match phase:
        case Open(joined=joined, declined=declined):
            return None if node in joined | declined else JoinArrived(node)
        case Training(cohort=cohort, ready=ready, left=left):
            return ReadyArrived(node) if node in cohort - ready - left else None
        case Dealing(ready=ready, dealt=dealt, agreed=agreed, attempt=attempt):
            if phase.without_keys:
                return ReadyArrived(node, attempt) if node in phase.without_keys else None
            if node in ready - dealt:
                return DealArrived(node, attempt)
            return AgreementArrived(node, attempt) if node in dealt - agreed else None
        case Uploading(ready=ready, received=received, attempt=attempt):
            return UploadArrived(node, attempt) if node in ready - received else None
        case Committing(terms=terms, survivors=survivors, ready=ready, attempt=attempt) as now:
            if node in now.commits | now.aborts or node not in ready:
                return None
            quorum = terms.quorum
            openable = quorum is not None and len(survivors) >= quorum.to_open
            if node in survivors and openable:
                return CommitArrived(node, attempt)
            return None if openable else AbortArrived(node, attempt)
        case Revealing(survivors=survivors, revealed=revealed, attempt=attempt):
            return SharesArrived(node, attempt) if node in survivors - revealed else None
        case _:
            return None


def contrary(event: Event) -> Event | None:
    """What a node must not say after ``event``."""
    match event:
        case JoinArrived(node):
            return DeclineArrived(node)
        case DeclineArrived(node):
            return JoinArrived(node)
        case ReadyArrived(node):
            return LeaveArrived(node)
        case LeaveArrived(node):
            return ReadyArrived(node)
        case CommitArrived(node, attempt):
            return AbortArrived(node, attempt)
        case AbortArrived(node, attempt):
            return CommitArrived(node, attempt)
        case _:
            return None


# -- the oracle ----------------------------------------------------------------------------------


def _sets(phase: Phase) -> Iterator[tuple[str, frozenset[NodeId], frozenset[NodeId]]]:
    """Pairs of sets of which the first must lie in the second."""
    match phase:
        case Open(joined=joined, declined=declined, terms=terms):
            yield "joined", joined | declined, frozenset(terms.roster)
        case Training(cohort=cohort, ready=ready, left=left, terms=terms):
            yield "cohort", cohort, frozenset(terms.roster)
            yield "ready", ready, cohort - left
            yield "left", left, cohort - ready
        case Dealing(ready=ready, dealt=dealt, agreed=agreed, keyed=keyed):
            yield "keyed", keyed, ready
            yield "dealt", dealt, ready if not phase.without_keys else frozenset()
            yield "agreed", agreed, ready
        case Uploading(ready=ready, received=received):
            yield "received", received, ready
        case Committing(ready=ready, survivors=survivors, commits=commits, aborts=aborts):
            yield "survivors", survivors, ready
            yield "commits", commits, survivors - aborts
            yield "aborts", aborts, ready - commits
        case Revealing(ready=ready, survivors=survivors, commits=commits, revealed=revealed):
            yield "survivors", survivors, ready
            yield "commits", commits, survivors
            yield "revealed", revealed, survivors
        case _:
            pass


def check_step(before: Phase, event: Event, after: Phase, now: datetime) -> None:
    """Convict a single step."""
    convict(is_final(before) and after != before, f"{before} changed after it was final")
    convict(
        ORDER.index(type(after)) < ORDER.index(type(before)),
        f"went back from {type(before).__name__} to {type(after).__name__}",
    )
    attempts = getattr(before, "attempt", 0), getattr(after, "attempt", None)
    if attempts[1] is not None:
        convict(attempts[1] < attempts[0], "went back to an earlier attempt")
    closes_at = deadline(before)
    late = closes_at is not None and now >= closes_at
    by_clock = isinstance(event, TimePassed | StopRequested)
    convict(late and not by_clock and after != before, f"{event} counted though it was late")
    for name, inner, outer in _sets(after):
        convict(not inner <= outer, f"{sorted(inner - outer)} in {name} of {type(after).__name__}")
    match before, after:
        case Open(joined=joined), Training(cohort=cohort):
            convict(not cohort <= joined | _of(event), "a node in the cohort has not joined")
        case Training(ready=ready), Dealing() | Uploading():
            convict(not after.ready <= ready | _of(event), "a node is ready that never said so")
        case Dealing(ready=ready), Dealing() | Uploading():
            convict(not after.ready <= ready, "the ready set grew")
        case Dealing(), _ if not isinstance(after, Dealing | Uploading | Aborted):
            convict(True, f"Dealing became {type(after).__name__}")
        case Committing(commits=commits, terms=terms), Revealing():
            need = terms.quorum.threshold if terms.quorum else 0
            convict(len(commits | _of(event)) < need, "revealing without a quorum of commits")
        case Revealing(revealed=revealed, terms=terms), Released():
            need = terms.quorum.threshold if terms.quorum else 0
            convict(len(revealed | _of(event)) < need, "released without enough shares")
        case ((Open() | Training() | Dealing() | Committing()), Released()):
            convict(True, f"released out of {type(before).__name__}")


def _of(event: Event) -> frozenset[NodeId]:
    node: NodeId | None = getattr(event, "node", None)
    return frozenset() if node is None else frozenset({node})


def check_end(play: Play) -> None:
    """Convict the whole play: who is in the sum, and who signed what."""
    phase = play.phase
    if isinstance(phase, Released):
        total = play.server.sum or 0
        expected = {(node, phase.attempt): 1 for node in phase.survivors}
        convict(counted(total) != expected, f"the sum counts {counted(total)}, not {expected}")
        terms = play.server.terms
        need = terms.quorum.to_open if terms.quorum else terms.min_participants
        convict(len(phase.survivors) < need, "too few survivors were opened")
    verdicts: dict[NodeId, set[type]] = {}
    for event in play.accepted:
        if isinstance(event, CommitArrived | AbortArrived):
            verdicts.setdefault(event.node, set()).add(type(event))
    twice = [node for node, kinds in verdicts.items() if len(kinds) > 1]
    convict(bool(twice), f"{twice} signed two verdicts")


def play(schedule: list[Move], server: Server) -> Play:
    """Play a schedule to its end."""
    game = Play(server=server, phase=open_round(server.terms, now=START, join_s=60))
    for move in schedule:
        game.move(move)
    game.finish()
    return game


# -- schedules -----------------------------------------------------------------------------------

KINDS = (
    ["act"] * 120
    + ["again"] * 12
    + ["late"] * 8
    + ["contrary"] * 4
    + ["tick"] * 3
    + ["wait"]
    + ["sleep", "expire"]  # rarely enough that rounds reach their end
    + [*MESSAGES, "leave", "leave"]
)
FATES = ["arrives"] * 8 + ["request lost", "answer lost"]


def random_schedule(rng: random.Random, length: int = 180) -> list[Move]:
    """A schedule in which most nodes do their part; some seeds have a node that is often silent."""
    silent = rng.randrange(len(PLAYERS)) if rng.random() < 0.5 else None
    moves = []
    for _ in range(length):
        who = rng.randrange(len(PLAYERS))
        if who == silent and rng.random() < 0.9:
            continue
        moves.append(
            Move(
                kind=rng.choice(KINDS),
                who=who,
                fate=rng.choice(FATES),
                attempt=rng.choice((1, 1, 2)),
            )
        )
        if rng.random() < 0.0005:
            moves.append(Move(kind="stop"))
    return moves


def straight(terms: Terms) -> Server:
    """A server that makes no mistake."""
    return Server(terms=terms)
