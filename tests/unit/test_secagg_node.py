"""A node and a coordinator beyond refusals: complaints, bad dealers, repetition, evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.crypto.signatures import public_bytes
from protocols.errors import (
    EquivocationError,
    WrongPhaseError,
)
from protocols.identifiers import RoundId
from protocols.secagg import checks
from protocols.secagg import coordinator as hub
from protocols.secagg import node as side
from protocols.secagg.dealing import judge_complaint
from protocols.secagg.errors import BadShareError, CheckFailedError
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.messages import (
    Abort,
    DealOk,
    Signed,
    signed_from_bytes,
)
from protocols.secagg.states import AbortSent, Closed
from tests.support.secagg import (
    SEEN,
    World,
    make_attempt,
    make_roster,
    seed_of,
)
from tests.support.secagg_stages import (
    KEYS,
    A,
    B,
    C,
    D,
    abort_certificate,
    at,
    badly_dealt,
    forge,
    world_with_bad_polynomial,
)

# -- bad dealers and false complaints ----------------------------------------------------------


def test_a_bad_packet_leads_to_a_complaint_that_convicts_the_dealer():
    world = at("dealt")
    world.bundles[B] = badly_dealt(world)
    checks.check_bundle(world.bundles[B], world.started)  # nobody but A can see it
    world.do_deliver()
    site = world.members[A]
    complaint, aborted = site.acknowledge(world.deliveries[A].to_bytes())
    assert isinstance(site.state, AbortSent)
    assert not site.state.uploaded
    signed = signed_from_bytes(side.Complaint, complaint)
    checks.check_abort(signed_from_bytes(Abort, aborted), world.attempt)
    guilty, why = judge_complaint(signed, world.bundles[B], world.started)
    assert guilty == B
    assert "committed" in why
    # the others opened theirs; without A's DEAL_OK they never get a GO
    for node in (C, D):
        (data,) = world.members[node].acknowledge(world.deliveries[node].to_bytes())
        world.oks[node] = signed_from_bytes(DealOk, data)
    with pytest.raises(CheckFailedError) as caught:
        world.members[C].go(hub.make_go(world.oks).to_bytes())
    assert caught.value.clause == "4.8"
    # and it repeats itself after a restart
    assert site.abort() == [complaint, aborted]
    # the next attempt needs no certificate: nothing was uploaded
    site.ready(make_attempt(4, number=2))


def _complaint(world: World, ek_secret: bytes, against=B) -> Signed:
    attempt = world.attempt
    return Signed.make(
        KEYS[A],
        side.Complaint(
            federation=attempt.federation,
            round=attempt.round,
            attempt=attempt.number,
            node=A,
            ctx_deal=world.started.ctx_deal,
            against=against,
            ek_secret=ek_secret,
        ),
    )


def test_a_false_complaint_convicts_the_complainant():
    world = at("dealt")
    keys = AttemptKeys.derive(seed_of("attempt", 1, str(world.attempt)), world.attempt, A)
    honest_key = _complaint(world, keys.ek_secret)
    assert judge_complaint(honest_key, world.bundles[B], world.started)[0] == A
    other_key = _complaint(world, bytes(range(32)))
    guilty, why = judge_complaint(other_key, world.bundles[B], world.started)
    assert guilty == A
    assert "EK" in why


def test_a_complaint_about_something_else_is_no_evidence():
    world = at("dealt")
    keys = AttemptKeys.derive(seed_of("attempt", 1, str(world.attempt)), world.attempt, A)
    with pytest.raises(CheckFailedError):
        judge_complaint(
            _complaint(world, keys.ek_secret, against=C), world.bundles[B], world.started
        )


def test_a_dealer_off_its_polynomial_is_named():
    world = world_with_bad_polynomial(threshold_off=1)
    with pytest.raises(BadShareError) as caught:
        world.do_open()
    assert caught.value.culprit == B


def test_a_dealer_with_one_bad_share_is_named_and_the_sum_opens():
    """Four reveals, one of them holding B's bad share: three others give what B committed to."""
    world = world_with_bad_polynomial(threshold_off=0)
    (data,) = world.members[B].reveal(world.certificate.to_bytes())
    signed = signed_from_bytes(side.Reveal, data)
    # B, deriving its own share again, reveals the right one
    body = signed.body
    world.reveals[B] = Signed(body=body, signature=signed.signature)
    found = hub.reconstruct((s.body for s in world.reveals.values()), world.listed)
    assert set(found.faults) == {B}
    assert found.opened.self_seeds.keys() == set(world.members)


# -- repetition --------------------------------------------------------------------------------


def test_asked_again_a_node_sends_the_same_bytes():
    """A lost answer or a crash after the durable write: same state, same bytes."""
    world = at("ready")
    site = world.members[A]
    assert site.ready(world.attempt) == [world.start.readys[0].to_bytes()]
    world = at("dealt")
    site = world.members[A]
    assert site.deal(world.start.to_bytes()) == [world.bundles[A].to_bytes()]
    world = at("acknowledged")
    site = world.members[A]
    assert site.acknowledge(world.deliveries[A].to_bytes()) == [world.oks[A].to_bytes()]
    world = at("masking")
    site = world.members[A]
    assert site.go(hub.make_go(world.oks).to_bytes()) == []
    assert site.mask() == site.mask()
    world = at("uploaded")
    site = world.members[A]
    header = world.headers[A].body
    again = side.upload(site.state, KEYS[A], upload_root=header.upload_root, length=header.length)
    assert [m.to_bytes() for m in again.send] == [world.headers[A].to_bytes()]
    world = at("committed")
    site = world.members[A]
    assert site.commit(world.survivors.to_bytes()) == [world.commits[A].to_bytes()]
    world = at("revealed")
    site = world.members[A]
    assert site.reveal(world.certificate.to_bytes()) == [world.reveals[A].to_bytes()]


def test_a_crash_before_the_durable_write_repeats_the_message():
    """The same seed and inputs give the same bytes, so nothing contradicts what nobody saw."""
    world = at("ready")
    site = world.members[A]
    before = site.record
    first = site.deal(world.start.to_bytes())
    site.record = before
    assert site.deal(world.start.to_bytes()) == first


def test_closing_keeps_what_may_not_be_done_again():
    for stage, uploaded, committed in (
        ("ready", False, False),
        ("masking", False, False),
        ("uploaded", True, False),
        ("committed", True, True),
        ("revealed", True, True),
    ):
        site = at(stage).members[A]
        site.do(side.close(site.state, "burned"))
        assert (site.state.uploaded, site.state.committed) == (uploaded, committed)
        assert isinstance(site.state, Closed)
        assert b"share" not in site.record
        site.do(side.close(site.state, "burned"))
        with pytest.raises(WrongPhaseError):
            site.abort()


def test_the_next_round_is_open_whatever_became_of_the_last():
    for stage in ("masking", "uploaded", "committed", "revealed"):
        site = at(stage).members[A]
        assert len(site.ready(make_attempt(4, round_=5))) == 1


def test_states_belong_to_one_run():
    site = at("ready").members[A]
    other = replace(make_attempt(4), round=RoundId.parse("run-2/9"))
    with pytest.raises(ValueError, match="one run"):
        site.ready(other)


def test_keys_of_this_world_are_the_rosters():
    roster = make_roster(4)
    assert all(roster.key(node) == public_bytes(KEYS[node]) for node in roster.nodes)


# -- equivocation is evidence ------------------------------------------------------------------


def test_contradictions_are_found_and_repetition_is_not():
    world = at("revealed")
    commit, header, reveal = world.commits[A], world.headers[A], world.reveals[A]
    abort = abort_certificate([A]).aborts[0]
    other_list = forge(world, commit, survivors=SEEN)
    next_attempt = forge(world, other_list, attempt=2)
    second_header = forge(world, header, upload_root=SEEN)
    assert hub.conflict(commit, other_list)
    assert hub.conflict(commit, next_attempt)  # one COMMIT for a round
    assert hub.conflict(commit, abort)
    assert hub.conflict(abort, commit)
    assert hub.conflict(reveal, abort)
    assert hub.conflict(header, second_header)
    assert hub.conflict(commit, commit) is None
    assert hub.conflict(header, commit) is None
    assert hub.conflict(header, world.headers[B]) is None
    assert hub.conflict(abort, forge(world, commit, attempt=2)) is None
    assert hub.conflict(header, forge(world, second_header, attempt=2)) is None
    assert hub.conflict(abort, forge(world, abort, reason="other.reason")) is None


def test_a_repeated_message_is_not_counted_twice():
    world = at("uploaded")
    known = dict(world.headers)
    assert not hub.is_new(world.headers[A], known)
    assert hub.is_new(world.headers[A], {})
    with pytest.raises(EquivocationError):
        hub.is_new(forge(world, world.headers[A], upload_root=SEEN), known)
