"""One key under two ids: every layer that counts refuses it by itself.

TUF counts ids. Root, delegations and the count of each signature look for a second id of a known
key, and ``distinct`` looks twice: an id that is not its key's, and a key that stands there before.
Each is asked alone here, so that one that stops looking is seen although the others still would.
"""

from __future__ import annotations

import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, Root, Targets

from protocols.governance import roles, signers
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import parse_metadata
from protocols.governance.signers import check_delegations, quorum, read_charter
from tests.support.trust import World, card, private

ANA = card("ana", "ar-univ-1", "AR").public
TWIN = SSlibKey.from_dict("f" * 64, ANA.to_dict())


@pytest.fixture
def world():
    made = World()
    made.found()
    return made


def alias(call) -> None:
    with pytest.raises(TrustRefusedError) as caught:
        call()
    assert caught.value.rule == "trust.alias", str(caught.value)


@pytest.mark.parametrize("blind", ["check_key", "material"])
def test_either_look_is_enough(monkeypatch, blind):
    """One of the two is blinded; the other one still sees it."""
    monkeypatch.setattr(signers, blind, {"check_key": lambda _: None, "material": id}[blind])
    alias(lambda: signers.distinct([ANA, TWIN]))


def test_without_both_nothing_sees_it(monkeypatch):
    """So the test above is about these two, and nothing else."""
    monkeypatch.setattr(signers, "check_key", lambda _: None)
    monkeypatch.setattr(signers, "material", id)
    signers.distinct([ANA, TWIN])


def test_the_root_refuses_it(world):
    root = parse_metadata(world.state.metadata[roles.ROOT], Root).signed
    root.keys[TWIN.keyid] = TWIN
    for name in (roles.ROOT, roles.TARGETS):
        root.roles[name].keyids.append(TWIN.keyid)
    alias(lambda: read_charter(root))


def targets_with_twin(world) -> Targets:
    targets = parse_metadata(world.state.metadata[roles.TARGETS], Targets).signed
    targets.delegations.keys[TWIN.keyid] = TWIN
    targets.delegations.roles[roles.POLICY].keyids.append(TWIN.keyid)
    return targets


def test_the_delegations_refuse_it(world):
    alias(lambda: check_delegations(targets_with_twin(world), world.state.charter))


def test_the_count_of_signatures_refuses_it(world):
    """TUF itself counts two: the policy would have its quorum."""
    policy = Metadata.from_bytes(world.state.metadata[roles.POLICY])
    policy.signatures.clear()
    for key in (ANA, TWIN):
        policy.sign(CryptoSigner(private("ana"), key), append=True)
    targets = targets_with_twin(world)
    found = targets.get_verification_result(roles.POLICY, policy.signed_bytes, policy.signatures)
    assert found.verified
    alias(lambda: quorum(targets, roles.POLICY, policy, world.state.charter))
