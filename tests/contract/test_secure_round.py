"""A secure round over the real services: every survivor exactly once, or nothing."""

from __future__ import annotations

import pytest

from protocols.rounds import Aborted, Burned, Dealing, Released
from protocols.secagg.attempts import attempt_of
from protocols.secagg.codec import from_bytes
from protocols.secagg.messages import Transcript
from protocols.secagg.verify import recompute_sum, verify_transcript
from tests.support.door import served
from tests.support.secure_nodes import STEPS, SecureRound


@pytest.fixture
def door(tmp_path):
    with served(tmp_path) as found:
        yield found


def test_the_opened_sum_is_the_plain_sum_of_all(door):
    play = SecureRound(door)
    play.all(*STEPS)
    row = play.until_open()
    assert isinstance(row.phase, Released)
    assert row.phase.survivors == set(play.nodes)
    assert play.opened_sum() == play.plain_sum(list(play.nodes))
    assert row.metrics["nodes"] == 5


def test_an_auditor_recomputes_it_from_what_is_published(door):
    play = SecureRound(door)
    play.all(*STEPS)
    row = play.until_open()
    transcript = from_bytes(Transcript, door.parts.blobs.open(row.transcript).path.read_bytes())
    attempt = attempt_of(play.plan, play.round, 1, row.start_root)
    verified = verify_transcript(transcript, attempt)
    node = play.nodes["n00"]
    uploads = {
        name: (lambda o, length, v=n.vector: v[o : o + length]) for name, n in play.nodes.items()
    }
    again = b"".join(recompute_sum(verified, uploads, node.layout.coordinates, node.ring))
    assert again == play.opened_sum()


@pytest.mark.parametrize("lost_before", ["upload", "commit", "reveal"])
def test_a_node_lost_after_dealing_does_not_cost_the_others(door, lost_before):
    play = SecureRound(door, n=5)
    steps = STEPS.index(lost_before)
    play.all(*STEPS[:steps])
    for step in STEPS[steps:]:
        play.all(step, but=("n03",))
        if step == "upload":
            play.expire()
    row = play.until_open()
    survivors = sorted(row.phase.survivors)
    assert ("n03" in survivors) == (lost_before != "upload")
    assert play.opened_sum() == play.plain_sum(survivors)


def test_a_node_lost_while_dealing_restarts_it_with_fresh_keys(door):
    play = SecureRound(door, n=5)
    play.all("join", "ready")
    play.all("deal", but=("n01",))
    play.expire()
    assert isinstance(play.phase, Dealing)
    assert (play.phase.attempt, "n01" in play.phase.ready) == (2, False)
    play.all(
        "next_attempt", "deal", "acknowledge", "mask", "upload", "commit", "reveal", but=("n01",)
    )
    row = play.until_open()
    assert play.opened_sum() == play.plain_sum(sorted(row.phase.survivors))


def test_a_node_that_dies_as_dealing_restarts_is_dropped_too(door):
    play = SecureRound(door, n=6)
    play.all("join", "ready")
    play.all("deal", but=("n01",))
    play.expire()
    play.all("next_attempt", but=("n01", "n02"))
    play.expire()
    assert (play.phase.attempt, sorted(play.phase.ready)) == (3, ["n00", "n03", "n04", "n05"])
    lost = ("n01", "n02")
    play.all("next_attempt", "deal", "acknowledge", "mask", "upload", "commit", "reveal", but=lost)
    row = play.until_open()
    assert play.opened_sum() == play.plain_sum(sorted(row.phase.survivors))


def test_too_few_uploads_end_with_an_abort_certificate(door):
    play = SecureRound(door, n=5)
    play.all(*STEPS[: STEPS.index("upload")])
    play.all("upload", but=("n00", "n01"))
    play.expire()
    play.all("abort", but=("n04",))
    assert isinstance(play.phase, Aborted)


def test_silence_after_uploads_burns_the_round(door):
    play = SecureRound(door, n=5)
    play.all(*STEPS[: STEPS.index("commit")])
    play.expire()
    assert isinstance(play.phase, Burned)
