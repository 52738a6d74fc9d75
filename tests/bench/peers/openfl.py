"""OpenFL 1.9: its own ``fx`` commands, a workspace with a certificate authority, gRPC with mTLS."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.bench.peers.base import NODES, Job, Peer, wait_for_rounds
from tests.bench.processes import Stage, free_port, wait_for_port

COLLABORATORS = tuple(f"col{index + 1}" for index in range(NODES))


def plan(*, params: int, rounds: int, port: int) -> dict[str, Any]:
    """The federation's plan; JSON is YAML, so that no YAML library is needed to write it."""
    return {
        "aggregator": {
            "defaults": "plan/defaults/aggregator.yaml",
            "template": "openfl_aggregator.BenchAggregator",
            "settings": {"rounds_to_train": rounds, "persist_checkpoint": True},
        },
        "collaborator": {
            "defaults": "plan/defaults/collaborator.yaml",
            "template": "openfl.component.Collaborator",
            "settings": {"use_delta_updates": False, "opt_treatment": "RESET"},
        },
        "data_loader": {
            "defaults": "plan/defaults/data_loader.yaml",
            "template": "openfl_task.NoData",
            "settings": {},
        },
        "task_runner": {
            "defaults": "plan/defaults/task_runner.yaml",
            "template": "openfl_task.AddRunner",
            "settings": {"floats": params},
        },
        "network": {
            "defaults": "plan/defaults/network.yaml",
            "settings": {"agg_addr": "localhost", "agg_port": port},
        },
        "assigner": {
            "defaults": "plan/defaults/assigner.yaml",
            "template": "openfl.component.RandomGroupedAssigner",
            "settings": {
                "task_groups": [{"name": "learning", "percentage": 1.0, "tasks": ["train"]}]
            },
        },
        "compression_pipeline": {"defaults": "plan/defaults/compression_pipeline.yaml"},
        "tasks": {"settings": {}, "train": {"function": "train_task", "kwargs": {}}},
    }


class OpenFl(Peer):
    name = "openfl"
    system = "OpenFL 1.9"
    # numpy is not pinned by OpenFL 1.9, and its aggregator fails to start with newer ones.
    requirements = ("openfl==1.9", "numpy<2.1")
    note = (
        "no-op workspace, gRPC with client certificates, one message per tensor, checkpoint on "
        "(its default); polls every 1 s instead of its 10 s"
    )

    def run(self, job: Job, stage: Stage) -> None:
        workspace = job.folder / "workspace"
        env = job.environment()
        port = free_port()

        def fx(name: str, *words: str) -> None:
            cwd = job.folder if name == "create" else workspace
            stage.run(name, [job.tool("fx"), *words], env=env, cwd=cwd, timeout_s=120)

        fx("create", "workspace", "create", "--prefix", "workspace", "--template", "no-op")
        terms = plan(params=job.params, rounds=job.rounds + 1, port=port)
        self._write_plan(job, terms)
        fx("certify", "workspace", "certify")
        fx("request", "aggregator", "generate-cert-request", "--fqdn", "localhost")
        fx("sign", "aggregator", "certify", "--fqdn", "localhost", "--silent")
        for name in COLLABORATORS:
            (workspace / "data" / name).mkdir(parents=True, exist_ok=True)
            fx(f"{name}-create", "collaborator", "create", "-n", name, "-d", f"data/{name}",
               "--silent")  # fmt: skip
            fx(f"{name}-request", "collaborator", "generate-cert-request", "-n", name,
               "--silent", "-x")  # fmt: skip
            fx(f"{name}-sign", "collaborator", "certify", "-n", name, "--silent")
        self._write_plan(job, terms)  # the commands above rewrite parts of it
        fx("initialize", "plan", "initialize")

        watched: dict[str, subprocess.Popen[bytes]] = {}
        watched["aggregator"] = stage.start(
            "aggregator", [job.tool("fx"), "aggregator", "start"],
            role="server", env=env, cwd=workspace,
        )  # fmt: skip
        wait_for_port(port, process=watched["aggregator"], timeout_s=90)
        for name in COLLABORATORS:
            watched[name] = stage.start(
                name, [job.tool("fx"), "collaborator", "start", "-n", name],
                role="client", env=env, cwd=workspace,
            )  # fmt: skip
        wait_for_rounds(job, stage, watched)

    @staticmethod
    def _write_plan(job: Job, terms: dict[str, Any]) -> None:
        folder = job.folder / "workspace" / "plan"
        (folder / "plan.yaml").write_text(json.dumps(terms, indent=1))
        (folder / "cols.yaml").write_text(json.dumps({"collaborators": list(COLLABORATORS)}))
        (folder / "data.yaml").write_text("".join(f"{c},data/{c}\n" for c in COLLABORATORS))
