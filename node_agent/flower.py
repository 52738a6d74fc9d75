"""Hosts an unmodified Flower ``ClientApp`` as the local step of a plan.

    plan.local_step.app = "package.module:app"     what the plan names
    --python-path DIR                              where the site lets it be imported from
    arrays  = the round's starting model           ArrayRecord, manifest order
    config  = lr, server-round, app_config, ...    ConfigRecord
    reply   = trained arrays, num-examples         -> delta.f32 = arrays - model

A Flower strategy at the coordinator makes a run of each of its rounds. ``minga-series`` in the
plan's app_config says to which whole they belong: to the app they are one run with one Context,
counted by ``server-round``.

The app sees Flower's own API and cannot tell: no SuperLink, no SuperNode, nothing is sent. Its
Context keeps its state between rounds and restarts. It is imported once and stays loaded, so
caches and CUDA contexts survive the round, which Flower's own per-message processes do not offer.

``python -m node_agent.flower --spool DIR`` serves a spool without torch (an app may import what it
likes); the torch worker calls ``run_app`` for the same plans.

Flower names that are not public API are used in this module only, in ``_message`` and
``_evaluates``; tests/conformance/test_flower_client.py fails when a new Flower changes them.
"""

from __future__ import annotations

import os

# Before any import of flwr: it phones home by default.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import argparse
import hashlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import (
    DEFAULT_TTL,
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from node_agent import flower_state
from node_agent.flower_state import PlainArray, PlainRecord
from node_agent.flower_terms import (
    Counts,
    Scalar,
    parse_node_config,
    read_counts,
    read_evaluation,
    round_config,
    site_config,
)
from node_agent.job_files import open_theta, read_plan
from node_agent.resident import (
    Clock,
    Duty,
    JobCancelledError,
    JobContext,
    JobFailedError,
    JobInterruptedError,
    Stop,
    add_arguments,
    live,
    watched,
)
from node_agent.spool import (
    DeltaSummary,
    DeltaWriter,
    Evaluation,
    Job,
    Result,
    Spool,
    WorkerInfo,
)
from protocols.errors import FederationError, NonFiniteUpdateError, exit_status
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest

_SUPERLINK: Final = 1  # the node id Flower gives the server's side
_POLL_S: Final = 0.1
_SERIES: Final = "minga-series"  # in app_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the site lends to apps."""

    python_path: tuple[Path, ...] = ()  # where apps may come from; empty: anything importable
    node_config: Mapping[str, Scalar] = field(default_factory=dict)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Site:
        """From the command line.

        Raises:
            ConfigurationError: the node config is not in Flower's notation.
        """
        return cls(
            python_path=tuple(path.resolve() for path in options.python_path),
            node_config=parse_node_config(options.node_config),
        )


# -- the app -------------------------------------------------------------------------------------


def load_app(name: str, site: Site) -> ClientApp:
    """Import ``package.module:attribute``.

    Raises:
        JobFailedError: flower.app: not importable, outside the site's python path, or not a
            ClientApp.
    """
    module_name, _, attribute = name.partition(":")
    for folder in reversed(site.python_path):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    _check_origin(module_name, site)
    try:
        app = getattr(importlib.import_module(module_name), attribute)
    except AttributeError:
        raise JobFailedError("flower.app", f"{module_name} has no {attribute}") from None
    except Exception as error:
        raise JobFailedError(
            "flower.app", f"cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(app, ClientApp):
        raise JobFailedError("flower.app", f"{name} is a {type(app).__name__}, not a ClientApp")
    return app


def _check_origin(module_name: str, site: Site) -> None:
    """Where the site says from where apps come, importing anything else is refused.

    Looked up by the top-level package, since finding a submodule would import its parents.
    """
    top = module_name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise JobFailedError("flower.app", f"there is no module {top} on the site's python path")
    places = [spec.origin] if spec.origin else []
    places += list(spec.submodule_search_locations or ())
    inside = [
        any(Path(place).resolve().is_relative_to(folder) for folder in site.python_path)
        for place in places
    ]
    if site.python_path and not (inside and all(inside)):
        raise JobFailedError("flower.app", f"{top} does not come from the site's python path")


def _message(
    content: RecordDict, kind: str, *, job: Job, node: int, run: int, now: float
) -> Message:
    """An instruction as a SuperLink would deliver it, with the id that replies refer to.

    ``Message(metadata=...)`` is the one internal way in: the public constructor takes run and
    node from a process-global identity that only Flower's own processes set.
    """
    metadata = Metadata(
        run_id=run,
        message_id=f"{job.id}.{kind}",
        src_node_id=_SUPERLINK,
        dst_node_id=node,
        reply_to_message_id="",
        group_id=str(job.round),
        created_at=now,
        ttl=DEFAULT_TTL,
        message_type=kind,
    )
    return Message(metadata=metadata, content=content)


def _evaluates(error: Exception) -> bool:
    """False when the app has no evaluate function: ClientApp says so with this ValueError."""
    return not (
        isinstance(error, ValueError) and str(error).startswith("No evaluate function registered")
    )


def _number(text: str) -> int:
    """A stable positive 63-bit id for a name, as Flower's ids are."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 or 1


# -- which run it is to the app ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Which Context a job continues."""

    run_id: int  # as Flower counts them
    folder: Path
    round: int


def memory_of(job: Job, plan: Plan, spool: Spool) -> Memory:
    """The Context of the job's run, or of the series that its plan belongs to.

    A series is one app's: what one app remembered is not given to another.
    """
    told = plan.local_step.app_config
    series, number = told.get(_SERIES), told.get("server-round")
    if not isinstance(series, str) or type(number) is not int or not 1 <= number < 10**6:
        return Memory(run_id=_number(job.run), folder=spool.state(job.run), round=job.round)
    run_id = _number(f"{plan.local_step.app} {series}")
    # A run's name has no dot: no run's memory can have this name.
    return Memory(run_id=run_id, folder=spool.state(f"series.{run_id:016x}"), round=number)


# -- what goes in --------------------------------------------------------------------------------


def model_record(theta: NDArray[np.float32], manifest: Manifest) -> ArrayRecord:
    """The starting model as Flower arrays.

    Args:
        theta: float32, shape [D], manifest order.
        manifest: names and shapes.
    """
    record = ArrayRecord()
    for spec, segment in zip(manifest.tensors, manifest.segments, strict=True):
        record[spec.name] = Array(np.array(theta[segment.start : segment.stop]).reshape(spec.shape))
    return record


# -- what comes out ------------------------------------------------------------------------------


def _only(records: Mapping[str, Any], what: str) -> Any:
    if len(records) != 1:
        raise JobFailedError(
            "flower.reply", f"the app's reply has {len(records)} {what}s; exactly one is needed"
        )
    return next(iter(records.values()))


def trained_arrays(record: ArrayRecord, manifest: Manifest) -> list[NDArray[np.float32]]:
    """The reply's arrays in manifest order, float32.

    Matched by name; an app that replies with a plain list of arrays (Flower then numbers them)
    must keep the order and shapes of what it was given.

    Raises:
        JobFailedError: flower.reply: other arrays or shapes than the manifest's, or not numbers.
    """
    names = [spec.name for spec in manifest.tensors]
    if set(record) != set(names):
        if list(record) != [str(number) for number in range(len(names))]:
            raise JobFailedError(
                "flower.reply",
                f"the app replied with {len(record)} arrays that are not the model's {len(names)}",
            )
        keys = list(record)
    else:
        keys = names
    found = []
    for key, spec in zip(keys, manifest.tensors, strict=True):
        array = record[key].numpy()
        if array.shape != spec.shape:
            raise JobFailedError(
                "flower.reply",
                f"tensor {spec.name} came back with shape {list(array.shape)},"
                f" not {list(spec.shape)}",
            )
        if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            raise JobFailedError("flower.reply", f"tensor {spec.name} came back as {array.dtype}")
        found.append(np.asarray(array, dtype=np.float32))
    return found


# -- the Context between rounds ------------------------------------------------------------------


def to_plain(state: RecordDict) -> list[PlainRecord]:
    """A Context's state by public attributes only."""
    found = [
        PlainRecord(
            name,
            "arrays",
            {
                key: PlainArray(array.dtype, tuple(array.shape), array.stype, array.data)
                for key, array in record.items()
            },
        )
        for name, record in state.array_records.items()
    ]
    found += [PlainRecord(n, "metrics", dict(r)) for n, r in state.metric_records.items()]
    found += [PlainRecord(n, "config", dict(r)) for n, r in state.config_records.items()]
    return found


def from_plain(records: Sequence[PlainRecord]) -> RecordDict:
    """The reverse of ``to_plain``."""
    state = RecordDict()
    for record in records:
        if record.kind == "metrics":
            state[record.name] = MetricRecord(dict(record.values))
        elif record.kind == "config":
            state[record.name] = ConfigRecord(dict(record.values))
        else:
            arrays = ArrayRecord()
            for key, a in record.values.items():
                arrays[key] = Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=a.data)
            state[record.name] = arrays
    return state


# -- one job -------------------------------------------------------------------------------------


def run_app(job: Job, context: JobContext, plan: Plan, manifest: Manifest, *, site: Site) -> Result:
    """Do one job with the plan's app: evaluate the starting model, train, write the update.

    Args:
        job: what to do; its limits are told to the app, only the deadline is enforced.
        context: where to speak, and why to stop.
        plan: names the app.
        manifest: names and order of tensors.
        site: what the site lends.

    Raises:
        JobFailedError: flower.app, flower.reply, flower.deadline, model.theta, train.non_finite.
        JobCancelledError, JobInterruptedError: the app goes on in its thread, so the process must
            end; it is told to.
    """
    if plan.local_step.app is None:
        raise JobFailedError("flower.app", "the plan names no app")
    app = load_app(plan.local_step.app, site)
    theta = open_theta(Path(job.theta), manifest)
    memory = memory_of(job, plan, context.spool)
    app_context = Context(
        run_id=memory.run_id,
        node_id=_number(str(context.spool.root)),
        node_config=site_config(job, site.node_config),
        state=from_plain(flower_state.load(memory.folder, memory.round)),
        run_config=dict(plan.local_step.app_config),
    )
    call = _Call(app, app_context, job, plan, theta, manifest, context)
    evaluation: tuple[Evaluation, ...] = ()
    if plan.evaluates_in(job.index):
        evaluation = call.evaluate()
    counts, seconds, trained = Counts(), 0.0, None
    if job.select != "none":
        began = context.clock.monotonic()
        counts, trained = call.train()
        seconds = context.clock.monotonic() - began
    delta = _write_delta(job, context, manifest, theta, trained)
    flower_state.save(memory.folder, memory.round, to_plain(app_context.state))
    return Result(
        id=job.id,
        steps=counts.steps,
        tokens=counts.tokens,
        records=counts.examples,
        loss_nats=counts.loss_nats,
        seconds=seconds,
        delta_root=delta.root,
        delta_coordinates=delta.coordinates,
        delta_norm=delta.norm,
        evaluation=evaluation,
        rank_steps=(counts.steps,),
        device=f"flower:{plan.local_step.app}"[:200],
    )


def _write_delta(
    job: Job,
    context: JobContext,
    manifest: Manifest,
    theta: NDArray[np.float32],
    trained: list[NDArray[np.float32]] | None,
) -> DeltaSummary:
    """``trained - theta`` of the selected tensors; what the app changed elsewhere is dropped."""
    places = {spec.name: number for number, spec in enumerate(manifest.tensors)}
    with DeltaWriter(context.spool.delta(job.id)) as writer:
        for segment in manifest.select(job.select):
            if trained is None:
                raise JobFailedError("flower.reply", "the app was not asked to train")
            local = trained[places[segment.name]].reshape(-1)
            try:
                writer.add(segment.name, local - theta[segment.start : segment.stop])
            except NonFiniteUpdateError as error:
                raise JobFailedError("train.non_finite", str(error)) from None
        return writer.commit()


@dataclass(slots=True)
class _Call:
    """Calls of one app in one job."""

    app: ClientApp
    app_context: Context
    job: Job
    plan: Plan
    theta: NDArray[np.float32]
    manifest: Manifest
    context: JobContext

    def train(self) -> tuple[Counts, list[NDArray[np.float32]]]:
        """One train message; what came back, checked."""
        content = self._ask(MessageType.TRAIN)
        counts = read_counts(_only(content.metric_records, "MetricRecord"))
        record = _only(content.array_records, "ArrayRecord")
        return counts, trained_arrays(record, self.manifest)

    def evaluate(self) -> tuple[Evaluation, ...]:
        """One evaluate message; nothing when the app has no such function."""
        try:
            content = self._ask(MessageType.EVALUATE)
        except _AppError as error:
            if error.cause is not None and not _evaluates(error.cause):
                return ()
            raise
        rows = read_evaluation(_only(content.metric_records, "MetricRecord"))
        self.context.say("evaluated", message=f"{sum(row.documents for row in rows)} documents")
        return rows

    def _ask(self, kind: str) -> RecordDict:
        content = RecordDict(
            {
                "arrays": model_record(self.theta, self.manifest),
                "config": ConfigRecord(round_config(self.job, self.plan)),
            }
        )
        message = _message(
            content,
            kind,
            job=self.job,
            node=self.app_context.node_id,
            run=self.app_context.run_id,
            now=self.context.clock.now(),
        )
        reply = self._supervised(message)
        if not isinstance(reply, Message):
            raise JobFailedError(
                "flower.reply", f"the app returned a {type(reply).__name__}, not a Message"
            )
        if reply.has_error():
            raise JobFailedError("flower.app", f"the app replied with: {reply.error.reason}")
        return reply.content

    def _supervised(self, message: Message) -> Any:
        """Call the app in a thread of its own, so that the agent's wishes are heard meanwhile."""
        box: dict[str, Any] = {}

        def call() -> None:
            try:
                box["reply"] = self.app(message, self.app_context)
            except BaseException as error:  # noqa: BLE001  an app's sys.exit is a failure too
                box["error"] = error

        thread = threading.Thread(target=call, name="flower-app", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            self._still_wanted()
        if "error" in box:
            error = box["error"]
            raise _AppError(error) from error
        return box["reply"]

    def _still_wanted(self) -> None:
        """Raise if nobody waits for the app any more; a thread cannot be ended, a process can."""
        deadline = self.job.deadline_unix
        try:
            self.context.check()
            if deadline is not None and self.context.clock.now() > deadline:
                raise JobFailedError("flower.deadline", "the app was not done by the deadline")
        except (JobCancelledError, JobInterruptedError, JobFailedError):
            self.context.stop.tell("an abandoned Flower app still runs")
            raise


class _AppError(JobFailedError):
    """The app raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("flower.app", f"the app raised {type(cause).__name__}: {cause}")
        self.cause = cause if isinstance(cause, Exception) else None


# -- the process ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a spool without torch."""
    parser = argparse.ArgumentParser(prog="python -m node_agent.flower", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    spool = Spool(options.spool.absolute()).make()
    clock = Clock()
    stop = Stop(spool, watched=watched(options, through_launcher=False))
    try:
        site = Site.of(options)
        live(
            spool,
            begin=lambda: _duty(site, clock),
            stop=stop,
            clock=clock,
            lock_wait_s=options.lock_wait_s,
        )
    except FederationError as error:
        print(f"worker: {error.diagnostics()}", file=sys.stderr)
        return exit_status(error)
    return 0


def _duty(site: Site, clock: Clock) -> Duty:
    def work(job: Job, context: JobContext) -> Result:
        plan, manifest = read_plan(job)
        if plan.local_step.kind != "flower":
            raise JobFailedError(
                "job.kind", f"the Flower host does no local steps of kind {plan.local_step.kind}"
            )
        return run_app(job, context, plan, manifest, site=site)

    info = WorkerInfo(
        pid=os.getpid(),
        ranks=1,
        backend="none",
        device="flower",
        torch="none",
        started_at=clock.now(),
    )
    return Duty(info=info, work=work)


if __name__ == "__main__":
    sys.exit(main())
