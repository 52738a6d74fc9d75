"""Blobs: durable under their name, read before they have one, and no failed sync is forgotten."""

from __future__ import annotations

import errno
import os
from threading import Event

import pytest

from coordinator import blobs as module
from coordinator.blobs import Blobs
from protocols.errors import StorageFullError
from protocols.tensors.behind import Behind
from protocols.tensors.sizes import UNIT
from protocols.tensors.units import blob_digest


@pytest.fixture
def blobs(tmp_path):
    made = Blobs(tmp_path / "blobs")
    made.prepare()
    return made


def test_a_blob_can_be_read_while_it_is_written_and_has_its_name_at_the_end(blobs):
    data = os.urandom(2 * UNIT + 5)
    with blobs.writer() as writer:
        for at in range(0, len(data), UNIT // 2):
            writer.write(data[at : at + UNIT // 2])
        assert writer.read(UNIT - 3, 10) == data[UNIT - 3 : UNIT + 7]
        assert not blobs.has(blob_digest(data))
        digest = writer.finish()

    assert digest == blob_digest(data)
    assert blobs.open(digest).read(0, len(data)) == data


def test_a_blob_has_no_name_before_all_of_it_was_synced(blobs, monkeypatch):
    """The last sync of the bytes comes after the last byte and before the name."""
    order, real = [], os.fdatasync

    def sync(descriptor):
        order.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(module.os, "fdatasync", sync)
    adopt = Blobs.adopt
    monkeypatch.setattr(
        Blobs, "adopt", lambda *arguments: (order.append("name"), adopt(*arguments))[1]
    )
    data = bytes(3 * UNIT + 1)
    with blobs.writer() as writer:
        writer.write(data)
        writer.finish()

    assert order[-2:] == [len(data), "name"]


def test_what_failed_behind_is_told_at_the_end():
    """Linux tells a failed write-back once: a later sync of the same descriptor succeeds."""
    failures = [OSError(errno.ENOSPC, "No space left on device")]
    calls = []

    def sync():
        calls.append(len(failures))
        if failures:
            raise failures.pop()

    behind = Behind(sync)
    behind.more()
    with pytest.raises(OSError, match="No space left"):
        behind.finish()
    behind.close()

    assert calls == [1]


def test_the_end_covers_what_came_while_the_work_was_under_way():
    """The work that is under way may have begun before the last piece was there."""
    there, covered, going = 0, [], Event()

    def sync():
        seen = there
        going.wait(10)
        covered.append(seen)

    behind = Behind(sync)
    behind.more()
    there = 1
    behind.more()  # not begun a second time: one is under way
    going.set()
    behind.finish()
    behind.close()

    assert covered[-1] == 1
    assert len(covered) == 2


def test_a_full_disk_behind_leaves_no_blob(blobs, monkeypatch):
    def sync(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    data = bytes(UNIT)
    with blobs.writer() as writer:
        monkeypatch.setattr(module.os, "fdatasync", sync)
        writer.write(data)
        with pytest.raises(StorageFullError):
            writer.finish()

    assert not blobs.has(blob_digest(data))
    assert not list(blobs.tmp.iterdir())
