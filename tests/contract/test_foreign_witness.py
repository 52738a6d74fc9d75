"""`minga audit witness`, a process of its own, cosigns a coordinator's log over plain HTTP: nothing
is witnessed without it, and it cosigns no second history."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from coordinator.log_files import LogFiles
from coordinator.log_parts import LOG_KEY, parse_witness
from coordinator.log_writer import LogWriter, load_signer
from node_agent.witness import KEY_FILE, read_key
from protocols.errors import ConfigurationError
from protocols.identifiers import Digest
from protocols.tlog.kinds import Heartbeat
from protocols.tlog.note import KeyType, SignerKey
from protocols.tlog.ratchet import ForkError
from tests.support.audit_disk import minga
from tests.support.door import Door, free_port
from tests.support.log_dir import read_log

PATIENCE_S = 15.0


def until(what):
    give_up = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(0.02)
    return found


def beat(seconds):
    """A leaf that differs with ``seconds``."""

    def work(tx):
        said = Heartbeat(interval_s=seconds)
        tx.append_own(said, subject="log/heartbeat", digest=Digest("0" * 64))

    return work


@contextmanager
def witness_process(folder, port, log):
    """The command, listening."""
    arguments = ["--dir", folder, "--listen", f"127.0.0.1:{port}", "--log", log]
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.cli", "audit", "witness", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()  # its key: it listens
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def started(door):
    door.start()
    try:
        yield door.parts.log.hub
    finally:
        door.stop()


def witnessed(hub, size):
    return hub.witnessed is not None and hub.witnessed.size == size


def test_a_witness_over_http_counts_and_cosigns_one_history(tmp_path, monkeypatch):
    mine, port = tmp_path / "witness", free_port()
    early = minga("audit", "witness", "--dir", mine)  # its key is made; no log to watch yet
    vkey = read_key(mine / KEY_FILE).verifier.to_text()
    assert early.status == 3
    assert vkey in early.error
    fed = tmp_path / "fed"
    made = minga(
        "coordinator", "init", "--dir", fed, "--ungoverned",
        "--address", f"127.0.0.1:{free_port()}", "--enrolment", f"127.0.0.1:{free_port()}",
        "--witness", f"{vkey}=http://127.0.0.1:{port}",
    )  # fmt: skip
    assert made.status == 0, made.error
    door = Door(fed, again=True)
    (tmp_path / "log.vkey").write_text(load_signer(door.config.keys / LOG_KEY).verifier.to_text())

    with witness_process(mine, port, tmp_path / "log.vkey"):
        with started(door) as hub:
            until(lambda: witnessed(hub, 2))
            assert set(hub.witnessed.lines) == {"auditor.1"}
            until((fed / "log/checkpoints/2").exists)
        shutil.copytree(fed, tmp_path / "twin")
        with started(door) as hub:
            door.ledger(beat(100))
            until(lambda: witnessed(hub, 3))
            until(lambda: LogFiles(fed / "log").published().size == 3)
        read = read_log(fed / "log")
        assert read.replay().genesis.witnesses == (vkey,)
        assert len(read.opened.cosignatures) == 1

        twin = Door(tmp_path / "twin", again=True)
        with started(twin):  # a restored backup learns it from the witness, and signs nothing
            twin.ledger(beat(200))
            (error,) = until(
                lambda: [d.exception() for d in twin.drivers if d.done() and d.exception()]
            )
            assert isinstance(error, ForkError)
        monkeypatch.setattr(LogWriter, "_compare", _without_asking)
        with started(twin) as hub:  # a liar signs, and is not cosigned
            until(lambda: "auditor.1" in hub.trouble)
            assert hub.signed.size == 3
            assert hub.witnessed is None
            assert hub.waits_for() == ("auditor.1",)
        monkeypatch.undo()

    with started(door) as hub:  # the witness is gone: nothing more is witnessed
        door.ledger(beat(300))
        until(lambda: "auditor.1" in hub.trouble)
        assert hub.witnessed is None


def _without_asking(self) -> bool:
    self._compared = True
    return True


def test_what_is_no_witness_is_refused():
    cosigner = SignerKey(name="w.example/a", type=KeyType.ED25519_COSIGNATURE, seed=b"\1" * 32)
    log = SignerKey(name="w.example/a", type=KeyType.ED25519, seed=b"\1" * 32)
    vkey = cosigner.verifier.to_text()
    url = "https://w.example/cosign?via=http"
    assert parse_witness(f"{vkey}={url}") == (vkey, url)
    for wrong in (vkey, f"{vkey}=ftp://w", f"{vkey[:-3]}={url}", f"{log.verifier.to_text()}={url}"):
        with pytest.raises(ConfigurationError):
            parse_witness(wrong)
