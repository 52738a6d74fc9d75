"""Rows of the ledger: what goes in comes back, once, with its reason; on both databases."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from coordinator.ledger import Tx
from coordinator.rounds import advance
from protocols.errors import (
    EquivocationError,
    ExistsError,
    NotFoundError,
    TokenRefusedError,
    WrongPhaseError,
)
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Dealing,
    JoinArrived,
    Open,
    Opened,
    Phase,
    Released,
    Revealing,
    Training,
    Uploading,
    deadline,
)
from tests.support.ledger_urls import url, with_ledger
from tests.support.ledgers import (
    NODES,
    ROUND,
    RUN,
    START,
    begin,
    digest,
    enrol,
    first_phase,
    make_plan,
    snapshot_bytes,
    terms,
)
from tests.support.postgres import postgres

__all__ = ["postgres", "url"]  # fixtures

TTL = timedelta(seconds=10)


T, CLOSES, SOME = terms(), START + timedelta(minutes=5), frozenset(NODES[:2])
PHASES: list[Phase] = [
    Open(terms=T, closes_at=CLOSES, joined=SOME, declined=frozenset(NODES[2:])),
    Training(terms=T, closes_at=CLOSES, cohort=frozenset(NODES), ready=SOME, left=frozenset()),
    Dealing(terms=T, closes_at=CLOSES, attempt=2, ready=SOME, dealt=SOME, agreed=frozenset()),
    Uploading(terms=T, closes_at=CLOSES, attempt=2, ready=SOME, received=SOME),
    Committing(terms=T, closes_at=CLOSES, attempt=1, ready=SOME, survivors=SOME, aborts=SOME),
    Revealing(terms=T, closes_at=CLOSES, attempt=1, ready=SOME, survivors=SOME, commits=SOME),
    Released(attempt=1, survivors=SOME),
    Released(
        attempt=1,
        survivors=SOME,
        opened=Opened(sum=Digest(digest("s")), model_root=Digest(digest("m"))),
    ),
    Aborted(code="stopped", reason="ñandú"),
    Burned(code="no_verdict", reason="x"),
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: type(phase).__name__)
def test_a_phase_comes_back_as_it_went_in(url, phase):
    async def story(ledger):
        await ledger.run("begin", begin)
        await ledger.run("set", lambda tx: tx.set_phase(ROUND, phase, "why", now=START))
        row = await ledger.read("look", lambda tx: tx.round(ROUND))
        assert row.phase == phase
        assert row.why == "why"
        waiting = await ledger.read("look", lambda tx: tx.unfinished_rounds())
        assert [found.round for found in waiting] == ([] if row.final else [ROUND])
        late = START + timedelta(hours=1)
        due = await ledger.read("look", lambda tx: tx.due(late))
        assert [found.round for found in due] == ([ROUND] if deadline(phase) else [])
        assert await ledger.read("look", lambda tx: tx.due(START)) == []

    with_ledger(url, story)


def test_a_run_is_submitted_once(url):
    plan, other = make_plan(), make_plan(title="another")

    async def story(ledger):
        first = await ledger.run("submit", lambda tx: tx.add_run(plan, snapshot_bytes(), START))
        before = ledger.version()
        again = await ledger.run("submit", lambda tx: tx.add_run(plan, snapshot_bytes(), START))
        assert first == again
        assert ledger.version() == before
        assert first.plan == plan
        for changed, snapshot in ((other, snapshot_bytes()), (plan, snapshot_bytes("other"))):
            with pytest.raises(ExistsError):
                await ledger.run("s", lambda tx, p=changed, s=snapshot: tx.add_run(p, s, START))
        with pytest.raises(NotFoundError):
            await ledger.read("look", lambda tx: tx.run(RunId("nobody")))

    with_ledger(url, story)


def test_a_run_ends_with_a_reason(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        assert [run.run for run in await ledger.read("l", lambda tx: tx.active_runs())] == [RUN]
        await ledger.run("stop", lambda tx: tx.set_run_status(RUN, "stopped", "enough", START))
        assert await ledger.read("l", lambda tx: tx.active_runs()) == []
        run = await ledger.read("l", lambda tx: tx.run(RUN))
        assert (run.status, run.why, run.ended_at) == ("stopped", "enough", START)
        assert await ledger.read("l", lambda tx: tx.run_statuses()) == {RUN: ("stopped", START)}

    with_ledger(url, story)


def test_a_round_number_is_used_once(url):
    async def story(ledger):
        plan = await ledger.run("begin", begin)
        with pytest.raises(ExistsError):
            await ledger.run(
                "again",
                lambda tx: tx.open_round(
                    ROUND, index=1, phase=first_phase(plan), start_snapshot=b"", why="", now=START
                ),
            )
        assert await ledger.read("look", lambda tx: tx.round(RoundId(RUN, 7))) is None
        with pytest.raises(NotFoundError):
            await ledger.run("look", lambda tx: tx.lock_round(RoundId(RUN, 7)))

    with_ledger(url, story)


def test_results_and_the_last_release(url):
    phase = Released(
        attempt=1,
        survivors=SOME,
        opened=Opened(sum=Digest(digest("s")), model_root=Digest(digest("m"))),
    )
    metrics = {"weight": 2**53 + 1, "nodes": 2, "nll_millinats/es": 7}

    def release(tx: Tx) -> None:
        tx.lock_round(ROUND)
        tx.set_phase(ROUND, phase, "opened", now=START, entered=True)
        tx.set_result(ROUND, Digest(digest("s")), snapshot_bytes("next", 1), metrics)

    async def story(ledger):
        await ledger.run("begin", begin)
        assert await ledger.read("look", lambda tx: tx.last_released(RUN)) is None
        await ledger.run("release", release)
        row = await ledger.read("look", lambda tx: tx.last_released(RUN))
        assert (row.round, row.metrics, row.sum) == (ROUND, metrics, digest("s"))
        assert row.next_snapshot == snapshot_bytes("next", 1)
        assert row.released
        assert row.final
        assert await ledger.read("look", lambda tx: tx.released_rounds(RUN)) == [row]
        times = await ledger.read("look", lambda tx: tx.phase_times(RUN))
        assert [time.phase for time in times] == ["Open", "Released"]

    with_ledger(url, story)


def test_a_verdict_is_kept_and_not_changed(url):
    async def story(ledger):
        await ledger.run("begin", begin)

        def say(root: str, objection: str) -> object:
            return ledger.run(
                "confirm",
                lambda tx: tx.confirm(ROUND, NODES[0], root, objection, "detail", now=START),
            )

        assert await say(digest("m"), "") is True
        assert await say(digest("m"), "") is False
        for root, objection in ((digest("other"), ""), (digest("m"), "not_in_sum")):
            with pytest.raises(EquivocationError):
                await say(root, objection)
        (kept,) = await ledger.read("look", lambda tx: tx.confirmations(RUN))
        assert (kept.node, kept.model_root, kept.objection) == (NODES[0], digest("m"), "")

    with_ledger(url, story)


def test_uploads(url):
    def add(tx: Tx, node: NodeId = NODES[0], id_: bytes = b"1" * 32) -> object:
        return tx.add_upload(
            id_, ROUND, 1, node, header=b"h", signature=b"s", unit_hashes=[b"a" * 32] * 2, total=5
        )

    async def story(ledger):
        await ledger.run("begin", begin)
        assert await ledger.read("look", lambda tx: tx.upload(ROUND, 1, NODES[0])) is None
        row = await ledger.run("begin_upload", add)
        assert (row.node, row.total, row.unit_hashes) == (NODES[0], 5, (b"a" * 32,) * 2)
        assert row.receipt is None
        for again in (add, lambda tx: add(tx, id_=b"2" * 32), lambda tx: add(tx, node=NODES[1])):
            with pytest.raises(ExistsError):
                await ledger.run("begin_upload", again)
        finish = lambda tx: tx.finish_upload(b"1" * 32, b"r" * 32, START)  # noqa: E731
        assert await ledger.run("finish", finish) is True
        assert await ledger.run("finish", finish) is False
        done = await ledger.read("look", lambda tx: tx.upload_by_id(b"1" * 32))
        assert (done.receipt, done.finished_at) == (b"r" * 32, START)
        assert await ledger.read("look", lambda tx: tx.uploads(ROUND, 1)) == [done]
        assert await ledger.read("look", lambda tx: tx.uploads(ROUND, 2)) == []

    with_ledger(url, story)


def test_traffic_adds_up(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        await asyncio.gather(
            *(
                ledger.run("traffic", lambda tx: tx.add_traffic(ROUND, NODES[0], up=2**40, down=1))
                for _ in range(10)
            )
        )
        (row,) = await ledger.read("look", lambda tx: tx.traffic(RUN))
        assert (row.node, row.up, row.down) == (NODES[0], 10 * 2**40, 10)

    with_ledger(url, story)


def test_tokens_say_why_they_are_refused(url):
    async def story(ledger):
        await ledger.run("invite", lambda tx: tx.add_token(b"1" * 32, NODES[0], START + TTL))
        with pytest.raises(ExistsError):
            await ledger.run("invite", lambda tx: tx.add_token(b"1" * 32, NODES[1], START))
        for token, at, sentence in (
            (b"2" * 32, START, "unknown"),
            (b"1" * 32, START + TTL, "expired at 2026-03-01 12:00Z"),
        ):
            with pytest.raises(TokenRefusedError, match=sentence):
                await ledger.run("enrol", lambda tx, t=token, a=at: tx.use_token(t, a, b""))
        await ledger.run("enrol", lambda tx: tx.use_token(b"1" * 32, START, b"request"))
        with pytest.raises(TokenRefusedError, match="used before"):
            await ledger.run("enrol", lambda tx: tx.use_token(b"1" * 32, START, b"request"))
        assert await ledger.read("look", lambda tx: tx.token_use(b"1" * 32)) == b"request"

    with_ledger(url, story)


def test_nodes_and_certificates(url):
    def certify(tx: Tx, serial: int, days: int) -> None:
        tx.add_certificate(
            serial=serial,
            spki_sha256=Digest(digest("key")),
            subject_role="node",
            subject_name=NODES[0],
            not_after=START + timedelta(days=days),
            der=b"der",
        )

    async def story(ledger):
        await ledger.run("enrol", enrol)
        rows = await ledger.read("look", lambda tx: tx.nodes())
        assert [row.node for row in rows] == list(NODES)
        assert rows[0].seen_at is None
        await ledger.run("seen", lambda tx: tx.seen(NODES[0], START, "paused", "1.2"))
        await ledger.run("s", lambda tx: tx.set_node_status(NODES[0], "suspended", "key lost"))
        row = await ledger.read("look", lambda tx: tx.node(NODES[0]))
        assert (row.seen_at, row.state, row.agent_version) == (START, "paused", "1.2")
        assert row.status == "suspended"
        await ledger.run("enrol", lambda tx: tx.add_node(NODES[0], b"k" * 32, START))
        row = await ledger.read("look", lambda tx: tx.node(NODES[0]))
        assert (row.signing_key, row.status) == (b"k" * 32, "suspended")  # no way back in

        await ledger.run("certify", lambda tx: certify(tx, 2**159, 30))
        await ledger.run("certify", lambda tx: certify(tx, 7, 10))
        with pytest.raises(ExistsError):
            await ledger.run("certify", lambda tx: certify(tx, 7, 90))
        found = await ledger.read("look", lambda tx: tx.certificate(Digest(digest("key"))))
        assert found.serial == 2**159
        assert await ledger.read("look", lambda tx: tx.certificate(Digest(digest("no")))) is None

        for key, name, standing in (
            ("key", NODES[0], (True, "suspended")),  # two certificates of this key
            ("key", NODES[1], (True, "active")),
            ("key", "nobody", (True, None)),
            ("no", NODES[0], (False, None)),
        ):
            named = Digest(digest(key)), name
            assert await ledger.read("look", lambda tx, n=named: tx.standing(*n)) == standing

    with_ledger(url, story)


def test_progress_is_replaced(url):
    async def story(ledger):
        await ledger.run("enrol", enrol)
        for text in (b"first", b"second"):
            await ledger.run("p", lambda tx, t=text: tx.set_progress(NODES[0], t, START))
        (row,) = await ledger.read("look", lambda tx: tx.progress())
        assert (row.node, row.reports, row.received_at) == (NODES[0], b"second", START)

    with_ledger(url, story)


def test_a_refused_event_is_not_recorded(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        before = ledger.version()
        late = START + timedelta(hours=1)
        with pytest.raises(WrongPhaseError):
            await ledger.run(
                "join", lambda tx: advance(tx, ROUND, JoinArrived(NODES[0]), late, transaction="j")
            )
        assert ledger.version() == before

    with_ledger(url, story)
