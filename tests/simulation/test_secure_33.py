"""A secure round of 33 nodes on one machine: real mutual TLS, real services, light clients.

Ten nodes are lost, some in every phase: two do not deal and one does not agree (Dealing starts
again, twice), three do not upload, two do not commit, two do not reveal. 27 are in the sum; with
t = 22, three of the 30 of the last attempt may be lost before COMMIT, and 23 reveal.
"""

from __future__ import annotations

import numpy as np
import pytest

from protocols.rounds import Committing, Dealing, Released, Revealing, Uploading
from tests.support.hostile import Member, SharedRound, audit, hostile

N, D = 33, 40
NO_DEAL = ("n03", "n20")
NO_DEAL_OK = ("n11",)
NO_UPLOAD = ("n00", "n17", "n32")
NO_COMMIT = ("n05", "n29")
NO_REVEAL = ("n08", "n23")
LOST = NO_DEAL + NO_DEAL_OK + NO_UPLOAD + NO_COMMIT + NO_REVEAL


class Marked(Member):
    """Its vector is non-zero in its own coordinate only: the sum names who was counted."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.delta[:] = 0.0
        self.delta[self.plan.roster.index(self.name)] = 2.0**-6


@pytest.mark.slow
def test_33_nodes_with_ten_lost_in_all_phases(tmp_path):
    assert len(set(LOST)) == 10
    with hostile(tmp_path) as door:
        play = SharedRound(door, n=N, coordinates=D, node_type=Marked)
        assert (play.plan.secagg.threshold, play.plan.secagg.colluders) == (22, 10)
        gone = ()
        play.all("join", "ready")

        gone += NO_DEAL
        play.all("deal", but=gone)
        play.expire()
        assert isinstance(play.phase, Dealing)
        assert (play.phase.attempt, len(play.phase.ready)) == (2, 31)

        play.all("next_attempt", "deal", but=gone)
        gone += NO_DEAL_OK
        play.all("acknowledge", but=gone)
        play.expire()
        assert isinstance(play.phase, Dealing)
        assert (play.phase.attempt, len(play.phase.ready)) == (3, 30)

        play.all("next_attempt", "deal", "acknowledge", but=gone)
        assert isinstance(play.phase, Uploading)
        play.all("mask", but=gone)
        gone += NO_UPLOAD
        play.all("upload", but=gone)
        play.expire()
        assert isinstance(play.phase, Committing)
        survivors = sorted(set(play.nodes) - set(gone))
        assert len(survivors) == 27

        gone += NO_COMMIT
        play.all("commit", but=gone)
        assert isinstance(play.phase, Revealing)
        gone += NO_REVEAL
        play.all("reveal", but=gone)
        row = play.until_open()

        assert isinstance(row.phase, Released)
        assert (sorted(row.phase.survivors), row.phase.attempt) == (survivors, 3)
        assert play.opened_sum() == play.plain_sum(survivors)
        marks = play.residues(play.opened_sum())[:N]
        assert [f"n{i:02d}" for i in np.flatnonzero(marks)] == survivors
        assert row.metrics["nodes"] == 27
        audit(play, attempt=3)
