"""What a worker remembers between rounds and across restarts: ``state/<run>/``.

    state/<run>/<round>/           after the training of <round>: moments, position in the data
    state/<run>/<round>.partial/   <round> was interrupted: also the weights and the sums so far
        meta.json                  written by rank 0
        rank-<r>.pt                what rank r holds

A folder appears by one rename after every rank has written its part, so there is never half a
state. Two rounds are kept: if the last one has to be done again, it starts from the state before
it and gives the same bits. Derived from the site's text: never sent, deleted with the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from node_agent.spool import Job, atomic_write, publish
from node_agent.worker.agreement import agree
from node_agent.worker.distributed import Ranks
from node_agent.worker.optimizer import Moments
from protocols.canonical import parse_json
from protocols.errors import CorruptStateError, MalformedMessageError

_SCHEMA: Final = "minga.worker-state/1"
_KEPT: Final = 2  # rounds
_FOLDER: Final = re.compile(r"(\d{6})(\.partial)?", re.ASCII)


@dataclass(slots=True, kw_only=True)
class Progress:
    """What one job has done so far, over all ranks."""

    steps: int = 0
    tokens: int = 0
    records: int = 0
    loss_nats: float = 0.0
    seconds: float = 0.0  # of training
    # Of a private step, whose tokens, records and loss stay zero; none of it leaves the site.
    sampled: int = 0  # records over all steps
    clipped: int = 0
    not_finite: int = 0
    empty_steps: int = 0


@dataclass(slots=True, kw_only=True)
class Partial:
    """The middle of an interrupted round."""

    work: str  # the job's bytes without its deadline
    progress: Progress
    evaluation: list[dict[str, Any]]  # rows of the result
    weights: dict[str, Tensor]  # this rank's part of each trainable tensor


@dataclass(slots=True, kw_only=True)
class Memory:
    """One rank's memory of one run."""

    run: str
    round: int  # the round whose training made it
    world: int
    optimizer: str
    updates: int = 0
    epoch: int = 0  # position in the data: sequence ``index`` of ``epoch`` comes next
    index: int = 0
    data: str = ""  # fingerprint of the corpus and the sequence length
    moments: Moments = field(default_factory=dict)
    partial: Partial | None = None


def work_of(job: Job) -> str:
    """What must be the same for an interrupted job to be taken up again."""
    return job.model_copy(update={"deadline_unix": None}).to_bytes().decode()


def _folder(root: Path, memory: Memory) -> Path:
    return root / f"{memory.round:06d}{'.partial' if memory.partial else ''}"


def save(root: Path, memory: Memory, ranks: Ranks) -> None:
    """Write one memory, all ranks together; older ones beyond two rounds are removed.

    Raises:
        JobFailedError: storage: on every rank, if one cannot write.
    """
    final = _folder(root, memory)
    temporary = root / f".{final.name}.tmp"

    def prepare() -> None:
        if ranks.first:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)

    def write() -> None:
        content = {
            "updates": memory.updates,
            "moments": memory.moments,
            "weights": memory.partial.weights if memory.partial else {},
        }
        with (temporary / f"rank-{ranks.rank}.pt").open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    def finish() -> None:
        if not ranks.first:
            return
        atomic_write(temporary / "meta.json", _meta(memory))
        shutil.rmtree(final, ignore_errors=True)
        publish(temporary, final)
        _prune(root, memory)

    for action in (prepare, write, finish):
        agree(ranks, action)


def _meta(memory: Memory) -> bytes:
    value: dict[str, Any] = {
        "schema": _SCHEMA,
        "run": memory.run,
        "round": memory.round,
        "world": memory.world,
        "optimizer": memory.optimizer,
        "epoch": memory.epoch,
        "index": memory.index,
        "data": memory.data,
    }
    if memory.partial is not None:
        progress = memory.partial.progress
        value["partial"] = {
            "work": memory.partial.work,
            "progress": {name: getattr(progress, name) for name in Progress.__slots__},
            "evaluation": memory.partial.evaluation,
        }
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _prune(root: Path, memory: Memory) -> None:
    """Keep the newest complete rounds, and the middle of a round only while it is the newest."""
    complete = sorted((number for number, partial in _found(root) if not partial), reverse=True)
    stale = [root / f"{number:06d}" for number in complete[_KEPT:]]
    stale += [root / f"{number:06d}.partial" for number, partial in _found(root) if partial]
    for folder in stale:
        if folder != _folder(root, memory):
            shutil.rmtree(folder)


def _found(root: Path) -> list[tuple[int, bool]]:
    """Rounds and whether they are partial."""
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except FileNotFoundError:
        return []
    matches = [match for name in names if (match := _FOLDER.fullmatch(name))]
    return [(int(match[1]), match[2] is not None) for match in matches]


def choose(root: Path, job: Job) -> Path | None:
    """Where to go on from: this very job's middle, else the newest round before it.

    A complete state of the job's own round is not taken: the round is being done again.
    """
    found = _found(root)
    middle = root / f"{job.round:06d}.partial"
    if (job.round, True) in found and _is_middle_of(middle, job):
        return middle
    before = [number for number, partial in found if number < job.round and not partial]
    return root / f"{max(before):06d}" if before else None


def _is_middle_of(folder: Path, job: Job) -> bool:
    try:
        meta = parse_json((folder / "meta.json").read_bytes())
        return bool(meta["partial"]["work"] == work_of(job))
    except (OSError, MalformedMessageError, KeyError, TypeError):
        return False  # not ours to repair: the round starts from its beginning


def load(folder: Path, *, rank: int, device: torch.device) -> Memory:
    """Read one rank's part.

    Raises:
        CorruptStateError: the folder was changed by somebody, or is from another version.
    """
    try:
        meta = parse_json((folder / "meta.json").read_bytes())
        if meta.pop("schema") != _SCHEMA:
            raise CorruptStateError(f"{folder} is not a {_SCHEMA}")
        partial = meta.pop("partial", None)
        memory = Memory(**meta)
        if rank >= memory.world:
            return memory
        held = torch.load(folder / f"rank-{rank}.pt", map_location=device, weights_only=True)
        memory.updates, memory.moments = held["updates"], held["moments"]
        if partial is not None:
            memory.partial = Partial(
                work=partial["work"],
                progress=Progress(**partial["progress"]),
                evaluation=partial["evaluation"],
                weights=held["weights"],
            )
    except CorruptStateError:
        raise
    except (OSError, MalformedMessageError, KeyError, TypeError, RuntimeError, EOFError) as error:
        raise CorruptStateError(f"the state in {folder} cannot be read: {error}") from None
    except Exception as error:  # noqa: BLE001  pickle errors have no common base
        raise CorruptStateError(f"the state in {folder} cannot be read: {error}") from None
    return memory
