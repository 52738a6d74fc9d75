"""Keys that are not what they say: exchanged by the coordinator, borrowed, or no keys at all.

Rows of the attack table: key substitution, Sybils, reflected own key, all-zero public key. Four
members, t = m = 3.
"""

from __future__ import annotations

import json
from dataclasses import replace

import grpc
import pytest

from protocols.canonical import canonical_bytes
from protocols.crypto.signatures import Context, public_bytes, sign
from protocols.gen import secure_sum_pb2_grpc
from protocols.identifiers import NodeId
from protocols.secagg import attempts, checks, keys, messages
from protocols.secagg.codec import from_bytes
from protocols.secagg.context import Member as RosterMember
from protocols.secagg.context import Roster, u16
from protocols.secagg.keys import AttemptKeys, hkdf
from protocols.secagg.masks import MaskAdder, MaskKey, node_masks
from protocols.secagg.messages import DealBundle, Go, Signed
from protocols.secagg.packets import Kind, unseal
from protocols.tensors.planar import pack
from tests.support.door import Door
from tests.support.hostile import HostileRound, Puppet, SharedRound, secrets_from
from tests.support.without import Check, Rule, check_attack, layers

SIGNATURES = Check(
    clause="2.2",
    function=messages.Signed.check,
    says="does not verify",
    marker="_verify_once(",
)


def _puppets(play: HostileRound, names: list[str], key: str | None = None) -> dict:
    """Members played by the coordinator: with their own keys, or all with one of its own."""
    attempt = play.liar.attempt()
    return {
        NodeId(name): Puppet(
            attempt=attempt, node=NodeId(name), key=play.door.signing_key(key or name)
        )
        for name in names
    }


def _surround(play: HostileRound, victim: str, puppets: dict) -> None:
    """Play a whole round with one honest node among puppets, and read its vector."""
    liar, node = play.liar, play.nodes[victim]
    node.ready()
    liar.add("ready", [puppet.ready() for puppet in puppets.values()])
    node.deal()
    started = liar.started()
    liar.add("deal", [puppet.bundle(started) for puppet in puppets.values()])
    agreed = liar.agreed()
    delivered = liar.deliveries()
    node.acknowledge()
    held = {
        started.indices[name]: puppet.held(delivered[name], agreed)[node.name]
        for name, puppet in puppets.items()
    }
    liar.add("deal_ok", [puppet.deal_ok(agreed.ctx) for puppet in puppets.values()])
    node.mask()
    node.upload()
    found = liar.open_one(agreed, victim, liar.vector(victim), **secrets_from(held, 3))
    assert play.is_plain(found, [victim])


@layers(SIGNATURES)
def test_the_coordinator_exchanges_everybodys_ready(door, removed, caught):
    """The coordinator shows n03 a START in which every other EK is its own: every share that n03
    deals would be sealed for it. Caught by 2.2, a READY is signed by the roster's key. Without
    signatures the coordinator is everybody, and reads the vector as soon as it is uploaded."""

    def attack():
        play = HostileRound(door)
        _surround(play, "n03", _puppets(play, ["n00", "n01", "n02"], key="the coordinator"))

    check_attack(attack, removed, caught)


@layers(SIGNATURES)
def test_the_coordinator_exchanges_everybodys_masking_key(door, removed, caught):
    """READYs are genuine; in the DELIVERY for n03 every other RK is the coordinator's, so that it
    knows the pair masks of n03; b of n03 it is given at the end, for n03 is on the others' list.

    Caught by 2.2 in the DEALs. Without signatures it also forges what else n03 and the others
    need to see: the other DEAL_OKs on n03's ctx, and n03's DEAL_OK and header on theirs.
    """

    def attack():
        play = HostileRound(door)
        liar, node = play.liar, play.nodes["n03"]
        others = play.others("n03")
        play.all("ready", "deal")
        genuine = liar.heard("deal")
        evil = _puppets(play, others, key="the coordinator")
        forged = dict(genuine)
        for name, puppet in evil.items():
            body = replace(genuine[name].deal.body, rk=puppet.keys.rk)
            forged[name] = DealBundle(
                deal=Signed.make(puppet.key, body), packets=genuine[name].packets
            )
        liar.lie("delivery", liar.deliveries(bundles=forged)[node.name].to_bytes(), to=["n03"])
        play.all("acknowledge")

        theirs, ours = liar.agreed(bundles=forged), liar.agreed()
        oks = [puppet.deal_ok(theirs.ctx) for puppet in evil.values()]
        oks.append(liar.heard("deal_ok")[node.name])
        liar.lie("go", Go(deal_oks=tuple(oks)).to_bytes(), to=["n03"])
        false = _puppets(play, ["n03"], key="the coordinator")[node.name]
        liar.add("deal_ok", [false.deal_ok(ours.ctx)])
        play.all("mask", "upload")
        liar.add("upload", [false.header(ours.ctx, liar.vector("n03"))])
        play.all("commit", "reveal", but=("n03",))

        b = liar.secret("n03", Kind.SEED)
        known = [
            keys.pair_mask_key(
                theirs.ctx,
                puppet.keys.rk_secret,
                own=(theirs.started.indices[name], puppet.keys.rk),
                peer=(4, theirs.deals[node.name].rk),
            )
            for name, puppet in evil.items()
        ]
        own = keys.self_mask_key(theirs.ctx, b, 4)
        masks = [MaskKey(key=own, sign=1), *(MaskKey(key=key, sign=-1) for key in known)]
        assert play.is_plain(liar.strip(liar.vector("n03"), masks), ["n03"])

    check_attack(attack, removed, caught)


# -- strangers ---------------------------------------------------------------------------------


def _told(real):
    """A node that takes the roster from the coordinator: n03 among Sybils."""

    def roster_of(plan):
        mine = next(member for member in real(plan).members if member.node == "n03")
        sybils = [
            RosterMember(node=NodeId(name), key=public_bytes(Door.signing_key(name)))
            for name in SYBILS
        ]
        return Roster((mine, *sybils))

    return roster_of


SYBILS = ["s00", "s01", "s02"]
PINNED_ROSTER = Rule(
    clause="1.3",
    function=attempts.roster_of,
    says="is not on the roster",
    target=attempts,
    name="roster_of",
    instead=_told,
)


@layers(PINNED_ROSTER)
def test_sybils_fill_the_ready_set(door, removed, caught):
    """Three members that nobody admitted, each with a key and valid signatures of its own, make up
    START with n03. Caught by 1.3, indices and keys come from the roster that the plan pins.
    Without: a node that goes by the roster it is told shares everything with the Sybils."""

    def attack():
        play = HostileRound(door)
        _surround(play, "n03", _puppets(play, SYBILS))

    check_attack(attack, removed, caught)


def test_a_sybil_with_a_certificate_gets_nowhere(door):
    """Enrolled, but not on the plan's roster: the honest coordinator takes and gives nothing."""
    play = SharedRound(door)
    play.all("join")
    stranger = play.nodes["n03"]
    stranger.client = door.client("s00")
    stranger.stub = secure_sum_pb2_grpc.SecureSumStub(stranger.client.channel)
    stranger.name, stranger.key = NodeId("s00"), door.signing_key("s00")
    puppet = Puppet(attempt=stranger.attempt(), node=stranger.name, key=stranger.key)
    for knock in (
        stranger.join,
        lambda: stranger.post("ready", puppet.ready().to_bytes()),
        lambda: stranger.get("start"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            knock()
        assert dict(refused.value.trailing_metadata())["minga-code"] == "not_listed"


# -- borrowed keys and no keys -----------------------------------------------------------------

DISTINCT = {
    "clause": "4.3",
    "function": checks._check_distinct,
    "says": "use the same",
}
SAME_RK, SAME_EK = Check(**DISTINCT), Check(**DISTINCT | {"clause": "3.5"})


def _with_colluder(play: HostileRound, *, borrow_rk_of: str | None = None) -> None:
    """A round in which n03 sides with the coordinator and may deal somebody else's RK."""
    liar = play.liar
    colluder = _puppets(play, ["n03"])[NodeId("n03")]
    play.all("ready", but=("n03",))
    liar.add("ready", [colluder.ready()])
    play.all("deal", but=("n03",))
    rk = liar.heard("deal")[borrow_rk_of].deal.body.rk if borrow_rk_of else colluder.keys.rk
    liar.add("deal", [colluder.bundle(liar.started(), rk=rk)])
    play.all("acknowledge", but=("n03",))
    agreed = liar.agreed()
    liar.add("deal_ok", [colluder.deal_ok(agreed.ctx)])
    play.all("mask", "upload", but=("n03",))
    lanes = play.residues(bytes(len(liar.vector("n00"))))  # its vector is zero
    secret = {"self_seed": colluder.keys.self_seed, "rk_secret": colluder.keys.rk_secret}
    masks = node_masks(agreed.ctx, index=4, rks=agreed.rks, **secret)
    MaskAdder(masks, play.ring).add(0, lanes)
    masked = pack(lanes & (play.ring.modulus - 1), play.ring)
    liar.add("upload", [colluder.header(agreed.ctx, masked)])
    play.all("commit", "reveal", but=("n03",))
    play.opened = liar.open_sum(play.nodes, vectors={"n03": masked})


def test_a_colluder_with_a_key_of_its_own_does_no_harm(door):
    """The oracle of the next test acquits: the same round with the colluder's own RK."""
    play = HostileRound(door)
    _with_colluder(play)
    assert play.is_plain(play.opened, play.others("n03"))


@layers(SAME_RK)
def test_a_masking_key_is_reflected(door, removed, caught):
    """n03 deals n00's own RK as its own: its masks with the others are then n00's to know, not
    its own, and cannot cancel. Caught by 4.3; without, the sum of the honest three is noise."""

    def attack():
        play = HostileRound(door)
        _with_colluder(play, borrow_rk_of="n00")
        assert play.is_noise(play.opened, play.others("n03"))

    check_attack(attack, removed, caught)


@layers(SAME_EK)
def test_a_packet_key_is_reflected(door, removed, caught):
    """n03 is ready with n00's own EK. Caught by 3.5; without, n00 can open what is sealed for n03
    and holds two shares of every secret: as if t were one less."""

    def attack():
        play = HostileRound(door)
        liar = play.liar
        play.all("ready", but=("n03",))
        ek = liar.heard("ready")["n00"].body.ek
        liar.add("ready", [_puppets(play, ["n03"])[NodeId("n03")].ready(ek=ek)])
        play.all("deal", but=("n03",))
        started, bundle = liar.started(), liar.heard("deal")["n01"]
        reader = play.nodes["n00"]
        secret = AttemptKeys.derive(reader.seed(), reader.attempt(), reader.name).ek_secret
        held = [
            unseal(
                next(packet.sealed for packet in bundle.packets if packet.to == to),
                started.ctx_deal,
                secret,
                started.readys[NodeId("n01")].ek,
                dealer=NodeId("n01"),
                dealer_index=2,
                to=started.indices[to],
                place=started.places[to],
                ready=4,
                share_root=bundle.deal.body.share_root,
            )
            for to in ("n00", "n03")
        ]
        assert held[0].rk_share != held[1].rk_share

    check_attack(attack, removed, caught)


LOW_ORDER = Check(
    clause="4.3",
    function=keys.parse_x25519,
    says="is a point of low order",
    forget=keys.parse_x25519.cache_clear,
)
ZERO_SECRET = Check(
    clause="4.3",
    function=keys.x25519_shared,
    says="is a point of low order",
    then="return bytes(32)",
)


def _with_zero_rk(play: HostileRound, bundle: DealBundle) -> dict:
    """The same DEAL with an all-zero RK, signed by n03, as JSON: the classes refuse to hold it."""
    value = json.loads(bundle.to_bytes())
    value["deal"]["body"]["rk"] = "00" * 32
    body = canonical_bytes(value["deal"]["body"])
    value["deal"]["signature"] = sign(play.door.signing_key("n03"), Context.DEAL, body).hex()
    return value


@layers(LOW_ORDER, ZERO_SECRET)
def test_an_all_zero_masking_key(door, removed, caught):
    """n03 deals an all-zero RK; the coordinator relays it. Caught by 4.3 where the key is read;
    behind it the exchange itself refuses an all-zero output. Without both, everybody who has read
    the DEALs can compute n00's pair mask with n03: nobody needs n03 to tell."""

    def attack():
        play = HostileRound(door)
        liar = play.liar
        colluder = _puppets(play, ["n03"])[NodeId("n03")]
        play.all("ready", but=("n03",))
        liar.add("ready", [colluder.ready()])
        play.all("deal", but=("n03",))
        bundle = colluder.bundle(liar.started())
        zero = _with_zero_rk(play, bundle)
        liar.add("deal", [bundle])
        for name, delivery in liar.deliveries().items():
            value = json.loads(delivery.to_bytes())
            value["parcels"][3]["deal"] = zero["deal"]
            liar.lie("delivery", canonical_bytes(value), to=[name])
        play.all("acknowledge", but=("n03",))
        liar.add("deal", [from_bytes(DealBundle, canonical_bytes(zero))])
        agreed = liar.agreed()
        liar.add("deal_ok", [colluder.deal_ok(agreed.ctx)])
        play.all("mask", but=("n03",))
        info = b"minga/mask/pair/v1" + u16(1) + u16(4) + agreed.rks[1] + agreed.rks[4]
        public = hkdf(ikm=bytes(32), salt=bytes.fromhex(agreed.ctx), info=info)
        assert public in [mask.key for mask in play.nodes["n00"].adder._masks]

    check_attack(attack, removed, caught)


def test_an_honest_coordinator_does_not_take_an_all_zero_key(door):
    """The same at the honest coordinator's door: malformed, in READY and in DEAL."""
    play = SharedRound(door)
    play.all("join", "ready")
    node = play.nodes["n03"]
    play.all("deal", but=("n03",))
    puppet = Puppet(attempt=node.attempt(), node=node.name, key=node.key)
    started = play.door.ledger(lambda tx: play.summed()(tx).started())
    ready = json.loads(puppet.ready().to_bytes())
    ready["body"]["ek"] = "00" * 32
    ready["signature"] = sign(node.key, Context.READY, canonical_bytes(ready["body"])).hex()
    for kind, value in (
        ("ready", ready),
        ("deal", _with_zero_rk(play, puppet.bundle(started))),
    ):
        with pytest.raises(grpc.RpcError, match="point of low order") as refused:
            node.post(kind, canonical_bytes(value))
        assert dict(refused.value.trailing_metadata())["minga-code"] == "malformed"
