"""A federation on one machine: its folder and its processes, by the commands that people use.

    DIR/coordinator/           minga coordinator init, minga coordinator serve
    DIR/nodes/<site>/          minga node join, minga node run; data/ holds the site's text
    DIR/blobs/                 content-addressed, the coordinator's

The parts share nothing but TCP connections and, once for each site, the text of an invitation.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.config import load_config
from infra.demo.policy import demo_site_policy
from infra.demo.processes import Child, Household, Process
from infra.runs.client import AdminClient
from infra.runs.operator import Operator, find_operator

COORDINATOR: Final = "coordinator"
_HOST: Final = "127.0.0.1"
_SERVING_S: Final = 60.0  # for the coordinator to answer


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for made in sockets:
            made.bind((_HOST, 0))
        return [made.getsockname()[1] for made in sockets]


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Where everything is, and how each part is started."""

    folder: Path
    household: Household

    # -- folders ---------------------------------------------------------------------------------

    def node_folder(self, site: str) -> Path:
        """The folder of one node."""
        return self.folder / "nodes" / site

    def data_folder(self, site: str) -> Path:
        """The site's own copy of its text."""
        return self.node_folder(site) / "data"

    def log(self, name: str) -> Path:
        """Diagnostics of one child: the coordinator, or a site's agent."""
        home = self.folder / COORDINATOR if name == COORDINATOR else self.node_folder(name)
        return home / "diagnostics.log"

    # -- the coordinator -------------------------------------------------------------------------

    @property
    def initialised(self) -> bool:
        """Whether the coordinator's folder is complete."""
        return (self.folder / COORDINATOR / "config.toml").exists()

    def initialise(
        self,
        *,
        name: str,
        port: int = 0,
        governed: bool = False,
        log: bool = True,
        ledger: str = "",
    ) -> None:
        """Make keys, certificates, configuration and an empty ledger.

        Args:
            name: of the federation.
            governed: nothing runs before admins have signed a root.
            log: whether the federation keeps a round log.
            ledger: URL of its database; SQLite in its folder if not given.
            port: for nodes, the next one for invitations; 0 takes two that are free.
        """
        main, enrolment = free_ports(2) if port == 0 else (port, port + 1)
        command = self._minga(
            "coordinator", "init", "--dir", str(self.folder), "--federation", name,
            "--address", f"{_HOST}:{main}", "--enrolment", f"{_HOST}:{enrolment}",
            "--governed" if governed else "--ungoverned", "--log" if log else "--no-log",
            *(("--ledger", ledger) if ledger else ()),
        )  # fmt: skip
        self.household.run("coordinator init", command, log=self.folder / "init.log")
        (self.folder / "init.log").replace(self.log(COORDINATOR))

    def cap(self, *, epsilon: float, delta: float) -> None:
        """Write what privacy the federation allows each institution, by document."""
        lines = ("", "[[privacy.budget]]", f"epsilon = {epsilon!r}", f"delta = {delta!r}", "")
        path = self.folder / COORDINATOR / "config.toml"
        path.write_text(path.read_text("utf-8").rstrip("\n") + "\n" + "\n".join(lines), "utf-8")

    def start_coordinator(self) -> Child:
        """Start serving; does not wait."""
        command = self._minga("coordinator", "serve", "--dir", str(self.folder))
        return self.household.start(COORDINATOR, command, log=self.log(COORDINATOR))

    def wait_until_serving(self, client: AdminClient, *, timeout_s: float = _SERVING_S) -> None:
        """Return when the coordinator answers.

        Raises:
            ChildDiedError: a process ended meanwhile.
            UnreachableError: not in time.
        """
        client.wait_until_serving(timeout_s=timeout_s, alive=self.household.check)

    def operator(self) -> Operator:
        """The operator's address and certificate, from the folder."""
        return find_operator(folder=self.folder, config=None, environment={})

    def client(self) -> AdminClient:
        """A connection as the operator; use it as a context manager."""
        return AdminClient(self.operator())

    # -- nodes -----------------------------------------------------------------------------------

    def joined(self, site: str) -> bool:
        """Whether the site has its certificate."""
        return (self.node_folder(site) / "config.toml").exists()

    def join(
        self,
        site: str,
        token: str,
        *,
        ranks: int = 1,
        approving: Sequence[str] = (),
        budget: tuple[float, float] | None = None,
        public_held_out: bool = False,
    ) -> None:
        """Give a site its certificate and configuration, by its invitation.

        Args:
            site: its id.
            token: the invitation; goes in by standard input, where no other user can read it.
            ranks: training processes, one thread each.
            approving: further arguments: where the institution's key is.
            budget: epsilon and delta that the site allows by document; None: what is usual.
            public_held_out: the site's held-out text is public.
        """
        config = load_config(self.folder / COORDINATOR / "config.toml")
        data = self.data_folder(site)
        command = self._minga(
            "node", "join", "--dir", str(self.node_folder(site)), "--token", "-",
            "--coordinator", config.public_address, "--enrolment", config.enrolment_address,
            "--data-train", str(data / "train.jsonl"), "--data-valid", str(data / "valid.jsonl"),
            "--ranks", str(ranks), "--device", "cpu", "--threads", "1", *approving,
            *(("--epsilon", repr(budget[0]), "--delta", repr(budget[1])) if budget else ()),
            *(("--held-out-public",) if public_held_out else ()),
        )  # fmt: skip
        self.household.run(f"{site} join", command, log=self.log(site), said=f"{token}\n".encode())

    def declare(self, site: str, languages: Collection[str]) -> None:
        """Say for a site what its texts are, as a person edits ``policy.toml`` after joining.

        What was declared before stays: somebody may have changed it since.
        """
        path, data = self.node_folder(site) / "policy.toml", self.data_folder(site)
        if path.exists() and 'licence = "unknown"' not in path.read_text("utf-8"):
            return
        text = demo_site_policy(
            site,
            paths=[str((data / name).absolute()) for name in ("train.jsonl", "valid.jsonl")],
            languages=sorted(languages),
            salt=secrets.token_bytes(32),
        )
        temporary = path.with_name(".policy.toml.tmp")
        temporary.write_text(text, "utf-8")
        temporary.replace(path)

    def start_node(self, site: str) -> Child:
        """Start a site's agent; it starts its worker when there is work."""
        command = self._minga("node", "run", "--dir", str(self.node_folder(site)))
        return self.household.start(site, command, log=self.log(site))

    # -- killing ---------------------------------------------------------------------------------

    def kill(self, name: str) -> frozenset[Process]:
        """SIGKILL the coordinator or a site's agent with its worker; who was killed."""
        return self.household.kill(name)

    def restart(self, name: str, *, after_s: float) -> None:
        """Start again what was killed."""
        time.sleep(after_s)
        if name == COORDINATOR:
            self.start_coordinator()
        else:
            self.start_node(name)

    def _minga(self, *arguments: str) -> list[str]:
        return self.household.python("infra.cli", *arguments)
