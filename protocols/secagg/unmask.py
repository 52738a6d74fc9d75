"""Taking the masks off a sum.

In the sum over the survivors U3 every pair mask between two survivors has cancelled. What is left
on it are the survivors' self masks, and the pair masks that survivors share with lost members:

    S = sum of y_u - sum over u in U3 of (self_u + sum over v in U1 without U3 of +-p_uv)

The secrets that name those masks are checked before they are used: a reconstructed secret is right
exactly when it fits what its owner signed in its DEAL.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protocols.identifiers import Digest, NodeId
from protocols.secagg.context import Roster
from protocols.secagg.errors import CheckFailedError
from protocols.secagg.keys import (
    pair_mask_key,
    self_mask_key,
    self_seed_commitment,
    x25519_public,
)
from protocols.secagg.masks import MaskAdder, MaskKey
from protocols.secagg.messages import Deal
from protocols.tensors.ordered import ordered_map
from protocols.tensors.ring import Ring
from protocols.tensors.sizes import CHUNK

SumReader = Callable[[int], NDArray[np.uint32]]  # chunk index -> uint32 [m], modulo 2**bits


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSecrets:
    """The reconstructed secrets of an attempt: exactly one for each member of U1."""

    self_seeds: Mapping[NodeId, bytes] = field(repr=False)  # b of every survivor
    pair_secrets: Mapping[NodeId, bytes] = field(repr=False)  # RK of every lost member


def check_secret(
    deal: Deal, index: int, *, self_seed: bytes | None, rk_secret: bytes | None
) -> None:
    """Check a reconstructed secret against its owner's DEAL.

    Raises:
        CheckFailedError: it is not the secret that ``deal.node`` committed to.
    """
    if self_seed is not None:
        found = self_seed_commitment(deal.ctx_deal, index, self_seed)
        if not hmac.compare_digest(found, deal.seed_commitment):
            raise CheckFailedError(
                f"the opened self seed of {deal.node} is not the one it committed to",
                clause="8.3",
            )
    if rk_secret is not None and not hmac.compare_digest(x25519_public(rk_secret), deal.rk):
        raise CheckFailedError(
            f"the opened masking key of {deal.node} is not the one it dealt", clause="8.3"
        )


def mask_remover(
    ctx: Digest,
    ring: Ring,
    *,
    roster: Roster,
    deals: Mapping[NodeId, Deal],
    opened: OpenedSecrets,
) -> MaskAdder:
    """An adder that removes from a sum over the survivors every mask that did not cancel.

    Args:
        ctx: of the attempt.
        deals: of all of U1, verified.
        opened: one secret for each of them; survivors are those whose self seed is given.

    Returns:
        |U3| * (1 + lost) masks with the opposite sign; see ``MaskAdder``.

    Raises:
        CheckFailedError: a member has no opened secret, or both, or a wrong one.
    """
    survivors, lost = opened.self_seeds.keys(), opened.pair_secrets.keys()
    if survivors & lost or survivors | lost != deals.keys():
        raise CheckFailedError(
            "exactly one secret must be open for each member that dealt", clause="8.2"
        )
    indices = {node: roster.index(node) for node in deals}
    for node, deal in deals.items():
        check_secret(
            deal,
            indices[node],
            self_seed=opened.self_seeds.get(node),
            rk_secret=opened.pair_secrets.get(node),
        )
    masks = [
        MaskKey(key=self_mask_key(ctx, seed, indices[node]), sign=-1)
        for node, seed in sorted(opened.self_seeds.items())
    ]
    for gone, secret in sorted(opened.pair_secrets.items()):
        own = (indices[gone], deals[gone].rk)
        for node in sorted(survivors):
            peer = (indices[node], deals[node].rk)
            key = pair_mask_key(ctx, secret, own=own, peer=peer)
            # The survivor added it with + when the lost member's index was the higher one.
            masks.append(MaskKey(key=key, sign=-1 if own[0] > peer[0] else 1))
    return MaskAdder(masks, ring)


def unmask(
    read: SumReader, coordinates: int, ring: Ring, remover: MaskAdder, *, threads: int = 1
) -> Iterator[NDArray[np.uint32]]:
    """The plain integer sum, chunk by chunk and in order.

    Args:
        read: gives each chunk of the masked sum; called from ``threads`` threads. Not changed.
        coordinates: d, of the whole vector.
        threads: chunks worked on at once; the answer does not depend on it.

    Yields:
        uint32 in [0, 2**bits), shape [m], one for each chunk.

    Raises:
        ValueError: ``read`` gave a chunk of another length.
    """

    def work(chunk: int, _: None) -> NDArray[np.uint32]:
        masked = read(chunk)
        if masked.shape != (min(CHUNK, coordinates - chunk * CHUNK),):
            raise ValueError(f"chunk {chunk} of the sum has shape {masked.shape}")
        lanes = masked.astype(np.uint32)  # a copy
        remover.add(chunk, lanes)
        np.bitwise_and(lanes, ring.modulus - 1, out=lanes)
        return lanes

    return ordered_map(work, -(-coordinates // CHUNK), lambda: None, threads=threads)
