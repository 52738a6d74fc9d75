"""What nodes and operators are answered, and the refusals that need the ledger (4.21 to 4.25)."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from coordinator.ledger import Ledger
from coordinator.services.board import Board
from protocols.enrolment import Invitation
from protocols.errors import (
    EquivocationError,
    MalformedMessageError,
    ModelDisagreementError,
    NotFoundError,
    NotListedError,
    NotPermittedError,
    PlanRefusedError,
    RefusedError,
    WrongPhaseError,
)
from protocols.gen import admin_pb2, rounds_pb2
from protocols.identifiers import NodeId
from protocols.plan import Plan
from protocols.rounds_codec import to_ms
from protocols.tensors.snapshot import Snapshot
from tests.support.ledgers import NODES, START, digest
from tests.support.spine_world import AS, PERSON, ZAPALA, A, B, C, D, story

# -- refusals ----------------------------------------------------------------------------------

REFUSALS = [
    ("4.1 stranger joins", lambda w: w.join(ZAPALA), NotListedError),
    ("4.22 another plan", lambda w: w.join(plan=digest("other")), PlanRefusedError),
    ("4.23 another model", lambda w: w.join(model=digest("other")), ModelDisagreementError),
    ("4.24 confirmed too early", lambda w: w.confirm(model=digest("m")), WrongPhaseError),
    ("no such round", lambda w: w.join(number=9), NotFoundError),
    ("no digest", lambda w: w.join(plan="abc"), MalformedMessageError),
    ("neither model nor objection", lambda w: w.confirm(), MalformedMessageError),
    ("a paused what", lambda w: w.sync(state="asleep"), MalformedMessageError),
    ("control characters", lambda w: w.sync(agent_version="1\n2"), MalformedMessageError),
    (
        "too many reports",
        lambda w: w.sync(progress=[rounds_pb2.Progress(round=w.ref)] * 17),
        MalformedMessageError,
    ),
    (
        "declines without a rule",
        lambda w: w.spine.rounds.Decline(rounds_pb2.DeclineRequest(round=w.ref), AS[A]),
        MalformedMessageError,
    ),
    (
        "stranger asks for the plan",
        lambda w: w.spine.rounds.GetPlan(rounds_pb2.GetPlanRequest(run=w.plan.run), AS[ZAPALA]),
        NotListedError,
    ),
    (
        "operator joins",
        lambda w: w.spine.rounds.Join(rounds_pb2.JoinRequest(), PERSON),
        NotPermittedError,
    ),
    (
        "node lists",
        lambda w: w.spine.admin.ListRuns(admin_pb2.ListRunsRequest(), AS[A]),
        NotPermittedError,
    ),
]


@pytest.mark.parametrize(("clause", "call", "error"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_refused(clause, call, error):
    async def play(w):
        before = w.spine.ledger.version()
        with pytest.raises(error) as caught:
            await call(w)
        assert type(caught.value) is error
        assert w.spine.ledger.version() == before

    story(play)


def test_4_21_who_is_suspended_takes_no_part():
    async def play(w):
        await w.spine.ledger.run("s", lambda tx: tx.set_node_status(A, "suspended", "key lost"))
        for call in (w.join(A), w.ready(A), w.confirm(A, model=digest("m"))):
            with pytest.raises(NotPermittedError):
                await call

    story(play)


def test_4_23_ready_from_another_model():
    async def play(w):
        for node in NODES:
            await w.join(node)
        with pytest.raises(ModelDisagreementError):
            await w.ready(A, model=digest("other"))
        assert (await w.ready(A)).phase.ready == [A]

    story(play)


def test_4_24_a_stranger_confirms_nothing():
    async def play(w):
        await w.finish()
        with pytest.raises(NotListedError):
            await w.confirm(ZAPALA, model=digest("m"))

    story(play)


def test_4_25_a_verdict_is_not_changed():
    async def play(w):
        await w.finish()
        root = (await w.facts()).rounds[0].phase.model_root
        before = w.spine.ledger.version()
        await w.confirm(A, model=root)
        await w.confirm(A, model=root)  # its answer was lost
        assert w.spine.ledger.version() == before + 1
        for changed in ({"model": digest("x")}, {"model": root, "objection": "not_in_sum"}):
            with pytest.raises(EquivocationError):
                await w.confirm(A, **changed)

    story(play)


# -- what nodes are told -----------------------------------------------------------------------


def test_a_round_as_its_nodes_see_it():
    async def play(w):
        joined = await w.join(A)
        again = await w.join(A)
        assert joined.phase == again.phase
        assert joined.phase.joined == [A]
        answer = await w.sync(B)
        (run,) = answer.runs
        assert (run.run, run.plan_digest, run.status) == (w.plan.run, w.plan.digest, "active")
        assert run.current.phase == joined.phase
        assert (run.current.index, run.current.round) == (0, w.ref)
        assert Snapshot.from_bytes(run.current.start_snapshot).model_root == w.root
        assert run.current.why == f"1 joined, 2 needed; until 12:01:00Z for {B}, {C}, {D}"
        assert not run.HasField("last_released")
        assert answer.now_ms == to_ms(START)
        assert (await w.sync(ZAPALA)).runs == []
        plan = await w.spine.rounds.GetPlan(rounds_pb2.GetPlanRequest(run=w.plan.run), AS[A])
        assert Plan.from_bytes(plan.plan) == w.plan

    story(play)


def test_declines_and_leaves_keep_their_reasons():
    async def play(w):
        request = rounds_pb2.DeclineRequest(round=w.ref, rule="site.hours", reason="night")
        await w.spine.rounds.Decline(request, AS[D])
        for node in (A, B, C):
            await w.join(node)
        leave = rounds_pb2.LeaveRequest(round=w.ref, code="worker_failed", reason="out of memory")
        reply = await w.spine.rounds.Leave(leave, AS[C])
        assert reply.phase.left == [C]
        said = [entry.why for entry in await w.history()]
        assert any(why.startswith(f"{D} declined (site.hours): night; ") for why in said)
        assert any(why.startswith(f"{C} left (worker_failed): out of memory; ") for why in said)
        times = await w.spine.ledger.read("t", lambda tx: tx.phase_times(w.plan.run_id))
        assert [time.phase for time in times] == ["Open", "Training"]

    story(play)


def test_a_poll_is_answered_when_something_concerns_the_node():
    async def play(w):
        seen = (await w.sync(A)).version
        waiting = asyncio.create_task(w.sync(A, seen=seen, wait_ms=30_000))
        for node in (B, C, D):
            await w.join(node)
        await asyncio.sleep(0.05)
        assert not waiting.done()  # peers that join are not news
        await w.join(A)  # but Training is
        answer = await asyncio.wait_for(waiting, 10)
        assert answer.runs[0].current.phase.name == "Training"
        assert answer.version > seen

    story(play)


def test_what_happened_between_two_polls_is_not_missed():
    async def play(w):
        seen = (await w.sync(A)).version
        for node in NODES:
            await w.join(node)
        answer = await asyncio.wait_for(w.sync(A, seen=seen, wait_ms=30_000), 10)
        assert answer.runs[0].current.phase.name == "Training"

    story(play)


def test_a_poll_ends_with_its_time():
    async def play(w):
        seen = (await w.sync(A)).version
        answer = await w.sync(A, seen=seen, wait_ms=20)
        assert answer.version == seen
        assert len(answer.runs) == 1
        ahead = await w.sync(A, seen=seen + 1000, wait_ms=20)  # it knew a ledger that is gone
        assert ahead.version == seen

    story(play)


def test_a_thousand_polls_cost_one_look_for_each_change(monkeypatch):
    looks: list[str] = []
    read = Ledger.read

    async def counted(self, name, work):
        looks.append(name)
        return await read(self, name, work)

    async def play(w):
        monkeypatch.setattr(Ledger, "read", counted)
        board = Board(w.spine.ledger, w.spine.clock)
        seen, _ = await board.wait(A, 0, 0)
        polls = [
            asyncio.create_task(board.wait(node, seen, 30)) for node in NODES for _ in range(4)
        ]
        strangers = [
            asyncio.create_task(board.wait(NodeId(f"n{i}"), seen, 30)) for i in range(1000)
        ]
        await asyncio.sleep(0.1)
        looks.clear()
        for node in NODES:
            await w.join(node)
        await asyncio.wait_for(asyncio.gather(*polls), 20)
        assert looks.count("board") <= len(NODES)
        assert not any(task.done() for task in strangers)
        for task in strangers:
            task.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        assert board._follower is None  # nobody waits, nobody looks
        assert board._waiting == {}

    story(play)


def test_polls_do_not_keep_a_closing_coordinator_busy():
    """Once the ledger is closed, who waits is let go and nobody spins."""

    async def play(w):
        seen = (await w.sync(A)).version
        waiting = asyncio.create_task(w.sync(A, seen=seen, wait_ms=30_000))
        await asyncio.sleep(0.01)
        await w.spine.ledger.close()
        await asyncio.sleep(0.01)  # spinning would never come back here
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    story(play)


def test_a_node_with_too_many_polls_gets_its_oldest_answered():
    async def play(w):
        seen = (await w.sync(A)).version
        first = asyncio.create_task(w.sync(A, seen=seen, wait_ms=30_000))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(w.sync(A, seen=seen, wait_ms=30_000)) for _ in range(4)]
        assert (await asyncio.wait_for(first, 10)).version == seen
        assert not any(task.done() for task in others)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    story(play)


def test_progress_is_shown_but_decides_nothing():
    async def play(w):
        report = rounds_pb2.Progress(round=w.ref, activity="training", step=7, max_step=9)
        before = w.spine.ledger.version()
        await w.sync(A, progress=[report], agent_version="0.1.0", state="running")
        for _ in range(100):
            nodes = await w.spine.admin.ListNodes(admin_pb2.ListNodesRequest(), PERSON)
            (mine,) = [node for node in nodes.nodes if node.node == A]
            if mine.progress:
                break
            await asyncio.sleep(0.01)
        assert mine.progress[0].step == 7
        assert (mine.state, mine.agent_version) == ("running", "0.1.0")
        assert mine.last_seen_ms == to_ms(START)
        why = await w.spine.admin.Why(admin_pb2.WhyRequest(round=w.ref), PERSON)
        assert [entry.activity for entry in why.progress] == ["training"]
        assert w.spine.ledger.version() == before

    story(play)


# -- what operators are told -------------------------------------------------------------------


def test_why_is_the_machines_own_answer():
    async def play(w):
        await w.join(A)
        why = await w.spine.admin.Why(admin_pb2.WhyRequest(round=w.ref), PERSON)
        assert why.why == f"1 joined, 2 needed; until 12:01:00Z for {B}, {C}, {D}"
        assert why.waiting_for == [B, C, D]
        for ref in (
            rounds_pb2.RoundRef(run="nobody"),
            rounds_pb2.RoundRef(run=w.plan.run, number=9),
        ):
            with pytest.raises(NotFoundError):
                await w.spine.admin.Why(admin_pb2.WhyRequest(round=ref), PERSON)

    story(play)


def test_a_disagreement_marks_the_facts_and_the_history():
    async def play(w):
        await w.finish()
        root = (await w.facts()).rounds[0].phase.model_root
        await w.confirm(A, model=root)
        reply = await w.confirm(B, model=digest("mine"))  # whatever it calls it
        assert "objects (model_disagreement)" in reply.why
        await w.confirm(C, objection="not_in_sum", detail="my header is missing")
        facts = await w.facts()
        assert facts.rounds[0].why.endswith(f"2 of 3 object: {B}, {C}")
        confirmed = {entry.node: entry.confirmed for entry in facts.rounds[0].traffic}
        assert confirmed[A] == root
        assert confirmed[B] == "objection: model_disagreement"
        assert confirmed[C] == "objection: not_in_sum"
        assert confirmed[D] == ""
        said = [entry.why for entry in await w.history() if entry.transaction == "confirm"]
        assert said[0] == f"{A} computed the same model"
        assert said[2].endswith("; my header is missing")

    story(play)


def test_facts_of_a_run():
    async def play(w):
        await w.finish()
        facts = await w.facts()
        (round_,) = facts.rounds
        assert (facts.status, facts.plan_digest, facts.rounds_planned) == ("done", w.plan.digest, 1)
        assert [time.phase for time in round_.times] == [
            "Open", "Training", "Uploading", "Released", "Released",
        ]  # fmt: skip
        assert round_.metrics["nodes"] == len(NODES)
        assert all(entry.bytes_up > 0 for entry in round_.traffic)
        assert Snapshot.from_bytes(round_.next_snapshot).model_root == round_.phase.model_root
        listed = await w.spine.admin.ListRuns(admin_pb2.ListRunsRequest(), PERSON)
        assert [(run.run, len(run.rounds)) for run in listed.runs] == [(w.plan.run, 0)]
        (view,) = (await w.sync(A)).runs
        assert view.status == "done"
        assert view.last_released.phase.model_root == round_.phase.model_root

    story(play)


def test_watching_tells_everything_once_and_ends_with_the_run():
    async def play(w):
        seen: list[admin_pb2.HistoryEntry] = []

        async def watch() -> None:
            request = admin_pb2.WatchRunRequest(run=w.plan.run)
            async for entry in w.spine.admin.WatchRun(request, PERSON):
                seen.append(entry)  # noqa: PERF401 - read by others before it ends

        watching = asyncio.create_task(watch())
        await w.finish()
        await asyncio.wait_for(watching, 20)
        expected = [entry for entry in await w.history() if entry.run == w.plan.run]
        assert [entry.id for entry in seen] == [entry.id for entry in expected]
        later = [
            entry
            async for entry in w.spine.admin.WatchRun(
                admin_pb2.WatchRunRequest(run=w.plan.run, after=seen[-2].id), PERSON
            )
        ]
        assert [entry.id for entry in later] == [seen[-1].id]
        with pytest.raises(NotFoundError):
            async for _ in w.spine.admin.WatchRun(admin_pb2.WatchRunRequest(run="nobody"), PERSON):
                pass

    story(play)


def test_stopping():
    async def play(w):
        await w.join(A)
        request = admin_pb2.StopRunRequest(run=w.plan.run, reason="enough")
        facts = await w.spine.admin.StopRun(request, PERSON)
        again = await w.spine.admin.StopRun(request, PERSON)
        assert facts == again
        assert facts.status == "stopped"
        assert (facts.rounds[0].phase.name, facts.rounds[0].phase.code) == ("Aborted", "stopped")
        await w.spine.drive()
        assert len((await w.facts()).rounds) == 1  # no other round opens
        with pytest.raises(WrongPhaseError):
            await w.join(B)

    story(play)


def test_what_is_over_is_not_stopped():
    async def play(w):
        await w.finish()
        with pytest.raises(RefusedError, match="is done"):
            await w.spine.admin.StopRun(admin_pb2.StopRunRequest(run=w.plan.run), PERSON)

    story(play)


def test_an_invitation_is_kept_only_as_its_hash():
    async def play(w):
        request = admin_pb2.InviteRequest(institution="valdivia", valid_hours=72)
        answer = await w.spine.admin.Invite(request, PERSON)
        invitation = Invitation.parse(answer.token)
        assert invitation.institution == "valdivia"
        assert answer.expires_at_ms == to_ms(START + timedelta(hours=72))
        for path in w.spine.folder.iterdir():
            if path.name.startswith("ledger.sqlite"):
                assert invitation.secret not in path.read_bytes()
        for hours in (0, 73):
            with pytest.raises(MalformedMessageError):
                await w.spine.admin.Invite(
                    admin_pb2.InviteRequest(institution="valdivia", valid_hours=hours), PERSON
                )

    story(play)
