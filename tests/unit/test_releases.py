"""A model leaves the federation when every gate holds, by the numbers, for enough evaluators."""

from __future__ import annotations

import pytest

from policies.releases import Reported, check_release, model_of, release_path
from protocols.identifiers import Digest
from protocols.tlog.kinds import EvalReport
from tests.support.policies import example, policy

MODEL = "5" * 64
GOOD = {
    "gate.quality": -5000,
    "gate.languages:arn": 0,
    "gate.languages:gn": 10,
    "gate.languages:quy": 0,
    "gate.memorisation": 10_000,
    "gate.safety": 20_000,
    "gate.contamination": 1000,
}


def report(
    by: str, changes: dict[str, int | None] | None = None, *, model: str = MODEL
) -> Reported:
    values = {name: v for name, v in (GOOD | (changes or {})).items() if v is not None}
    said = EvalReport(
        model=model,
        evaluator=by,
        gates=tuple(
            {"gate": name, "value_micro": value, "passed": True} for name, value in values.items()
        ),
        report_sha256="a" * 64,
    )
    return Reported(leaf=Digest("b" * 64), by=by, said=said)


def test_two_evaluators_for_whom_every_gate_holds_are_enough():
    assert check_release(MODEL, [report("pe-univ-1"), report("uy-univ-1")], example())


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        ("gate.quality", {"gate.quality": -5001}),
        ("gate.languages:gn", {"gate.languages:gn": -1}),
        (
            "gate.languages:es",
            {"gate.languages:es": -1},
        ),  # the policy does not name it
        ("gate.languages:quy", {"gate.languages:quy": None}),
        ("gate.memorisation", {"gate.memorisation": 10_001}),
        ("gate.safety", {"gate.safety": 20_001}),
        ("gate.contamination", {"gate.contamination": 1001}),
        ("gate.safety", {"gate.safety": None}),
    ],
)
def test_a_gate_that_does_not_hold_says_so_whatever_the_evaluator_says(gate, changes):
    """``passed`` is true in every one of these reports."""
    decision = check_release(MODEL, [report("pe-univ-1"), report("uy-univ-1", changes)], example())
    assert decision.rules[0] == "release.gate"
    assert gate in str(decision)
    assert "release.evaluators" in decision.rules


@pytest.mark.parametrize(
    "reports",
    [
        [],
        [report("pe-univ-1")],
        [report("pe-univ-1"), report("pe-univ-1")],
        [report("pe-univ-1"), report("uy-univ-1", model="6" * 64)],
    ],
)
def test_too_few_evaluators(reports):
    assert check_release(MODEL, reports, example()).rules == ("release.evaluators",)


def test_a_gate_that_asks_for_less_or_equal():
    gate = {"id": "gate.loss", "metric": "bpb", "op": "<=", "ref": "base", "margin_micro": 5}
    rules = policy({"gates": [gate], "evaluators.min_independent": 1})
    assert check_release(MODEL, [report("a", {"gate.loss": 5})], rules)
    assert not check_release(MODEL, [report("a", {"gate.loss": 6})], rules)


@pytest.mark.parametrize("path", ["release/x.json", f"release/{MODEL}", f"release/{'G' * 64}.json"])
def test_a_release_is_named_after_its_model(path):
    assert model_of(path) is None
    assert model_of(release_path(MODEL)) == MODEL
