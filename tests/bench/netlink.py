"""A long link between two network namespaces: so much delay, so much bandwidth, and loss if wanted.

    near  10.203.0.1  tun --[ relay: rate, delay, loss, a queue ]-- tun  10.203.0.2  far

The kernel's own emulator (``tc netem``) is not in every kernel, so packets are passed on by a small
process that holds each one back: it leaves when the link is free at its rate, and arrives a delay
later. Packets are rather large (the MTU), so that the process is not the limit; with much larger
ones Linux opens its receive window so slowly that a new connection crawls for a minute. What it
does may change while it runs. Needs root and /dev/net/tun; ``unavailable`` says why there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random

NEAR, FAR = "10.203.0.1", "10.203.0.2"
MTU = 16_000  # bytes
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_QUEUE_S = 0.1  # of packets that wait for the link; more are dropped
_BUFFERS = "4096 131072 67108864"  # of TCP: enough for 1 Gb/s at 100 ms and more


def unavailable() -> str | None:
    """Why there can be no such link here; None: there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    try:
        subprocess.run(["ip", "netns", "list"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "needs `ip netns` (iproute2)"
    return None


class Link:
    """Two namespaces and the process between them, for as long as the ``with`` block lasts."""

    def __init__(
        self,
        *,
        delay_s: float,
        bits_per_s: float,
        mtu: int = MTU,
        here: bool = False,
        addresses: tuple[str, str] = (NEAR, FAR),
    ) -> None:
        """
        Args:
            delay_s: one way.
            bits_per_s: in each direction.
            mtu: bytes of a packet, at most.
            here: whether the near end is in this process's own namespace.
            addresses: of both ends.
        """
        token = secrets.token_hex(3)
        self.near, self.far = "" if here else f"mgnear{token}", f"mgfar{token}"
        self.addresses = addresses
        self._device = f"mg{token}" if here else "long"
        self._mtu = mtu
        self._arguments = [self.near, self.far, self._device, _words(delay_s, bits_per_s, 0.0)]
        self._relay: subprocess.Popen[str] | None = None

    def set(self, *, delay_s: float, bits_per_s: float, loss: float = 0.0) -> None:
        """Change what the link does from now on; of all packets the share ``loss`` is lost."""
        if self._relay is None or self._relay.stdin is None:
            raise ChildProcessError("the link is not up")
        self._relay.stdin.write(_words(delay_s, bits_per_s, loss) + "\n")
        self._relay.stdin.flush()

    def inside(self, namespace: str, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` at one end."""
        return ["ip", "netns", "exec", namespace, *argv]

    def __enter__(self) -> Link:
        try:
            for name in filter(None, (self.near, self.far)):
                self._run("ip", "netns", "add", name)
            self._relay = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.netlink", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if self._relay.stdout is None or self._relay.stdout.readline() != "ready\n":
                raise ChildProcessError("the link did not come up")
            device, (near, far) = self._device, self.addresses
            for name, mine, other in ((self.near, near, far), (self.far, far, near)):
                self._ip(name, "addr", "add", mine, "peer", other, "dev", device)
                mtu = str(self._mtu)
                self._ip(name, "link", "set", device, "mtu", mtu, "txqueuelen", "2000", "up")
                if not name:
                    continue
                self._ip(name, "link", "set", "lo", "up")
                for way in ("rmem", "wmem"):
                    setting = f"net.ipv4.tcp_{way}={_BUFFERS}"
                    self._run(*self.inside(name, ["sysctl", "-qw", setting]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for name in filter(None, (self.near, self.far)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _ip(self, namespace: str, *words: str) -> None:
        self._run("ip", *(["-n", namespace] if namespace else []), *words)

    def _run(self, *argv: str) -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ChildProcessError(f"{' '.join(argv)}: {done.stderr.strip()}")


# -- the process in the middle -------------------------------------------------------------------


def _words(delay_s: float, bits_per_s: float, loss: float) -> str:
    return f"{delay_s} {bits_per_s} {loss}"


def _tun(namespace: str, name: str) -> int:
    """A new device in a namespace (empty: that of the parent); its descriptor works anywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    where = f"/run/netns/{namespace}" if namespace else f"/proc/{os.getppid()}/ns/net"
    place = os.open(where, os.O_RDONLY)
    if libc.setns(place, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(place)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    return device


def relay(ends: tuple[int, int], said: str, more: int) -> None:
    """Pass packets on, for ever.

    Args:
        ends: devices.
        said: delay, rate and loss.
        more: a descriptor from which lines come that say it anew.
    """
    delay_s, bits_per_s, loss = map(float, said.split())
    rng = Random(8)
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}  # by source
    free = dict.fromkeys(ends, 0.0)  # when the link out of it is free
    target = {ends[0]: ends[1], ends[1]: ends[0]}
    poll = select.epoll()
    for end in (*ends, more):
        poll.register(end, select.EPOLLIN)
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        pause = -1.0 if due is None else max(0.0, due - time.monotonic())
        readable = poll.poll(pause)
        now = time.monotonic()
        for source, _ in readable:
            if source == more:
                lines = os.read(more, 4096).decode().splitlines()
                if not lines:
                    poll.unregister(more)
                for line in lines[-1:]:
                    delay_s, bits_per_s, loss = map(float, line.split())
                continue
            with contextlib.suppress(BlockingIOError):
                for _packet in range(64):
                    packet = os.read(source, 65_536)
                    if loss and rng.random() < loss:
                        continue
                    start = max(now, free[source])
                    if start - now > _QUEUE_S:
                        continue  # the queue is full
                    free[source] = start + 8 * len(packet) / bits_per_s
                    waiting[source].append((free[source] + delay_s, packet))
        now = time.monotonic()
        for source, queue in waiting.items():
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # not up yet, or full: lost
                    os.write(target[source], queue[0][1])
                queue.popleft()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with who started it
    # A wire does not wait for a free core: it comes before both ends.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    near, far, device, said = sys.argv[1:]
    both = (_tun(near, device), _tun(far, device))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    relay(both, said, sys.stdin.fileno())
