"""Asks witnesses that listen over plain HTTP: one task for each that the configuration names.

The body is that of add-checkpoint (tlog-witness v1.0.0), as nodes get it over gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import urllib.error
import urllib.request
from typing import Final

from coordinator.clock import Clock
from coordinator.log_hub import LogHub
from protocols.errors import FederationError
from protocols.tlog.note import MAX_NOTE
from protocols.tlog.witness import monitoring_path

logger = logging.getLogger(__name__)
TIMEOUT_S: Final = 10.0
RETRY_S: Final = 2.0


def _fetch(url: str, body: bytes | None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=body)  # noqa: S310 - http(s) by the configuration
    if body is not None:
        request.add_header("Content-Type", "text/plain; charset=utf-8")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return int(answer.status), answer.read(MAX_NOTE + 1)
    except urllib.error.HTTPError as error:
        return error.code, error.read(MAX_NOTE)


async def push(hub: LogHub, clock: Clock, name: str, url: str) -> None:
    """Keep one witness asked, until cancelled.

    Args:
        name: as in the trust policy.
        url: prefix of the witness, for submission and monitoring alike.
    """
    url, spoken = url.rstrip("/"), False
    while True:
        wait = 30.0
        try:
            if name not in hub.keys or not hub.leads:
                spoken = False
            elif not spoken:
                path = f"{url}/{monitoring_path(hub.log.name)}"
                status, body = await asyncio.to_thread(_fetch, path, None)
                if status in (200, 404):
                    hub.greet(name, body if status == 200 else b"")
                    spoken, wait = True, 0.0
                else:
                    hub.trouble[name], wait = f"answered {status}", RETRY_S
            elif (asked := hub.request_for(name)) is not None:
                head, request = asked
                status, body = await asyncio.to_thread(_fetch, f"{url}/add-checkpoint", request)
                again = hub.answer(name, head, status, body, now=_unix(clock))
                wait = 0.0 if again else RETRY_S
        except (OSError, FederationError, ValueError) as error:
            hub.trouble[name], wait = f"does not answer: {error!s:.120}", RETRY_S
            spoken = False
            await asyncio.sleep(RETRY_S)
        await hub.changed(wait)


def _unix(clock: Clock) -> int:
    return int(clock.now().timestamp())
