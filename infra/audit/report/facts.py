"""What the report shows, taken from the evidence: no words, no drawing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from infra.audit.blobs import BlobFolder
from infra.audit.loading import Loaded
from policies.audit.evidence import Evidence, released
from policies.audit.spending import SpendingUnknownError, spending, spent_claims
from protocols.errors import FederationError
from protocols.identifiers import Digest, RoundId
from protocols.round_vector import round_layout, round_ring
from protocols.strata import is_country
from protocols.tensors.manifest import Manifest
from protocols.tensors.metrics import decode_metrics
from protocols.tensors.planar import PackedVector
from protocols.tlog.kinds import (
    ObjectionResolved,
    RoundObjection,
    UpdateCommit,
    parse_round_subject,
)

IN_SUM, DROPPED, DECLINED, JOINED, SILENT = "in_sum", "dropped", "declined", "joined_only", "silent"
_COUNTRY = re.compile(r"([a-z]{2})-", re.ASCII)


def country_of(institution: str) -> str:
    """The country that an id begins with (``cl-univ-1``), where no signed membership says it."""
    match = _COUNTRY.match(institution)
    return match[1].upper() if match else "—"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one institution did in one round."""

    state: str  # one of the five above
    detail: str = ""  # codes, as in the leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A round, or an institution's part in one, that did not end in a sum."""

    round: str
    what: str  # aborted, burned, declined, dropped
    who: str
    detail: str
    leaf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceptional:
    """An override or an objection."""

    what: str  # override, objection
    where: str
    detail: str
    outcome: str  # open_objection, dismissed, upheld, or empty
    leaf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Privacy of one institution's data set."""

    institution: str
    dataset: str
    unit: str
    updates: int
    epsilon: float
    delta: float
    printed: str
    budget: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything on the page."""

    rounds: tuple[str, ...]
    released: int
    institutions: tuple[str, ...]  # by country
    countries: Mapping[str, str]  # of every institution; a dash where it is not known
    cells: Mapping[tuple[str, str], Cell]  # (institution, round)
    curves: Mapping[str, tuple[tuple[int, float], ...]]  # language or "" -> (round, bits per byte)
    loss: tuple[tuple[int, float], ...]  # (round, nats per token)
    modes: tuple[str, ...]
    spent: tuple[Spent, ...]
    spent_unknown: str  # why spends were not recomputed; empty where they were or there are none
    troubles: tuple[Trouble, ...]
    exceptions: tuple[Exceptional, ...]
    gpu_hours: float
    energy_kwh: float
    megabytes: float


def gather_facts(loaded: Loaded) -> Facts:
    """Look everything up; what is not at hand is left out, never made up."""
    evidence = loaded.audit.evidence
    rounds = evidence.rounds
    everybody: set[str] = set()
    cells: dict[tuple[str, str], Cell] = {}
    troubles: list[Trouble] = []
    for round_, state in rounds.items():
        members = (state.roster or frozenset()) | state.joins.keys() | state.declines.keys()
        everybody |= members
        attempt = released(state)
        said = attempt.aggregate if attempt else None
        lost = {d.node: f"{d.phase}: {d.code}" for d in said.dropped} if said else {}
        for node in members:
            if said is not None and node in said.included:
                cell = Cell(state=IN_SUM)
            elif node in state.declines:
                cell = Cell(state=DECLINED, detail=", ".join(state.declines[node]))
            elif node in lost:
                cell = Cell(state=DROPPED, detail=lost[node])
            elif node in state.joins:
                cell = Cell(state=JOINED)
            else:
                cell = Cell(state=SILENT)
            cells[node, str(round_)] = cell
            if cell.state in {DECLINED, DROPPED}:
                leaf = (attempt.aggregate_at if attempt else None) or state.plan_at
                troubles.append(
                    Trouble(
                        round=str(round_), what=cell.state, who=node, detail=cell.detail, leaf=leaf
                    )
                )
        ends = [attempt.aborted for attempt in state.attempts]
        if state.ended is not None and state.ended.attempt == 0:
            ends.append(state.ended)
        troubles += [
            Trouble(
                round=str(round_),
                what=end.outcome,
                who=end.actor,
                detail=f"{end.phase}: {end.code}",
                leaf=state.plan_at,
            )
            for end in ends
            if end is not None
        ]
    signed = evidence.signed
    countries = {
        name: (signed.country_of(name) if signed else None) or country_of(name)
        for name in everybody
    }
    curves, loss = _curves(loaded)
    spent, unknown = _spent(evidence)
    return Facts(
        rounds=tuple(map(str, rounds)),
        released=sum(released(state) is not None for state in rounds.values()),
        institutions=tuple(sorted(everybody, key=lambda name: (countries[name], name))),
        countries=countries,
        cells=cells,
        curves=curves,
        loss=loss,
        modes=tuple(sorted({state.plan.mode for state in rounds.values()})),
        spent=spent,
        spent_unknown=unknown,
        troubles=tuple(troubles),
        exceptions=_exceptions(evidence),
        **_resources(evidence),
    )


def _spent(evidence: Evidence) -> tuple[tuple[Spent, ...], str]:
    if not spent_claims(evidence):
        return (), ""
    policy = evidence.policy
    try:
        found = spending(evidence)
    except SpendingUnknownError as error:
        return (), str(error)
    return tuple(
        Spent(
            institution=item.institution,
            dataset=item.dataset,
            unit=item.unit,
            updates=item.claims,
            epsilon=item.epsilon,
            delta=item.delta,
            printed=item.printed,
            budget=policy.privacy.budgets.epsilon_micro(item.institution, item.dataset) / 1e6
            if policy
            else None,
        )
        for item in found
    ), ""


def _exceptions(evidence: Evidence) -> tuple[Exceptional, ...]:
    found: list[Exceptional] = []
    outcomes = {
        taken.said.objection: taken.said.outcome
        for taken in evidence.of(ObjectionResolved)
        if isinstance(taken.said, ObjectionResolved)
    }
    for index, override, signers in evidence.signed.overrides() if evidence.signed else ():
        who = ", ".join(sorted(signers))
        found.append(
            Exceptional(
                what="override",
                where=f"{override.plan[:12]}…",
                detail=f"{override.rule}: {override.code} ({who})",
                outcome="",
                leaf=index,
            )
        )
    for taken in evidence.of(RoundObjection):
        said = taken.said
        if isinstance(said, RoundObjection):
            _, round_ = parse_round_subject(taken.statement.subject)
            found.append(
                Exceptional(
                    what="objection",
                    where=str(round_),
                    detail=f"{said.node}: {said.code}",
                    outcome=outcomes.get(taken.leaf.hash, "open_objection"),
                    leaf=taken.index,
                )
            )
    return tuple(found)


def _resources(evidence: Evidence) -> dict[str, float]:
    used = [t.said.resources for t in evidence.of(UpdateCommit) if isinstance(t.said, UpdateCommit)]
    return {
        "gpu_hours": sum(item.gpu_seconds for item in used) / 3600,
        "energy_kwh": sum(item.energy_wh for item in used) / 1000,
        "megabytes": sum(item.bytes for item in used) / 1e6,
    }


# -- learning ------------------------------------------------------------------------------------


def _curves(
    loaded: Loaded,
) -> tuple[dict[str, tuple[tuple[int, float], ...]], tuple[tuple[int, float], ...]]:
    folder, evidence = loaded.places.blob_folder, loaded.audit.evidence
    curves: dict[str, list[tuple[int, float]]] = {}
    loss: list[tuple[int, float]] = []
    for round_ in evidence.rounds:
        metrics = metrics_of(evidence, folder, round_) if folder is not None else {}
        total = [0, 0]
        for name, nll in metrics.items():
            kind, _, language = name.partition("/")
            size = metrics.get(f"bytes/{language}", 0)
            if kind == "nll_millinats" and size:
                if not is_country(language):  # the same text again
                    total = [total[0] + nll, total[1] + size]
                curves.setdefault(language, []).append((round_.number, _bits(nll, size)))
        if total[1]:
            curves.setdefault("", []).append((round_.number, _bits(*total)))
        if metrics.get("tokens") and metrics.get("loss_micronats"):
            value = metrics["loss_micronats"] / 1e6 / metrics["tokens"]
            loss.append((round_.number, value))
    return {name: tuple(points) for name, points in curves.items()}, tuple(loss)


def _bits(nll_millinats: int, size: int) -> float:
    return nll_millinats / 1000 / math.log(2) / size


def metrics_of(evidence: Evidence, folder: BlobFolder, round_: RoundId) -> dict[str, int]:
    """The sums of a released round's metrics, from the published sum; empty where not at hand."""
    state = evidence.rounds[round_]
    attempt, plan = released(state), evidence.plan_of(state)
    if attempt is None or attempt.aggregate is None or plan is None:
        return {}
    said = attempt.aggregate
    try:
        with ExitStack() as stack:
            manifest = Manifest.from_bytes(folder.document(Digest(plan.model.manifest)))
            layout = round_layout(plan, state.plan.index, manifest)
            digest = Digest(said.sum_blob)
            read = folder.open(folder.path(digest), digest, stack)
            vector = PackedVector(read, layout.coordinates, round_ring(plan))
            limbs = np.empty(layout.coordinates - layout.model_coordinates, np.int32)
            vector.read_centred(layout.model_coordinates, layout.coordinates, limbs)
            return decode_metrics(limbs, layout.metrics, nodes=said.survivors)
    except FederationError:
        return {}
