"""Reading what a job points at: plan, manifest and starting model. No torch, no flwr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from node_agent.resident import JobFailedError
from node_agent.spool import Job
from protocols.canonical import parse_json
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest

Theta = NDArray[np.float32]


def read_plan(job: Job) -> tuple[Plan, Manifest]:
    """Read the plan and the manifest of a job and see that they belong together.

    Raises:
        JobFailedError: job.plan: a file is missing, or they are of another run or model.
        MalformedMessageError: one of them cannot be read.
        ManifestMismatchError: the job selects a tensor that the manifest has not.
    """
    try:
        plan = Plan.from_value(parse_json(Path(job.plan).read_bytes()))
        manifest = Manifest.from_bytes(Path(job.manifest).read_bytes())
    except OSError as error:
        raise JobFailedError(
            "job.plan", f"cannot read {error.filename}: {error.strerror}"
        ) from None
    if plan.run != job.run:
        raise JobFailedError("job.plan", f"the job is of run {job.run}, its plan of {plan.run}")
    if plan.model.manifest != manifest.digest:
        raise JobFailedError("job.plan", "the manifest is not the one that the plan names")
    manifest.select(job.select)
    return plan, manifest


def open_theta(path: Path, manifest: Manifest) -> Theta:
    """Map a model file.

    Returns:
        float32, shape [D], read-only.

    Raises:
        JobFailedError: model.theta: missing, or another size than the manifest's.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise JobFailedError("model.theta", f"cannot read {path}: {error.strerror}") from None
    if size != 4 * manifest.coordinates:
        raise JobFailedError(
            "model.theta", f"{path} has {size} bytes; the manifest has {4 * manifest.coordinates}"
        )
    return np.memmap(path, dtype="<f4", mode="r")


def least(*limits: float | None) -> float | None:
    """The narrowest of some limits; None does not limit."""
    return min((limit for limit in limits if limit is not None), default=None)
