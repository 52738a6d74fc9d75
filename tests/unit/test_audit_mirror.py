"""Copying a log over HTTP: incremental, resumable, bounded, and never over a good copy."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from typing import ClassVar

import pytest

from infra.audit.mirror import ShrunkError, Source, mirror
from protocols.errors import ConfigurationError, MalformedMessageError, UnreachableError
from protocols.tlog.trust_policy import QuorumError
from tests.support.audit_disk import copy_run, minga, the_run
from tests.support.audit_run import write_log
from tests.support.tampering import rewritten


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; counts what was asked for; can be told to fail."""

    asked: ClassVar[Counter[str]] = Counter()
    fail_after = 10**9

    def do_GET(self):
        Handler.asked[self.path] += 1
        if sum(Handler.asked.values()) > Handler.fail_after:
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder):
    Handler.asked.clear()
    Handler.fail_after = 10**9
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def run(tmp_path):
    return copy_run(tmp_path / "run")


NOW = int(the_run().clock.timestamp()) + 60


def copy(url, folder, policy=None):
    return mirror(Source(url), folder, trust_policy=policy, say=lambda _: None, now=NOW)


def at(log, size):
    """The log as it was at an earlier checkpoint."""
    shutil.rmtree(log / "tile")
    write_log(log, the_run().entries[:size])
    (log / "checkpoint").write_bytes(the_run().checkpoints[size])


def test_a_copy_grows_and_verifies(run, tmp_path):
    log, mine = run / "log", tmp_path / "mine"
    at(log, 40)
    with serving(log) as url:
        first = copy(url, mine, run / "anchor.txt")
        at(log, 80)
        second = copy(url, mine, run / "anchor.txt")
        Handler.asked.clear()
        third = copy(url, mine, run / "anchor.txt")
        quiet = dict(Handler.asked)

    assert (first.before, first.size, second.before, second.size) == (0, 40, 40, 80)
    assert third.size == 80
    assert quiet == {"/checkpoint": 1}  # nothing new: nothing else is asked for
    assert (mine / "checkpoints/40").exists()
    assert minga("audit", "verify", mine, "--trust-policy", run / "anchor.txt").status == 0


def test_an_interrupted_copy_goes_on_where_it_was(run, tmp_path):
    log, mine = run / "log", tmp_path / "mine"
    with serving(log) as url:
        Handler.fail_after = 2
        with pytest.raises(UnreachableError):
            copy(url, mine, run / "anchor.txt")
        assert not (mine / "checkpoint").exists()
        assert (mine / "tile/entries/000.p/80").exists()
        Handler.asked.clear()
        Handler.fail_after = 10**9
        copy(url, mine, run / "anchor.txt")

        assert not any("entries" in path for path in Handler.asked)
    assert minga("audit", "verify", mine).status == 0


def test_a_log_that_shrank_is_refused_and_the_copy_stays(run, tmp_path):
    log, mine = run / "log", tmp_path / "mine"
    with serving(log) as url:
        copy(url, mine, run / "anchor.txt")
        kept = (mine / "checkpoint").read_bytes()
        at(log, 40)

        with pytest.raises(ShrunkError):
            copy(url, mine, run / "anchor.txt")

    assert (mine / "checkpoint").read_bytes() == kept
    assert list((mine / "refused").iterdir())
    assert minga("audit", "verify", mine).status == 0


def test_a_fork_that_every_witness_cosigned_is_refused(run, tmp_path):
    """The copy remembers what the world has forgotten."""
    log, mine = run / "log", tmp_path / "mine"
    at(log, 40)
    with serving(log) as url:
        copy(url, mine, run / "anchor.txt")
        entries = list(the_run().entries)
        entries[5], entries[7] = entries[7], entries[5]
        forked = rewritten(the_run(), entries, "everybody")
        shutil.rmtree(log / "tile")
        write_log(log, entries)
        (log / "checkpoint").write_bytes(forked.files.checkpoint)

        with pytest.raises(ShrunkError, match="does not extend the copy"):
            copy(url, mine, run / "anchor.txt")
        at(log, 80)
        assert copy(url, mine, run / "anchor.txt").size == 80  # the good one is still taken

    assert minga("audit", "verify", mine).status == 0


def test_a_checkpoint_without_a_quorum_is_not_taken(run, tmp_path):
    (run / "log/checkpoint").write_bytes(
        rewritten(the_run(), the_run().entries, "log").files.checkpoint
    )
    with serving(run / "log") as url, pytest.raises(QuorumError):
        copy(url, tmp_path / "mine", run / "anchor.txt")


def test_a_file_that_is_too_large_is_not_read(run, tmp_path):
    (run / "log/checkpoint").write_bytes(b"a" * 1_000_001)
    with serving(run / "log") as url, pytest.raises(MalformedMessageError, match="more than"):
        copy(url, tmp_path / "mine", run / "anchor.txt")


def test_documents_are_copied_and_checked(run, tmp_path):
    mine = tmp_path / "mine"
    with serving(run / "log") as url:
        done = minga("audit", "mirror", url, mine, "--blobs", "--json")

    assert done.status == 0, done.error
    (digest,) = the_run().documents
    assert (mine / "blobs/sha256" / digest).read_bytes() == the_run().documents[digest]


def test_the_first_copy_without_a_trust_policy_says_that_it_anchors_nothing(run, tmp_path):
    with serving(run / "log") as url:
        done = minga("audit", "mirror", url, tmp_path / "mine")

    assert done.status == 0
    assert "80 leaves, 80 new" in done.out
    assert "unanchored" in done.error


@pytest.mark.parametrize("url", ["file:///etc", "ftp://x", "log"])
def test_only_http_is_fetched(url):
    with pytest.raises(ConfigurationError):
        Source(url)


def test_nobody_answers(tmp_path):
    with pytest.raises(UnreachableError):
        copy("http://127.0.0.1:9", tmp_path / "mine")
