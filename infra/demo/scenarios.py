"""`minga demo --scenario`: the common acts of governance, played for real and explained.

    expel             two of three admins are too few for an expulsion; three are enough, once the
                      member was heard, and its node is refused on the connection that it has open
    override-refused  three signatures do not lift secure aggregation, nor a site's own rule
    policy-change     a change in words; what raises a privacy budget needs more signatures,
                      and each institution itself

Every act goes the whole way: proposed, shown in words, signed with the admins' keys, handed to a
running coordinator, which verifies it and takes it or says which rule stands against it. Nothing is
trained: it takes well under a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
from rich.console import Console

from infra.admin.proposals import propose_members, propose_override, propose_policy, with_status
from infra.demo.federation import Federation
from infra.demo.governance import ADMINS, MIN_COUNTRIES, THRESHOLD, DemoGovernance
from infra.demo.policy import demo_policy
from infra.demo.processes import Household
from infra.runs.client import AdminClient, error_of
from node_agent.code_digest import installed_code
from node_agent.config import NodeFolder
from node_agent.keys import KeyStore
from policies.bodies import HEARING
from policies.changes import describe_change
from policies.consortium import ConsortiumPolicy
from policies.effect import POLICY_DOCUMENT
from policies.overrides import Override
from protocols.canonical import canonical_bytes
from protocols.errors import ExistsError, FederationError
from protocols.gen import rounds_pb2, rounds_pb2_grpc
from protocols.governance.repository import sha256_of
from protocols.governance.requests import SigningRequest
from protocols.identifiers import Digest, FederationId, parse_node_id
from protocols.tlog.kinds import MemberStatement

FEDERATION: Final = "demo"
SITES: Final = ("ar-archivo", "br-saude", "cl-leyes", "pe-escuela")
PEOPLE: Final = tuple(holder.person for holder in ADMINS)
_NO_MODEL: Final = Digest("1" * 64)  # nothing is trained here


class UnexpectedError(FederationError):
    """An act that must be refused was taken, or the reverse."""

    code = "scenario"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A running coordinator with its founded governance."""

    federation: Federation
    governance: DemoGovernance
    client: AdminClient
    say: Callable[[str], None]

    def policy(self) -> ConsortiumPolicy:
        """In force."""
        return ConsortiumPolicy.from_bytes(self.governance.base().state.documents[POLICY_DOCUMENT])

    def taken(self, name: str, request: SigningRequest, people: Sequence[str]) -> None:
        """Play an act that is taken."""
        self.say(f"{', '.join(people)} sign")
        for words in self.governance.enact(name, request, people, self.client):
            self.say(f"  in force: {words}")

    def hear(self, site: str) -> None:
        """A member speaks on its hearing; what it says stays with it, its digest is in the log."""
        said = MemberStatement(
            institution=site, topic=HEARING, statement_sha256=sha256_of(f"{site} speaks".encode())
        )
        self.client.deliver(self.governance.speak(site, said))

    def refused(self, name: str, request: SigningRequest, people: Sequence[str]) -> None:
        """Play an act that is refused.

        Raises:
            UnexpectedError: it was taken.
        """
        self.say(f"{', '.join(people)} sign")
        try:
            self.governance.enact(name, request, people, self.client)
        except FederationError as error:
            self.say(f"  refused: {error.diagnostics()}")
            return
        raise UnexpectedError(f"{name} was taken, and must not be")


@contextmanager
def _connected(stage: Stage, site: str) -> Iterator[Callable[[], None]]:
    """A member that has joined and keeps a connection open; calling asks for its work over it.

    Raises:
        FederationError: what the coordinator answers to a call.
    """
    federation = stage.federation
    data = federation.data_folder(site)
    data.mkdir(parents=True)
    for name in ("train.jsonl", "valid.jsonl"):
        (data / name).write_text(json.dumps({"text": "minga", "lang": "es"}) + "\n", "utf-8")
    federation.join(site, stage.client.invite(site), approving=stage.governance.approving(site))
    federation.start_node(site)  # it cosigns the log from now on
    address = federation.operator().address
    tls = KeyStore(NodeFolder(federation.node_folder(site)).keys).tls()
    credentials = grpc.ssl_channel_credentials(tls.root, tls.key, tls.chain)
    with grpc.secure_channel(address, credentials) as channel:
        ask = rounds_pb2_grpc.RoundsStub(channel).Sync

        def call() -> None:
            try:
                ask(rounds_pb2.SyncRequest(), timeout=20.0)
            except grpc.RpcError as error:
                raise error_of(error, address) from None

        call()
        stage.say(f"{site} has joined, and its node has a connection open")
        yield call


def expel(stage: Stage) -> None:
    """A member is expelled: by enough admins, and not before; and it is out at once."""
    site = SITES[-1]
    with _connected(stage, site) as call:
        _expel(stage, site, call)


def _expel(stage: Stage, site: str, call: Callable[[], None]) -> None:
    table = stage.policy().governance.decisions
    stage.say(
        f"{site} is to be expelled; the policy asks for {table.expel} of {len(ADMINS)} admins"
    )
    base = stage.governance.base()
    members = with_status(base.state.members, parse_node_id(site), "expelled")
    request = propose_members(base, members, f"expel {site}")
    stage.refused("expel-two", request, PEOPLE[:THRESHOLD])
    stage.say("enough sign, and nobody has heard it:")
    stage.refused("expel-unheard", request, PEOPLE[: table.expel])
    stage.say(f"{site} makes its statement, signed with its own key, in the log")
    stage.hear(site)
    call()
    stage.say(f"  {site} is still served")
    stage.taken("expel", request, PEOPLE[: table.expel])
    try:
        call()
    except FederationError as error:
        stage.say(f"  on the connection that {site} had open: {error.diagnostics()}")
    else:
        raise UnexpectedError(f"{site} was served after it was expelled")
    status = stage.governance.base().state.members.get(site)
    stage.say(f"{site} is now {status.status if status else 'unknown'}: its next call is refused")
    try:
        stage.client.invite(site)
    except FederationError as error:
        stage.say(f"  a new invitation for it is refused: {error.diagnostics()}")
        return
    raise UnexpectedError(f"{site} was invited after it was expelled")


def override_refused(stage: Stage) -> None:
    """Some rules no majority lifts."""
    never = stage.policy().governance.override.never
    stage.say(f"all {len(PEOPLE)} admins want an exception; never overridable: {', '.join(never)}")
    for rule in ("secagg.required", "privacy.budget", "site.hours"):
        stage.say(f"an override of {rule}:")
        request = propose_override(stage.governance.base(), _override(rule))
        stage.refused(f"override-{rule}", request, PEOPLE)
    stage.say("an override of rounds.steps, which a majority may grant for a day:")
    request = propose_override(stage.governance.base(), _override("rounds.steps"))
    stage.taken("override-steps", request, PEOPLE[:THRESHOLD])


def _override(rule: str) -> Override:
    now, stamp = datetime.now(UTC), "%Y-%m-%dT%H:%M:%SZ"
    value = {
        "schema": "minga.override/1",
        "federation": FEDERATION,
        "plan": "0" * 64,
        "rule": rule,
        "code": "demonstration",
        "granted_at": f"{now:{stamp}}",
        "expires": f"{now + timedelta(hours=12):{stamp}}",
    }
    return Override.from_bytes(canonical_bytes(value))


def policy_change(stage: Stage) -> None:
    """What changes is said in words, and its kind says how many must sign."""
    _change(stage, "stricter", {"rounds": {"max_steps_local": 100}}, few=None)
    larger = {"privacy": {"eps_round_max_micro": 60_000_000}}
    _change(stage, "larger-budget", larger, few=THRESHOLD, agree=SITES)


def _change(
    stage: Stage,
    name: str,
    edits: Mapping[str, Any],
    *,
    few: int | None,
    agree: Sequence[str] = (),
) -> None:
    old = stage.policy()
    value = old.to_value()
    for section, changed in edits.items():
        value[section] |= changed
    value["policy_version"] += 1
    new = ConsortiumPolicy.from_value(value)
    change = describe_change(old, new)
    stage.say(f"a proposal for policy {new.policy_version}:")
    for sentence in change.sentences:
        stage.say(f"  {sentence}")
    stage.say(f"  it needs {change.signatures} of {len(PEOPLE)} signatures")
    request = propose_policy(stage.governance.base(), {POLICY_DOCUMENT: new.to_bytes()})
    if few is not None:
        stage.refused(f"policy-{name}-few", request, PEOPLE[:few])
    if agree:
        stage.say(f"it may raise what {', '.join(agree)} spend: each must agree itself")
        stage.refused(f"policy-{name}-alone", request, PEOPLE[: change.signatures])
        for site in agree:
            stage.governance.agree(site, new, stage.client)
        stage.say("they sign with their own keys")
        request = propose_policy(stage.governance.base(), {POLICY_DOCUMENT: new.to_bytes()})
    stage.taken(f"policy-{name}", request, PEOPLE[: change.signatures])


SCENARIOS: Final[Mapping[str, Callable[[Stage], None]]] = {
    "expel": expel,
    "override-refused": override_refused,
    "policy-change": policy_change,
}


def run_scenario(name: str, folder: Path, console: Console) -> None:
    """Play one scenario in a new folder.

    Raises:
        ExistsError: the folder is not empty.
        UnexpectedError: an act ended otherwise than it must.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise ExistsError(f"{folder} exists and is not empty; choose another folder with --dir")
    folder.mkdir(parents=True, exist_ok=True)

    def say(words: str) -> None:
        console.print(words, markup=False, highlight=False, soft_wrap=True)

    with Household(folder) as household:
        federation = Federation(folder=folder, household=household)
        governance = DemoGovernance(folder=folder, sites=SITES)
        federation.initialise(name=FEDERATION)
        federation.start_coordinator()
        with federation.client() as client:
            federation.wait_until_serving(client)
            governance.make_people()
            policy = demo_policy(
                federation=FederationId(FEDERATION),
                sites=SITES,
                base=_NO_MODEL,
                code=installed_code(),
                admins=PEOPLE,
                threshold=THRESHOLD,
                witnesses=len(SITES),
                now=datetime.now(UTC),
                min_countries=MIN_COUNTRIES,
            )
            governance.found({POLICY_DOCUMENT: policy.to_bytes()}, client)
            say(f"{', '.join(PEOPLE)} founded federation {FEDERATION} with {len(SITES)} members")
            stage = Stage(federation=federation, governance=governance, client=client, say=say)
            SCENARIOS[name](stage)
    say(f"every request with its signatures is in {folder / 'governance'}")
