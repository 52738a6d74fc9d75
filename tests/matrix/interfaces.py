"""All nodes of a federation in a network namespace, behind an interface that goes down.

    nodes --127.0.0.1--> relay ==[ 10.204.0.2  veth  10.204.0.1 ]== relay --127.0.0.1--> coordinator

The relays only change the address, so that certificates and configurations stay as they are; what
is lost while the interface is down is lost between two kernels' ends of one TCP connection, which
send it again when it is up. Needs root and ``ip netns``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from coordinator.config import load_config
from infra.demo.federation import COORDINATOR, free_ports
from tests.bench.netlink import unavailable
from tests.matrix.cases import Bench
from tests.matrix.relay import Relay
from tests.matrix.troubles import Trouble
from tests.support.federation import ROOT

HOST, NODES = "10.204.0.1", "10.204.0.2"
_DOWN_S: Final = 5.0


def why_not() -> str | None:
    """Why this cannot be had here; None: it can."""
    return unavailable()


@contextmanager
def namespace() -> Iterator[tuple[str, str]]:
    """A namespace and the host's end of the link to it; both are gone afterwards."""
    name, end, other = (f"minga{kind}{os.getpid()}"[:15] for kind in ("", "h", "n"))
    _ip("netns", "add", name)
    try:
        _ip("link", "add", end, "type", "veth", "peer", "name", other, "netns", name)
        _ip("addr", "add", f"{HOST}/30", "dev", end)
        _ip("link", "set", end, "up")
        _ip("-n", name, "addr", "add", f"{NODES}/30", "dev", other)
        for device in ("lo", other):
            _ip("-n", name, "link", "set", device, "up")
        yield name, end
    finally:
        _ip("netns", "del", name)  # and with it the link


@contextmanager
def behind_an_interface(bench: Bench) -> Iterator[Trouble]:
    """The nodes move into the namespace; the trouble takes the interface down for a while."""
    running, household = bench.running, bench.running.household
    config = load_config(running.folder / COORDINATOR / "config.toml")
    port = int(config.public_address.rpartition(":")[2])
    crossing = free_ports(1)[0]
    relay = Relay(target=port, port=crossing, host=HOST)
    with namespace() as (name, end):
        relay.start()
        try:
            inside = ["ip", "netns", "exec", name]
            _within(bench, inside, f"127.0.0.1:{port}", f"{HOST}:{crossing}")
            yield Trouble(
                fault=f"the interface goes down for {_DOWN_S:.0f} s (network namespaces)",
                victim="network",
                begin=lambda: _ip("link", "set", end, "down"),
                end=lambda: _ip("link", "set", end, "up"),
                lasts_s=_DOWN_S,
            )
        finally:
            for site in (*running.sites, "relay"):
                if site in household:
                    household.stop(site)
            relay.stop()
    for site in running.sites:
        running.start_node(site)


def _within(bench: Bench, inside: list[str], near: str, far: str) -> None:
    """Start the relay and all nodes in the namespace."""
    running, household = bench.running, bench.running.household
    path = {"PYTHONPATH": str(ROOT)}
    command = household.python("tests.matrix.relay", near, far)
    household.start(
        "relay", [*inside, *command], log=running.folder / "relay.log", environment=path
    )
    for site in running.sites:
        if site in household:
            household.stop(site)
        folder = str(running.federation.node_folder(site))
        command = household.python("infra.cli", "node", "run", "--dir", folder)
        household.start(site, [*inside, *command], log=running.federation.log(site))
    bench.settle()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
