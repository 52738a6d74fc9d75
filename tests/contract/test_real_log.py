"""The log of a real federation: written by its processes, verified by us and by Go, tampered with.

Coordinator and agents are real processes, updates are masked, witnesses are the nodes. One run for
the whole file. What is tried on every kind of leaf here is tried more widely, and with more keys in
the tamperer's hands, in tests/attacks/test_log_tampering.py.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest

from infra.audit.folder import read_log, read_trust_policy
from policies.audit.records import Result
from policies.audit.verify import audit
from protocols.tlog import kinds
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.note import SignerKey
from protocols.tlog.proofs import root_of, stored
from tests.support import gocheck
from tests.support.audit_disk import minga
from tests.support.federation import PATIENCE_S, running
from tests.support.tampering import drop, duplicate, flip, swap, truncate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROUNDS = 2


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """The folder of a federation that ran and was stopped in order."""
    folder = tmp_path_factory.mktemp("real") / "federation"
    with running(folder, nodes=4) as made:
        run = made.submit("logged", rounds=ROUNDS, mode="aggregate-only")
        made.confirmed(run)
        give_up = time.monotonic() + PATIENCE_S
        while closed(folder / "log") < ROUNDS:
            assert time.monotonic() < give_up, made.logs()
            made.household.check()
            time.sleep(0.2)
    return folder


def closed(log) -> int:
    """How many rounds are closed in the published log."""
    entries = read_log(log).entries if (log / "checkpoint").exists() else ()
    found = audit_of(log) if entries else None
    return 0 if found is None else sum(1 for _ in found.evidence.of(kinds.RoundClosed))


def audit_of(log, files=None):
    policy = read_trust_policy(log / "trust-policy.txt")
    return audit(files or read_log(log), policy, now=int(time.time()), anchored=True)


@pytest.fixture(scope="module")
def log(federation):
    return federation / "log"


@pytest.fixture(scope="module")
def files(log):
    """As they were read, with every archived head."""
    return read_log(log)


@pytest.fixture(scope="module")
def each_kind(log):
    """The last leaf of each kind."""
    return {t.said.KIND: t.index for t in audit_of(log).evidence.taken}


def test_the_log_holds_and_its_questions_are_answered(log):
    done = minga("audit", "verify", log, "--json")
    facts = json.loads(done.out)

    assert done.status == 0, done.error
    assert facts["leaves_verified"] == facts["size"]
    found = {}
    for record in facts["records"]:
        found.setdefault(record["id"], set()).add(record["result"])
    for id_ in ("1", "5", "9", "10", "12", "18", "21", "22"):  # what needs no signed policy
        assert found[id_] == {"pass"}, (id_, found[id_])


def test_every_model_is_made_again_from_the_masked_uploads(log):
    done = minga("audit", "recompute", log, "--json")

    assert done.status == 0, done.error
    facts = json.loads(done.out)
    assert [item["result"] for item in facts] == ["pass"] * ROUNDS
    assert all(item["from_uploads"] for item in facts)


def test_go_accepts_the_log(log):
    status, complaint, facts = gocheck.check(gocheck.program(), log)

    assert status == 0, complaint
    assert facts["leaves"] == facts["size"] > 4 * (2 + 3 * ROUNDS)
    assert facts["archived"] > 1


def test_every_kind_of_a_released_round_is_there(each_kind):
    assert each_kind.keys() >= {
        "log.genesis", "enrol.request", "cert.issued", "round.plan", "round.join", "round.start",
        "update.commit", "round.survivors", "round.aggregate", "round.confirm", "round.closed",
    }  # fmt: skip


def signed_again(federation, files, entries):
    """The operator's best: a new head by the real log key, the archive gone, no cosignature."""
    signer = SignerKey.parse_private((federation / "coordinator/keys/log.key").read_text().strip())
    hashes = [leaf_hash(entry) for entry in entries]
    head = Checkpoint(
        origin=signer.name, size=len(entries), root=root_of(stored(hashes), len(entries))
    )
    checkpoint = sign_checkpoint(head, signer).to_bytes()
    return replace(files, checkpoint=checkpoint, archive={}, entries=entries, row=hashes)


def rewritten(files, entries):
    """Whoever can write to the folder: bundles and tiles anew, no key."""
    return replace(files, entries=entries, row=[leaf_hash(entry) for entry in entries])


@pytest.mark.parametrize("change", [flip, drop, duplicate, swap])
def test_tampering_with_any_kind_of_leaf_is_found(federation, log, files, each_kind, change):
    sizes = sorted({0, *files.archive, len(files.entries)})
    for kind, last in each_kind.items():
        index = min(last, len(files.entries) - 2)
        high = min(size for size in sizes if size > index)
        entries = change(index)(list(files.entries))

        for made in (rewritten(files, entries), signed_again(federation, files, entries)):
            first = audit_of(log, made).first

            assert first is not None, f"{change.__name__} of {kind}"
            assert first.first <= max(high, index + 2), f"{change.__name__} of {kind}: {first}"
            if change is flip:
                assert (first.first, first.stop) == (index, index + 1)


def test_a_truncated_log_is_found(federation, log, files):
    for size in (len(files.entries) - 1, len(files.entries) // 2):
        entries = truncate(size)(list(files.entries))

        for made in (rewritten(files, entries), signed_again(federation, files, entries)):
            assert audit_of(log, made).first is not None


def test_blobs_that_changed_places_are_found(federation, log, tmp_path):
    """Two thetas, two sums, two transcripts: each pair is swapped and must be missed."""
    aggregates = [t.said for t in audit_of(log).evidence.of(kinds.RoundAggregate)]
    one, two = aggregates[0], aggregates[1]
    for a, b in ((one.sum_blob, two.sum_blob), (one.transcript_blob, two.transcript_blob)):
        if a == b:
            continue  # the same constant was added twice: one blob
        copy = tmp_path / a[:8]
        shutil.copytree(federation / "blobs", copy)
        (copy / a[:2] / a).write_bytes((federation / "blobs" / b[:2] / b).read_bytes())

        assert minga("audit", "recompute", log, "--blobs", copy).status in (4, 5)
    copy = tmp_path / "models"
    shutil.copytree(federation / "blobs", copy)
    size = 4 * 5_000
    thetas = [p for p in sorted(copy.glob("??/*")) if not p.suffix and p.stat().st_size == size]
    assert len(thetas) == ROUNDS + 1
    thetas[0].write_bytes(thetas[1].read_bytes())

    done = minga("audit", "recompute", log, "--blobs", copy)

    assert done.status == 5, done.out


def test_the_report_of_a_real_log(log, tmp_path):
    done = minga("audit", "report", log, "--out", tmp_path / "r.html", "--recompute")

    assert done.status == 0, done.error
    text = (tmp_path / "r.html").read_text("utf-8")
    assert f"Models made again from the masked contributions: {ROUNDS} of {ROUNDS}." in text
    assert audit_of(log).result is not Result.FAIL
