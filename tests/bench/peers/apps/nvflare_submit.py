"""Submit one FedAvg job to a running NVIDIA FLARE federation and wait for its end.

usage: nvflare_submit.py PRODUCTION_FOLDER SCRATCH FLOATS ROUNDS CLIENTS TIMEOUT_S
"""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

import os
import sys
from pathlib import Path

from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.fuel.flare_api.flare_api import (
    new_secure_session,
)
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare_persistor import BenchPersistor


def main(production, scratch, *, floats, rounds, clients, timeout_s):
    os.chdir(Path(__file__).resolve().parent)
    job = FedJob(name="minga_bench", min_clients=clients)
    job.to_server(FedAvg(num_clients=clients, num_rounds=rounds, persistor_id="persistor"))
    job.to_server(BenchPersistor(floats=floats), id="persistor")
    for index in range(clients):
        runner = ScriptRunner(script="nvflare_client.py", framework=FrameworkType.NUMPY)
        job.to(runner, f"site-{index + 1}")
    job.export_job(scratch)
    session = new_secure_session(
        username="admin@nvidia.com",
        startup_kit_location=str(Path(production) / "admin@nvidia.com"),
    )
    identifier = session.submit_job(str(Path(scratch) / job.name))
    session.monitor_job(identifier, timeout=timeout_s, poll_interval=1.0)
    status = session.get_job_meta(identifier).get("status")
    session.close()
    print("status", status)
    return 0 if status == "FINISHED:COMPLETED" else 1


if __name__ == "__main__":
    numbers = ("floats", "rounds", "clients", "timeout_s")
    named = {name: int(word) for name, word in zip(numbers, sys.argv[3:], strict=True)}
    sys.exit(main(sys.argv[1], sys.argv[2], **named))
