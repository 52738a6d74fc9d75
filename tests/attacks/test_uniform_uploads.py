"""What lies in the coordinator's spool is uniform over the ring, or it is not masked.

``tests/unit/test_secagg_masks.py`` shows it of the masks; here it is looked at where it matters:
in the files that a real round leaves behind a real server, with vectors that are far from uniform.
"""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.spool import upload_path
from protocols.identifiers import NodeId
from tests.support.hostile import CHI_SQUARE_LIMIT, Member, SharedRound, chi_squares

D = 100_000  # coordinates: about 400 in each of 256 bins


def arrived(play: SharedRound, name: str) -> np.ndarray:
    """Residues of the vector in the spool."""
    path = upload_path(play.door.config.spool, play.round, 1, NodeId(name))
    return play.residues(path.read_bytes())


def upload_all(door, bits: int, **types) -> SharedRound:
    play = SharedRound(
        door, n=3, coordinates=D, node_type=types, vector={"ring_bits": bits, "clip_norm": None}
    )
    play.all("join", "ready", "deal", "acknowledge", "mask", "upload")
    return play


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_every_vector_that_arrives_is_uniform(door, bits):
    play = upload_all(door, bits)
    for name in play.nodes:
        assert max(chi_squares(arrived(play, name), bits)) < CHI_SQUARE_LIMIT
        assert min(chi_squares(play.plain([name]), bits)) > CHI_SQUARE_LIMIT  # it was far from it


class Unmasked(Member):
    """Sends its vector as it is."""

    def masks(self):
        return None


class HalfMasked(Member):
    """Masks every second coordinate."""

    def masks(self):
        adder = super().masks()

        def half(chunk, start, lanes):
            masked = lanes.copy()
            adder(chunk, start, masked)
            lanes[::2] = masked[::2]

        return half


class LowMasked(Member):
    """Keeps the 8 lowest bits of each mask only."""

    def masks(self):
        adder = super().masks()

        def low(chunk, start, lanes):
            masked = lanes.copy()
            adder(chunk, start, masked)
            lanes += (masked - lanes) & 255

        return low


@pytest.mark.parametrize("kind", [Unmasked, HalfMasked, LowMasked])
def test_the_oracle_convicts_what_is_not_fully_masked(door, kind):
    play = upload_all(door, 20, n01=kind)
    for name in play.nodes:
        worst = max(chi_squares(arrived(play, name), 20))
        assert (worst > CHI_SQUARE_LIMIT) == (name == "n01")
