"""A second coordinator process of a test federation: the same database, the same shared folders.

``second/coordinator`` is a folder of its own with its own ``config.toml`` and its own ratchet; keys
are the same, and blobs, spool and log directory are shared, as on a file system that both mount.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import tomli_w

from infra.demo.federation import COORDINATOR, free_ports
from infra.runs.client import AdminClient
from infra.runs.operator import find_operator
from tests.support.federation import CLOCK, ROOT, Running

SECOND: Final = "second"


def make_second(running: Running) -> str:
    """Make the folder; the address that the second process will serve."""
    first = running.folder / COORDINATOR
    home = running.folder / SECOND / COORDINATOR
    home.mkdir(parents=True)
    document = tomllib.loads((first / "config.toml").read_text("utf-8"))
    main, enrolment = (f"127.0.0.1:{port}" for port in free_ports(2))
    document["listen"] = {"address": main, "enrolment": enrolment, "public_address": main}
    document["storage"] = {
        **document.get("storage", {}),
        "blobs": str(running.folder / "blobs"),
        "spool": str(first / "spool"),
    }
    document["log"] = {**document["log"], "folder": str(running.folder / "log")}
    (home / "config.toml").write_text(tomli_w.dumps(document), "utf-8")
    (home / "keys").symlink_to(first / "keys")
    return main


def start_second(running: Running) -> None:
    """Start the second process; does not wait."""
    folder = running.folder
    command = running.household.python(
        "tests.support.faulty_coordinator",
        *("--dir", str(folder / SECOND), "--clock", str(folder / CLOCK)),
        *("--faults", str(folder / "faults" / SECOND)),
    )
    log = folder / SECOND / "diagnostics.log"
    path = {"PYTHONPATH": str(ROOT)}
    running.household.start(SECOND, command, log=log, environment=path)


def tell_nodes(running: Running, second: str) -> None:
    """Write both addresses into every node's configuration; every other node prefers the second."""
    for number, site in enumerate(running.sites):
        path: Path = running.federation.node_folder(site) / "config.toml"
        document = tomllib.loads(path.read_text("utf-8"))
        first = document["coordinator"]
        both = [first, second] if number % 2 == 0 else [second, first]
        path.write_text(
            "\n".join(
                f"coordinator = {both!r}" if line.startswith("coordinator = ") else line
                for line in path.read_text("utf-8").splitlines()
            )
            + "\n",
            "utf-8",
        )


@contextmanager
def second_client(running: Running) -> Iterator[AdminClient]:
    """An operator's connection to the second process."""
    home = running.folder / SECOND
    with AdminClient(find_operator(folder=home, config=None, environment=dict(os.environ))) as made:
        yield made
