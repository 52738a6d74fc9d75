"""The plain HTTP server of log and trust repository against strangers: it gives what is public and
keeps no place for whoever does not ask for it."""

from __future__ import annotations

import http.client
import socket
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.limits import Limits
from coordinator.static_http import StaticServer, find

SMALL = replace(Limits(), http_connections=8, http_request_s=1.0)
PATIENCE_S = 60.0
SECRET = b"-----BEGIN PRIVATE KEY-----"
BIG = 3 * 2**20


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("http")
    (folder / "coordinator/keys").mkdir(parents=True)
    (folder / "coordinator/keys/ca.key").write_bytes(SECRET)
    for name in ("log/tile/0", "tuf/metadata"):
        (folder / name).mkdir(parents=True)
    (folder / "log/checkpoint").write_bytes(b"signed head\n")
    (folder / "log/.tmp").write_bytes(SECRET)
    (folder / "log/tile/0/000").write_bytes(bytes(BIG))
    (folder / "log/link").symlink_to(folder / "coordinator/keys/ca.key")
    (folder / "log/out").symlink_to(folder / "coordinator")
    return folder


@pytest.fixture(scope="module")
def server(home):
    made = StaticServer("127.0.0.1:0", {"log": home / "log", "tuf": home / "tuf"}, SMALL)
    made.start()
    yield made
    made.stop()


def get(server, path, method="GET", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def wait_for(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_what_is_public_is_given(server):
    assert get(server, "/log/checkpoint") == (200, b"signed head\n")
    assert get(server, "/log/checkpoint", "HEAD") == (200, b"")
    status, body = get(server, "/log/tile/0/000?x=1")
    assert (status, len(body)) == (200, BIG)


@pytest.mark.parametrize(
    "path",
    [
        "/log/../coordinator/keys/ca.key", "/log/%2e%2e/coordinator/keys/ca.key",
        "/log//coordinator/keys/ca.key", "//etc/passwd", "/log/link", "/log/out/keys/ca.key",
        "/log/.tmp", "/log/", "/log", "/", "*", "/coordinator/keys/ca.key", "/log/tile",
        "/tuf/../log/checkpoint", "/log/checkpoint/../../coordinator/keys/ca.key", "/log/x%00",
        "/log/..%2f..%2fkeys", "/log/\\..\\x", "http://other/log/../x", "/log/" + "a" * 5000,
    ],
)  # fmt: skip
def test_nothing_else_is(server, path):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        raw.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        said = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert said.split(b"\r\n", 1)[0].split(b" ")[1] in {b"404", b"414", b"400"}
    assert SECRET not in said


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.text(max_size=30)
    | st.lists(
        st.sampled_from(["log", "tuf", "..", ".", "%2e%2e", "coordinator", "keys", "ca.key", "link",
                         "out", "", "~", "checkpoint"]), max_size=8,
    ).map(lambda parts: "/" + "/".join(parts))
)  # fmt: skip
def test_no_path_leads_outside(home, path):
    found = find({"log": (home / "log").resolve(), "tuf": (home / "tuf").resolve()}, path)
    if found is not None:
        with found[1] as file:
            assert SECRET not in file.read(100)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "\u00e9"])
def test_other_methods_are_not_served(server, method):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        raw.sendall(f"{method} /log/checkpoint HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".encode())
        raw.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert b"signed head" not in said


def test_a_body_is_no_second_request(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        hidden = b"GET /log/checkpoint HTTP/1.1\r\n\r\n"
        raw.sendall(
            b"GET /log/none HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(hidden), hidden)
        )
        said = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert said.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /log/checkpoint HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /log/checkpoint HTTP/1.1\r\n" + b"X: a\r\n" * 5000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_a_huge_head_is_refused(server, head):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        try:
            raw.sendall(head)
            said = b"".join(iter(lambda: raw.recv(65_536), b""))
        except ConnectionError:
            said = b""  # it was ended while it still sent
    assert b"signed head\n" not in said
    assert get(server, "/log/checkpoint")[0] == 200


def test_a_head_that_drips_is_ended(server):
    """A byte now and then keeps no place: the time is that of the whole head."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        raw.settimeout(0.2)
        begun, ended = time.monotonic(), False
        while not ended and time.monotonic() - begun < PATIENCE_S:
            try:
                raw.send(b"x")
                ended = raw.recv(10) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended
    wait_for(lambda: server.connections() == 0)


def test_a_reader_that_reads_nothing_is_ended(home):
    slow = replace(SMALL, http_request_s=0.5)
    (home / "log/tile/0/001").write_bytes(bytes(9 * 2**20))
    made = StaticServer("127.0.0.1:0", {"log": home / "log"}, slow)
    made.start()
    try:
        made._server.allow = lambda request, _: type(made._server).allow(made._server, request, 0.5)
        with socket.create_connection(("127.0.0.1", made.port), timeout=PATIENCE_S) as raw:
            raw.sendall(b"GET /log/tile/0/001 HTTP/1.1\r\n\r\n")
            wait_for(lambda: made.connections() == 0)
    finally:
        made.stop()


def test_places_are_limited_and_given_back(server):
    """One address gets half of the places; what comes beyond them is told at once."""
    most = SMALL.http_connections // 2
    wait_for(lambda: server.connections() == 0)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(most)]
    try:
        wait_for(lambda: server.connections() == most)
        assert get(server, "/log/checkpoint")[0] == 503
    finally:
        for one in idle:
            one.close()
    wait_for(lambda: server.connections() == 0)
    assert get(server, "/log/checkpoint")[0] == 200


def test_idle_connections_end_by_themselves(server):
    wait_for(lambda: server.connections() == 0)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    wait_for(lambda: server.connections() == 0)
    for one in idle:
        assert one.recv(1) == b""
        one.close()
