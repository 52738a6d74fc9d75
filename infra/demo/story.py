"""The course of a demonstration, from an empty folder to the last table.

    folder -> coordinator -> invitations -> nodes -> text -> first model -> plan -> run -> report

Each step looks whether its result is there already, so a demonstration that was interrupted goes
on where it was. Whatever happens, every process that was started is stopped.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from infra.demo.faults import Striker, Struck
from infra.demo.federation import Federation
from infra.demo.follow import Entry, History, follow
from infra.demo.governance import ADMINS, MIN_COUNTRIES, THRESHOLD, DemoGovernance
from infra.demo.policy import TERMS, demo_policy
from infra.demo.processes import Household
from infra.demo.report import MODES, learned, print_end, summary, write_summary
from infra.demo.settings import Settings, claim_folder, write_settings
from infra.demo.sites import SiteText, choose_sites, copy_text, find_sites
from infra.demo.training import EPSILON, ROUNDS, RUN, demo_delta, demo_model, demo_plan
from infra.demo.view import View
from infra.runs.client import AdminClient
from infra.runs.facts import RunReport
from infra.runs.plan_file import (
    InitialModel,
    Submission,
    complete_plan,
    federation_of,
    read_initial_model,
)
from infra.runs.submission import submit
from node_agent.code_digest import installed_code
from policies.consortium import ConsortiumPolicy
from policies.effect import POLICY_DOCUMENT
from protocols.errors import (
    ConfigurationError,
    FederationError,
    NotFoundError,
    NotReadyError,
)
from protocols.identifiers import Digest, FederationId, NodeId, RunId
from protocols.secagg.threshold import MIN_ROSTER
from protocols.tensors.snapshot import Snapshot

FEDERATION: Final = "demo"
_FIRST_MODEL: Final = "first model"
DEFAULT_SITES: Final = 4
_LOG_PAUSE_S: Final = 0.1  # between two looks at the log's checkpoint
_LOG_QUIET: Final = 4  # looks without a change: the last leaves are witnessed
_LOG_TRIES: Final = 60
VERDICTS_S: Final = 20.0  # for the nodes to say which last model they computed


class RunFailedError(NotReadyError):
    """The run ended without all of its rounds; the sentence says why."""

    code = "run_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asked for."""

    folder: Path
    data: Path
    sites: str | None
    rounds: int | None
    mode: str
    two_ranks: int
    port: int
    resume: bool
    keep: bool
    kill_node: str | None  # phase
    kill_coordinator: str | None  # phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a demonstration ended."""

    run: RunReport
    struck: tuple[Struck, ...]
    summary: Path


def run_demo(request: Request, console: Console) -> Outcome:
    """Run a demonstration to its end.

    Raises:
        ExistsError, NotFoundError, ConfigurationError: the folder or the options; nothing began.
        ChildDiedError: a process ended by itself.
        RunFailedError: the run did not come to its end.
        KeyboardInterrupt: stopped by a person; everything was stopped in order.
    """
    folder = request.folder.resolve()
    settings = claim_folder(folder, resume=request.resume)
    if settings is None:
        settings = _new_settings(request)
        write_settings(folder, settings)
    with _stoppable(), Household(folder) as household:
        left = household.end_leftovers() if request.resume else 0
        if left:
            console.print(f"ended {left} processes that an earlier demonstration had left")
        federation = Federation(folder=folder, household=household)
        view = View(console, federation, settings.sites)
        view.say(f"{len(settings.sites)} sites: {', '.join(settings.sites)}")
        view.say(MODES[settings.mode].label)
        try:
            return _play(request, settings, federation, view, console)
        except (FederationError, KeyboardInterrupt):
            view.close()
            view.say("stopping every process")
            view.say(f"go on from here: minga demo --dir {request.folder} --resume")
            raise


def _play(
    request: Request, settings: Settings, federation: Federation, view: View, console: Console
) -> Outcome:
    texts = _copy_texts(settings, federation, view)
    documents = sum(text.documents for text in texts) // max(1, len(texts))
    delta = float(demo_delta(documents))
    if not federation.initialised:
        federation.initialise(name=FEDERATION, port=request.port, governed=True)
        federation.cap(epsilon=EPSILON, delta=delta)
    governance = DemoGovernance(folder=federation.folder, sites=settings.sites)
    federation.start_coordinator()
    _start_first_model(federation, settings.mode)
    with federation.client() as client:
        federation.wait_until_serving(client)
        view.say(f"coordinator serves on {federation.operator().address}, mutual TLS")
        _found(settings, texts, federation, governance, client, view)
        for site in settings.sites:
            if not federation.joined(site):
                federation.join(
                    site,
                    client.invite(site),
                    ranks=settings.ranks(site),
                    approving=governance.approving(site),
                    budget=(EPSILON, delta),
                    public_held_out=True,
                )
                view.say(f"{site} joined by a one-time invitation, approved by its institution")
            languages = next(text.languages for text in texts if text.site == site)
            federation.declare(site, languages)
        for site in settings.sites:  # before the plan: they are the log's witnesses
            federation.start_node(site)
        _submit(settings, texts, federation, governance, client, view)
        strikers = _strikers(request, settings, federation)
        with view:
            run = _follow(client, federation, view, strikers)
            run = _wait_for_verdicts(run, client, federation, view)
            _wait_for_log(federation)
        struck = tuple(entry.struck for entry in strikers if entry.struck is not None)
        facts = summary(
            run=run, settings=settings, texts=texts, struck=struck, seconds=view.elapsed_s
        )
        path = write_summary(federation.folder, facts)
        if run.status != "done":
            raise RunFailedError(f"run {run.run} {run.status}: {_last_words(run)}")
        _export(run, federation, client)
        print_end(console, run, settings)
        _say_end(run, settings, path, federation, view)
        _audit(federation, view)
        missed = [striker.moment for striker in strikers if striker.struck is None]
        if missed:
            raise RunFailedError(
                f"no round was met in phase {', '.join(missed)}, so nobody was killed there; "
                "more rounds give more chances"
            )
        if request.keep:
            _keep(federation, view)
    return Outcome(run=run, struck=struck, summary=path)


# -- steps ---------------------------------------------------------------------------------------


def _new_settings(request: Request) -> Settings:
    found = find_sites(request.data)
    chosen = choose_sites(found, request.sites, most=DEFAULT_SITES)
    if MODES[request.mode].masked and len(chosen) < MIN_ROSTER:
        raise ConfigurationError(
            f"mode {request.mode} needs {MIN_ROSTER} sites or more: with two, each would learn the "
            "other's update from the sum; take more sites, or --privacy open for public data"
        )
    return Settings(
        sites=tuple(str(item.site) for item in chosen),
        rounds=request.rounds or ROUNDS,
        mode=request.mode,
        two_ranks=min(request.two_ranks, len(chosen)),
        data=str(request.data.resolve()),
    )


def _copy_texts(settings: Settings, federation: Federation, view: View) -> list[SiteText]:
    """Each site gets its text into its own folder; the facts about it stay beside it."""
    sources = {str(item.site): item for item in find_sites(Path(settings.data))}
    texts = []
    for site in settings.sites:
        if site not in sources:
            raise NotFoundError(f"{settings.data} no longer holds the site {site}")
        text = copy_text(sources[site], federation.data_folder(site))
        left_out = f", {text.left_out} lines without a text left out" if text.left_out else ""
        view.say(
            f"{site}: {text.documents} documents, {text.text_bytes} bytes of text in "
            f"{federation.data_folder(site).relative_to(federation.folder)}{left_out}"
        )
        texts.append(text)
    return texts


def _start_first_model(federation: Federation, mode: str) -> None:
    """Begin to make the model of round 0, while the sites join; ``_first_model`` waits for it."""
    start = federation.folder / "start"
    if (start / "manifest.json").exists():
        return
    start.mkdir(exist_ok=True)
    (start / "model.json").write_text(json.dumps({"model": demo_model(mode)}, indent=2) + "\n")
    federation.household.start(
        _FIRST_MODEL,
        federation.household.python(
            "node_agent.worker.init_model",
            "--plan",
            str(start / "model.json"),
            "--out",
            str(start),
        ),
        log=start / "diagnostics.log",
        passing=True,
    )


def _first_model(federation: Federation) -> InitialModel:
    if _FIRST_MODEL in federation.household:
        federation.household.finish(_FIRST_MODEL)
    return read_initial_model(federation.folder / "start")


def _written(settings: Settings, texts: Sequence[SiteText]) -> dict[str, Any]:
    return demo_plan(
        sites=[NodeId(site) for site in settings.sites],
        languages=sorted(set[str]().union(*(text.languages for text in texts))),
        rounds=settings.rounds,
        mode=settings.mode,
        documents=sum(text.documents for text in texts) // max(1, len(texts)),
    )


def _found(
    settings: Settings,
    texts: Sequence[SiteText],
    federation: Federation,
    governance: DemoGovernance,
    client: AdminClient,
    view: View,
) -> None:
    """Three admins sign the first root: who decides, who is a member, what the policy allows."""
    if governance.founded:
        return
    governance.make_people()
    model = _first_model(federation)
    # The first model's root does not depend on keys, and the nodes have none yet.
    made = complete_plan(
        _written(settings, texts),
        model,
        federation_of(federation.operator().certificate),
        governance.institution_public_keys(),
    )
    policy = demo_policy(
        federation=FederationId(FEDERATION),
        sites=settings.sites,
        base=made.snapshot.model_root,
        code=installed_code(),
        admins=[holder.person for holder in ADMINS],
        threshold=THRESHOLD,
        witnesses=len(settings.sites),
        now=datetime.now(UTC),
        min_countries=MIN_COUNTRIES,
    )
    governance.found({POLICY_DOCUMENT: policy.to_bytes()}, client)
    view.say(
        f"{', '.join(holder.person for holder in ADMINS)} founded the federation: "
        f"{THRESHOLD} of {len(ADMINS)} decide; their policy and their members are signed"
    )


def _submit(
    settings: Settings,
    texts: Sequence[SiteText],
    federation: Federation,
    governance: DemoGovernance,
    client: AdminClient,
    view: View,
) -> None:
    """Submit the plan; again after an interruption, which is harmless."""
    start = federation.folder / "start"
    written = _written(settings, texts)
    model = _first_model(federation)
    made: Submission = complete_plan(
        written | {"terms": TERMS},
        model,
        federation_of(federation.operator().certificate),
        client.signing_keys(),
        policy=ConsortiumPolicy.from_bytes(governance.base().state.documents[POLICY_DOCUMENT]),
        code=installed_code(),
    )
    (start / "plan.json").write_bytes(made.plan.to_bytes())
    governance.sign_plan(made.plan, client)
    submit(client, made, model)
    view.say(
        f"run {RUN}: {model.manifest.coordinates} parameters, {settings.rounds} rounds of training"
        f", plan {made.plan.digest[:12]}…, signed by {THRESHOLD} admins"
    )


def _wait_for_log(federation: Federation) -> None:
    """Return when the last leaves are under a checkpoint, before the witnesses are stopped."""
    path, last, quiet = federation.folder / "log" / "checkpoint", b"", 0
    for _ in range(_LOG_TRIES):
        now = path.read_bytes() if path.exists() else b""
        quiet = quiet + 1 if now == last else 0
        if quiet >= _LOG_QUIET:
            return
        last = now
        time.sleep(_LOG_PAUSE_S)


def _strikers(request: Request, settings: Settings, federation: Federation) -> list[Striker]:
    first = 1 if settings.rounds > 1 else 0  # one undisturbed round first, where there are several
    made = []
    if request.kill_node is not None:
        phase = request.kill_node.capitalize()
        made.append(
            Striker(
                federation,
                target="node",
                phase=phase,
                sites=settings.sites,
                from_number=first,
            )
        )
    if request.kill_coordinator is not None:
        phase = request.kill_coordinator.capitalize()
        # After the node's kill, so that each can be told from the other.
        number = first + len(made)
        made.append(
            Striker(
                federation,
                target="coordinator",
                phase=phase,
                sites=settings.sites,
                from_number=number,
            )
        )
    return made


def _follow(
    client: AdminClient, federation: Federation, view: View, strikers: Sequence[Striker]
) -> RunReport:
    last: RunReport | None = None

    def on_entry(entry: Entry) -> None:
        for striker in strikers:
            struck = striker.on_entry(entry, client)
            if struck is not None:
                view.say(struck.killed_line())
                view.say(striker.revive().restarted_line())

    with History(federation.client, RunId(RUN)) as history:
        for report in follow(
            client,
            RunId(RUN),
            history,
            check=federation.household.check,
            on_entry=on_entry,
        ):
            last = report
            view.report(report)
            for striker in strikers:
                struck = striker.on_report(report)
                if struck is not None:
                    view.say(struck.went_on_line())
    if last is None:
        raise AssertionError("following ends with a report")
    return last


def _wait_for_verdicts(
    run: RunReport, client: AdminClient, federation: Federation, view: View
) -> RunReport:
    """The ended run with every node's own word on the last model; without, after a while."""
    until = time.monotonic() + VERDICTS_S
    while time.monotonic() < until and not all(
        round_.confirmed >= set(round_.survivors) for round_ in run.released
    ):
        federation.household.check()
        time.sleep(0.1)
        with suppress(NotReadyError):
            run = client.show(RunId(RUN))
    if run.released:
        last = run.released[-1]
        same = sum(entry.confirmed == last.model_out for entry in last.traffic)
        view.say(f"{same} of {len(last.survivors)} nodes computed the very same last model")
    return run


def _last_words(run: RunReport) -> str:
    return run.current.why if run.current is not None else "no round was opened"


def _export(run: RunReport, federation: Federation, client: AdminClient) -> None:
    """The learned model as files: what every node holds too."""
    folder = federation.folder / "model"
    final = run.released[-1].next_snapshot
    if final is None:
        return
    folder.mkdir(exist_ok=True)
    snapshot = Snapshot.from_bytes(final)
    (folder / "snapshot.json").write_bytes(final)
    (folder / "config.json").write_text(json.dumps(demo_model(run.mode), indent=2) + "\n")
    client.fetch(Digest(snapshot.theta), folder / "theta.f32")
    client.fetch(Digest(snapshot.manifest), folder / "manifest.json")


def _say_end(
    run: RunReport, settings: Settings, path: Path, federation: Federation, view: View
) -> None:
    if learned(run):
        view.say("the federation learned: fewer bits per byte on text that no site trained on")
    else:
        view.say("the federation did not learn on the held-out text; look at the table above")
    for entry in run.spent:
        view.say(
            f"{entry.node} has spent epsilon {entry.epsilon} at delta {entry.delta}, by document,"
            f" of the {entry.budget} that it allows"
        )
    relative = path.relative_to(federation.folder)
    view.say(f"facts: {relative}; model: model/; both in {federation.folder}")


def _audit(federation: Federation, view: View) -> None:
    """Audit the log as anybody could, and leave the page for people who decide."""
    from infra.audit.loading import Places, load
    from infra.audit.report import write_report

    log = federation.folder / "log"
    if not (log / "checkpoint").exists():
        return
    loaded = load(Places(log=log))
    found = loaded.audit
    page = federation.folder / "report" / "report.html"
    write_report(loaded, page, lang="es", recompute=False)
    verdict = f"first bad place: {found.first.place}" if found.first else "no leaf is bad"
    view.say(
        f"audited {len(found.evidence.taken)} leaves of the log: {verdict},"
        f" {len(found.failed)} answers fail; report/report.html"
    )
    view.say(f"check it yourself: minga audit verify {log}; minga audit recompute {log}")


def _keep(federation: Federation, view: View) -> None:
    """Leave everything running until Ctrl-C, which is then the regular end."""
    view.say(f"still running; ask it: minga run show {RUN} --dir {federation.folder}")
    view.say("Ctrl-C stops everything")
    with suppress(KeyboardInterrupt):
        while True:
            federation.household.check()
            time.sleep(0.5)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demonstration as Ctrl-C does: in order."""

    def told(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
