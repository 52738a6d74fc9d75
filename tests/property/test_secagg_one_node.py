"""One honest node against everybody else: it never contradicts itself.

The coordinator and all other members are one adversary: it holds their keys, so it can show this
node any list with any number of valid signatures of theirs, in any order, again and again, and cut
its power before or after anything is written. Whatever the schedule, everything the node ever sent
must be what one honest node may send.
"""

from __future__ import annotations

import copy
import functools
import json
from itertools import combinations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from protocols.errors import FederationError
from protocols.secagg import coordinator as hub
from protocols.secagg import messages
from protocols.secagg import node as side
from protocols.secagg.checks import check_survivors
from protocols.secagg.messages import (
    Abort,
    AbortCertificate,
    Commit,
    CommitCertificate,
    DealBundle,
    Reveal,
    Signed,
    Survivors,
    Upload,
    signed_from_bytes,
)
from protocols.secagg.packets import Kind
from protocols.secagg.states import Committed, Uploaded
from tests.support.secagg import CHECKPOINT, SEEN, Site, World, identity, make_attempt, node_name

ME, B, C, D = (node_name(i) for i in range(1, 5))
ROOTS = (SEEN, SEEN[::-1])  # what the caller may say it has masked
LISTS = [frozenset(some) for size in (2, 3, 4) for some in combinations((ME, B, C, D), size)]


@functools.cache
def material(round_: int, number: int) -> dict:
    """All that the adversary may show this node in one attempt."""
    world = World.make(4, d=8, attempt=make_attempt(4, number=number, round_=round_))
    world.up_to_go()
    headers = {}
    for index, node in enumerate((ME, B, C, D), start=1):
        for root in ROOTS:
            body = Upload(
                federation=world.attempt.federation,
                round=world.attempt.round,
                attempt=number,
                node=node,
                ctx=world.agreed.ctx,
                upload_root=root,
                length=20,
            )
            headers[node, root] = Signed.make(identity(index), body)
    lists, certificates = {}, {}
    for some in LISTS:
        for root in ROOTS:  # two lists of the same members: this node's header differs
            chosen = {n: headers[n, root if n == ME else SEEN] for n in some}
            survivors = hub.make_survivors(chosen)
            lists[some, root] = survivors
            if len(some) < 3:
                continue
            listed = check_survivors(survivors, world.agreed)
            commits = {
                node: Signed.make(
                    identity(int(node[-2:])),
                    Commit(
                        federation=world.attempt.federation,
                        round=world.attempt.round,
                        attempt=number,
                        node=node,
                        ctx=world.agreed.ctx,
                        survivors=listed.digest,
                    ),
                )
                for node in some
            }
            certificates[some, root] = CommitCertificate(
                commits=tuple(commits[node] for node in sorted(commits))
            )
    aborts = tuple(
        Signed.make(
            identity(index),
            Abort(
                federation=world.attempt.federation,
                round=world.attempt.round,
                attempt=number,
                node=node_name(index),
                roster_root=world.attempt.roster.root,
                reason="test.abort",
            ),
        )
        for index in (2, 3, 4)
    )
    return {
        "attempt": world.attempt,
        "start": world.start.to_bytes(),
        "delivery": world.deliveries[ME].to_bytes(),
        "go": hub.make_go(world.oks).to_bytes(),
        "lists": {key: value.to_bytes() for key, value in lists.items()},
        "certificates": {key: value.to_bytes() for key, value in certificates.items()},
        "aborts": AbortCertificate(aborts=aborts),
    }


ATTEMPTS = [(4, 1), (4, 2), (5, 1)]
STEPS = ("ready", "start", "delivery", "go", "upload", "commit", "reveal")


def apply(site: Site, op: tuple) -> None:
    """Do one thing; refusals are part of life. ``cut`` loses power before the record is written."""
    name, attempt, choice, root, flag = op
    found = material(*ATTEMPTS[attempt])
    before, sent = site.record, len(site.sent)
    try:
        match name:
            case "ready":
                site.ready(found["attempt"], material(*ATTEMPTS[0])["aborts"] if flag else None)
            case "start":
                site.deal(found["start"])
            case "delivery":
                site.acknowledge(found["delivery"])
            case "go":
                site.go(found["go"])
            case "upload":
                site.do(side.upload(site.state, site.key, upload_root=ROOTS[root], length=20))
            case "commit":
                site.commit(found["lists"][LISTS[choice], ROOTS[root]])
            case "reveal":
                site.reveal(found["certificates"].get((LISTS[choice], ROOTS[root]), b""))
            case "abort":
                site.abort()
            case "close":
                site.do(side.close(site.state, "aborted"))
            case "cut":
                # everything since the last durable record is lost, and nothing was sent
                site.record, site.sent[sent:] = before, []
    except (FederationError, AttributeError):
        # AttributeError: there is no state yet; the caller has nothing to act on
        assert site.record == before
        assert len(site.sent) == sent


def said(site: Site) -> list[Signed]:
    """Everything this node ever sent, parsed."""
    kinds = {
        cls.SCHEMA: cls
        for cls in vars(messages).values()
        if isinstance(cls, type) and issubclass(cls, messages.Body) and "SCHEMA" in vars(cls)
    }
    found = []
    for data in site.sent:
        value = json.loads(data)
        if "body" in value:
            found.append(signed_from_bytes(kinds[value["body"]["schema"]], data))
        else:
            found.append(DealBundle.from_bytes(data).deal)
    return found


def check_consistent(sent: list[Signed]) -> None:
    """What one honest node may have said, over all attempts and rounds."""
    for first, second in combinations(sent, 2):
        assert hub.conflict(first, second) is None
    for signed in sent:
        if isinstance(signed.body, Reveal):
            commits = [s.body for s in sent if isinstance(s.body, Commit)]
            assert any(
                (c.ctx, c.survivors) == (signed.body.ctx, signed.body.survivors) for c in commits
            )
            kinds = {share.of: share.kind for share in signed.body.shares}
            assert len(kinds) == len(signed.body.shares)
            assert kinds[ME] is Kind.SEED
    committed = {s.body.round for s in sent if isinstance(s.body, Commit)}
    for round_ in committed:
        last = max(
            s.body.attempt
            for s in sent
            if s.body.round == round_ and isinstance(s.body, (Upload, Commit))
        )
        commit = next(s.body for s in sent if isinstance(s.body, Commit) and s.body.round == round_)
        assert commit.attempt == last  # nothing was uploaded after a commit


operations = st.tuples(
    st.sampled_from([*STEPS, "abort", "close", "cut"]),
    st.integers(0, len(ATTEMPTS) - 1),
    st.integers(0, len(LISTS) - 1),
    st.integers(0, 1),
    st.booleans(),
)


@st.composite
def schedules(draw):
    """Mostly the right next step, else anything: pure noise would hardly leave READY."""
    out: list[tuple] = []
    attempt = 0
    for _ in range(draw(st.integers(1, 4))):
        upto = draw(st.integers(1, len(STEPS)))
        choice, root = draw(st.integers(0, len(LISTS) - 1)), draw(st.integers(0, 1))
        for step in STEPS[:upto]:
            out.append((step, attempt, choice, root, True))
            out.extend(draw(st.lists(operations, max_size=1)))
        attempt = draw(st.integers(0, len(ATTEMPTS) - 1))
    return out


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_a_node_never_contradicts_itself(schedule):
    site = copy.deepcopy(World.make(4, d=8).members[ME])

    for op in schedule:
        apply(site, op)

    sent = said(site)
    event(f"reached {type(site.state).__name__}")
    check_consistent(sent)


def honest(attempt: int, members: frozenset, upto: int) -> list[tuple]:
    return [(step, attempt, LISTS.index(members), 0, True) for step in STEPS[:upto]]


def test_the_adversary_gets_as_far_as_a_reveal():
    """Else the property would say nothing about commits and reveals."""
    site = World.make(4, d=8).members[ME]
    for op in honest(0, frozenset({ME, B, C}), len(STEPS)):
        apply(site, op)
    assert {type(s.body).__name__ for s in said(site)} == {
        "Ready",
        "Deal",
        "DealOk",
        "Upload",
        "Commit",
        "Reveal",
    }


def test_a_retry_with_a_certificate_is_reached():
    site = World.make(4, d=8).members[ME]
    for op in [*honest(0, frozenset({ME, B, C}), 5), *honest(1, frozenset({ME, B, C}), 7)]:
        apply(site, op)
    uploads = [s.body.attempt for s in said(site) if isinstance(s.body, Upload)]
    assert uploads == [1, 2]
    check_consistent(said(site))


def record_of(site: Site, kind: type) -> bytes:
    assert isinstance(site.state, kind)
    return site.record


def test_the_oracle_convicts_a_node_whose_disk_was_rolled_back():
    """Restoring an older record is the one thing a node cannot survive by itself (9.7)."""
    site = World.make(4, d=8).members[ME]
    for op in honest(0, frozenset({ME, B, C}), 5):
        apply(site, op)
    older = record_of(site, Uploaded)
    apply(site, ("commit", 0, LISTS.index(frozenset({ME, B, C})), 0, True))
    record_of(site, Committed)
    site.record = older
    apply(site, ("commit", 0, LISTS.index(frozenset({ME, B, D})), 0, True))
    with pytest.raises(AssertionError):
        check_consistent(said(site))


def test_the_oracle_convicts_both_verdicts():
    site = World.make(4, d=8).members[ME]
    for op in honest(0, frozenset({ME, B, C}), 5):
        apply(site, op)
    older = site.record
    site.abort()
    site.record = older
    apply(site, ("commit", 0, LISTS.index(frozenset({ME, B, C})), 0, True))
    with pytest.raises(AssertionError):
        check_consistent(said(site))


def test_the_checkpoint_of_the_material_is_the_one_the_node_verifies():
    delivery = messages.Delivery.from_bytes(material(4, 1)["delivery"])
    assert delivery.checkpoint == CHECKPOINT


def test_lists_with_and_without_this_node_are_among_the_material():
    lists = material(4, 1)["lists"]
    members = {frozenset(Survivors.from_bytes(data).nodes) for data in lists.values()}
    assert frozenset({B, C, D}) in members
    assert frozenset({ME, B, C, D}) in members
