"""What rounds leave behind at a node, and when it goes."""

from __future__ import annotations

from typing import Final

from node_agent.carry import carries, close, was_sent
from node_agent.launchers.jobs import Launcher
from node_agent.site import Site
from node_agent.spool import Result, Spool, job_id, read_job, read_result
from protocols.errors import FederationError
from protocols.identifiers import Digest, RoundId
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest

KEEP_MODELS: Final = 2  # the one a round starts from, and the one before it
_JOBS: Final = 8  # earlier rounds whose jobs are looked for: older ones were removed before


def _carry(site: Site, launcher: Launcher, plan: Plan, over: RoundId) -> None:
    """Put aside what a round that is over did and never sent."""
    found = site.journal.round(over)
    if found is None:
        return
    name, spool = job_id(over), launcher.spool
    made = over in site.journal.upload_files(over.run).values()
    sent = was_sent(spool, over.run, over.number, made=made)
    result = None if sent else _sound(site, spool, over)
    kept = close(
        spool,
        over.run,
        over.number,
        sent=sent,
        result=result,
        delta=spool.delta(name),
        selection=plan.selection_in(found.index),
        keep=site.config.worker.carry_over,
    )
    if kept and result is not None:
        detail = {"steps": result.steps, "tokens": result.tokens, "norm": result.delta_norm}
        site.journal.note("carried over", detail, round_=over)


def _sound(site: Site, spool: Spool, over: RoundId) -> Result | None:
    """A round's result, if all of it is what it says: every byte of the update is read."""
    name = job_id(over)
    if not spool.result(name).exists():
        return None
    try:
        manifest = Manifest.from_bytes(site.models.manifest_path(over.run).read_bytes())
        return read_result(spool, read_job(spool.job(name)), manifest)
    except (FederationError, OSError):
        return None


def tidy(site: Site, round_: RoundId, *, current: bool) -> None:
    """Remove vectors, jobs and models of rounds that are over. Blocking.

    A run that this node stopped taking part in keeps everything: it is evidence. A job that a
    worker is still on is left to it: ``decide`` ends it.

    Args:
        site: the node.
        round_: a round of the run.
        current: whether it is under way (it was joined), or over (it was confirmed).
    """
    run = round_.run
    record = site.journal.run(run)
    if record is None or record.stopped is not None:
        return
    end = round_.number if current else round_.number + 1
    for name, of in site.journal.upload_files(run).items():
        if of.number < end:
            (site.folder.uploads / name).unlink(missing_ok=True)
    launcher = site.launchers.get(record.plan.local_step.kind)
    joined = [RoundId(run, number) for number in site.journal.open_rounds(run)]
    if launcher is not None:
        busy = {round_ for round_, _ in launcher.unfinished(run, end)}
        for over in [earlier for earlier in joined if earlier.number < end][-_JOBS:]:
            if over in busy:
                continue  # what it has done is still to come
            if carries(record.plan):
                _carry(site, launcher, record.plan, over)
            launcher.forget(job_id(over))
    if not current:
        return  # the model that was just computed has no round of its own yet
    keep: set[Digest] = set()
    for known in reversed([earlier for earlier in joined if earlier.number <= round_.number]):
        found = site.journal.round(known)
        if found is not None and len(keep) < KEEP_MODELS:
            keep.add(found.start_root)
    site.models.keep_only(run, frozenset(keep))
