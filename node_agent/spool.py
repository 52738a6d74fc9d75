"""The spool directory: everything that the agent and its worker say to each other.

The agent never imports torch and the worker never reads the network; a folder is all they share,
so the same worker runs as a child process or inside a Slurm allocation.

    worker.json            who serves this spool, written when it is ready for jobs
    alive                  touched about once a second
    drain                  made by the agent: finish the step, put the state away, leave
    jobs/<id>.json         one job, ``<id>`` is ``<run>.<round>``
    jobs/<id>.cancel       made by the agent: stop the job, nothing of it is wanted
    jobs/<id>.finish       made by the agent: begin no further step, what is done is the update
    out/<id>/status.jsonl  what happens to it, one JSON object per line
    out/<id>/delta.f32     the update: little-endian float32, selected tensors, manifest order
    out/<id>/spent.json    what it used before it was interrupted
    out/<id>/result.json   the last file written: when it is there, everything else is
    state/<run>/           the worker's own memory between rounds; nobody else reads it
    carry/<run>/           the agent's: late updates that wait for the next round (carry.py)

Files appear whole: written under a temporary name, made durable, renamed. Reading is strict, and
``read_result`` trusts nothing it can check: sizes, digest, finite numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protocols.canonical import parse_json
from protocols.errors import (
    DigestMismatchError,
    MalformedMessageError,
    ManifestMismatchError,
    NonFiniteUpdateError,
)
from protocols.identifiers import Digest, RoundId, RunId, parse_digest, parse_run_id
from protocols.tensors.manifest import Manifest
from protocols.tensors.units import UnitHasher

_JOB_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,47}\.(0|[1-9][0-9]{0,5})", re.ASCII)
_MAX_MESSAGE: Final = 500  # characters of a sentence in status.jsonl
_TAIL: Final = 64 * 2**10  # bytes: more than one status line ever has
_READ: Final = 2**20  # coordinates read at a time when a delta is checked

Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]

EventName = Literal[
    "started", "progress", "evaluated", "done", "failed", "cancelled", "interrupted"
]
FINAL_EVENTS: Final = frozenset({"failed", "cancelled"})  # no result.json will follow


# -- documents -----------------------------------------------------------------------------------


class _Document(BaseModel):
    """A frozen JSON document: strict types, no unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    def to_bytes(self) -> bytes:
        """JSON, sorted keys, one line without its newline."""
        value = self.model_dump(mode="json", by_alias=True)
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


class DataPaths(_Document):
    """Where the site keeps its text: files, folders or globs, absolute."""

    train: tuple[str, ...] = ()
    weights: tuple[Weight, ...] = ()  # one for each of train, or none: all text is one data set
    valid: tuple[str, ...] = ()

    @field_validator("train", "weights", "valid", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("train", "valid")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not Path(path).is_absolute() or "\0" in path:
                raise ValueError(f"{path!r} is not an absolute path")
        return value

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError("weights has one number for each of train, or none")
        return self


class Job(_Document):
    """One round's local work, as the agent asks for it."""

    schema_: Literal["minga.job/1"] = Field(default="minga.job/1", alias="schema")
    id: str
    run: str
    round: int = Field(ge=0, lt=10**6)
    index: int = Field(default=0, ge=0, lt=10**6)  # which of the plan's rounds this is
    plan: str  # path of the canonical plan
    manifest: str  # path
    theta: str  # path of the starting model: raw little-endian float32, manifest order
    base: str | None = None  # path of the base model's folder, where the plan has one
    select: Literal["all", "none"] | tuple[str, ...]  # tensors whose update leaves the site
    data: DataPaths = DataPaths()
    max_steps: Positive | None = None  # the plan's limits hold as well; the smaller one counts
    max_tokens: Positive | None = None
    max_seconds: Seconds | None = None  # of training, loading and evaluation not counted
    deadline_unix: Seconds | None = None  # training must be over by then
    seed: int = Field(ge=0, le=2**63 - 1)  # of the site's order of documents
    threads: int | None = Field(default=None, ge=1, le=1024)  # CPU threads of each rank
    reset_optimizer: bool = False
    carry: tuple[str, ...] = ()  # paths of earlier updates of these tensors, added to this one

    @field_validator("select", "carry", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("plan", "manifest", "theta", "base")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and (not Path(value).is_absolute() or "\0" in value):
            raise ValueError(f"{value!r} is not an absolute path")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.id != job_id(RoundId(parse_run_id(self.run), self.round)):
            raise ValueError(f"id {self.id!r} is not that of run {self.run} round {self.round}")
        if any(not Path(path).is_absolute() or "\0" in path for path in self.carry):
            raise ValueError("carry holds a path that is not absolute")
        if isinstance(self.select, tuple) and not self.select:
            raise ValueError('select must name a tensor, or be "all" or "none"')
        return self

    @property
    def round_id(self) -> RoundId:
        """The round this job belongs to."""
        return RoundId(RunId(self.run), self.round)

    def same_work(self, other: Job) -> bool:
        """Whether the other job asks for the same numbers; when it must be over does not matter."""
        return self.model_copy(update={"deadline_unix": None}) == other.model_copy(
            update={"deadline_unix": None}
        )


class Evaluation(_Document):
    """How well the round's starting model predicts held-out text of one language: sums only."""

    language: str = Field(min_length=1, max_length=64)
    nll_nats: Seconds  # summed over the bytes of all documents
    bytes: Count  # UTF-8
    documents: Count


class PrivateReport(_Document):
    """What a private step did to the site's records. **Never leaves the site**, not in a sum."""

    way: Literal["hooks", "ghost", "loop"]
    records: Count  # N
    expected_batch: Number  # public: what sums are divided by
    sampled: Count  # records over all steps
    clipped: Count  # of them, longer than the clip norm
    not_finite: Count  # of them, left out because their gradient was NaN or infinite
    empty_steps: Count
    unused_rows: Count  # of documents longer than the plan's cap on sequences
    noise: Literal["added", "later"]  # "later": by the agent, under the secure sum


class Spent(_Document):
    """What a job used, over all ranks."""

    gpu_seconds: Seconds = 0.0  # devices held
    cpu_seconds: Seconds = 0.0  # user and system
    energy_joules: Seconds | None = None  # of the devices, as the driver counts; None: not counted

    def __add__(self, other: Spent) -> Spent:
        mine, others = self.energy_joules, other.energy_joules
        return Spent(
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            energy_joules=None if mine is None or others is None else mine + others,
        )


class Result(_Document):
    """What a finished job says about itself.

    Of private steps ``tokens``, ``records`` and ``loss_nats`` are zero: no noise would cover them.
    """

    schema_: Literal["minga.result/1"] = Field(default="minga.result/1", alias="schema")
    id: str
    steps: Count
    tokens: Count  # predicted, over all ranks
    records: Count  # sequences, over all ranks
    loss_nats: Number  # summed over tokens
    seconds: Seconds  # of training
    delta_root: str
    delta_coordinates: Count
    delta_norm: Seconds  # L2, float64
    evaluation: tuple[Evaluation, ...] = ()
    rank_steps: tuple[Count, ...] = ()
    device: str = Field(max_length=200)
    private: PrivateReport | None = None
    spent: Spent | None = None  # None: the worker does not count

    @field_validator("evaluation", "rank_steps", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("delta_root")
    @classmethod
    def _digest(cls, value: str) -> str:
        return parse_digest(value)

    @property
    def root(self) -> Digest:
        """Root of the delta's units, typed."""
        return Digest(self.delta_root)


class StatusEvent(_Document):
    """One line of status.jsonl. A newer worker may add fields; they are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    at: Seconds  # unix seconds
    event: EventName
    step: Count | None = None
    max_steps: Count | None = None
    tokens: Count | None = None
    loss: Number | None = None  # mean nats per token since the last event
    tokens_per_s: Seconds | None = None
    message: str | None = None
    code: str | None = None

    def to_bytes(self) -> bytes:
        """JSON without the fields that say nothing."""
        value = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


class WorkerInfo(_Document):
    """Who serves a spool."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)

    schema_: Literal["minga.worker/1"] = Field(default="minga.worker/1", alias="schema")
    pid: int = Field(ge=1)
    ranks: int = Field(ge=1)
    backend: str  # "gloo", "cpu:gloo,cuda:nccl", or "none" for a single process
    device: str
    torch: str  # version, or "none" for the Flower host
    started_at: Seconds  # unix seconds


_D = TypeVar("_D", bound=_Document)


def _parse(kind: type[_D], data: bytes, what: str) -> _D:
    """Read one document; every way of being wrong is a MalformedMessageError naming the field."""
    try:
        return kind.model_validate(parse_json(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise MalformedMessageError(f"{what}: {where + ': ' if where else ''}{reason}") from None
    except MalformedMessageError as error:
        raise MalformedMessageError(f"{what}: {error}") from None


# -- places --------------------------------------------------------------------------------------


def job_id(round_: RoundId) -> str:
    """The name of a round's job: ``<run>.<round>``."""
    return f"{round_.run}.{round_.number}"


def parse_job_id(text: str) -> RoundId:
    """Read a job's name.

    Raises:
        MalformedMessageError: not of the form ``<run>.<round>``.
    """
    if _JOB_ID.fullmatch(text) is None:
        raise MalformedMessageError(f"a job is named RUN.ROUND, got {text!r:.80}")
    run, _, number = text.partition(".")
    return RoundId(parse_run_id(run), int(number))


@dataclass(frozen=True, slots=True)
class Spool:
    """The paths inside one spool directory."""

    root: Path

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def drain(self) -> Path:
        return self.root / "drain"

    @property
    def alive(self) -> Path:
        return self.root / "alive"

    @property
    def worker(self) -> Path:
        return self.root / "worker.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    def job(self, name: str) -> Path:
        return self.jobs / f"{name}.json"

    def cancel(self, name: str) -> Path:
        return self.jobs / f"{name}.cancel"

    def finish(self, name: str) -> Path:
        return self.jobs / f"{name}.finish"

    def out(self, name: str) -> Path:
        return self.root / "out" / name

    def status(self, name: str) -> Path:
        return self.out(name) / "status.jsonl"

    def delta(self, name: str) -> Path:
        return self.out(name) / "delta.f32"

    def spent(self, name: str) -> Path:
        return self.out(name) / "spent.json"

    def result(self, name: str) -> Path:
        return self.out(name) / "result.json"

    def state(self, run: str) -> Path:
        return self.root / "state" / run

    def make(self) -> Spool:
        """Create the folders; private, because states and updates are derived from the data."""
        for folder in (self.root, self.jobs, self.root / "out", self.root / "state"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self


# -- durable writing -----------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a file that was written and synced its name, durably."""
    temporary.replace(final)
    sync_folder(final.parent)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSummary:
    """What an update's bytes are called, how many coordinates it has and how long it is."""

    root: Digest
    coordinates: int
    norm: float  # L2, float64


class DeltaWriter:
    """Streams an update to ``delta.f32``: O(largest tensor) memory, hashed on the way.

    Nothing appears under the final name unless ``commit`` was reached.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._final = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._hasher = UnitHasher()
        self._coordinates = 0
        self._squares = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with suppress(FileNotFoundError):  # gone when it was committed
            self._temporary.unlink()

    def add(self, name: str, part: NDArray[np.float32]) -> None:
        """Append one tensor's update.

        Args:
            name: the tensor's name, for the error.
            part: float32, any shape; written in row-major order.

        Raises:
            NonFiniteUpdateError: a coordinate is NaN or infinite; names the tensor.
        """
        flat = np.ascontiguousarray(part, dtype="<f4").reshape(-1)
        for start in range(0, flat.size, _READ):
            piece = flat[start : start + _READ]
            wide = piece.astype(np.float64)
            squares = float(np.dot(wide, wide))
            if not math.isfinite(squares):
                raise NonFiniteUpdateError(f"the update of tensor {name} is not finite")
            data = piece.tobytes()
            self._file.write(data)
            self._hasher.update(data)
            self._squares += squares
        self._coordinates += flat.size

    def commit(self) -> DeltaSummary:
        """Make the file durable and give it its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(self._temporary, self._final)
        return DeltaSummary(
            root=self._hasher.digest(),
            coordinates=self._coordinates,
            norm=math.sqrt(self._squares),
        )


class StatusWriter:
    """Appends events of one job to its status.jsonl; one ``write`` per line."""

    def __init__(self, path: Path, *, now: Callable[[], float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        self._now = now

    def event(self, event: EventName, *, message: str | None = None, **fields: Any) -> StatusEvent:
        """Append one event, durably when it is the job's last word."""
        if message is not None:
            message = " ".join(message.split())[:_MAX_MESSAGE]
        said = StatusEvent(at=self._now(), event=event, message=message, **fields)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, said.to_bytes() + b"\n")
            if event not in ("progress", "started"):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return said


# -- the agent's side ----------------------------------------------------------------------------


def write_job(spool: Spool, job: Job) -> None:
    """Ask for a job. Asking again for the same work keeps what is done; a failed job runs again.

    If a job of the same name but with other work (another model, other tensors) was there, its
    results are removed first: they answer another question.
    """
    spool.make()
    path = spool.job(job.id)
    with suppress(FileNotFoundError, MalformedMessageError):
        if not read_job(path).same_work(job):
            shutil.rmtree(spool.out(job.id), ignore_errors=True)
    spool.cancel(job.id).unlink(missing_ok=True)
    spool.finish(job.id).unlink(missing_ok=True)
    if not spool.result(job.id).exists():
        spool.status(job.id).unlink(missing_ok=True)
    atomic_write(path, job.to_bytes())


def read_job(path: Path) -> Job:
    """Read a job file; its name must be its id.

    Raises:
        FileNotFoundError: there is none.
        MalformedMessageError: names the file and the first wrong field.
    """
    job = _parse(Job, path.read_bytes(), path.name)
    if path.name != f"{job.id}.json":
        raise MalformedMessageError(f"{path.name}: the job inside is called {job.id}")
    return job


def request_cancel(spool: Spool, name: str) -> None:
    """Ask the worker to stop a job; it answers with the event ``cancelled``."""
    spool.cancel(name).touch()


def request_finish(spool: Spool, name: str) -> None:
    """Ask the worker to begin no further step of a job; it answers as when its time box is full."""
    spool.finish(name).touch()


def request_drain(spool: Spool) -> None:
    """Ask the worker to put its state away and leave."""
    spool.drain.touch()


def keep_spent(spool: Spool, name: str, spent: Spent) -> None:
    """Note what an unfinished job used so far, over all its beginnings."""
    spool.out(name).mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(spool.spent(name), spent.to_bytes())


def read_spent(spool: Spool, name: str) -> Spent | None:
    """What a job used before it was interrupted; None: it was not, or nobody can tell."""
    try:
        return _parse(Spent, spool.spent(name).read_bytes(), "spent.json")
    except (OSError, MalformedMessageError):
        return None


def forget_job(spool: Spool, name: str) -> None:
    """Remove a job and what it produced; the worker's state of the run stays."""
    spool.job(name).unlink(missing_ok=True)
    spool.cancel(name).unlink(missing_ok=True)
    spool.finish(name).unlink(missing_ok=True)
    shutil.rmtree(spool.out(name), ignore_errors=True)


def forget_run(spool: Spool, run: str) -> None:
    """Remove a run that is over: jobs, results, and what the worker remembers of the site's text.

    Raises:
        MalformedMessageError: not a run's name.
    """
    parse_run_id(run)
    for path in [*spool.jobs.glob(f"{run}.*"), *(spool.root / "out").glob(f"{run}.*")]:
        name, _, number = path.name.partition(".")
        forget_job(spool, f"{name}.{number.partition('.')[0]}")
    shutil.rmtree(spool.state(run), ignore_errors=True)
    shutil.rmtree(spool.root / "carry" / run, ignore_errors=True)


def runs_in(spool: Spool) -> frozenset[RunId]:
    """The runs of which anything is in a spool."""
    found = set()
    for folder in (spool.jobs, spool.root / "out", spool.root / "state", spool.root / "carry"):
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(MalformedMessageError):  # a file on its way to its name
                    found.add(parse_run_id(entry.name.partition(".")[0]))
    return frozenset(found)


def read_worker(spool: Spool) -> WorkerInfo | None:
    """Who serves the spool; None before it is ready and after it left.

    Raises:
        MalformedMessageError: worker.json cannot be read.
    """
    try:
        data = spool.worker.read_bytes()
    except FileNotFoundError:
        return None
    return _parse(WorkerInfo, data, "worker.json")


def alive_age(spool: Spool, *, now: float | None = None) -> float | None:
    """Seconds since the worker last showed that it lives; None if it never did."""
    try:
        touched = spool.alive.stat().st_mtime
    except FileNotFoundError:
        return None
    return max(0.0, (time.time() if now is None else now) - touched)


def _status_lines(data: bytes) -> Iterator[bytes]:
    whole, newline, _torn = data.rpartition(b"\n")  # the last line may still be on its way
    if newline:
        yield from whole.split(b"\n")


def read_status(spool: Spool, name: str) -> tuple[StatusEvent, ...]:
    """All events of a job so far; a line that is still being written is left out.

    Raises:
        MalformedMessageError: a whole line is not an event.
    """
    try:
        data = spool.status(name).read_bytes()
    except FileNotFoundError:
        return ()
    return tuple(_parse(StatusEvent, line, "status.jsonl") for line in _status_lines(data))


def last_status(spool: Spool, name: str) -> StatusEvent | None:
    """The last event of a job, without reading all of them; None when there is none.

    Raises:
        MalformedMessageError: the last whole line is not an event.
    """
    try:
        with spool.status(name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = list(_status_lines(file.read()))
    except FileNotFoundError:
        return None
    return _parse(StatusEvent, lines[-1], "status.jsonl") if lines else None


def read_result(spool: Spool, job: Job, manifest: Manifest) -> Result | None:
    """The result of a job, checked against its bytes; None while there is none.

    Checks: the document is for this job; the delta has as many coordinates as the selected
    tensors; every one is finite; the root of its units is the one that the result names.

    Raises:
        MalformedMessageError: the document cannot be read, or is for another job.
        ManifestMismatchError: the update has another size than the selected tensors.
        NonFiniteUpdateError: NaN or infinity; names the first coordinate.
        DigestMismatchError: the bytes are not those the worker hashed.
    """
    try:
        data = spool.result(job.id).read_bytes()
    except FileNotFoundError:
        return None
    result = _parse(Result, data, f"result of {job.id}")
    if result.id != job.id:
        raise MalformedMessageError(f"the result of {job.id} is for {result.id}")
    wanted = sum(segment.stop - segment.start for segment in manifest.select(job.select))
    path = spool.delta(job.id)
    size = path.stat().st_size if path.exists() else -1
    if result.delta_coordinates != wanted or size != 4 * wanted:
        raise ManifestMismatchError(
            f"the update of {job.id} has {result.delta_coordinates} coordinates in {size} bytes;"
            f" the selected tensors have {wanted}"
        )
    root = _checked_root(path)
    if root != result.root:
        raise DigestMismatchError(f"the update of {job.id} is not what its result names")
    return result


def _checked_root(path: Path) -> Digest:
    hasher, at = UnitHasher(), 0
    with path.open("rb") as file:
        while piece := file.read(4 * _READ):
            finite = np.isfinite(np.frombuffer(piece, dtype="<f4"))
            if not finite.all():
                first = at + int(np.argmin(finite))
                raise NonFiniteUpdateError(f"coordinate {first} of {path.name} is not finite")
            hasher.update(piece)
            at += finite.size
    return hasher.digest()
