"""A federation's governance in memory: admins, institutions, and what they sign.

Keys follow from names, so the same world is the same in every test. ``World`` is pure; ``found``
gives a repository folder whose every file was really signed and really verified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, Signer, SSlibKey

import policies.example
from coordinator.trust_repository import ONLINE_KEY, load_online_key
from infra.admin.keys import Card
from infra.admin.proposals import Base, Founding, _needed, propose_founding, read_files
from policies.effect import POLICY_DOCUMENT
from protocols.canonical import canonical_bytes
from protocols.gen import trust_pb2
from protocols.governance import roles
from protocols.governance.building import latest_files, next_online, serialize, timestamp_over
from protocols.governance.documents import Institution, Members, time_text
from protocols.governance.keys import Holder, ed25519_key, key_to_value
from protocols.governance.repository import MemoryFiles, TrustState, verify_repository
from protocols.governance.requests import (
    SigningRequest,
    add_signatures,
    open_request,
    sign_request,
)
from protocols.identifiers import FederationId, NodeId

NOW = datetime.now(UTC).replace(microsecond=0)
ADMINS = (("ana", "ar-univ-1", "AR"), ("bruno", "br-univ-1", "BR"), ("carla", "cl-univ-1", "CL"))
INSTITUTIONS = (("site-a", "AR"), ("site-b", "BR"), ("site-c", "CL"))


def private(name: str) -> Ed25519PrivateKey:
    """The key of a name; the same in every test."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"trust {name}".encode()).digest())


def public(name: str) -> bytes:
    """Its public half."""
    return private(name).public_key().public_bytes_raw()


def card(person: str, institution: str, country: str) -> Card:
    """A person's card."""
    holder = Holder(person=person, institution=NodeId(institution), country=country)
    return Card(key=key_to_value(ed25519_key(public(person), holder)))


def signer(key: SSlibKey, name: str) -> Signer:
    """What signs for a key."""
    return CryptoSigner(private(name), key)


def institution(name: str, country: str, **changes: Any) -> Institution:
    """A member."""
    value = {
        "id": name,
        "country": country,
        "status": "active",
        "roles": ("member",),
        "keys": (public(f"institution {name}").hex(),),
        "nodes": ("1",),
        "witnesses": (),
        "since": time_text(NOW),
    }
    return Institution.model_validate(value | changes)


def policy_bytes(
    *,
    admins: int,
    threshold: int,
    min_countries: int,
    approvers: Iterable[str] = ("ana", "bruno"),
    **changes: Any,
) -> bytes:
    """The example policy for so many admins; ``changes`` by dotted path with ``__``."""
    source = Path(policies.example.__path__[0]) / "consortium.json"
    value = json.loads(source.read_text())
    value["federation"] = "demo"
    value["governance"]["admins"] |= {
        "n": admins,
        "threshold": threshold,
        "min_countries": min_countries,
    }
    high = min(admins, threshold + 1)
    value["governance"]["decisions"] |= {
        "admit": threshold, "suspend": threshold, "expel": high, "policy": threshold,
        "root": threshold, "budget_increase": high, "amendment": admins, "code_approvers": 2,
    }  # fmt: skip
    value["governance"]["override"]["threshold"] = threshold
    value["governance"]["release_board"] = {"n": 3, "threshold": 2}
    value["governance"]["emergency"]["threshold"] = 2
    value["governance"]["policy_delay_hours"] = 0  # tests of the delay ask for one
    value["governance"]["decisions"]["amendment_notice_days"] = 0
    for code in value["code"]["allowed"]:
        code["approved_by"] = list(approvers)
    for path, changed in changes.items():
        *parents, last = path.split("__")
        inner = value
        for step in parents:
            inner = inner[step]
        inner[last] = changed
    return canonical_bytes(value)


@dataclass
class World:
    """Admins with their keys, and the repository as it is."""

    admins: tuple[tuple[str, str, str], ...] = ADMINS
    institutions: tuple[tuple[str, str], ...] = INSTITUTIONS
    threshold: int = 2
    min_countries: int = 2
    now: datetime = NOW
    files: dict[str, bytes] = field(default_factory=dict)
    state: TrustState | None = None
    online_key: Ed25519PrivateKey = field(default_factory=lambda: private("online"), repr=False)

    @property
    def cards(self) -> list[Card]:
        """Of the first admins."""
        return [card(*admin) for admin in self.admins]

    @property
    def online(self) -> SSlibKey:
        """The coordinator's key."""
        return ed25519_key(self.online_key.public_key().public_bytes_raw())

    def members(self) -> Members:
        """The first members."""
        return Members(
            federation="demo",
            institutions=tuple(institution(*item) for item in self.institutions),
        )

    def policy(self, **changes: Any) -> bytes:
        """A policy that fits the admins."""
        return policy_bytes(
            admins=len(self.admins),
            threshold=self.threshold,
            min_countries=self.min_countries,
            approvers=[admin[0] for admin in self.admins[:2]],
            **changes,
        )

    def founding(self, **changes: Any) -> Founding:
        """What the federation begins with."""
        values: dict[str, Any] = {
            "federation": FederationId("demo"),
            "online": self.online,
            "admins": self.cards,
            "threshold": self.threshold,
            "min_countries": self.min_countries,
            "policy": {POLICY_DOCUMENT: self.policy()},
            "members": self.members(),
        }
        return Founding(**values | changes)

    def found(self, **changes: Any) -> TrustState:
        """Sign and put into force version 1 of everything."""
        request = propose_founding(self.founding(**changes), now=self.now)
        return self.enact(request, [admin[0] for admin in self.admins])

    def base(self) -> Base:
        """What proposals start from."""
        assert self.state is not None
        return Base(files=_needed(self.files, self.state), state=self.state, now=self.now)

    def signed(
        self, request: SigningRequest, people: Iterable[str], keys: Mapping[str, SSlibKey] = {}
    ) -> dict[str, bytes]:
        """The files of a request with these people's signatures, however few they are."""
        opened = open_request(request, trusted_root=None, now=self.now)
        cards = {item.holder.person: item.public for item in self.cards} | dict(keys)
        collected = [sign_request(opened, signer(cards[name], name)) for name in people]
        files = dict(opened.files)
        for item in add_signatures(opened, collected):
            files[item.name] = serialize(item.metadata)
        return files

    def publish(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The repository with new files under a signed snapshot and timestamp; not verified."""
        versions = self.state.versions if self.state else {}
        number = versions.get(roles.SNAPSHOT, 0) + 1
        stamp = versions.get(roles.TIMESTAMP, 0) + 1
        made, _ = next_online(
            latest_files(files, self.state), snapshot=number, timestamp=1, now=self.now
        )
        online = CryptoSigner(self.online_key, self.online)
        made.sign(online)
        snapshot = serialize(made)
        timestamp = timestamp_over(snapshot, snapshot=number, timestamp=stamp, now=self.now)
        timestamp.sign(online)
        return {
            **self.files,
            **files,
            f"metadata/{number}.snapshot.json": snapshot,
            f"metadata/{stamp}.timestamp.json": serialize(timestamp),
            "metadata/timestamp.json": serialize(timestamp),
        }

    def verify(self, files: Mapping[str, bytes], **options: Any) -> TrustState:
        """As every reader does."""
        values: dict[str, Any] = {
            "trusted_root": files["metadata/1.root.json"],
            "now": self.now,
        }
        return verify_repository(MemoryFiles(files), **values | options)

    def enact(
        self, request: SigningRequest, people: Iterable[str], keys: Mapping[str, SSlibKey] = {}
    ) -> TrustState:
        """Sign, publish and verify."""
        files = self.publish(self.signed(request, people, keys))
        self.state = self.verify(files, previous=self.state)
        self.files = files
        return self.state

    def enact_at(
        self,
        door: Any,
        request: SigningRequest,
        people: Iterable[str],
        keys: Any = MappingProxyType({}),
    ) -> list[str]:
        """Sign, bring it to a served coordinator, and read what is in force there."""
        files = self.signed(request, people, keys)
        message = trust_pb2.PublishTrustRequest(files=files)
        changes = door.operator().trust.Publish(message, timeout=20).changes
        self.files = read_files(door.config.trust)
        self.state = self.verify(self.files, previous=self.state)
        return list(changes)

    def found_at(self, door: Any, **changes: Any) -> None:
        """Found the federation of a served coordinator."""
        self.online_key = load_online_key(door.config.keys / ONLINE_KEY)
        request = propose_founding(self.founding(**changes), now=self.now)
        self.enact_at(door, request, [admin[0] for admin in self.admins])

    def write(self, folder: Path) -> None:
        """Put the repository into a folder."""
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def later(days: float) -> datetime:
    """Some days on."""
    return NOW + timedelta(days=days)
