"""A witness that listens: the vectors' answers over real HTTP, one history under a race, a memory
that is never begun anew, and a coordinator's log that it cosigns."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.audit.witness import prepare
from node_agent.witness import DATABASE, make_witness, open_witness, serve_http
from protocols.errors import ConfigurationError, CorruptStateError
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import open_checkpoint
from protocols.tlog.note import KeyRing
from protocols.tlog.proofs import make_consistency
from protocols.tlog.witness import SIZE_CONTENT_TYPE, monitoring_path, parse_answer, write_request
from tests.support.tlog import LOG, ORIGIN, big_tree, head_of

NOW = 1_790_000_000


def ask(url, body=None):
    try:
        request = urllib.request.Request(url, data=body)  # noqa: S310 - ours
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers["Content-Type"]


def body_for(old, new, *, checkpoint=None):
    proof = make_consistency(big_tree(), old, new) if 0 < old < new else ()
    note = sign_checkpoint(checkpoint or head_of(new), LOG)
    return write_request(old=old, proof=proof, checkpoint=note.to_bytes()), note


@pytest.fixture
def witness(tmp_path):
    make_witness(tmp_path / "w", "witness.example/w1")
    made = open_witness(tmp_path / "w", {ORIGIN: KeyRing.of([LOG.verifier])}, now=lambda: NOW)
    server = serve_http(made, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    made.store.close()


def test_it_answers_as_the_specification_says(witness):
    made, url = witness
    ring = KeyRing.of([made.signer.verifier])
    path = f"{url}/{monitoring_path(ORIGIN)}"
    assert ask(path)[0] == 404
    body, note = body_for(0, 255)
    status, lines, _ = ask(f"{url}/add-checkpoint", body)
    assert status == 200
    assert parse_answer(lines, text=note.text, ring=ring, now=NOW)
    both = KeyRing.of([LOG.verifier, made.signer.verifier])
    assert open_checkpoint(ask(path)[1], both, now=NOW).cosignatures

    assert ask(f"{url}/add-checkpoint", body)[:2] == (409, b"255\n")
    assert ask(f"{url}/add-checkpoint", body)[2] == SIZE_CONTENT_TYPE
    for old, new in ((255, 256), (256, 257), (257, 65_535), (65_535, 65_536), (65_536, 70_000)):
        assert ask(f"{url}/add-checkpoint", body_for(old, new)[0])[0] == 200
    assert ask(f"{url}/add-checkpoint", body_for(70_000, 70_000)[0])[0] == 200  # heartbeat
    fork = Checkpoint(origin=ORIGIN, size=70_000, root=b"\1" * 32)
    assert ask(f"{url}/add-checkpoint", body_for(70_000, 70_000, checkpoint=fork)[0])[0] == 422
    assert ask(f"{url}/add-checkpoint", b"old x\n\n")[0] == 400
    assert ask(f"{url}/other", b"")[0] == 404
    assert ask(f"{url}/../w/witness.key")[0] == 404


@pytest.mark.parametrize("length", [b"\xb2", b"-1", b"1_0", b"", b"9" * 5000, b"99999999"])
def test_a_length_that_is_none_is_refused(witness, length):
    host, _, port = witness[1].removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as asked:
        asked.sendall(
            b"POST /add-checkpoint HTTP/1.1\r\nHost: w\r\nContent-Length: " + length + b"\r\n\r\n"
        )
        assert asked.makefile("rb").readline().split()[1] == b"400"


def test_of_two_branches_at_once_one_is_cosigned(witness):
    made, _ = witness
    branches = [
        body_for(0, 10, checkpoint=Checkpoint(origin=ORIGIN, size=10, root=bytes([n]) * 32))[0]
        for n in range(1, 17)
    ]
    with ThreadPoolExecutor(8) as threads:
        statuses = sorted(answer.status for answer in threads.map(made.add, branches))
    assert statuses == [200] + [409] * 15


def test_its_memory_survives_and_is_never_begun_anew(tmp_path):
    logs = {ORIGIN: KeyRing.of([LOG.verifier])}
    make_witness(tmp_path, "witness.example/w1")
    first = open_witness(tmp_path, logs, now=lambda: NOW)
    assert first.add(body_for(0, 256)[0]).status == 200
    first.store.close()
    again = open_witness(tmp_path, logs, now=lambda: NOW)
    assert again.add(body_for(0, 255)[0]).status == 409
    again.store.close()
    for leftover in tmp_path.glob(f"{DATABASE}*"):
        leftover.unlink()
    with pytest.raises(CorruptStateError):
        open_witness(tmp_path, logs, now=lambda: NOW)
    with pytest.raises(FileExistsError):
        make_witness(tmp_path, "witness.example/w2")


def test_the_command_prepares_a_folder_once(tmp_path):
    vkey = tmp_path / "log.vkey"
    vkey.write_text(LOG.verifier.to_text() + "\n")
    with pytest.raises(ConfigurationError):
        prepare(tmp_path / "w", name="witness.example/a", log_keys=())
    made = prepare(tmp_path / "w", name="witness.example/a", log_keys=(vkey,))
    made.store.close()
    again = prepare(tmp_path / "w", name="witness.example/b", log_keys=())
    again.store.close()
    assert again.signer.verifier == made.signer.verifier
    assert (tmp_path / "w/witness.key").stat().st_mode & 0o077 == 0
    vkey.write_text(made.signer.verifier.to_text())
    with pytest.raises(ConfigurationError):
        prepare(tmp_path / "x", name="witness.example/a", log_keys=(vkey,))
