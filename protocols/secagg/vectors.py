"""Golden vectors of the secure sum, from fixed seeds.

``python -m protocols.secagg.vectors NAME > protocols/vectors/NAME`` writes one again; the tests
fail if the tree differs. Keys, seeds and shares in them are made from published words and protect
nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.canonical import canonical_bytes
from protocols.crypto.signatures import public_bytes
from protocols.identifiers import Digest, FederationId, NodeId, RoundId
from protocols.secagg import coordinator as hub
from protocols.secagg import node as side
from protocols.secagg import shamir
from protocols.secagg.checks import check_start, check_survivors
from protocols.secagg.context import Attempt, Member, Roster
from protocols.secagg.dealing import where
from protocols.secagg.keys import (
    AttemptKeys,
    hkdf,
    packet_key,
    pair_mask_key,
    self_mask_key,
    self_seed_commitment,
)
from protocols.secagg.masks import MaskAdder, MaskKey
from protocols.secagg.messages import Complaint, Signed
from protocols.secagg.states import NodeState
from protocols.secagg.threshold import MAX_ROSTER, MIN_ROSTER, SecaggTerms
from protocols.tensors.ring import Ring
from protocols.tensors.sizes import CHUNK

CHECKPOINT = b"log.minga.example/rounds/2026\n17\n" + b"A" * 43 + b"=\n"
NAMES = tuple(map(NodeId, ("ar-archivo", "br-saude", "cl-leyes", "pe-escuela")))
LOST = NAMES[2]


def _seed(*words: str) -> bytes:
    return hashlib.sha256(("minga vectors: " + " ".join(words)).encode()).digest()


def _digest(word: str) -> Digest:
    return Digest(_seed(word).hex())


def _key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_seed("identity", name))


def attempt() -> Attempt:
    """Four members, three of whom must agree."""
    roster = Roster(tuple(Member(node=n, key=public_bytes(_key(n))) for n in NAMES))
    return Attempt(
        federation=FederationId("andes"),
        round=RoundId.parse("andes-7/42"),
        number=1,
        roster=roster,
        terms=SecaggTerms.for_roster(len(roster)),
        model_root=_digest("model"),
        plan_digest=_digest("plan"),
    )


class _Play:
    """One attempt from READY to the transcript, with one member lost after GO."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.states: dict[NodeId, NodeState] = {}
        terms = attempt()
        readys = {}
        for name in terms.roster.nodes:
            readys[name] = self._take(
                side.ready(
                    None,
                    terms,
                    name,
                    _key(name),
                    seed=_seed("attempt", name),
                    seen_size=16,
                    seen_root=_digest("seen"),
                )
            )[0]
        start = hub.make_start(readys)
        self.started = check_start(start, terms)
        bundles = {n: self._take(side.deal(self.states[n], start, _key(n)))[0] for n in readys}
        self.agreed, deliveries = hub.make_deliveries(bundles, self.started, CHECKPOINT)
        oks = {}
        for name, delivery in deliveries.items():
            move = side.acknowledge(self.states[name], delivery, _key(name), checkpoint=CHECKPOINT)
            oks[name] = self._take(move)[0]
        go = hub.make_go(oks)
        for name in readys:
            self._take(side.go(self.states[name], go))
        self.masking = dict(self.states)
        headers = {}
        for name in (n for n in readys if n != LOST):
            move = side.upload(
                self.states[name], _key(name), upload_root=_digest(f"upload {name}"), length=20
            )
            headers[name] = self._take(move)[0]
        survivors = hub.make_survivors(headers)
        self.listed = check_survivors(survivors, self.agreed)
        commits = {
            n: self._take(side.commit(self.states[n], survivors, _key(n)))[0] for n in headers
        }
        certificate = hub.make_commit_certificate(commits, self.listed)
        reveals = {
            n: self._take(side.reveal(self.states[n], certificate, _key(n)))[0] for n in headers
        }
        found = hub.reconstruct((signed.body for signed in reveals.values()), self.listed)
        aborts: dict[NodeId, Signed[Any]] = {}
        for name in NAMES[:3]:
            (sent,) = side.abort(self.masking[name], "site.deadline", _key(name)).send
            if isinstance(sent, Signed):
                aborts[name] = sent
        complaint = Complaint(
            **where(terms, NAMES[0]),
            ctx_deal=self.started.ctx_deal,
            against=NAMES[1],
            ek_secret=AttemptKeys.derive(_seed("attempt", NAMES[0]), terms, NAMES[0]).ek_secret,
        )
        first = NAMES[0]
        transcript = hub.make_transcript(
            start=start,
            bundles=bundles,
            checkpoint=CHECKPOINT,
            go=go,
            survivors=survivors,
            certificate=certificate,
            reveals=reveals,
            opened=found.opened,
        )
        sample: tuple[Any, ...] = (
            readys[first],
            start,
            bundles[first].deal,
            bundles[first],
            deliveries[first],
            oks[first],
            Signed.make(_key(NAMES[0]), complaint),
            go,
            headers[first],
            survivors,
            commits[first],
            certificate,
            aborts[NAMES[0]],
            hub.make_abort_certificate(aborts, terms),
            reveals[first],
            transcript,
        )
        for message in sample:
            signed = isinstance(message, Signed)
            kind = type(message.body if signed else message).__name__
            self.rows.append({"kind": kind, "signed": signed, "bytes": message.to_bytes().hex()})

    def _take(self, move: side.Move) -> tuple[Any, ...]:
        self.states[move.state.node] = move.state
        return move.send


def _messages() -> dict[str, Any]:
    play = _Play()
    terms = attempt()
    return {
        "about": "One attempt of four members, cl-leyes lost after GO. Signed messages are the"
        " envelope with body and signature.",
        "identity_seeds": {name: _seed("identity", name).hex() for name in NAMES},
        "attempt_seeds": {name: _seed("attempt", name).hex() for name in NAMES},
        "roster_root": terms.roster.root,
        "model_root": terms.model_root,
        "plan_digest": terms.plan_digest,
        "checkpoint": CHECKPOINT.hex(),
        "ctx_deal": play.started.ctx_deal,
        "ctx": play.agreed.ctx,
        "survivors": play.listed.digest,
        "messages": play.rows,
    }


def _first_lanes(key: bytes, bits: int, chunk: int) -> list[int]:
    lanes = np.zeros(8, np.uint32)
    MaskAdder([MaskKey(key=key, sign=1)], Ring(bits)).add(chunk, lanes)
    return [int(lane) for lane in lanes]


def _primitives() -> dict[str, Any]:
    play, terms = _Play(), attempt()
    keys = {name: AttemptKeys.derive(_seed("attempt", name), terms, name) for name in NAMES}
    a, b = keys[NAMES[0]], keys[NAMES[1]]
    ctx_deal, ctx = play.started.ctx_deal, play.agreed.ctx
    pair = pair_mask_key(ctx, a.rk_secret, own=(1, a.rk), peer=(2, b.rk))
    own = self_mask_key(ctx, a.self_seed, 1)
    coefficients = b"".join(
        hashlib.sha256(b"shamir-kat" + bytes([k])).digest() for k in range(1, 22)
    )
    dealt = shamir.split(
        bytes(range(32)), threshold=22, indices=range(1, 34), randomness=coefficients
    )
    return {
        "thresholds": [
            [n, t.threshold, t.colluders, t.min_surviving]
            for n in range(MIN_ROSTER, MAX_ROSTER + 1)
            for t in [SecaggTerms.for_roster(n)]
        ],
        "shamir": {
            "secret": bytes(range(32)).hex(),
            "coefficients": "SHA-256('shamir-kat' || byte k), k = 1..21",
            "share_1": dealt[0].hex(),
            "share_33": dealt[32].hex(),
            "sha256_of_33_shares": hashlib.sha256(b"".join(dealt)).hexdigest(),
        },
        "hkdf": {
            "ikm": bytes(32).hex(),
            "salt": bytes(32).hex(),
            "info": "minga/mask/self/v1 || 0001",
            "okm": hkdf(ikm=bytes(32), salt=bytes(32), info=b"minga/mask/self/v1\x00\x01").hex(),
        },
        "attempt_keys": {
            name: {"ek": k.ek.hex(), "rk": k.rk.hex(), "b": k.self_seed.hex()}
            for name, k in keys.items()
        },
        "self_seed_commitment": self_seed_commitment(ctx_deal, 1, a.self_seed).hex(),
        "packet_key_1_to_2": packet_key(ctx_deal, a.ek_secret, b.ek, dealer=1, to=2).hex(),
        "pair_mask_key_1_2": pair.hex(),
        "self_mask_key_1": own.hex(),
        "lanes": [
            {"key": name, "bits": bits, "chunk": chunk, "first": _first_lanes(key, bits, chunk)}
            for name, key in (("pair_mask_key_1_2", pair), ("self_mask_key_1", own))
            for bits in (16, 20, 24)
            for chunk in (0, 1, 255, 256, 257, 2**18 - 1)
        ],
        "chunk": CHUNK,
    }


def documents() -> Mapping[str, bytes]:
    """File name to canonical JSON."""
    return {
        "secagg.json": canonical_bytes({"schema": "minga.vectors.secagg/1", **_primitives()}),
        "secagg-messages.json": canonical_bytes(
            {"schema": "minga.vectors.secagg-messages/1", **_messages()}
        ),
    }


if __name__ == "__main__":
    sys.stdout.buffer.write(documents()[sys.argv[1]])
