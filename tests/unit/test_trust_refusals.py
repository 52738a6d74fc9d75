"""What no number of lies makes true: one row for each MUST NOT of spec/governance.md, sections 2-5.

Every repository here is really signed; only the thing named is wrong with it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Metadata, TargetFile

from infra.admin.proposals import (
    admitted,
    propose_documents,
    propose_emergency,
    propose_founding,
    propose_members,
    propose_policy,
    propose_rotation,
    with_status,
)
from policies.deciding import check_successor, preview
from policies.effect import POLICY_DOCUMENT
from protocols.canonical import canonical_bytes
from protocols.errors import DigestMismatchError, MalformedMessageError
from protocols.governance import roles
from protocols.governance.building import changed_role, serialize
from protocols.governance.documents import Admins, Denials, Emergency, member_refusal, time_text
from protocols.governance.errors import ForgedError, TrustRefusedError
from protocols.governance.keys import Holder, ed25519_key, key_to_value, parse_key, with_holder
from protocols.governance.repository import in_force
from protocols.governance.requests import open_request, sign_request
from tests.support.trust import NOW, World, card, institution, later, private, public, signer


def founded(**changes) -> World:
    world = World(**changes)
    world.found()
    return world


def refused(rule: str, action) -> str:
    with pytest.raises(TrustRefusedError) as caught:
        action()
    assert caught.value.rule == rule, str(caught.value)
    return str(caught.value)


def new_policy(world: World, version: int = 8, **changes) -> dict[str, bytes]:
    return {POLICY_DOCUMENT: world.policy(policy_version=version, **changes)}


def test_a_founded_federation_is_in_force():
    """The happy end: everything below is one step away from this."""
    world = founded()
    state = world.state

    assert state.versions["policy"] == 1
    assert state.members.active() == ("site-a", "site-b", "site-c")
    assert in_force(state, NOW) is state


# -- quorum ------------------------------------------------------------------------------------


def test_a_policy_under_quorum():
    world = founded()
    request = propose_policy(world.base(), new_policy(world))

    refused("trust.quorum", lambda: world.enact(request, ["ana"]))


def test_signatures_from_too_few_countries():
    same = (("ana", "ar-1", "AR"), ("berta", "ar-2", "AR"), ("carla", "cl-1", "CL"))
    world = founded(admins=same)
    request = propose_policy(world.base(), new_policy(world))

    said = refused("trust.quorum", lambda: world.enact(request, ["ana", "berta"]))
    assert "countries" in said


def test_one_key_under_two_ids():
    """TUF counts ids: here the second id of ana's key makes two of two, and must not."""
    world = founded()
    request = propose_policy(world.base(), new_policy(world))
    files = world.signed(request, ["ana"])
    name = "metadata/2.policy.json"
    value = json.loads(files[name])
    alias = "f" * 64
    value["signatures"].append({"keyid": alias, "sig": value["signatures"][0]["sig"]})
    files[name] = json.dumps(value).encode()
    targets = json.loads(world.files["metadata/1.targets.json"])
    key = card("ana", "ar-univ-1", "AR").public.to_dict()
    targets["signed"]["version"] = 2
    targets["signed"]["delegations"]["keys"][alias] = key
    for role in targets["signed"]["delegations"]["roles"]:
        if role["name"] == "policy":
            role["keyids"].append(alias)
    forged = Metadata.from_dict(targets)
    forged.signatures.clear()
    for person in ("ana", "bruno"):
        forged.sign(signer(world.cards[0 if person == "ana" else 1].public, person), append=True)
    files["metadata/2.targets.json"] = serialize(forged)

    # python-tuf itself would take it: that is what makes the test worth having.
    policy = Metadata.from_bytes(files[name])
    assert len(
        forged.signed.get_verification_result(
            "policy", policy.signed_bytes, policy.signatures
        ).signed
    ) == 2  # fmt: skip
    refused("trust.alias", lambda: world.verify(world.publish(files)))


def test_a_founding_with_two_keys_of_one_institution():
    world = World(admins=(("ana", "ar-1", "AR"), ("berta", "ar-1", "AR"), ("carla", "cl-1", "CL")))

    refused("trust.institution", world.found)


def test_a_founding_with_a_key_twice():
    world = World()
    twice = [*world.cards[:2], card("carla", "cl-univ-1", "CL")]
    key = with_holder(twice[0].public, twice[2].holder)
    twice[2] = twice[2].model_copy(update={"key": key_to_value(key)})

    refused("trust.alias", lambda: world.found(admins=twice))


@pytest.mark.parametrize(("admins", "threshold"), [(2, 2), (4, 2), (5, 2), (9, 4)])
def test_a_threshold_below_a_majority(admins, threshold):
    refused("trust.shape" if admins < 3 else "trust.quorum",
            lambda: roles.Terms(admins, threshold, 1))  # fmt: skip


def test_a_change_that_needs_more_than_its_role():
    """Expelling needs the decision table's majority: here 3 of 3, where the role has 2."""
    world = founded()
    before = world.state
    members = with_status(world.state.members, "site-a", "expelled")
    request = propose_members(world.base(), members, "expel site-a")

    after = world.enact(request, ["ana", "bruno"])  # the role's own threshold
    said = refused("trust.majority", lambda: check_successor(before, after))
    assert "needs 3" in said

    world = founded()
    after = world.enact(
        propose_members(world.base(), members, "expel site-a"), ["ana", "bruno", "carla"]
    )
    words = [change.words for change in check_successor(before, after)]
    assert "expels site-a" in words


def test_what_nobody_classified_needs_the_highest_majority():
    world = founded()
    before = world.state
    strange = propose_documents(
        world.base(), roles.MEMBERSHIP, "strange", put={"membership/other.txt": b"?"}
    )

    after = world.enact(strange, ["ana", "bruno"])
    refused("trust.majority", lambda: check_successor(before, after))


def test_code_that_nobody_of_two_institutions_read():
    world = founded()
    one = world.policy(policy_version=8)
    value = json.loads(one)
    value["code"]["allowed"][0]["approved_by"] = ["ana", "nobody"]
    request = propose_policy(world.base(), {POLICY_DOCUMENT: canonical_bytes(value)})
    before = world.state

    after = world.enact(request, ["ana", "bruno", "carla"])
    assert "must have read" in refused("trust.quorum", lambda: check_successor(before, after))


# -- roles -------------------------------------------------------------------------------------


def test_an_emergency_that_allows_is_no_document():
    value = json.loads(
        Emergency(
            federation="demo",
            code="leak",
            issued_at=time_text(NOW),
            until=time_text(later(1)),
            deny=Denials(
                institutions=("site-a",), runs=(), plans=(), code=(), certificates=(),
                all_rounds=False,
            ),
        ).to_bytes()
    )  # fmt: skip
    Emergency.from_bytes(canonical_bytes(value))
    for allowing in (
        value | {"allow": {"institutions": ["site-z"]}},
        value | {"deny": value["deny"] | {"except": ["site-b"]}},
        value | {"deny": value["deny"] | {"all_rounds": "no"}},
        value | {"deny": value["deny"] | {"institutions": []}},
    ):
        with pytest.raises(MalformedMessageError):
            Emergency.from_bytes(canonical_bytes(allowing))


def test_an_emergency_for_more_than_72_hours():
    world = founded()
    deny = Denials(
        institutions=("site-a",), runs=(), plans=(), code=(), certificates=(), all_rounds=False
    )
    with pytest.raises(MalformedMessageError, match="72 hours"):
        propose_emergency(world.base(), "suspend-site-a", deny=deny, code="leak", hours=73)


def test_an_emergency_by_two_suspends_and_lapses():
    world = founded(threshold=3)
    deny = Denials(
        institutions=("site-a",), runs=(), plans=(), code=(), certificates=(), all_rounds=False
    )
    request = propose_emergency(world.base(), "suspend-site-a", deny=deny, code="leak")
    state = world.enact(request, ["ana", "bruno"])  # two suffice, where policies need three

    refusal = member_refusal(state.members, state.emergencies, "site-a", NOW)
    assert refusal is not None
    assert refusal.rule == "trust.emergency"
    assert member_refusal(state.members, state.emergencies, "site-b", NOW) is None
    after = later(3.01)
    assert member_refusal(state.members, state.emergencies, "site-a", after) is None
    assert in_force(state, after).lapsed == {"emergency"}


def test_one_admin_is_no_emergency():
    world = founded()
    deny = Denials(
        institutions=("site-a",), runs=(), plans=(), code=(), certificates=(), all_rounds=False
    )
    request = propose_emergency(world.base(), "x", deny=deny, code="leak")
    refused("trust.quorum", lambda: world.enact(request, ["ana"]))


def test_a_role_publishes_only_under_its_own_paths():
    world = founded()
    made, files = changed_role(
        world.state, roles.PLANS, put={"membership/members.json": b"{}"}, now=NOW
    )
    for person, key in zip(("ana", "bruno"), world.cards, strict=False):
        made.sign(signer(key.public, person), append=True)
    files["metadata/2.plans.json"] = serialize(made)

    refused("trust.shape", lambda: world.verify(world.publish(files)))


def test_the_coordinator_forges_metadata():
    """Everything the coordinator can sign is snapshot and timestamp."""
    world = founded()
    request = propose_policy(world.base(), new_policy(world))
    opened = open_request(request, trusted_root=None, now=NOW)
    metadata = opened.candidates[0].metadata
    metadata.sign(signer(world.online, "online"))
    files = {**opened.files, opened.candidates[0].name: serialize(metadata)}

    refused("trust.quorum", lambda: world.verify(world.publish(files)))


def test_a_stranger_is_the_coordinator():
    world = founded()
    files = dict(world.files)
    timestamp = Metadata.from_bytes(files["metadata/timestamp.json"])
    timestamp.signatures.clear()
    timestamp.sign(signer(ed25519_key(public("mallory")), "mallory"))
    files["metadata/timestamp.json"] = serialize(timestamp)

    with pytest.raises(ForgedError):
        world.verify(files)


def test_a_document_with_other_bytes():
    world = founded()
    files = dict(world.files)
    name = next(name for name in files if name.endswith("members.json"))
    files[name] = files[name].replace(b"site-a", b"site-x")

    with pytest.raises(DigestMismatchError):
        world.verify(files)


# -- time --------------------------------------------------------------------------------------


def test_a_rolled_back_policy():
    world = founded()
    old = dict(world.files)
    world.enact(propose_policy(world.base(), new_policy(world)), ["ana", "bruno"])

    refused("trust.rollback", lambda: world.verify(old, previous=world.state))


def test_an_older_policy_in_a_newer_snapshot():
    world = founded()
    first = world.state
    world.enact(propose_policy(world.base(), new_policy(world)), ["ana", "bruno"])
    second = world.state
    world.state = replace(first, versions=first.versions | {"snapshot": 2, "timestamp": 2})

    files = world.publish({})
    refused("trust.rollback", lambda: world.verify(files, previous=second))


def test_a_frozen_timestamp():
    world = founded()
    refused("trust.expired", lambda: world.verify(world.files, now=later(1.01)))


@pytest.mark.parametrize(
    ("role", "days"), [("membership", 30.1), ("policy", 90.1), ("plans", 90.1), ("root", 366)]
)
def test_an_expired_role(role, days):
    """With fresh snapshots, the role that expired first is named."""
    world = founded()
    world.now = later(days)
    files = world.publish({})
    said = refused("trust.expired", lambda: world.verify(files))
    assert "expired at" in said
    assert role  # the first to expire differs; each of these days refuses


def test_what_was_in_force_expires():
    state = founded().state
    refused("trust.expired", lambda: in_force(state, NOW + timedelta(days=31)))


def test_an_expired_request_is_not_signed():
    world = founded()
    request = propose_policy(world.base(), new_policy(world))
    refused("trust.expired", lambda: open_request(request, trusted_root=None, now=later(14.1)))


# -- roots -------------------------------------------------------------------------------------


def new_admins(*names: str):
    return [card(name, f"{name}-univ", country) for name, country in zip(names, ("MX", "PE", "UY"))]  # noqa: B905


def test_all_admin_keys_are_replaced_under_both_thresholds():
    world = founded()
    coming = new_admins("dora", "eva", "fito")
    keys = {item.holder.person: item.public for item in coming}
    request = propose_rotation(world.base(), add=coming, remove=["ana", "bruno", "carla"])

    state = world.enact(request, ["ana", "bruno", "dora", "eva"], keys)
    assert {holder.person for holder in state.charter.holders.values()} == set(keys)
    again = world.verify(world.files)  # from the first root alone
    assert again.root_version == 2


@pytest.mark.parametrize("people", [["ana", "dora", "eva"], ["ana", "bruno", "dora"]])
def test_a_root_without_one_of_its_two_thresholds(people):
    world = founded()
    coming = new_admins("dora", "eva", "fito")
    keys = {item.holder.person: item.public for item in coming}
    request = propose_rotation(world.base(), add=coming, remove=["ana", "bruno", "carla"])

    refused("trust.quorum", lambda: world.enact(request, people, keys))


def test_a_key_that_was_taken_away_signs_nothing():
    world = founded()
    coming = new_admins("dora")
    keys = {"dora": coming[0].public}
    world.enact(
        propose_rotation(world.base(), add=coming, remove=["ana"]), ["ana", "bruno", "dora"], keys
    )
    request = propose_policy(world.base(), new_policy(world))

    refused(
        "trust.quorum",
        lambda: sign_request(
            open_request(request, trusted_root=None, now=NOW),
            signer(world.cards[0].public, "ana"),
        ),
    )


# -- people ------------------------------------------------------------------------------------


def test_an_admin_who_is_also_auditor():
    world = World()
    refused(
        "trust.duties",
        lambda: propose_founding(
            world.founding(others=[(card("olga", "uy-1", "UY"), ("auditor", "operator"))]), now=NOW
        ),
    )
    admins = json.loads(founded().state.admins.to_bytes())
    admins["people"][0]["roles"] = ["admin", "auditor"]
    refused("trust.duties", lambda: Admins.from_value(admins).check_duties())


def test_an_auditor_with_an_admins_key():
    world = World()
    holder = Holder(person="olga", institution="uy-1", country="UY")
    same = with_holder(world.cards[0].public, holder)
    olga = world.cards[0].model_copy(update={"key": key_to_value(same)})

    refused(
        "trust.alias",
        lambda: propose_founding(world.founding(others=[(olga, ("auditor",))]), now=NOW),
    )


def test_a_policy_for_other_admins_than_the_root_names():
    world = founded()
    other = World(threshold=3).policy(policy_version=8)
    request = propose_policy(world.base(), {POLICY_DOCUMENT: other})

    refused(
        "trust.shape",
        lambda: check_successor(world.state, world.enact(request, ["ana", "bruno", "carla"])),
    )


def test_a_preview_says_what_changes_and_how_many_must_sign():
    world = founded()
    member = institution("site-d", "UY")
    request = propose_members(world.base(), admitted(world.state.members, member), "admit site-d")

    _, changes, needs = preview(open_request(request, trusted_root=None, now=NOW), now=NOW)
    assert "admits site-d (UY) as member, with 1 institution key(s)" in [c.words for c in changes]
    assert needs["membership"] == 2


# -- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"keyid": "0" * 64},
        {"keyval": {"public": public("ana").hex().upper()}},
        {"keyval": {"public": public("ana").hex(), "more": "x"}},
        {"keyval": {"public": "00" * 32}},  # a point of low order
        {"keyval": {" ublic": public("ana").hex()}},
        {"keyval": {}},
        {"keytype": "rsa", "scheme": "rsassa-pss-sha256"},
        {"extra": 1},
        {"x-minga-holder": {"person": "ana"}},
    ],
)
def test_a_key_in_another_spelling(change):
    value = key_to_value(card("ana", "ar-univ-1", "AR").public) | change
    with pytest.raises((MalformedMessageError, TrustRefusedError)):
        parse_key(value)


def test_no_key_prints_itself():
    secret = private("ana").private_bytes_raw().hex()
    made = signer(card("ana", "ar-univ-1", "AR").public, "ana")
    assert secret not in repr(made)
    assert isinstance(made.public_key, SSlibKey)
    assert TargetFile.from_data("a/b", b"x", ["sha256"]).length == 1
