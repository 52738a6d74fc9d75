"""Nobody rewrites a log unseen: every mutation is found, and the first bad place is named.

The log is a whole run with real masks, sums and models (``tests.support.audit_run``). What nobody
can see from one copy has its own test at the end: a log cut back to an old, good checkpoint.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.audit.records import Result
from protocols.tlog import kinds
from tests.support.audit_run import NODES, Run
from tests.support.tampering import (
    POWERS,
    Tampered,
    drop,
    duplicate,
    flip,
    interval_of,
    kinds_of,
    rewritten,
    swap,
    tamper,
    truncate,
)


@functools.cache
def run() -> Run:
    return Run().whole()


@functools.cache
def one_of_each() -> dict[str, int]:
    """A leaf of each kind, from the middle of the log where there are several."""
    return {kind: indices[len(indices) // 2] for kind, indices in kinds_of(run()).items()}


EACH_KIND = sorted(one_of_each())


def test_the_untouched_log_holds():
    found = rewritten(run(), run().entries, "files").audit(blobs=True)

    assert found.first is None
    assert found.failed == ()
    assert len(found.evidence.taken) == len(run().entries)


def test_every_kind_of_a_round_occurs():
    """Else the tests below would say less than they seem to."""
    rounds = {kind for kind in kinds.MODELS if kinds.is_about_round(kind)}

    assert rounds <= set(EACH_KIND)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_flipped_byte_is_found_at_its_leaf(kind):
    """The leaf's own signature convicts it, whoever signs the tree."""
    index = one_of_each()[kind]

    for power, at in zip(POWERS, (-9, 40, -9), strict=True):  # in the signature, in the payload
        first = tamper(run(), flip(index, at), power).audit().first

        assert first is not None
        assert (first.first, first.stop) == (index, index + 1)


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("power", ["files", "log"])
@pytest.mark.parametrize("change", [drop, duplicate, swap])
def test_a_leaf_that_is_dropped_repeated_or_moved_is_found_before_the_next_checkpoint(
    kind, power, change
):
    index = one_of_each()[kind]
    if index + 1 == len(run().entries) and change is swap:
        index -= 1
    low, high = interval_of(run(), index)

    first = tamper(run(), change(index), power).audit().first

    assert first is not None
    if power == "files":  # the archive is there: the place is known to an interval
        assert low <= first.first <= max(high, index + 1)
    else:  # only the newest head is left, and it has no quorum
        assert first.first <= max(high, index + 2)


@given(index=st.integers(0, 79), change=st.sampled_from([drop, duplicate, flip]))
@settings(max_examples=40, deadline=None)
def test_even_operator_and_witnesses_together_cannot_change_what_others_signed(index, change):
    """All heads are cosigned and the archive is gone; nodes' signatures and chains remain.

    A leaf that nobody builds on can be dropped: the last of the log, where its signer has none
    after it.
    """
    entries = run().entries
    if index + 1 == len(entries) and change is drop:
        return
    first = tamper(run(), change(index), "everybody").audit().first
    assert first is not None, f"{change.__name__} of leaf {index}"
    if change in (flip, duplicate):
        assert first.first <= index + 1


def test_even_together_they_can_only_move_the_last_words_of_nodes():
    """Two leaves may change places where neither signer says anything after: nobody saw the order.

    In this log those are the four confirmations before the end; every other swap is found.
    """
    entries = run().entries
    last = len(entries) - 1  # the operator's round.closed: it names what came before
    confirms = [index for index in kinds_of(run())["round.confirm"] if index > last - 5]
    assert confirms == list(range(last - 4, last))

    unseen = [
        index
        for index in range(last)
        if tamper(run(), swap(index), "everybody").audit().first is None
    ]

    assert unseen == confirms[:-1]


@pytest.mark.parametrize("power", ["files", "log"])
def test_a_truncated_log_is_found(power):
    entries = run().entries
    for size in (len(entries) - 1, len(entries) // 2, 1):
        first = tamper(run(), truncate(size), power).audit().first

        assert first is not None
        assert first.first <= size


def test_a_log_cut_back_to_an_old_checkpoint_needs_a_second_copy():
    """It holds, as it did then. A checkpoint from elsewhere (``--seen``) convicts it."""
    old = sorted(run().checkpoints)[-3]
    cut = tamper(run(), truncate(old), "everybody")
    assert cut.audit().first is None

    newer = run().checkpoints[len(run().entries)]
    files = replace(cut.files, archive={len(run().entries): newer})
    first = Tampered(files=files, policy=cut.policy, run=run()).audit().first

    assert first is not None
    assert first.check == "missing"
    assert first.first == old


# -- forks: the coordinator signs other leaves of its own ----------------------------------------


def forked(kind: str, change) -> tuple[Run, int]:
    """The run again, with one leaf of the coordinator said otherwise and all its later ones signed
    anew; the nodes' leaves are those that they signed."""
    index = one_of_each()[kind]
    twin = Run()
    real = run()
    done: list[bytes] = []
    said = []
    from policies.audit.replay import Replay

    replay = Replay()
    for at, entry in enumerate(real.entries):
        taken = replay.take(entry)
        if taken.holder.role != "coordinator" or at < index:
            if taken.holder.role == "coordinator":
                twin.heads["coordinator"] = replay.chains[taken.leaf.signer]
            done.append(entry)
            continue
        fields = change(taken.said) if at == index else taken.said
        twin.entries = done
        twin.hashes = []
        twin.clock = taken.statement.time
        twin.seen = taken.statement.seen
        statement = taken.statement
        said.append(at)
        twin.say("coordinator", fields, subject=statement.subject, digest=statement.digest)
    return twin, index


FORKS = {
    "round.plan": lambda s: s.model_copy(update={"model_in": "9" * 64}),
    "round.start": lambda s: s.model_copy(update={"ctx_deal": "9" * 64}),
    "round.survivors": lambda s: s.model_copy(
        update={"dropped": tuple(d.model_copy(update={"code": "other"}) for d in s.dropped)}
    ),
    "round.aggregate": lambda s: s.model_copy(update={"model_out": "9" * 64}),
    "round.closed": lambda s: s.model_copy(update={"confirmations": ()}),
    "round.aborted": lambda s: s.model_copy(update={"code": "other"}),
    "cert.issued": lambda s: s.model_copy(update={"spki_sha256": "9" * 64}),
    "log.heartbeat": lambda s: s.model_copy(update={"interval_s": 60}),
    "objection.resolved": lambda s: s.model_copy(update={"outcome": "upheld"}),
    "log.genesis": lambda s: s.model_copy(update={"ca_sha256": "9" * 64}),
}


def test_every_kind_that_the_coordinator_signs_is_forked():
    signed_by_coordinator = {
        kind for kind in EACH_KIND if "coordinator" in kinds.MODELS[kind].SIGNERS
    }

    assert signed_by_coordinator == set(FORKS)


@pytest.mark.parametrize("kind", sorted(FORKS))
def test_a_fork_is_found_though_the_coordinator_signed_it(kind):
    """With its own key and the log's it can say another thing, but not make others have seen it."""
    twin, index = forked(kind, FORKS[kind])
    assert twin.entries[index] != run().entries[index]  # else nothing was tested
    low, high = interval_of(run(), index)

    found = rewritten(run(), twin.entries, "files").audit()
    assert found.first is not None
    assert low <= found.first.first <= high

    assert rewritten(run(), twin.entries, "log").audit().first is not None


@pytest.mark.parametrize(
    "kind", [kind for kind in sorted(FORKS) if kind not in {"objection.resolved", "round.closed"}]
)
def test_a_fork_is_found_even_where_every_witness_cosigned_it(kind):
    """Nodes said in their leaves which tree they had seen, and that was another one."""
    twin, index = forked(kind, FORKS[kind])

    first = rewritten(run(), twin.entries, "everybody").audit().first

    assert first is not None
    assert first.first >= interval_of(run(), index)[0]


# -- documents beside the log --------------------------------------------------------------------


def test_a_replaced_transcript_is_found():
    real = run()
    released = list(kinds_of(real)["round.aggregate"])
    tampered = rewritten(real, real.entries, "files")
    digests = [
        taken.said.transcript_blob
        for taken in tampered.audit().evidence.taken
        if taken.index in released
    ]
    blobs = {**real.blobs, digests[0]: real.blobs[digests[1]]}

    found = Tampered(
        files=tampered.files, policy=tampered.policy, run=replace_blobs(real, blobs)
    ).audit(blobs=True)

    assert found.first is None
    bad = [record for record in found.failed if record.id == "12"]
    assert [record.round for record in bad] == ["r1/0"]
    assert found.result is Result.FAIL


def replace_blobs(real: Run, blobs: dict[str, bytes]) -> Run:
    twin = object.__new__(Run)
    twin.__dict__.update(real.__dict__)
    twin.blobs = blobs
    return twin


def test_a_node_that_changes_its_own_privacy_claim_is_found():
    """It signs the leaf itself, so the tree and the chain hold; the plan gives another claim."""
    mended = private_run(change=False)
    assert not [r for r in mended.audit(blobs=True).failed if r.id == "4"]

    cheap = private_run(change=True).audit(blobs=True)

    assert cheap.first is None
    (record,) = [r for r in cheap.failed if r.id == "4"]
    kind = cheap.evidence.taken[record.leaves[0]].said
    assert (kind.KIND, kind.node) == ("update.commit", NODES[0])


def private_run(*, change: bool) -> Tampered:
    from tests.support.private_plans import _PARTS

    made = Run(
        mode="record-local", changes=_PARTS["record-local"] | {"evaluation": {"languages": []}}
    )
    honest = made.claim

    def claim():
        value = honest()
        if change and value is not None and "once" not in made.__dict__:
            made.__dict__["once"] = True
            return value | {"count": 1}
        return value

    made.claim = claim
    made.begin()
    made.open_round()
    world = made.start_attempt()
    made.upload(world, NODES)
    made.release(world)
    return rewritten(made, made.entries, "files")
