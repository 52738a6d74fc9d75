"""An attempt of four members (t = 3, c = 1) at each of its stages, and ways to misbehave in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protocols.secagg import checks, shamir
from protocols.secagg import coordinator as hub
from protocols.secagg import packets as packets_module
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.messages import (
    Abort,
    AbortCertificate,
    DealOk,
    Packet,
    Reveal,
    Signed,
    signed_from_bytes,
)
from protocols.secagg.packets import seal
from tests.support.secagg import World, identity, node_name, seed_of

A, B, C, D = (node_name(i) for i in range(1, 5))
KEYS = {node_name(i): identity(i) for i in range(1, 9)}

STAGES = {
    "fresh": lambda w: None,
    "ready": lambda w: w.do_ready(w.members),
    "dealt": lambda w: (w.do_deal(), w.do_deliver()),
    "acknowledged": lambda w: w.do_acknowledge(),
    "masking": lambda w: w.do_go(),
    "uploaded": lambda w: (w.do_upload([A, B, C]), w.do_survivors()),
    "committed": lambda w: w.do_commit(),
    "revealed": lambda w: w.do_reveal(),
}


@functools.cache
def _stage(name: str) -> World:
    names = list(STAGES)
    if name == names[0]:
        return World.make(4, d=8)
    world = copy.deepcopy(_stage(names[names.index(name) - 1]))
    STAGES[name](world)
    return world


def at(stage: str) -> World:
    """A world of its own, played honestly up to ``stage``. D is lost before it uploads."""
    return copy.deepcopy(_stage(stage))


def forge(world: World, signed, **changes) -> Signed:
    """The same message, changed and signed again by its sender: a member that lies."""
    body = replace(signed.body, **changes)
    return Signed.make(KEYS[body.node], body)


def edit(messages, *, drop=(), change=None):
    """A list of signed messages without some senders, or with one exchanged."""
    change = change or {}
    return tuple(
        change.get(signed.body.node, signed) for signed in messages if signed.body.node not in drop
    )


class Refusals:
    """Rows of a refusal table, registered as they are written."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, type[Exception], Callable[[], object]]] = []

    def row(self, label: str, error: type[Exception]) -> Callable[..., Any]:
        """Register a play that must end in ``error``; ``label`` begins with the clause."""

        def keep(play: Callable[[], object]) -> Callable[[], object]:
            self.rows.append((label, error, play))
            return play

        return keep

    @property
    def clauses(self) -> set[str]:
        return {label.split()[0] for label, _, _ in self.rows}


def check_refused(label: str, error: type[Exception], play: Callable[[], object]) -> None:
    """The play ends in exactly that error, answered by that clause.

    2.3 may answer first for whatever is of another attempt: it is checked with every signature.
    """
    with pytest.raises(error) as caught:
        play()
    assert type(caught.value) is error, f"{label} was answered by {type(caught.value).__name__}"
    clause = getattr(caught.value, "clause", "")
    assert clause in ("", "2.3", label.split(maxsplit=1)[0]), f"{label} was answered by {clause}"


def abort_certificate(nodes, **changes) -> AbortCertificate:
    world = at("uploaded")
    attempt = world.attempt
    bodies = [
        Abort(
            federation=attempt.federation,
            round=attempt.round,
            attempt=attempt.number,
            node=node,
            roster_root=attempt.roster.root,
            reason="test.abort",
        )
        for node in nodes
    ]
    return AbortCertificate(
        aborts=tuple(Signed.make(KEYS[body.node], replace(body, **changes)) for body in bodies)
    )


def badly_dealt(world: World, to=A):
    """B seals for ``to`` shares that it did not commit to, and signs the packets."""
    started = world.started
    keys = AttemptKeys.derive(seed_of("attempt", 2, str(world.attempt)), world.attempt, B)
    held = next(h for h in at("acknowledged").members[to].state.held if h.dealer == B)
    wrong = replace(held, b_share=bytes(33))
    sealed = {packet.to: packet.sealed for packet in world.bundles[B].packets}
    sealed[to] = seal(
        wrong,
        started.ctx_deal,
        keys,
        started.readys[to].ek,
        dealer=started.indices[B],
        to=started.indices[to],
    )
    root = checks.tree_root(checks.packet_leaves(B, sealed, started)).hex()
    return replace(
        world.bundles[B],
        deal=forge(world, world.bundles[B].deal, packets_root=root),
        packets=tuple(Packet(to=node, sealed=data) for node, data in sealed.items()),
    )


def world_with_bad_polynomial(*, threshold_off: int) -> World:
    """B commits to one b and deals shares of another polynomial, consistently signed."""
    original = packets_module.shamir.split

    class Crooked:
        """Stands in for ``shamir`` while B deals: its b shares are of a different secret."""

        calls = 0

        def __getattr__(self, name):
            return getattr(shamir, name)

        def split(self, secret, **kwargs):
            Crooked.calls += 1
            if Crooked.calls == 2:  # RK first, then b
                shares = original(bytes(32), **kwargs)
                right = original(secret, **kwargs)
                return [*right[: -threshold_off - 1], *shares[-threshold_off - 1 :]]
            return original(secret, **kwargs)

    world = at("ready")
    for node in world.start.nodes:
        if node == B:
            packets_module.shamir = Crooked()
        try:
            world.do_deal([node])
        finally:
            packets_module.shamir = shamir
    assert Crooked.calls == 2  # else nothing was tested
    world.do_deliver()
    # B itself would find out when it derives its own share again; it lies and says DEAL_OK
    for node in (A, C, D):
        (data,) = world.members[node].acknowledge(world.deliveries[node].to_bytes())
        world.oks[node] = signed_from_bytes(DealOk, data)
    (data,) = world.members[B].acknowledge(world.deliveries[B].to_bytes())
    world.oks[B] = signed_from_bytes(DealOk, data)
    world.do_go()
    world.do_upload()
    world.do_survivors()
    world.do_commit()
    world.certificate = hub.make_commit_certificate(world.commits, world.listed)
    for node in (A, C, D):  # B does not reveal
        (data,) = world.members[node].reveal(world.certificate.to_bytes())
        signed = signed_from_bytes(Reveal, data)
        checks.check_reveal(signed, world.listed)
        world.reveals[node] = signed
    return world
