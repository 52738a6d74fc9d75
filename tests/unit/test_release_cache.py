"""What a round read for the last time is not kept in the system's cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import ExitStack

import pytest

from coordinator.aggregation.release import _reader

SIZE = 64 * mmap.PAGESIZE


def resident(path):
    """Pages of a file that are in the cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, mmap.MAP_PRIVATE) as mapped:
        found = (ctypes.c_ubyte * 64)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(SIZE), found) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in found)


def test_an_upload_leaves_the_cache_when_it_was_added(tmp_path):
    path = tmp_path / "upload"
    with path.open("wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    if resident(path):
        pytest.skip("this file system keeps files in memory whatever it is told")
    with ExitStack() as stack:
        read = _reader(path, SIZE, stack)
        assert read(0, SIZE) == path.read_bytes()
        assert resident(path) == 64
    assert resident(path) == 0
