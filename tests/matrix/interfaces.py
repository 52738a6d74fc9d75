"""All nodes of a federation in a network namespace, behind an interface that goes down, or behind a
link that delays packets, lets few of them through, and loses some or all.

    nodes --127.0.0.1--> relay ==[ 10.204.x.2  veth or tun  10.204.x.1 ]== relay --> coordinator

The relays only change the address, so that certificates and configurations stay as they are; what
is lost is lost between two kernels' ends of one TCP connection, which send it again. Packets are
delayed and dropped by ``tests.bench.netlink``, since ``tc netem`` is not in every kernel. Needs
root and ``ip netns``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from coordinator.config import load_config
from infra.demo.federation import COORDINATOR, free_ports
from tests.bench.netlink import Link, unavailable
from tests.matrix.cases import Bench
from tests.matrix.relay import Relay
from tests.matrix.troubles import Trouble
from tests.support.federation import ROOT

_NUMBER: Final = os.getpid() % 250  # several of us may run side by side
HOST, NODES = f"10.204.{_NUMBER}.1", f"10.204.{_NUMBER}.2"
_DOWN_S: Final = 5.0
Sky = Literal["slow", "lossy", "lost"]
_CLEAR: Final = {"delay_s": 0.0, "bits_per_s": 1e10}
_LONG: Final = {"delay_s": 0.05, "bits_per_s": 1e8}
_SKIES: Final[dict[Sky, tuple[str, dict[str, float]]]] = {
    "slow": ("packets: 100 ms round trip, 100 Mb/s, for 5 s", _LONG),
    "lossy": ("packets: 100 ms, 100 Mb/s and 2 % lost, for 5 s", {**_LONG, "loss": 0.02}),
    "lost": ("packets: all lost for 5 s, without a word", {**_LONG, "loss": 1.0}),
}


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
    with namespace() as (name, end), _moved(bench, name):
        yield Trouble(
            fault=f"the interface goes down for {_DOWN_S:.0f} s (network namespaces)",
            victim="network",
            begin=lambda: _ip("link", "set", end, "down"),
            end=lambda: _ip("link", "set", end, "up"),
            lasts_s=_DOWN_S,
        )


@contextmanager
def behind_a_link(bench: Bench) -> Iterator[Callable[[Sky], Trouble]]:
    """The nodes move behind a link of packets; the troubles are what it may do for a while."""
    link = Link(**_CLEAR, mtu=1500, here=True, addresses=(HOST, NODES))

    def trouble(sky: Sky) -> Trouble:
        words, how = _SKIES[sky]
        return Trouble(
            fault=f"{words} (network namespaces)",
            victim="network",
            begin=lambda: link.set(**how),
            end=lambda: link.set(**_CLEAR),
            lasts_s=_DOWN_S,
        )

    with link, _moved(bench, link.far):
        yield trouble


@contextmanager
def _moved(bench: Bench, name: str) -> Iterator[None]:
    """All nodes in a namespace that has ``NODES`` and reaches ``HOST``, and back again."""
    running, household = bench.running, bench.running.household
    config = load_config(running.folder / COORDINATOR / "config.toml")
    port = int(config.public_address.rpartition(":")[2])
    crossing = free_ports(1)[0]
    relay = Relay(target=port, port=crossing, host=HOST)
    relay.start()
    try:
        inside = ["ip", "netns", "exec", name]
        _within(bench, inside, f"127.0.0.1:{port}", f"{HOST}:{crossing}")
        yield
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
