"""An audit on a terminal: the verdict, the first bad place, the 22 answers."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from policies.audit.records import Record, Result
from policies.audit.verify import NOT_SHOWN, QUESTIONS, Audit, by_question

_MARK = {Result.PASS: "pass   ", Result.FAIL: "FAIL   ", Result.UNKNOWN: "unknown"}
_FEW = 6  # answers of one question that are written out


def print_audit(found: Audit, console: Console | None = None) -> None:
    """Print everything that a person wants to know; colour carries nothing."""
    out = console or Console(highlight=False)

    def line(text: str = "") -> None:
        out.print(Text(text), soft_wrap=True)

    tree = found.evidence.tree
    line(f"{tree.origin or 'a log without a readable checkpoint'}: {tree.size} leaves")
    witnessed = [head.quorum_at for head in tree.heads if head.quorum_at]
    if witnessed:
        when = datetime.fromtimestamp(max(witnessed), UTC)
        line(f"last cosigned by a quorum of witnesses at {when:%Y-%m-%d %H:%M:%S} UTC")
    line(
        "anchored: the trust policy came from elsewhere"
        if found.evidence.anchored
        else "unanchored: the trust policy was found beside the log"
    )
    line(f"{len(found.evidence.taken)} leaves verified")
    first = found.first
    if first is not None:
        line(f"FIRST BAD PLACE: {first.place} ({first.check}): {first.reason}")
        for fault in found.evidence.faults[:20]:
            if fault is not first:
                line(f"  also: {fault.place} ({fault.check}): {fault.reason}")
    line()
    answers = by_question(found.records)
    for question in QUESTIONS:
        records = answers[question.id]
        line(f"{question.id:>2} {question.text}")
        for text in _summary(records):
            line(f"     {text}")
    line()
    line(
        f"{_count(found.records, Result.PASS)} pass, {_count(found.records, Result.FAIL)} fail,"
        f" {_count(found.records, Result.UNKNOWN)} unknown"
    )
    line("What no log can show:")
    for text in NOT_SHOWN:
        line(f"   - {text}")


def _count(records: tuple[Record, ...], result: Result) -> int:
    return sum(record.result is result for record in records)


def _summary(records: tuple[Record, ...]) -> list[str]:
    """Fails one by one; of the rest, what repeats itself is said once."""
    lines = []
    for result in (Result.FAIL, Result.UNKNOWN, Result.PASS):
        same: dict[str, list[Record]] = {}
        for record in records:
            if record.result is result:
                same.setdefault(record.reason, []).append(record)
        shown = list(same.items())[: _FEW if result is not Result.FAIL else None]
        for reason, those in shown:
            where = sorted({record.round for record in those if record.round}, key=_by_number)
            rounds = f" [{', '.join(where[:8])}{', …' if len(where) > 8 else ''}]" if where else ""
            lines.append(f"{_MARK[result]} {reason}{rounds}")
        if len(same) > len(shown):
            lines.append(f"{_MARK[result]} and {len(same) - len(shown)} more; see --json")
    return lines


def _by_number(text: str) -> tuple[str, int]:
    run, _, number = text.partition("/")
    return run, int(number or 0)
