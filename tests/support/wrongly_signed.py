"""Documents that were really signed and must not be taken: what a hostile admin or two can make.

Every builder gives the files of one publication over a founded ``World``. Nothing here asks our own
checks for leave: candidates are signed key by key, whatever they say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Metadata

from infra.admin.proposals import (
    Base,
    propose_documents,
    propose_override,
    propose_policy,
    propose_rotation,
)
from policies.overrides import Override
from policies.trust import POLICY_DOCUMENT
from protocols.canonical import canonical_bytes
from protocols.governance import roles
from protocols.governance.building import serialize
from protocols.governance.documents import ADMINS, Admins, time_text
from protocols.governance.requests import SigningRequest
from tests.support.trust import World, card, signer

Files = dict[str, bytes]
EVERYBODY = ("ana", "bruno", "carla")


def forced(request: SigningRequest, people: Iterable[str], keys: Mapping[str, SSlibKey]) -> Files:
    """The files of a request, every metadata file signed by all these people, unread."""
    files = request.candidate_files()
    for name in [name for name in files if name.startswith("metadata/")]:
        metadata = Metadata.from_bytes(files[name])
        for person in people:
            metadata.sign(signer(keys[person], person), append=True)
        files[name] = serialize(metadata)
    return files


def _cards(world: World) -> dict[str, SSlibKey]:
    return {item.holder.person: item.public for item in world.cards}


def _base(world: World) -> Base:
    return world.base()


def unchecked():
    """Build what ``check_duties`` would refuse to build."""
    return patch.object(Admins, "check_duties", lambda self: None)


def one_key_under_two_ids(world: World) -> Files:
    """Ana signs a policy twice, under the second id that two admins gave her key."""
    request = propose_policy(_base(world), {POLICY_DOCUMENT: world.policy(policy_version=8)})
    files = forced(request, ["ana"], _cards(world))
    (name,) = [name for name in files if name.endswith(".policy.json")]
    alias = "f" * 64
    policy = json.loads(files[name])
    policy["signatures"].append({"keyid": alias, "sig": policy["signatures"][0]["sig"]})
    files[name] = json.dumps(policy).encode()
    number = world.state.versions["targets"]
    value = json.loads(world.files[f"metadata/{number}.targets.json"])
    value["signatures"] = []
    value["signed"]["version"] = number + 1
    value["signed"]["delegations"]["keys"][alias] = _cards(world)["ana"].to_dict()
    for role in value["signed"]["delegations"]["roles"]:
        if role["name"] == "policy":
            role["keyids"] = [*role["keyids"], alias]
    targets = Metadata.from_dict(value)
    for person in ("ana", "bruno"):
        targets.sign(signer(_cards(world)[person], person), append=True)
    files[f"metadata/{number + 1}.targets.json"] = serialize(targets)
    return files


def two_keys_of_one_institution(world: World) -> Files:
    """A root that seats a second admin of Ana's institution; everybody signs."""
    berta = card("berta", "ar-univ-1", "AR")
    with unchecked():
        request = propose_rotation(_base(world), add=[berta], remove=["carla"])
    keys = _cards(world) | {"berta": berta.public}
    return forced(request, [*EVERYBODY, "berta"], keys)


def an_emergency_that_allows(world: World) -> Files:
    """Two admins let an institution in that no membership names."""
    now = datetime.now(UTC)
    notice = {
        "schema": "minga.emergency/1",
        "federation": "demo",
        "code": "urgent",
        "issued_at": time_text(now),
        "until": time_text(now + timedelta(hours=24)),
        "deny": {
            "institutions": ["site-c"], "runs": [], "plans": [], "code": [], "certificates": [],
            "all_rounds": False,
        },
        "allow": {"institutions": ["site-z"]},
    }  # fmt: skip
    put = {"emergency/let-in.json": canonical_bytes(notice)}
    request = propose_documents(_base(world), roles.EMERGENCY, "emergency", put=put)
    return forced(request, ["ana", "bruno"], _cards(world))


def an_override_of(rule: str, world: World) -> Files:
    """All admins want an exception from a rule that has none."""
    now = datetime.now(UTC)
    value = {
        "schema": "minga.override/1",
        "federation": "demo",
        "plan": "0" * 64,
        "rule": rule,
        "code": "urgent",
        "granted_at": time_text(now),
        "expires": time_text(now + timedelta(hours=12)),
    }
    override = Override.from_bytes(canonical_bytes(value))
    return forced(propose_override(_base(world), override), EVERYBODY, _cards(world))


def an_admin_who_is_auditor(world: World) -> SigningRequest:
    """A list of people on which Ana audits what she decides."""
    value = world.state.admins.model_dump(mode="json", by_alias=True)
    for person in value["people"]:
        if person["id"] == "ana":
            person["roles"] = ["admin", "auditor"]
    put = {ADMINS: Admins.from_value(value).to_bytes()}
    return propose_documents(_base(world), roles.MEMBERSHIP, "people", put=put)


ATTACKS = {
    "one key under two ids": ("trust.alias", one_key_under_two_ids),
    "two keys of one institution": ("trust.institution", two_keys_of_one_institution),
    "an emergency that allows": ("malformed", an_emergency_that_allows),
    "an override of secagg.required": (
        "override.never",
        lambda world: an_override_of("secagg.required", world),
    ),
    "an override of privacy.budget": (
        "override.never",
        lambda world: an_override_of("privacy.budget", world),
    ),
    "an override of a site's rule": (
        "override.site",
        lambda world: an_override_of("site.hours", world),
    ),
    "an admin who is also auditor": (
        "trust.duties",
        lambda world: forced(an_admin_who_is_auditor(world), EVERYBODY, _cards(world)),
    ),
}
