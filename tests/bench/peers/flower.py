"""Flower 1.41: SuperLink, four SuperNodes and a ServerApp with stock FedAvg, HTTPS throughout.

Flower has no mutual TLS: nodes check the SuperLink's certificate, not the reverse. The SuperLink's
state is in memory, which is its default.
"""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
import time
from pathlib import Path

from tests.bench.certificates import make_identities
from tests.bench.peers.base import APPS, NODES, Job, Peer, wait_for_rounds
from tests.bench.processes import Stage, free_port, wait_for_port

PROJECT = """\
[project]
name = "bench"
version = "1.0.0"
description = "add a step to the model"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "benchapp.flower_server:app"
clientapp = "benchapp.flower_client:app"

[tool.flwr.app.config]
floats = {floats}
rounds = {rounds}
clients = {clients}
"""
CONNECTION = """\
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
root-certificates = "{ca}"
"""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


class Flower(Peer):
    name = "flower"
    system = "Flower SuperLink 1.41.0"
    requirements = ("flwr==1.41.0",)
    note = (
        "FedAvg, HTTPS without client certificates, SuperLink state in memory; "
        "server memory is SuperLink plus ServerApp"
    )

    def run(self, job: Job, stage: Stage) -> None:
        home = job.folder / "flwr"
        home.mkdir(parents=True)
        env = {**job.environment(), **QUIET, "FLWR_HOME": str(home)}
        tls = make_identities(job.folder / "tls", ["superlink"], now=dt.datetime.now(dt.UTC))
        identity = tls["superlink"]
        port = free_port()
        secured = ["--ssl-ca-certfile", str(identity.ca), "--ssl-certfile"]
        secured += [str(identity.certificate), "--ssl-keyfile", str(identity.key)]
        watched: dict[str, subprocess.Popen[bytes]] = {}
        watched["superlink"] = stage.start(
            "superlink",
            [job.tool("flower-superlink"), "--port", str(port), *secured],
            role="server",
            env=env,
        )
        wait_for_port(port, process=watched["superlink"], timeout_s=90)
        for index in range(NODES):
            name = f"supernode-{index}"
            watched[name] = stage.start(
                name,
                [
                    job.tool("flower-supernode"),
                    "--superlink", f"127.0.0.1:{port}",
                    "--root-certificates", str(identity.ca),
                    "--port", str(free_port()),
                    "--node-config", f"partition-id={index}",
                    *secured,
                ],
                role="client",
                env=env,
            )  # fmt: skip
            time.sleep(1)  # else the next free port may be the one that this node is about to take
        app = self._write_app(job)
        (home / "config.toml").write_text(CONNECTION.format(port=port, ca=identity.ca))
        stage.run(
            "submit", [job.tool("flwr"), "run", str(app)], env=env, timeout_s=90, role="admin"
        )
        wait_for_rounds(job, stage, watched)

    @staticmethod
    def _write_app(job: Job) -> Path:
        app = job.folder / "app"
        package = app / "benchapp"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        for name in ("flower_server.py", "flower_client.py"):
            shutil.copy(APPS / name, package / name)
        project = PROJECT.format(floats=job.params, rounds=job.rounds + 1, clients=NODES)
        (app / "pyproject.toml").write_text(project)
        return app
