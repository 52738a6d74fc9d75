"""The refusal table, clauses 1 to 4: a row for each MUST NOT of the masked-update specification.

Each row plays an attempt of four members up to a point, lets the coordinator or one member
misbehave, and names the error and clause that must answer. Clauses 5 to 9 are in
``test_secagg_refusals_late``, with the check that no clause lacks a row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.crypto.signatures import BadSignatureError, Context
from protocols.errors import (
    EquivocationError,
    MalformedMessageError,
    NotListedError,
    PlanRefusedError,
    WrongPhaseError,
)
from protocols.identifiers import FederationId, RoundId
from protocols.secagg import checks
from protocols.secagg import coordinator as hub
from protocols.secagg import node as side
from protocols.secagg.context import Member, Roster
from protocols.secagg.dealing import _open
from protocols.secagg.errors import BadShareError, CheckFailedError
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.messages import (
    DealBundle,
    Go,
    Packet,
    Signed,
    Start,
    signed_from_bytes,
)
from protocols.secagg.threshold import SecaggTerms
from tests.support.secagg import (
    CHECKPOINT,
    SEEN,
    World,
    make_attempt,
    make_roster,
    node_name,
    seed_of,
)
from tests.support.secagg_stages import (
    KEYS,
    A,
    B,
    C,
    D,
    Refusals,
    at,
    badly_dealt,
    check_refused,
    edit,
    forge,
)

TABLE = Refusals()
row = TABLE.row

# -- 1. terms and roster -----------------------------------------------------------------------


@row("1.1 two members", PlanRefusedError)
def _():
    SecaggTerms(roster_size=2, threshold=2, colluders=0, min_surviving=2)


@row("1.1 65 members", PlanRefusedError)
def _():
    SecaggTerms.for_roster(65)


@row("1.2 2t = n + c", PlanRefusedError)
def _():
    SecaggTerms(roster_size=4, threshold=3, colluders=2, min_surviving=4)


@row("1.2 m = c + 1", PlanRefusedError)
def _():
    SecaggTerms(roster_size=4, threshold=3, colluders=1, min_surviving=2)


@row("1.2 terms of another roster size", MalformedMessageError)
def _():
    make_attempt(4, terms=SecaggTerms.for_roster(5))


@row("1.3 a key that is not on the roster", CheckFailedError)
def _():
    world = at("fresh")
    side.ready(None, world.attempt, A, KEYS[B], seed=bytes(32), seen_size=0, seen_root=SEEN)


@row("1.3 a stranger", NotListedError)
def _():
    world = at("fresh")
    side.ready(
        None, world.attempt, node_name(5), KEYS[A], seed=bytes(32), seen_size=0, seen_root=SEEN
    )


@row("1.4 a name twice", MalformedMessageError)
def _():
    Roster((make_roster(3).members[0], *make_roster(3).members))


@row("1.4 not in order", MalformedMessageError)
def _():
    Roster(make_roster(3).members[::-1])


@row("1.4 a key twice", MalformedMessageError)
def _():
    members = make_roster(3).members
    Roster((members[0], members[1], replace(members[2], key=members[0].key)))


@row("1.4 an identity key of low order", MalformedMessageError)
def _():
    Member(node=A, key=bytes(32))


# -- 2. messages -------------------------------------------------------------------------------


@row("2.1 members out of order", MalformedMessageError)
def _():
    Start(readys=at("ready").start.readys[::-1])


@row("2.1 a member twice", MalformedMessageError)
def _():
    readys = at("ready").start.readys
    Start(readys=(readys[0], *readys))


@row("2.2 a stranger signs", NotListedError)
def _():
    world = at("fresh")
    other = World.make(5, d=8)
    (data,) = other.members[node_name(5)].ready(other.attempt)
    checks.check_ready(signed_from_bytes(side.Ready, data), world.attempt)


@row("2.2 a member signs for another", BadSignatureError)
def _():
    world = at("ready")
    body = world.start.readys[0].body
    forged = Signed.make(KEYS[B], body)  # B signs what names A
    checks.check_start(Start(readys=edit(world.start.readys, change={A: forged})), world.attempt)


@row("2.2 another kind of context", BadSignatureError)
def _():
    world = at("uploaded")
    commit = world.members[A].commit(world.survivors.to_bytes())
    signed = signed_from_bytes(side.Commit, commit[0])
    from protocols.crypto.signatures import sign

    wrong = replace(signed, signature=sign(KEYS[A], Context.ABORT, signed.body.to_bytes()))
    checks.check_commit(wrong, world.listed)


@row("2.2 a body changed on the way", BadSignatureError)
def _():
    world = at("uploaded")
    header = world.headers[A]
    changed = replace(header, body=replace(header.body, length=header.body.length + 1))
    checks.check_header(changed, world.agreed)


@row("2.3 a READY replayed from another attempt", CheckFailedError)
def _():
    world = at("ready")
    later = replace(world.attempt, number=2)
    checks.check_start(world.start, later)


# -- 3. READY and START ------------------------------------------------------------------------


def _start_with(**changes) -> None:
    world = at("ready")
    forged = forge(world, world.start.readys[1], **changes)
    world.members[A].deal(Start(readys=edit(world.start.readys, change={B: forged})).to_bytes())


@row("3.2 another model", CheckFailedError)
def _():
    _start_with(model_root=SEEN)


@row("3.2 another plan", CheckFailedError)
def _():
    _start_with(plan_digest=SEEN)


@row("3.2 another roster", CheckFailedError)
def _():
    _start_with(roster_root=SEEN)


@row("3.3 this node's READY is missing", CheckFailedError)
def _():
    world = at("ready")
    world.members[A].deal(Start(readys=edit(world.start.readys, drop=[A])).to_bytes())


@row("3.3 this node's READY is another", CheckFailedError)
def _():
    world = at("ready")
    forged = forge(world, world.start.readys[0], seen_size=10)
    world.members[A].deal(Start(readys=edit(world.start.readys, change={A: forged})).to_bytes())


@row("3.3 a second START", EquivocationError)
def _():
    world = at("dealt")
    world.members[A].deal(Start(readys=edit(world.start.readys, drop=[D])).to_bytes())


@row("3.4 too few", CheckFailedError)
def _():
    world = at("ready")
    world.members[A].deal(Start(readys=edit(world.start.readys, drop=[C, D])).to_bytes())


@row("3.5 the EK of another member", CheckFailedError)
def _():
    world = at("ready")
    _start_with(ek=world.start.readys[2].body.ek)


@row("3.5 this node's own EK", CheckFailedError)
def _():
    world = at("ready")
    _start_with(ek=world.start.readys[0].body.ek)


@row("3.5 an EK of low order", MalformedMessageError)
def _():
    _start_with(ek=bytes(32))


# -- 4. DEAL to GO -----------------------------------------------------------------------------


@row("4.1 on another START", CheckFailedError)
def _():
    world = at("dealt")
    checks.check_deal(forge(world, world.bundles[A].deal, ctx_deal=SEEN), world.started)


@row("4.1 by a node outside U1", CheckFailedError)
def _():
    world = at("dealt")
    smaller = checks.check_start(Start(readys=edit(world.start.readys, drop=[D])), world.attempt)
    body = replace(world.bundles[D].deal.body, ctx_deal=smaller.ctx_deal)
    checks.check_deal(Signed.make(KEYS[D], body), smaller)


@row("4.2 a packet too few", CheckFailedError)
def _():
    world = at("dealt")
    bundle = world.bundles[A]
    checks.check_bundle(replace(bundle, packets=bundle.packets[1:]), world.started)


@row("4.2 a packet exchanged", CheckFailedError)
def _():
    world = at("dealt")
    bundle = world.bundles[A]
    first = bundle.packets[0]
    flipped = Packet(to=first.to, sealed=bytes([first.sealed[0] ^ 1]) + first.sealed[1:])
    checks.check_bundle(replace(bundle, packets=(flipped, *bundle.packets[1:])), world.started)


def _deliver_with(world: World, dealer, signed, to=A) -> None:
    delivery = world.deliveries[to]
    parcels = tuple(
        replace(parcel, deal=signed) if parcel.node == dealer else parcel
        for parcel in delivery.parcels
    )
    world.members[to].acknowledge(replace(delivery, parcels=parcels).to_bytes())


@row("4.3 the RK of another member", CheckFailedError)
def _():
    world = at("dealt")
    rk = world.bundles[C].deal.body.rk
    _deliver_with(world, B, forge(world, world.bundles[B].deal, rk=rk))


@row("4.3 this node's own RK", CheckFailedError)
def _():
    world = at("dealt")
    rk = world.bundles[A].deal.body.rk
    _deliver_with(world, B, forge(world, world.bundles[B].deal, rk=rk))


@row("4.3 an EK as RK", CheckFailedError)
def _():
    world = at("dealt")
    _deliver_with(world, B, forge(world, world.bundles[B].deal, rk=world.start.readys[1].body.ek))


@row("4.3 an RK of low order", MalformedMessageError)
def _():
    world = at("dealt")
    forge(world, world.bundles[B].deal, rk=(1).to_bytes(32, "little"))


@row("4.4 a DEAL is missing", CheckFailedError)
def _():
    world = at("dealt")
    delivery = world.deliveries[A]
    world.members[A].acknowledge(replace(delivery, parcels=delivery.parcels[:-1]).to_bytes())


@row("4.4 this node's own DEAL exchanged", CheckFailedError)
def _():
    world = at("dealt")
    _deliver_with(world, A, forge(world, world.bundles[A].deal, seed_commitment=bytes(32)))


def _parcel_with(**changes) -> None:
    world = at("dealt")
    delivery = world.deliveries[A]
    parcels = tuple(
        replace(parcel, **changes) if parcel.node == B else parcel for parcel in delivery.parcels
    )
    world.members[A].acknowledge(replace(delivery, parcels=parcels).to_bytes())


@row("4.5 another packet than the dealer signed", CheckFailedError)
def _():
    _parcel_with(sealed=at("dealt").deliveries[A].parcels[2].sealed)


@row("4.5 no packet", CheckFailedError)
def _():
    _parcel_with(sealed=None)


@row("4.5 a path too short", CheckFailedError)
def _():
    _parcel_with(path=())


def open_as_a(world: World, bundle: DealBundle) -> None:
    keys = AttemptKeys.derive(seed_of("attempt", 1, str(world.attempt)), world.attempt, A)
    sealed = next(packet.sealed for packet in bundle.packets if packet.to == A)
    _open(world.started, bundle.deal.body, A, keys.ek_secret, sealed)


@row("4.6 a share that was not committed to", BadShareError)
def _():
    world = at("dealt")
    bundle = badly_dealt(world)
    open_as_a(world, bundle)


@row("4.7 a second DELIVERY", EquivocationError)
def _():
    world = at("acknowledged")
    delivery = replace(world.deliveries[A], checkpoint=CHECKPOINT + b"x")
    side.acknowledge(world.members[A].state, delivery, KEYS[A], checkpoint=delivery.checkpoint)


@row("4.8 a DEAL_OK is missing", CheckFailedError)
def _():
    world = at("acknowledged")
    oks = dict(world.oks)
    del oks[B]
    world.members[A].go(hub.make_go(oks).to_bytes())


@row("4.8 a member on another ctx", CheckFailedError)
def _():
    world = at("acknowledged")
    oks = {**world.oks, B: forge(world, world.oks[B], ctx=SEEN)}
    world.members[A].go(hub.make_go(oks).to_bytes())


@row("4.8 GO before DELIVERY", WrongPhaseError)
def _():
    world = at("dealt")
    world.members[A].go(Go(deal_oks=()).to_bytes())


@row("4.9 a bad packet after DEAL_OK", EquivocationError)
def _():
    """The coordinator cannot get the EK out of a node that has signed DEAL_OK."""
    world = at("acknowledged")
    bundle = badly_dealt(world)
    _, deliveries = hub.make_deliveries({**world.bundles, B: bundle}, world.started, CHECKPOINT)
    world.members[A].acknowledge(deliveries[A].to_bytes())


@row("4.10 a checkpoint that nobody verified", CheckFailedError)
def _():
    world = at("dealt")
    side.acknowledge(
        world.members[A].state, world.deliveries[A], KEYS[A], checkpoint=CHECKPOINT + b"x"
    )


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "error", "play"), TABLE.rows, ids=[row[0].replace(" ", "_") for row in TABLE.rows]
)
def test_refused(label, error, play):
    check_refused(label, error, play)


def test_3_1_a_seed_used_again_gives_other_keys():
    attempt = make_attempt(4)
    first = AttemptKeys.derive(bytes(32), attempt, A)
    for attempt_, node in (
        (replace(attempt, number=2), A),
        (make_attempt(4, round_=5), A),
        (attempt, B),
    ):
        other = AttemptKeys.derive(bytes(32), attempt_, node)
        for name in ("ek_secret", "rk_secret", "self_seed", "salts", "rk_randomness"):
            assert getattr(other, name) != getattr(first, name)


@pytest.mark.parametrize("what", ["federation", "round", "attempt"])
def test_2_3_messages_of_elsewhere(what):
    world = at("ready")
    value = {
        "federation": FederationId("pacifico"),
        "round": RoundId.parse("run-1/5"),
        "attempt": 2,
    }[what]
    forged = forge(world, world.start.readys[0], **{what: value})
    with pytest.raises(CheckFailedError) as caught:
        checks.check_start(
            Start(readys=edit(world.start.readys, change={A: forged})), world.attempt
        )
    assert caught.value.clause == "2.3"
