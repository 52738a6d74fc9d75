"""A TCP relay between nodes and the coordinator that a test may make slow, deaf or dead.

The kernels that tests run on have no traffic shaping everywhere, so delay, rate and stalls are made
here, per direction and connection. What the coordinator and the nodes see is a network:

    clear      bytes pass
    slow       each piece is delayed, and pieces follow each other at a rate
    lossy      a piece in fifty waits for a retransmission, as TCP's own timer would have it
    deaf       bytes are taken and never passed on; such a connection stays open and stays deaf,
               as when a middlebox forgot it
    away       connections are cut, new ones refused
"""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

Weather = Literal["clear", "slow", "lossy", "deaf", "away"]
DELAY_S: Final = 0.05  # each way: 100 ms for a round trip
RATE: Final = 100e6 / 8  # bytes per second
RETRANSMIT_S: Final = 0.2
PIECE: Final = 64 * 1024


@dataclass(slots=True)
class Relay:
    """Listens on loopback and passes on to a port there; runs in a thread of its own."""

    target: int  # port
    port: int = 0
    host: str = "127.0.0.1"  # where it listens
    target_host: str = "127.0.0.1"
    weather: Weather = "clear"
    passed: int = 0  # bytes
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _ready: threading.Event = field(default_factory=threading.Event)
    _rng: Random = field(default_factory=lambda: Random(8))

    def start(self) -> None:
        """Listen; the port is known afterwards."""
        threading.Thread(target=self._run, name="relay", daemon=True).start()
        self._ready.wait()

    def stop(self) -> None:
        """Cut everything and end."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def set(self, weather: Weather) -> None:
        """Change the weather; ``away`` cuts what is open."""
        self.weather = weather
        if weather == "away":
            self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, self.host, self.port)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather == "away":
            writer.transport.abort()
            return
        try:
            onward = await asyncio.open_connection(self.target_host, self.target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, onward[1]}
        try:
            await asyncio.gather(self._pump(reader, onward[1]), self._pump(onward[0], writer))
        finally:
            for each in (writer, onward[1]):
                self._open.discard(each)
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction: a reader that notes when a piece may leave, a writer that waits for it."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=512)
        leaving = asyncio.create_task(self._leave(line, writer))
        free_at, deaf = 0.0, False
        try:
            while data := await reader.read(PIECE):
                now = self._loop.time()
                deaf = deaf or self.weather == "deaf"
                if deaf:
                    continue
                if self.weather == "clear":
                    free_at = now
                    await line.put((now, data))
                    continue
                free_at = max(now, free_at) + len(data) / RATE
                lost = self.weather == "lossy" and self._rng.random() < 0.02
                await line.put((free_at + DELAY_S + (RETRANSMIT_S if lost else 0.0), data))
        except OSError:
            pass
        finally:
            await line.put((0.0, b""))
            await leaving

    async def _leave(
        self, line: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            at, data = await line.get()
            if not data:
                writer.close()
                return
            await asyncio.sleep(max(0.0, at - self._loop.time()))
            writer.write(data)
            self.passed += len(data)
            try:
                await writer.drain()
            except OSError:
                return


def main() -> None:
    """Pass on between two addresses until killed: LISTEN_HOST:PORT TARGET_HOST:PORT."""
    (host, port), (target_host, target) = (each.rsplit(":", 1) for each in sys.argv[1:3])
    relay = Relay(target=int(target), port=int(port), host=host, target_host=target_host)
    relay.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
