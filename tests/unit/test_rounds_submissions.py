"""Which plans are taken, and how a run goes on from round to round."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from coordinator.rounds import MAX_FAILURES, EndRun, OpenRound, Wait, next_of_run, retry_at
from coordinator.services.board import stage
from protocols.errors import (
    ExistsError,
    FederationError,
    ManifestMismatchError,
    NotFoundError,
    PlanRefusedError,
)
from protocols.gen import admin_pb2
from protocols.identifiers import RoundId
from protocols.plan import Plan
from protocols.rounds import Aborted, Burned, Dealing, Open, Released, Training
from tests.support.ledgers import NODES, START
from tests.support.spine import (
    initial_model,
)
from tests.support.spine_world import PERSON, A, B, story

# -- submissions -------------------------------------------------------------------------------


def changed(plan: Plan, **fields) -> Plan:
    return Plan.from_value(plan.model_dump(mode="json", by_alias=True) | fields)


def model(**fields) -> dict:
    return {"family": "vector", **fields}


SUBMISSIONS = [
    ("other federation", lambda p: {"federation": "other"}, PlanRefusedError, "plan.federation"),
    ("unknown node", lambda p: {"roster": [*NODES, "ushuaia"]}, PlanRefusedError, "plan.roster"),
    (
        "unknown optimizer",
        lambda p: {"outer": {"optimizer": "flower:Nobody"}},
        PlanRefusedError,
        "outer.flower.unknown",
    ),
    ("unknown tensor", lambda p: {"trainable": ["nobody"]}, ManifestMismatchError, None),
    (
        "another first model",
        lambda p: {"model": model(manifest=p.model.manifest, initial="0" * 64)},
        PlanRefusedError,
        "model.initial",
    ),
    (
        "another parameter set",
        lambda p: {"model": model(manifest="0" * 64, initial=p.model.initial)},
        PlanRefusedError,
        "model.initial",
    ),
    ("same name, other plan", lambda p: {"title": "x", "run": p.run}, ExistsError, None),
]


@pytest.mark.parametrize(
    ("why", "change", "error", "rule"), SUBMISSIONS, ids=[row[0] for row in SUBMISSIONS]
)
def test_submissions_that_are_refused(why, change, error, rule):
    async def play(w):
        plan = changed(w.plan, **{"run": "second", **change(w.plan)})
        snapshot = initial_model(w.spine.blobs, w.plan).to_bytes()
        before = w.spine.ledger.version()
        with pytest.raises(error) as caught:
            await w.spine.admin.SubmitRun(
                admin_pb2.SubmitRunRequest(plan=plan.to_bytes(), snapshot=snapshot), PERSON
            )
        assert getattr(caught.value, "rule", None) == rule
        assert w.spine.ledger.version() == before

    story(play)


def test_a_submission_without_its_blobs_is_refused():
    async def play(w):
        snapshot = initial_model(w.spine.blobs, w.plan)
        request = admin_pb2.SubmitRunRequest(
            plan=changed(w.plan, run="second").to_bytes(), snapshot=snapshot.to_bytes()
        )
        for name in ("theta", "scales", "manifest"):
            w.spine.blobs.remove(getattr(snapshot, name))
            with pytest.raises(NotFoundError, match=name):
                await w.spine.admin.SubmitRun(request, PERSON)
            initial_model(w.spine.blobs, w.plan)
        await w.spine.admin.SubmitRun(request, PERSON)

    story(play)


def test_submitting_again_is_harmless():
    async def play(w):
        snapshot = initial_model(w.spine.blobs, w.plan).to_bytes()
        request = admin_pb2.SubmitRunRequest(plan=w.plan.to_bytes(), snapshot=snapshot)
        await w.spine.ledger.run("s", lambda tx: tx.set_node_status(A, "suspended", "later"))
        before = w.spine.ledger.version()
        facts = await w.spine.admin.SubmitRun(request, PERSON)
        assert facts.run == w.plan.run
        assert w.spine.ledger.version() == before

    story(play)


# -- decisions ---------------------------------------------------------------------------------


async def rows(w):
    run = await w.spine.ledger.read("look", lambda tx: tx.run(w.plan.run_id))
    return run, (await w.spine.all_rounds(w.plan.run_id))[0]


def test_how_a_run_goes_on():
    async def play(w):
        run, row = await rows(w)
        burned = replace(row, phase=Burned(code="x", reason="y"))
        released = replace(row, phase=Released(attempt=1, survivors=frozenset(NODES)))

        assert next_of_run(run, []) == OpenRound(
            number=0, index=0, start_snapshot=run.snapshot, why="the first round of the run"
        )
        assert isinstance(next_of_run(run, [row]), Wait)
        assert isinstance(next_of_run(run, [released]), Wait)  # its sum is not open yet
        again = next_of_run(run, [burned])
        assert isinstance(again, OpenRound)
        assert (again.number, again.index, again.start_snapshot) == (1, 0, row.start_snapshot)
        assert again.why == f"round {row.round} was burned: y"
        four = [replace(burned, round=RoundId(row.round.run, n)) for n in (3, 2, 1, 0)]
        assert isinstance(next_of_run(run, four), OpenRound)
        five = [replace(burned, round=RoundId(row.round.run, 4)), *four]
        assert len(five) == MAX_FAILURES
        assert next_of_run(run, five) == EndRun(
            status="failed", why="5 rounds in a row ended without a release; the last: y"
        )
        pauses = [retry_at(four[4 - n :]) - row.changed_at for n in (1, 2, 3, 4)]
        assert pauses == [timedelta(seconds=s) for s in (1, 2, 4, 8)]
        assert retry_at([row]) is None

    story(play)


def test_what_nodes_have_to_hear_of():
    async def play(w):
        _, row = await rows(w)
        opening = row.phase
        assert isinstance(opening, Open)
        dealing = Dealing(terms=opening.terms, closes_at=START, attempt=1, ready=frozenset({A, B}))
        news = [
            opening,
            Training(terms=opening.terms, closes_at=START, cohort=frozenset({A})),
            dealing,
            replace(dealing, dealt=dealing.ready),
            replace(dealing, attempt=2),
            Released(attempt=1, survivors=frozenset()),
            Aborted(code="x", reason="y"),
        ]
        assert len({stage(phase) for phase in news}) == len(news)
        assert stage(opening) == stage(replace(opening, joined=frozenset({A})))
        assert stage(dealing) == stage(replace(dealing, dealt=frozenset({A})))

    story(play)


def test_a_ledger_that_is_away_is_said():
    async def play(w):
        await w.spine.ledger.close()
        with pytest.raises(FederationError):
            await w.join(A)

    story(play)
