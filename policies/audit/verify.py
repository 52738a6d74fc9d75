"""The whole audit of a copy: from bytes to one record for each question and round.

    files -> tree -> evidence -> questions -> report

Pure. A question is one function of the evidence; ``QUESTIONS`` lists all 22 in the order of
protocols/spec/audit.md. Once a leaf is bad, what follows it is not read: every question about it is
unknown, and question 17 fails with the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from policies.audit import questions_log, questions_rounds, questions_rules
from policies.audit.evidence import Documents, Evidence, gather, no_documents
from policies.audit.records import Fault, Record, Result, worst
from policies.audit.replay import Taken
from policies.audit.signed import SignedHistory
from policies.audit.tree import LogFiles, Tree, check_tree
from protocols.tlog.trust_policy import TrustPolicy

SCHEMA: Final = "minga.audit/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One thing that an auditor asks."""

    id: str
    text: str
    answer: Callable[[Evidence], Iterable[Record]]


QUESTIONS: Final = (
    Question(id="1", text="Who took part?", answer=questions_rounds.q01_who_took_part),
    Question(
        id="2", text="Which policy, signed by whom?", answer=questions_rules.q02_policy_signed
    ),
    Question(id="3", text="Was it in force?", answer=questions_rules.q03_in_force),
    Question(
        id="4",
        text="What privacy did each institution lose?",
        answer=questions_rules.q04_privacy_loss,
    ),
    Question(id="5", text="Which model went in and out?", answer=questions_rounds.q05_models),
    Question(id="6", text="Which code and container ran?", answer=questions_rules.q06_code),
    Question(id="7", text="Which data was declared?", answer=questions_rules.q07_data),
    Question(
        id="8",
        text="What was aborted or burned, why, by whom?",
        answer=questions_rounds.q08_aborted_or_burned,
    ),
    Question(
        id="9", text="Who dropped or refused, why?", answer=questions_rounds.q09_dropped_or_refused
    ),
    Question(
        id="10",
        text="Was it the same plan and model for all?",
        answer=questions_rounds.q10_same_for_all,
    ),
    Question(id="11", text="Were rules overridden?", answer=questions_rules.q11_overrides),
    Question(
        id="12",
        text="Was secure aggregation really used?",
        answer=questions_rounds.q12_secure_sum_used,
    ),
    Question(id="13", text="Were norm bounds respected?", answer=questions_rounds.q13_norm_bounds),
    Question(id="14", text="Did one institution dominate?", answer=questions_rules.q14_dominance),
    Question(id="15", text="Was a suspended member active?", answer=questions_rules.q15_suspended),
    Question(
        id="16",
        text="Is every certificate accounted for?",
        answer=questions_rules.q16_certificates,
    ),
    Question(
        id="17", text="Was the log rewritten or two-faced?", answer=questions_log.q17_rewritten
    ),
    Question(id="18", text="Are there gaps in time?", answer=questions_log.q18_gaps),
    Question(id="19", text="Who approved a release, on what?", answer=questions_rules.q19_releases),
    Question(id="20", text="What did it cost in resources?", answer=questions_rules.q20_resources),
    Question(id="21", text="What did not run?", answer=questions_rounds.q21_what_did_not_run),
    Question(
        id="22",
        text="What became of objections?",
        answer=questions_rounds.q22_objections,
    ),
)

# What no record in any log can show. Kept here so that every report says the same.
NOT_SHOWN: Final = (
    "that a node trained on the data it declared, with the code it was sent",
    "that a node drew the noise and clipped the records that its privacy claim says",
    "that the figures for energy, time and money are right: they are signed claims",
    "that anything was deleted when it was said to be",
    "that the witnesses are independent of each other and of the operator",
    "that nothing happened after the last checkpoint of this copy",
    "that an institution's data is what its licence says, or is not personal data",
    "that a sum over many institutions gives nothing of one of them away: only noise limits that",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What came out."""

    evidence: Evidence
    records: tuple[Record, ...]

    @property
    def first(self) -> Fault | None:
        """The first bad place."""
        return self.evidence.first

    @property
    def result(self) -> Result:
        """Fail, where any place is bad or any answer is; else unknown, where any answer is."""
        return Result.FAIL if self.evidence.faults else worst(self.records)

    @property
    def unknown(self) -> tuple[Record, ...]:
        """What could not be checked."""
        return tuple(record for record in self.records if record.result is Result.UNKNOWN)

    @property
    def failed(self) -> tuple[Record, ...]:
        """What does not hold."""
        return tuple(record for record in self.records if record.result is Result.FAIL)

    def to_json(self) -> dict[str, Any]:
        """As `minga audit verify --json` prints it."""
        tree, first = self.evidence.tree, self.first
        bounds = [head.quorum_at for head in tree.heads if head.quorum_at]
        return {
            "schema": SCHEMA,
            "origin": tree.origin,
            "size": tree.size,
            "root": tree.root(tree.size).hex() if tree.size <= len(tree.hashes) else None,
            "leaves_verified": len(self.evidence.taken),
            "witnessed_at": max(bounds, default=None),
            "anchored": self.evidence.anchored,
            "result": self.result.value,
            "first_bad": first.to_json() if first else None,
            "faults": [fault.to_json() for fault in self.evidence.faults],
            "records": [record.to_json() for record in self.records],
            "not_shown": list(NOT_SHOWN),
        }


def audit(
    files: LogFiles,
    policy: TrustPolicy,
    *,
    now: int,
    anchored: bool,
    documents: Documents = no_documents,
    blobs: Documents = no_documents,
    root: bytes | None = None,
) -> Audit:
    """Check a copy of a log; nothing is raised for what is bad, everything is reported.

    Args:
        files: as they were read.
        policy: the auditor's trust policy.
        now: Unix seconds.
        anchored: the trust policy came from outside the log.
        documents, blobs: what lies beside the log, by SHA-256 and by unit root.
        root: the first root of the signed policy; None: questions about it are unknown.
    """
    tree = check_tree(files, policy, now=now)
    signed = None
    if root is not None:
        signed = SignedHistory(
            root=root,
            documents=documents,
            time_of=partial(_time_of, tree),
            logged_at=partial(_logged_at, tree),
        )
    evidence = gather(
        tree,
        files.entries,
        documents=documents,
        blobs=blobs,
        anchored=anchored,
        now=now,
        signed=signed,
    )
    records: list[Record] = []
    for question in QUESTIONS:
        found = list(question.answer(evidence))
        records += found or [
            Record(
                id=question.id,
                round=None,
                result=Result.UNKNOWN,
                leaves=(),
                reason="no leaf of this log speaks about it",
            )
        ]
    if evidence.first is not None:
        records += _unread(evidence, evidence.first)
    return Audit(evidence=evidence, records=tuple(records))


def _time_of(tree: Tree, taken: Taken) -> int:
    """When a leaf came: the first witnessed time after it, or what it claims."""
    _, after = tree.written_between(taken.index)
    return after if after is not None else int(taken.statement.time.timestamp())


def _logged_at(tree: Tree, taken: Taken) -> datetime:
    """What a leaf says of its time, within the witnessed times around it, UTC."""
    before, after = tree.written_between(taken.index)
    at = taken.statement.time
    if before is not None:
        at = max(at, datetime.fromtimestamp(before, UTC))
    return at if after is None else min(at, datetime.fromtimestamp(after, UTC))


def _unread(evidence: Evidence, first: Fault) -> list[Record]:
    """Nothing is said about leaves that were not read."""
    read, size = len(evidence.taken), evidence.tree.size
    if read >= size:
        return []
    reason = f"leaves {read} to {size - 1} were not read, because {first.place} does not hold"
    leaves = (read, size - 1)
    return [Record(id="17", round=None, result=Result.FAIL, leaves=leaves, reason=reason)]


def by_question(records: Iterable[Record]) -> Mapping[str, tuple[Record, ...]]:
    """Records of each question, in the order of the questions."""
    found: dict[str, list[Record]] = {question.id: [] for question in QUESTIONS}
    for record in records:
        found[record.id].append(record)
    return {id_: tuple(items) for id_, items in found.items()}
