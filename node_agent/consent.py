"""What this site is willing and able to do. It can only narrow what the plan allows.

site.paused       the site paused its node
site.local_step   the kind of local step is not in [allow] local_steps
site.mode         the mode of the sum is not in [allow] modes
site.flower_app   the Flower app is not in [allow] flower_apps
site.base_model   the plan trains a base model that the site has no folder for
site.data         there is no training text, or it cannot be read
site.held_out     scores of text that is not public could be of this site alone
site.disk         the model does not fit on the disk
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from node_agent.config import NodeConfig
from node_agent.rules import Refusal
from node_agent.worker.text_files import DataError, find_files
from protocols.plan import Plan

MIN_SITES = 3  # that an opened score of text that is not public depends on, at least
_STATES = 3  # two models are kept and one is made at a time
_VECTORS = 2  # an encoded vector and a downloaded sum


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What was found at the site."""

    train: str | None  # what is wrong with the training text, in one sentence; None: nothing
    valid: str | None  # likewise for the held-out text
    free_bytes: int  # of the disk that holds the node's folder


def text_trouble(paths: tuple[str, ...]) -> str | None:
    """What keeps the worker from finding text at these paths; None: nothing.

    The worker's own rule for paths, folders and globs. No file is read here: a broken line is
    found by `minga node doctor`, and by the job.
    """
    try:
        sizes = [path.stat().st_size for path in find_files(paths)]
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None if sum(sizes) else f"{len(sizes)} files hold no text"


def site_facts(config: NodeConfig, folder: Path) -> SiteFacts:
    """Look at the disk: a few system calls per file, nothing is read."""
    usage = os.statvfs(folder)
    return SiteFacts(
        train=text_trouble(config.data.train),
        valid=text_trouble(config.data.valid),
        free_bytes=usage.f_bavail * usage.f_frsize,
    )


def disk_needed(plan: Plan, coordinates: int, buffers: int) -> int:
    """Bytes that a run needs on the node's disk, at most."""
    state = 4 * coordinates * (1 + buffers)
    return _STATES * state + (_VECTORS * 3 + 4) * coordinates * plan.vector.ring_bits // 24


def check_site(plan: Plan, config: NodeConfig, facts: SiteFacts) -> Refusal | None:
    """Whether the site wants to and can do what the plan asks; None: nothing against it."""
    step = plan.local_step
    if step.kind not in config.allow.local_steps:
        return Refusal(
            "site.local_step",
            f"this site does not allow local steps of kind {step.kind}:"
            " config.toml [allow] local_steps",
        )
    if plan.mode not in config.allow.modes:
        return Refusal(
            "site.mode", f"this site does not allow mode {plan.mode}: config.toml [allow] modes"
        )
    if step.app is not None and step.app not in config.allow.flower_apps:
        return Refusal(
            "site.flower_app",
            f"this site does not allow the Flower app {step.app}: config.toml [allow] flower_apps",
        )
    folder = config.worker.base_model
    trains = step.kind == "builtin" and plan.model.base is not None
    if trains and (folder is None or not Path(folder).is_dir()):
        return Refusal(
            "site.base_model",
            f"the plan trains base model {plan.model.base}, and there is no folder for it:"
            " config.toml [worker] base_model",
        )
    if step.kind != "synthetic" and facts.train is not None:
        return Refusal("site.data", f"training text: {facts.train}")
    if step.kind != "synthetic" and plan.evaluation.languages and facts.valid is not None:
        return Refusal("site.data", f"held-out text: {facts.valid}")
    return check_scores(plan, config)


def check_scores(plan: Plan, config: NodeConfig) -> Refusal | None:
    """Whether scores of this site's held-out text may be opened as the plan opens them.

    Without ``evaluation.sites`` nobody knows how many sites a figure is of: one site's language
    would be its score alone. In mode open everything is seen anyway.
    """
    scores = plan.local_step.kind != "synthetic" and plan.evaluation.languages
    if plan.mode == "open" or not scores or config.data.valid_public:
        return None
    if plan.evaluation.sites is None:
        return Refusal(
            "site.held_out",
            "the plan opens held-out scores by language and does not say which sites hold which:"
            " a figure could be of this site alone. The plan needs [evaluation.sites], or the text"
            " is public: config.toml [data] valid_public",
        )
    if plan.evaluation.min_sites < MIN_SITES:
        return Refusal(
            "site.held_out",
            f"the plan opens held-out scores of {plan.evaluation.min_sites} sites; this site wants"
            f" at least {MIN_SITES} where its text is not public",
        )
    return None


def check_disk(plan: Plan, facts: SiteFacts, *, coordinates: int, buffers: int) -> Refusal | None:
    """Whether the run's models fit; asked before the first model of a run is fetched."""
    needed = disk_needed(plan, coordinates, buffers)
    if facts.free_bytes < needed:
        return Refusal(
            "site.disk",
            f"the run needs {needed / 2**30:.1f} GiB, {facts.free_bytes / 2**30:.1f} GiB are free",
        )
    return None
