"""May this model leave the federation? Every gate of the policy, judged by enough evaluators.

    reports of the log, policy -> yes, or the rules that say no

release.gate        a gate of the policy was not reported, or its value is beyond the threshold
release.evaluators  fewer independent evaluators than the policy asks for report that all gates hold

A report gives a number for each gate (``GateResult.value_micro``); whether it passes is computed
here from the policy in force, so an evaluator's own ``passed`` is never enough. What the number is:

    quality         the score minus that of the reference            op, margin_micro
    languages       of each language, ``<gate>:<language>``: the score minus that before
    memorisation, safety, contamination   the share that fails or overlaps, at most the limit

Who signs for the board is ``policies.bodies``. Normative text: protocols/spec/policy.md, section 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from policies.consortium import (
    ConsortiumPolicy,
    ContaminationGate,
    Gate,
    LanguageGate,
    MemorisationGate,
    QualityGate,
    SafetyGate,
)
from policies.decision import Decision, Refused, Why, from_whys
from protocols.governance import roles
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import TrustState
from protocols.identifiers import Digest
from protocols.tlog.kinds_general import EvalReport

RELEASE_PREFIX = "release/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """An evaluation as it stands in the log."""

    leaf: Digest
    by: str  # whose key signed it
    said: EvalReport


def release_path(model: str) -> str:
    """The target under which the board publishes a model."""
    return f"{RELEASE_PREFIX}{model}.json"


def model_of(path: str) -> str | None:
    """The model that a target of role release names; None: it names none."""
    name = path.removeprefix(RELEASE_PREFIX).removesuffix(".json")
    hexadecimal = len(name) == 64 and set(name) <= set("0123456789abcdef")
    return name if hexadecimal and path == release_path(name) else None


def check_release(model: str, reports: Iterable[Reported], policy: ConsortiumPolicy) -> Decision:
    """Whether enough independent evaluators report that a model passes every gate.

    Args:
        model: its root.
        reports: of the log, about any model.
        policy: in force when it is released.
    """
    mine = [item for item in reports if item.said.model == model]
    good = {item.by for item in mine if not list(failures(item.said, policy))}
    need = policy.evaluators.min_independent
    if len(good) >= need:
        return from_whys(())
    whys = [
        Why("release.gate", f"{item.by}: {sentence}")
        for item in mine
        for sentence in failures(item.said, policy)
    ]
    whys.append(
        Why(
            "release.evaluators",
            f"model {model[:12]}…: {len(good)} independent evaluators report that all gates hold,"
            f" {need} must",
        )
    )
    return from_whys(whys)


def released_between(before: TrustState | None, after: TrustState) -> tuple[str, ...]:
    """Targets of role release that are new or other than before, in order."""
    old = before.targets if before is not None else {}
    return tuple(
        path
        for path, target in sorted(after.targets.items())
        if target.role == roles.RELEASE and old.get(path) != target
    )


def check_released(
    before: TrustState | None,
    after: TrustState,
    reports: Iterable[Reported],
    policy: ConsortiumPolicy,
) -> None:
    """Check that what the board publishes now passed the gates.

    Args:
        reports: that stand in the log; without a log there are none, and nothing is released.

    Raises:
        TrustRefusedError: trust.release.
    """
    known = tuple(reports)
    for path in released_between(before, after):
        model = model_of(path)
        if model is None:
            raise TrustRefusedError(
                f"{path}: a release is named after its model, {release_path('<root>')}",
                rule="trust.release",
            )
        decision = check_release(model, known, policy)
        if isinstance(decision, Refused):
            raise TrustRefusedError(str(decision), rule="trust.release")


def failures(report: EvalReport, policy: ConsortiumPolicy) -> Iterator[str]:
    """What of the policy's gates a report does not show, one sentence each."""
    said = {result.gate: result.value_micro for result in report.gates}
    for gate in policy.gates:
        yield from _failures(gate, said)


def _failures(gate: Gate, said: Mapping[str, int]) -> Iterator[str]:
    match gate:
        case LanguageGate():
            languages = dict.fromkeys(
                (name.partition(":")[2] for name in said if name.startswith(f"{gate.id}:")), 0
            )
            for language, least in (languages | dict(gate.per_language_min_micro)).items():
                yield from _bound(f"{gate.id}:{language}", said, least=least)
        case QualityGate():
            if gate.op == ">=":
                yield from _bound(gate.id, said, least=gate.margin_micro)
            else:
                yield from _bound(gate.id, said, most=gate.margin_micro)
        case MemorisationGate():
            yield from _bound(gate.id, said, most=gate.max_micro)
        case SafetyGate():
            yield from _bound(gate.id, said, most=gate.max_fail_micro)
        case ContaminationGate():
            yield from _bound(gate.id, said, most=gate.max_overlap_micro)


def _bound(
    name: str, said: Mapping[str, int], *, least: int | None = None, most: int | None = None
) -> Iterator[str]:
    value = said.get(name)
    if value is None:
        yield f"{name} is not reported"
    elif least is not None and value < least:
        yield f"{name} is {value} millionths, at least {least} are needed"
    elif most is not None and value > most:
        yield f"{name} is {value} millionths, at most {most} are allowed"
