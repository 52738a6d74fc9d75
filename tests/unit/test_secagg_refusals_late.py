"""The refusal table, clauses 5 to 9, and the check that every MUST NOT has a row."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from protocols.errors import (
    ConflictingUploadError,
    EquivocationError,
    MalformedMessageError,
    NotListedError,
    WrongPhaseError,
)
from protocols.secagg import checks, shamir
from protocols.secagg import coordinator as hub
from protocols.secagg import node as side
from protocols.secagg.errors import BadShareError, CheckFailedError, TooFewSharesError
from protocols.secagg.messages import (
    AbortCertificate,
    CommitCertificate,
    Signed,
    Start,
    Survivors,
    signed_from_bytes,
)
from protocols.secagg.packets import Kind
from protocols.secagg.threshold import SecaggTerms
from protocols.secagg.unmask import OpenedSecrets, mask_remover
from protocols.secagg.verify import check_own_upload, verify_transcript
from protocols.tensors.ring import Ring
from tests.support.secagg import (
    SEEN,
    World,
    make_attempt,
    node_name,
)
from tests.support.secagg_stages import (
    KEYS,
    A,
    B,
    C,
    D,
    Refusals,
    abort_certificate,
    at,
    check_refused,
    edit,
    forge,
    world_with_bad_polynomial,
)
from tests.unit.test_secagg_refusals import TABLE as EARLY

SPEC = Path(__file__).parents[2] / "protocols" / "spec" / "masked-update.md"

TABLE = Refusals()
row = TABLE.row

# -- 5. masks and UPLOAD -----------------------------------------------------------------------


@row("5.1 masks before GO", WrongPhaseError)
def _():
    side.mask_adder(at("acknowledged").members[A].state, Ring(20))


@row("5.2 a header before GO", WrongPhaseError)
def _():
    side.upload(at("acknowledged").members[A].state, KEYS[A], upload_root=SEEN, length=20)


@row("5.3 a second vector", ConflictingUploadError)
def _():
    side.upload(at("uploaded").members[A].state, KEYS[A], upload_root=SEEN, length=20)


@row("5.3 another length", ConflictingUploadError)
def _():
    world = at("uploaded")
    root = world.headers[A].body.upload_root
    side.upload(world.members[A].state, KEYS[A], upload_root=root, length=1)


@row("5.4 masks after the header", WrongPhaseError)
def _():
    side.mask_adder(at("uploaded").members[A].state, Ring(20))


# -- 6. the verdict ----------------------------------------------------------------------------


def _commit_to(world: World, headers) -> None:
    world.members[A].commit(Survivors(headers=headers).to_bytes())


@row("6.1 a node outside U1", CheckFailedError)
def _():
    world = at("masking")
    smaller = checks.check_start(Start(readys=edit(world.start.readys, drop=[D])), world.attempt)
    agreed = replace(
        world.agreed,
        started=smaller,
        deals={node: deal for node, deal in world.agreed.deals.items() if node != D},
    )
    (data,) = world.members[D].upload()
    checks.check_header(signed_from_bytes(side.Upload, data), agreed)


@row("6.1 a header on another ctx", CheckFailedError)
def _():
    world = at("uploaded")
    forged = forge(world, world.headers[B], ctx=SEEN)
    _commit_to(world, edit(world.survivors.headers, change={B: forged}))


@row("6.2 this node is not on the list", CheckFailedError)
def _():
    world = at("masking")
    world.do_upload()
    _commit_to(world, edit(hub.make_survivors(world.headers).headers, drop=[A]))


@row("6.2 with another header of this node", CheckFailedError)
def _():
    world = at("uploaded")
    forged = forge(world, world.headers[A], upload_root=SEEN)
    _commit_to(world, edit(world.survivors.headers, change={A: forged}))


@row("6.3 too few survivors", CheckFailedError)
def _():
    world = at("uploaded")
    _commit_to(world, edit(world.survivors.headers, drop=[C]))


@row("6.3 alone", CheckFailedError)
def _():
    world = at("uploaded")
    _commit_to(world, edit(world.survivors.headers, drop=[B, C]))


@row("6.3 fewer than min_surviving although t are there", CheckFailedError)
def _():
    terms = SecaggTerms(roster_size=4, threshold=3, colluders=1, min_surviving=4)
    world = World.make(4, d=8, attempt=make_attempt(4, terms=terms)).up_to_go()
    world.do_upload([A, B, C])
    _commit_to(world, hub.make_survivors(world.headers).headers)


@row("6.4 COMMIT after ABORT", EquivocationError)
def _():
    world = at("uploaded")
    world.members[A].abort()
    world.members[A].commit(world.survivors.to_bytes())


@row("6.4 ABORT after COMMIT", EquivocationError)
def _():
    at("committed").members[A].abort()


@row("6.4 ABORT after REVEAL", EquivocationError)
def _():
    at("revealed").members[A].abort()


@row("6.4 COMMIT to a second list", EquivocationError)
def _():
    world = at("masking")
    world.do_upload()
    world.do_survivors()
    world.members[A].commit(world.survivors.to_bytes())
    _commit_to(world, edit(world.survivors.headers, drop=[D]))


@row("6.5 REVEAL after ABORT", WrongPhaseError)
def _():
    world = at("committed")
    world.do_reveal()
    other = at("uploaded").members[A]
    other.abort()
    other.reveal(world.certificate.to_bytes())


@row("6.6 uploads of different lengths", CheckFailedError)
def _():
    world = at("uploaded")
    forged = forge(world, world.headers[B], length=1)
    _commit_to(world, edit(world.survivors.headers, change={B: forged}))


# -- 7. REVEAL ---------------------------------------------------------------------------------


@row("7.1 too few commits", CheckFailedError)
def _():
    world = at("committed")
    commits = tuple(world.commits[node] for node in (A, B))
    world.members[A].reveal(CommitCertificate(commits=commits).to_bytes())


@row("7.1 commits to another list", EquivocationError)
def _():
    world = at("committed")
    commits = {**world.commits, B: forge(world, world.commits[B], survivors=SEEN)}
    world.members[A].reveal(CommitCertificate(commits=tuple(commits.values())).to_bytes())


@row("7.1 a lost member commits", CheckFailedError)
def _():
    world = at("committed")
    body = replace(world.commits[B].body, node=D)
    commits = (world.commits[A], world.commits[B], Signed.make(KEYS[D], body))
    world.members[A].reveal(CommitCertificate(commits=commits).to_bytes())


def _reveal_with(change) -> None:
    world = at("revealed")
    shares = change(list(world.reveals[A].body.shares), world)
    checks.check_reveal(forge(world, world.reveals[A], shares=tuple(shares)), world.listed)


def _of_kind(world: World, of, kind: Kind):
    """A's share of ``of`` of a chosen kind, from the record before it revealed."""
    held = next(h for h in at("committed").members[A].state.held if h.dealer == of)
    opening = held.opening(kind)
    sample = world.reveals[A].body.shares[0]
    return replace(
        sample, of=of, kind=kind, share=opening.share, salt=opening.salt, path=opening.path
    )


@row("7.2 the RK share of a survivor", BadShareError)
def _():
    _reveal_with(
        lambda shares, world: [
            _of_kind(world, B, Kind.KEY) if share.of == B else share for share in shares
        ]
    )


@row("7.2 the b share of a lost member", BadShareError)
def _():
    _reveal_with(
        lambda shares, world: [
            _of_kind(world, D, Kind.SEED) if share.of == D else share for share in shares
        ]
    )


@row("7.2 both shares of one member", MalformedMessageError)
def _():
    _reveal_with(lambda shares, world: [shares[0], _of_kind(world, A, Kind.KEY), *shares[1:]])


@row("7.2 a share is missing", CheckFailedError)
def _():
    _reveal_with(lambda shares, _: shares[1:])


@row("7.2 a lost member reveals", CheckFailedError)
def _():
    world = at("revealed")
    body = replace(world.reveals[A].body, node=D)
    checks.check_reveal(Signed.make(KEYS[D], body), world.listed)


@row("7.2 for another list", CheckFailedError)
def _():
    world = at("revealed")
    checks.check_reveal(forge(world, world.reveals[A], survivors=SEEN), world.listed)


@row("7.3 before COMMIT", WrongPhaseError)
def _():
    world = at("committed")
    world.do_reveal()
    at("uploaded").members[A].reveal(world.certificate.to_bytes())


# -- 8. opening --------------------------------------------------------------------------------


@row("8.1 a share that was not dealt", BadShareError)
def _():
    def wrong(shares, _):
        value = (shamir.parse_share(shares[1].share) + 1) % shamir.PRIME
        return [shares[0], replace(shares[1], share=value.to_bytes(33, "big")), *shares[2:]]

    _reveal_with(wrong)


@row("8.1 another member's share", BadShareError)
def _():
    def wrong(shares, world):
        other = world.reveals[B].body.shares[1]
        return [shares[0], other, *shares[2:]]

    _reveal_with(wrong)


def _opened(world: World) -> OpenedSecrets:
    return hub.reconstruct((s.body for s in world.reveals.values()), world.listed).opened


def _remove(world: World, opened: OpenedSecrets) -> None:
    mask_remover(
        world.agreed.ctx,
        world.ring,
        roster=world.attempt.roster,
        deals=world.agreed.deals,
        opened=opened,
    )


@row("8.2 a secret is missing", CheckFailedError)
def _():
    world = at("revealed")
    opened = _opened(world)
    seeds = {node: seed for node, seed in opened.self_seeds.items() if node != A}
    _remove(world, replace(opened, self_seeds=seeds))


@row("8.2 both secrets of one member", CheckFailedError)
def _():
    world = at("revealed")
    opened = _opened(world)
    _remove(world, replace(opened, self_seeds={**opened.self_seeds, D: bytes(32)}))


@row("8.2 published secrets that the shares do not give", CheckFailedError)
def _():
    world = at("revealed")
    transcript = world.do_open()
    first = replace(transcript.self_seeds[0], secret=bytes(32))
    verify_transcript(
        replace(transcript, self_seeds=(first, *transcript.self_seeds[1:])), world.attempt
    )


@row("8.3 another b", CheckFailedError)
def _():
    world = at("revealed")
    opened = _opened(world)
    _remove(world, replace(opened, self_seeds={**opened.self_seeds, A: bytes(32)}))


@row("8.3 another RK", CheckFailedError)
def _():
    world = at("revealed")
    opened = _opened(world)
    _remove(world, replace(opened, pair_secrets={D: bytes(32)}))


@row("8.4 a dealer whose shares agree with nothing it committed to", BadShareError)
def _():
    world = world_with_bad_polynomial(threshold_off=1)
    world.do_open()


@row("8.4 too few reveals", TooFewSharesError)
def _():
    world = at("revealed")
    hub.reconstruct([world.reveals[A].body, world.reveals[B].body], world.listed)


# -- 9. trying again ---------------------------------------------------------------------------


@row("9.1 the same attempt again", WrongPhaseError)
def _():
    world = at("dealt")
    world.members[A].ready(world.attempt)


@row("9.1 an earlier round", WrongPhaseError)
def _():
    world = at("fresh")
    world.members[A].ready(world.attempt)
    world.members[A].abort()
    world.members[A].ready(make_attempt(4, round_=3, number=9))


@row("9.1 another model in the same round", CheckFailedError)
def _():
    world = at("ready")
    world.members[A].abort()
    world.members[A].ready(make_attempt(4, number=2, model=SEEN))


@row("9.2 the last attempt is under way", WrongPhaseError)
def _():
    at("masking").members[A].ready(make_attempt(4, number=2))


@row("9.3 uploaded, no certificate", WrongPhaseError)
def _():
    at("uploaded").members[A].ready(make_attempt(4, number=2))


@row("9.3 uploaded and aborted, no certificate", WrongPhaseError)
def _():
    site = at("uploaded").members[A]
    site.abort()
    site.ready(make_attempt(4, number=2))


@row("9.3 uploaded and told that it is over", WrongPhaseError)
def _():
    site = at("uploaded").members[A]
    site.do(side.close(site.state, "aborted"))
    site.ready(make_attempt(4, number=2))


@row("9.4 committed", WrongPhaseError)
def _():
    world = at("committed")
    certificate = abort_certificate([B, C, D])
    world.members[A].ready(make_attempt(4, number=2), certificate)


@row("9.4 committed and told that it is over", WrongPhaseError)
def _():
    site = at("committed").members[A]
    site.do(side.close(site.state, "burned"))
    site.ready(make_attempt(4, number=2), abort_certificate([B, C, D]))


def _retry_with(certificate: AbortCertificate) -> None:
    at("uploaded").members[A].ready(make_attempt(4, number=2), certificate)


@row("9.6 t - 1 signers", CheckFailedError)
def _():
    _retry_with(abort_certificate([A, B]))


@row("9.6 of another attempt", CheckFailedError)
def _():
    _retry_with(abort_certificate([A, B, C], attempt=3))


@row("9.6 of another roster", CheckFailedError)
def _():
    _retry_with(abort_certificate([A, B, C], roster_root=SEEN))


@row("9.6 a stranger among the signers", NotListedError)
def _():
    _retry_with(abort_certificate([A, B, node_name(5)]))


@row("9.7 a record that cannot be read", MalformedMessageError)
def _():
    site = at("uploaded").members[A]
    site.record = site.record[:-1]
    site.ready(make_attempt(4, number=2))


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "error", "play"), TABLE.rows, ids=[row[0].replace(" ", "_") for row in TABLE.rows]
)
def test_refused(label, error, play):
    check_refused(label, error, play)


def test_every_must_not_has_a_row():
    text = SPEC.read_text(encoding="utf-8")
    clauses = re.findall(r"^(\d+\.\d+) (.*?)(?=^\d+\.\d+ |^##|\Z)", text, re.MULTILINE | re.DOTALL)
    forbidding = {number for number, body in clauses if "MUST NOT" in " ".join(body.split())}
    assert len(forbidding) > 40
    assert forbidding - TABLE.clauses - EARLY.clauses == {"3.1"}  # has a test of its own


def test_the_honest_play_gets_through():
    """A table of refusals means little if nothing is ever accepted."""
    world = at("revealed")
    transcript = world.do_open()
    verified = verify_transcript(transcript, world.attempt)
    assert list(verified.listed.headers) == [A, B, C]
    assert verified.listed.lost == (D,)
    assert verified.faults == {}
    check_own_upload(verified, A, world.headers[A])
    check_own_upload(verified, D, None)
    with pytest.raises(CheckFailedError):
        check_own_upload(verified, A, None)


def test_a_retry_after_anabort_certificate_is_taken():
    world = at("uploaded")
    certificate = abort_certificate([B, C, D])
    second = make_attempt(4, number=2)
    for node in world.members:
        if node in (B, C, D):
            world.members[node].abort()
    again = World(attempt=second, members=world.members, ring=world.ring)
    again.do_ready(list(world.members), certificate)
    assert again.start.nodes == (A, B, C, D)
