"""The acts of governance that the demonstration plays: real coordinator, real signatures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from infra.demo.scenarios import SCENARIOS, run_scenario
from protocols.errors import ExistsError

SAYS = {
    "expel": [
        "needs 3 [trust_refused: trust.quorum]",
        "pe-escuela has joined, and its node has a connection open",
        "pe-escuela was not heard",
        "[trust_refused: trust.hearing]",
        "in force: expels pe-escuela",
        "on the connection that pe-escuela had open: pe-escuela is expelled",
        "a new invitation for it is refused: pe-escuela is expelled",
    ],
    "override-refused": [
        "refused: nobody may override secagg.required [trust_refused: override.never]",
        "refused: nobody may override privacy.budget [trust_refused: override.never]",
        "refused: an override never binds a site [trust_refused: override.site]",
        "past rounds.steps (demonstration) until",
    ],
    "policy-change": [
        "Local steps of a round, at most: from 200 steps to 100 steps (stricter).",
        "it needs 2 of 3 signatures",
        "Epsilon of one round, at most: from 50 to 60 (looser).",
        "policy 3 is signed for 2 institutions, what it changes needs 3",
        "[trust_refused: trust.consent]",
        "in force: Epsilon of one round, at most: from 50 to 60 (looser).",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_ends_as_it_must(tmp_path, name):
    out = io.StringIO()
    run_scenario(name, tmp_path / "act", Console(file=out, width=200))

    said = out.getvalue()
    for words in SAYS[name]:
        assert words in said, said
    assert (tmp_path / "act" / "governance").is_dir()


def test_a_folder_that_holds_something_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ExistsError):
        run_scenario("expel", tmp_path, Console(file=io.StringIO()))
