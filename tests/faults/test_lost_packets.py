"""Packets between the nodes and the coordinator are late, or lost: the round ends as it would have.

Every phase is visited by ``make faults``; here two.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.bench.netlink import Link, unavailable
from tests.matrix.cases import bench
from tests.matrix.interfaces import behind_a_link
from tests.matrix.troubles import suffer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
needs_root = pytest.mark.skipif(unavailable() is not None, reason=f"{unavailable()}")
PING = """
import socket, sys, time
near, tries = sys.argv[1], int(sys.argv[2])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(0.5)
times = []
for number in range(tries):
    begun = time.monotonic()
    sock.sendto(str(number).encode(), (near, 7007))
    try:
        while sock.recv(64) != str(number).encode():
            pass
        times.append(time.monotonic() - begun)
    except TimeoutError:
        pass
print(len(times), min(times, default=0.0))
"""
ECHO = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[1], 7007))
print("ready", flush=True)
while True:
    data, who = sock.recvfrom(64)
    sock.sendto(data, who)
"""


@needs_root
def test_a_link_delays_and_loses_what_it_was_told():
    with Link(delay_s=0.0, bits_per_s=1e9, mtu=1500) as link:
        near, _ = link.addresses
        echo = subprocess.Popen(
            link.inside(link.near, [sys.executable, "-c", ECHO, near]),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert echo.stdout is not None
            assert echo.stdout.readline() == "ready\n"

            def ping(tries):
                command = link.inside(link.far, [sys.executable, "-c", PING, near, str(tries)])
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                answered, quickest = done.stdout.split()
                return int(answered), float(quickest)

            assert ping(5)[0] == 5
            link.set(delay_s=0.1, bits_per_s=1e9)
            answered, quickest = ping(5)
            assert answered == 5
            assert 0.2 <= quickest < 0.5
            link.set(delay_s=0.0, bits_per_s=1e9, loss=1.0)
            assert ping(3)[0] == 0
            link.set(delay_s=0.0, bits_per_s=1e9, loss=0.4)  # each way: 0.36 of the answers come
            assert 0 < ping(20)[0] < 20
            link.set(delay_s=0.0, bits_per_s=1e9)
            assert ping(5)[0] == 5
        finally:
            echo.kill()
            echo.wait()


@needs_root
def test_a_round_goes_on_when_packets_were_lost(tmp_path):
    with (
        bench(tmp_path / "f", mode="open", database="sqlite", server=None, rounds=1) as made,
        behind_a_link(made) as trouble,
    ):
        for sky, phase in (("lossy", "Uploading"), ("lost", "Training")):
            (row,) = suffer(made, trouble(sky), (phase,))
            assert (row.phase, row.outcome) == (phase, "same")
