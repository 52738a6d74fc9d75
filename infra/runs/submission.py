"""Bring a plan and the model it starts from to the coordinator."""

from __future__ import annotations

import tempfile
from pathlib import Path

from infra.runs.client import AdminClient
from infra.runs.facts import RunReport
from infra.runs.plan_file import InitialModel, Submission
from protocols.errors import DigestMismatchError
from protocols.identifiers import Digest


def submit(client: AdminClient, made: Submission, model: InitialModel) -> RunReport:
    """Put the blobs of round 0, then submit. Doing it again is harmless.

    Raises:
        DigestMismatchError: the snapshot's files changed while they were sent.
        RefusedError: the coordinator does not take the plan; the sentence says why.
    """
    with tempfile.TemporaryDirectory(prefix="minga-submit-") as folder:
        scales = Path(folder) / "scales"
        scales.write_bytes(made.scales.to_bytes())
        _put(client, scales, made.snapshot.scales)
        _put(client, model.manifest_path, model.manifest.digest)
        _put(client, model.theta_path, made.snapshot.theta)
    return client.submit(made.plan.to_bytes(), made.snapshot.to_bytes())


def _put(client: AdminClient, path: Path, expected: Digest) -> None:
    found = client.put(path)
    if found != expected:
        raise DigestMismatchError(f"{path} changed while it was read; nothing was submitted")
