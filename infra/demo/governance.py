"""The demonstration's governance: three admins, two of whom must sign, and an auditor.

    admins/<person>/key           their keys, DEMO ONLY: one machine holds them all
    auditors/<person>/key         of the auditor, who has no other role
    institutions/<site>/key       each institution's own key, which approves its node's keys
    governance/*.request.json     what was proposed, with the signatures that were collected

Everything is signed, published and enforced for real; only the people are not. The passphrase is
known to everybody who reads this file, so these keys are worth nothing outside a demonstration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from infra.admin import acts
from infra.admin.keys import Card, card_path, load_private, make_key, read_card
from infra.admin.proposals import (
    Base,
    Founding,
    founding_members,
    propose_agreement,
    propose_founding,
    propose_plan,
    read_base,
)
from infra.admin.statements import replayed, sign_statement
from infra.demo.policy import country_of
from infra.runs.client import AdminClient
from policies.consortium import ConsortiumPolicy
from protocols.errors import ExistsError, FederationError
from protocols.governance.keys import Holder
from protocols.governance.repository import plan_path, sha256_of
from protocols.governance.requests import SigningRequest
from protocols.identifiers import FederationId, NodeId, parse_node_id
from protocols.plan import Plan
from protocols.tlog.kinds import Predicate

PASSPHRASE: Final = "demo only: not a secret"  # noqa: S105 - and printed beside the keys
THRESHOLD: Final = 2
MIN_COUNTRIES: Final = 2
ADMINS: Final = (
    Holder(person="admin-ar", institution=NodeId("ar-univ-1"), country="AR"),
    Holder(person="admin-br", institution=NodeId("br-univ-1"), country="BR"),
    Holder(person="admin-uy", institution=NodeId("uy-univ-1"), country="UY"),
)
AUDITOR: Final = Holder(person="auditor-1", institution=NodeId("pa-univ-1"), country="PA")
_NOTE: Final = f"""\
DEMO ONLY. This key belongs to nobody: its passphrase is "{PASSPHRASE}",
and the demonstration made it on the same machine as all the others.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoGovernance:
    """The people of one demonstration and what they do."""

    folder: Path  # of the demonstration
    sites: tuple[str, ...]

    # -- people ----------------------------------------------------------------------------------

    def admin_key(self, person: str) -> Path:
        """An admin's key file."""
        return self.folder / "admins" / person / "key"

    def institution_key(self, site: str) -> Path:
        """The key with which an institution approves its node's keys."""
        return self.folder / "institutions" / site / "key"

    @property
    def passphrase_file(self) -> Path:
        """Where commands read the passphrase that is none."""
        return self.folder / "admins" / "passphrase.txt"

    @property
    def repository(self) -> Path:
        """The trust repository, as the coordinator publishes it."""
        return self.folder / "tuf"

    def make_people(self) -> None:
        """Keys of all people and institutions; those that are there stay."""
        self.passphrase_file.parent.mkdir(parents=True, exist_ok=True)
        self.passphrase_file.write_text(PASSPHRASE + "\n")
        for holder in ADMINS:
            self._make(self.admin_key(holder.person), holder)
        self._make(self.folder / "auditors" / AUDITOR.person / "key", AUDITOR)
        for site in self.sites:
            name = parse_node_id(site)
            holder = Holder(person=name, institution=name, country=country_of(site))
            self._make(self.institution_key(site), holder)

    def _make(self, path: Path, holder: Holder) -> None:
        if card_path(path).exists():
            return
        path.unlink(missing_ok=True)  # interrupted between the two
        make_key(path, holder, PASSPHRASE)
        (path.parent / "DEMO-ONLY.txt").write_text(_NOTE)

    def card(self, path: Path) -> Card:
        """The card of a key file."""
        return read_card(card_path(path))

    def institution_public_keys(self) -> dict[str, str]:
        """Hex keys of the institutions, by site."""
        return {
            site: str(self.card(self.institution_key(site)).public.keyval["public"])
            for site in self.sites
        }

    def approving(self, site: str) -> list[str]:
        """What `minga node join` is told of the institution's key."""
        return [
            "--institution-key",
            str(self.institution_key(site)),
            "--passphrase-file",
            str(self.passphrase_file),
        ]

    # -- acts ------------------------------------------------------------------------------------

    @property
    def founded(self) -> bool:
        """Whether the first root was published."""
        return (self.repository / "metadata" / "timestamp.json").exists()

    def base(self) -> Base:
        """The repository as it is, verified from the first root."""
        return read_base(self.repository, now=acts.utc_now())

    def found(self, policy: Mapping[str, bytes], client: AdminClient) -> list[str]:
        """Sign and publish the first root; what is in force, in words.

        Args:
            policy: documents of role ``policy`` by path.
            client: a connection to the coordinator, as its operator.
        """
        statement = self.folder / "coordinator" / "founding.json"
        name, online = acts.online_key_of(statement)
        now = datetime.now(UTC).replace(microsecond=0)
        founding = Founding(
            federation=FederationId(name),
            online=online,
            admins=[self.card(self.admin_key(holder.person)) for holder in ADMINS],
            threshold=THRESHOLD,
            min_countries=MIN_COUNTRIES,
            policy=policy,
            members=founding_members(
                name, [self.card(self.institution_key(site)) for site in self.sites], now
            ),
            others=[(self.card(self.folder / "auditors" / AUDITOR.person / "key"), ("auditor",))],
        )
        people = [holder.person for holder in ADMINS]
        return self.enact("founding", propose_founding(founding, now=now), people, client)

    def enact(
        self, name: str, request: SigningRequest, people: Sequence[str], client: AdminClient
    ) -> list[str]:
        """Let people sign a request, and publish it; what came into force, in words.

        Raises:
            TrustRefusedError: too few signed for what it changes.
        """
        keys = [self.admin_key(person) for person in people]
        return self._enact(name, request, keys, client)

    def agree(self, site: str, policy: ConsortiumPolicy, client: AdminClient) -> list[str]:
        """An institution agrees to a policy that may raise its privacy budget, with its own key."""
        request = propose_agreement(self.base(), site, policy)
        name = f"agree-{policy.policy_version}-{site}"
        return self._enact(name, request, [self.institution_key(site)], client)

    def speak(self, site: str, said: Predicate, *, within_s: float = 60.0) -> bytes:
        """A leaf that an institution signs over the public log, once that knows its key."""
        log, key = self.folder / "log", load_private(self.institution_key(site), lambda: PASSPHRASE)
        until = time.monotonic() + within_s
        while True:
            now = acts.utc_now()
            try:
                state, seen = replayed(log, policy=log / "trust-policy.txt", now=now)
                return sign_statement(said, key, log=state, seen=seen, now=now).entry
            except FederationError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.2)

    def _enact(
        self, name: str, request: SigningRequest, keys: Sequence[Path], client: AdminClient
    ) -> list[str]:
        path = self.folder / "governance" / f"{name}.request.json"
        if path.exists():  # of an interrupted demonstration: its signatures do not fit this one
            for old in path.parent.glob(f"{path.name}*"):
                old.unlink()
        acts.write_request(path, request)
        for key in keys:
            acts.sign(
                path,
                key,
                root=self._root(),
                secret=lambda: PASSPHRASE,
                module=None,
                confirm=lambda _: True,
                now=acts.utc_now(),
            )
        return client.publish_trust(acts.signed_files(path, (), now=acts.utc_now()))

    def _root(self) -> bytes | None:
        path = self.repository / "metadata" / "1.root.json"
        return path.read_bytes() if path.exists() else None

    def sign_plan(self, plan: Plan, client: AdminClient) -> list[str]:
        """Two admins sign the terms of a run; again is harmless.

        Raises:
            ExistsError: another plan of this run was signed.
        """
        base = self.base()
        known = base.state.targets.get(plan_path(plan.run_id))
        if known is not None:
            if known.sha256 != sha256_of(plan.to_bytes()):
                raise ExistsError(f"another plan of run {plan.run} was signed before")
            return []
        people = [holder.person for holder in ADMINS[:THRESHOLD]]
        return self.enact(f"plan-{plan.run}", propose_plan(base, plan), people, client)
