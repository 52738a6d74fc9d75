"""NVIDIA FLARE 2.9.0: its provisioned "proof of concept" federation, one process tree per site.

The kits are the ones that ``nvflare poc prepare`` makes (own authority, mutual TLS), on a port of
our own, started with the kits' own script. The job is the stock FedAvg controller with a Client
API script, plus a persistor that writes the mean with numpy each round, as FLARE's own does.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.bench.peers.base import APPS, NODES, Job, Peer, wait_for_rounds
from tests.bench.processes import Stage, free_port, wait_for_port

PROJECT = """\
api_version: 3
name: minga_bench
description: one server and four sites on loopback
participants:
  - {{name: server, type: server, org: bench, fed_learn_port: {port}, default_host: localhost}}
{sites}
  - {{name: admin@nvidia.com, type: admin, org: bench, role: project_admin}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
    args: {{template_file: [master_template.yml]}}
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config, scheme: http}}
  - path: nvflare.lighter.impl.cert.CertBuilder
  - path: nvflare.lighter.impl.signature.SignatureBuilder
"""


class NvFlare(Peer):
    name = "nvflare"
    system = "NVIDIA FLARE 2.9.0"
    requirements = ("nvflare==2.9.0",)
    note = (
        "POC federation, WebSocket over mutual TLS 1.3, FedAvg controller, in-process client; "
        "model written each round, client results not stored"
    )

    def run(self, job: Job, stage: Stage) -> None:
        workspace = job.folder / "poc"
        port = free_port()
        project = job.folder / "project.yml"
        sites = [f"site-{index + 1}" for index in range(NODES)]
        site_lines = "\n".join(f"  - {{name: {site}, type: client, org: bench}}" for site in sites)
        project.write_text(PROJECT.format(port=port, sites=site_lines))
        env = {**job.environment(), "NVFLARE_POC_WORKSPACE": str(workspace)}
        stage.run(
            "prepare",
            [job.tool("nvflare"), "poc", "prepare", "--force", "-i", str(project)],
            env=env,
            timeout_s=120,
        )
        (production,) = workspace.glob("*/prod_00")
        server = self._start_kit(stage, production, "server", role="server", env=env)
        wait_for_port(port, process=server, timeout_s=60)
        watched = {"server": server}
        for site in sites:
            watched[site] = self._start_kit(stage, production, site, role="client", env=env)
        time.sleep(5)  # until the sites have registered: a job needs all four at submission
        watched["submit"] = stage.start(
            "submit",
            [
                job.tool("python"),
                str(APPS / "nvflare_submit.py"),
                str(production),
                str(job.folder / "job"),
                str(job.params),
                str(job.rounds + 1),
                str(NODES),
                str(int(job.timeout_s)),
            ],
            role="admin",
            env=env,
        )
        wait_for_rounds(job, stage, watched)

    @staticmethod
    def _start_kit(
        stage: Stage, production: Path, name: str, *, role: str, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        script = production / name / "startup" / "sub_start.sh"
        return stage.start(name, ["bash", str(script), "--once"], role=role, env=env)
