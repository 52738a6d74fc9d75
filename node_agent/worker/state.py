"""What a worker remembers between rounds and across restarts: ``state/<run>/``.

    state/<run>/<round>/               after the training of <round>: moments, place in the data
    state/<run>/<round>.step-<n>/      the middle of <round>: also the weights and the sums so far
        meta.json                      written by rank 0
        .metadata, __<r>_0.distcp      torch.distributed.checkpoint: what each rank holds

A folder appears by one rename after every rank has written its part, so there is never half a
state, and an older middle goes only when a newer one is there. Two rounds are kept: if the last one
has to be done again, it starts from the state before it and gives the same bits. Derived from the
site's text: never sent, deleted with the run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from node_agent.resident import JobFailedError
from node_agent.spool import Job, atomic_write, publish
from node_agent.worker import checkpoint
from node_agent.worker.agreement import agree
from node_agent.worker.checkpoint import Like
from node_agent.worker.distributed import Ranks
from node_agent.worker.optimizer import Moments
from protocols.canonical import parse_json
from protocols.errors import FederationError, MalformedMessageError

_SCHEMA: Final = "minga.worker-state/2"
_KEPT: Final = 2  # rounds
_FOLDER: Final = re.compile(r"(\d{6})(?:\.step-(\d{9}))?", re.ASCII)


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


def folder_name(memory: Memory) -> str:
    """What the folder of a memory is called."""
    middle = "" if memory.partial is None else f".step-{memory.partial.progress.steps:09d}"
    return f"{memory.round:06d}{middle}"


def save(root: Path, memory: Memory, ranks: Ranks, *, like: Like) -> None:
    """Write one memory, all ranks together; older ones beyond two rounds are removed.

    Args:
        root: ``state/<run>``.
        memory: this rank's.
        ranks: this process among its peers.
        like: the model's parameters, which show how tensors are spread.

    Raises:
        JobFailedError: storage: on every rank, if one cannot write.
    """
    final = root / folder_name(memory)
    temporary = root / f".{final.name}.tmp"

    def prepare() -> None:
        if ranks.first:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)

    def write() -> None:
        checkpoint.write(temporary, _tensors(memory, like), ranks)

    def finish() -> None:
        if not ranks.first:
            return
        atomic_write(temporary / "meta.json", _meta(memory))
        shutil.rmtree(final, ignore_errors=True)
        publish(temporary, final)
        _prune(root, memory)

    for action in (prepare, write, finish):
        agree(ranks, action)


def _tensors(memory: Memory, like: Like) -> dict[str, Tensor]:
    """Everything of a memory that is a tensor, by its key in the checkpoint."""
    found = {
        f"moments/{name}/{key}": checkpoint.spread(tensor, like(name))
        for name, kept in memory.moments.items()
        for key, tensor in kept.items()
    }
    if memory.partial is not None:
        for name, tensor in memory.partial.weights.items():
            found[f"weights/{name}"] = checkpoint.spread(tensor, like(name))
    return found


def _meta(memory: Memory) -> bytes:
    value: dict[str, Any] = {
        "schema": _SCHEMA,
        "run": memory.run,
        "round": memory.round,
        "world": memory.world,
        "optimizer": memory.optimizer,
        "updates": memory.updates,
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
    """Keep the newest complete rounds, the middle of a round only while it is the newest."""
    found, mine = _found(root), folder_name(memory)
    complete = sorted((one.round for one in found if one.step is None), reverse=True)
    stale = [one.path for one in found if one.round in complete[_KEPT:] or one.step is not None]
    stale += [Path(entry) for entry in os.scandir(root) if entry.name.endswith(".tmp")]
    for folder in stale:
        if folder.name != mine:
            shutil.rmtree(folder)


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    round: int
    step: int | None  # None: after the round's training


def _found(root: Path) -> list[_Found]:
    """The states of a run."""
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except FileNotFoundError:
        return []
    return [
        _Found(root / name, int(match[1]), None if match[2] is None else int(match[2]))
        for name in names
        if (match := _FOLDER.fullmatch(name))
    ]


def choose(root: Path, job: Job) -> Path | None:
    """Where to go on from: this very job's newest middle, else the newest round before it.

    A complete state of the job's own round is not taken: the round is being done again.
    """
    found = _found(root)
    middles = [one for one in found if one.round == job.round and one.step is not None]
    for middle in sorted(middles, key=lambda one: one.step or 0, reverse=True):
        if _is_middle_of(middle.path, job):
            return middle.path
    before = [one for one in found if one.round < job.round and one.step is None]
    return max(before, key=lambda one: one.round).path if before else None


def _is_middle_of(folder: Path, job: Job) -> bool:
    try:
        meta = parse_json((folder / "meta.json").read_bytes())
        return bool(meta["partial"]["work"] == work_of(job))
    except (OSError, MalformedMessageError, KeyError, TypeError):
        return False  # not ours to repair: the round starts from its beginning


def load(folder: Path, ranks: Ranks, *, like: Like) -> Memory:
    """Read one rank's part, all ranks together; it may have been written by another number of them.

    Args:
        folder: which ``choose`` found.
        ranks: this process among its peers.
        like: the model's parameters, which show how tensors are to be spread.

    Raises:
        JobFailedError: state.corrupt: on every rank: the folder was changed by somebody, or is
            from another version.
    """
    memory, boxes = agree(ranks, lambda: _open(folder, like))

    def fill() -> None:
        try:
            checkpoint.read(folder, boxes, ranks)
        except Exception as error:  # noqa: BLE001  the library raises whatever its parts raise
            raise _spoilt(folder, error) from None

    agree(ranks, fill)
    return memory


def _open(folder: Path, like: Like) -> tuple[Memory, dict[str, Tensor]]:
    """The memory with tensors that wait to be filled, and the whole tensors they are parts of."""
    try:
        meta = parse_json((folder / "meta.json").read_bytes())
        if meta.pop("schema") != _SCHEMA:
            raise MalformedMessageError(f"it is not a {_SCHEMA}")
        partial = meta.pop("partial", None)
        memory = Memory(**meta)
        weights: dict[str, Tensor] = {}
        boxes: dict[str, Tensor] = {}
        for key, shape in checkpoint.keys(folder).items():
            kind, _, rest = key.partition("/")
            name, _, moment = rest.rpartition("/") if kind == "moments" else (rest, "", "")
            boxes[key], mine = checkpoint.empty(like(name), shape)
            if kind == "moments":
                memory.moments.setdefault(name, {})[moment] = mine
            else:
                weights[name] = mine
        if partial is not None:
            memory.partial = Partial(
                work=partial["work"],
                progress=Progress(**partial["progress"]),
                evaluation=partial["evaluation"],
                weights=weights,
            )
    except (OSError, FederationError, KeyError, TypeError, ValueError) as error:
        raise _spoilt(folder, error) from None
    except (pickle.PickleError, EOFError, AttributeError, IndexError) as error:
        raise _spoilt(folder, error) from None
    return memory, boxes


def _spoilt(folder: Path, error: BaseException) -> JobFailedError:
    words = " ".join(str(error).split())[:200]
    return JobFailedError("state.corrupt", f"the state in {folder} cannot be read: {words}")
