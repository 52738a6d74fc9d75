"""Budgets as people write them: in a node's config.toml and in the coordinator's."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from coordinator.config import load_config as load_coordinator
from node_agent.config import (
    DataConfig,
    NodeFolder,
    WorkerConfig,
    load_config,
    render_config,
)
from policies.privacy.caps import cap_for
from policies.privacy.claim import claim_of
from policies.privacy.sensitivity import Unit
from protocols.errors import ConfigurationError
from protocols.identifiers import FederationId, NodeId
from tests.support.private_plans import private_plan

TWO = """
[[privacy.budget]]
dataset = "letters"
unit = "institution"
epsilon = 3
delta = 1e-7
starts = 2026-01-01
ends = 2027-01-01
"""


def written(tmp_path, more: str = "", **changes) -> NodeFolder:
    values = {
        "institution": NodeId("a"),
        "federation": FederationId("demo"),
        "coordinator": "127.0.0.1:1",
        "enrolment": "127.0.0.1:2",
        "data": DataConfig(),
        "worker": WorkerConfig(),
    }
    text = render_config(**values | changes)
    (tmp_path / "config.toml").write_text(text + more)
    return NodeFolder(tmp_path)


def test_a_new_node_allows_a_budget_that_it_can_read_again(tmp_path):
    made = load_config(written(tmp_path))
    (budget,) = made.privacy.budget
    assert (budget.dataset, budget.unit) == ("default", Unit.DOCUMENT)
    assert (budget.epsilon, budget.delta) == (8.0, 1e-6)
    assert not made.data.valid_public


def test_budgets_have_units_data_sets_and_periods(tmp_path):
    made = load_config(written(tmp_path, TWO))
    second = made.privacy.budget[1].allowance()
    assert (second.dataset, second.unit) == ("letters", Unit.INSTITUTION)
    assert second.starts_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert second.ends_at == datetime(2027, 1, 1, tzinfo=UTC)
    assert second.fixed.relation.value == "replace_special"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (TWO + TWO, "one budget"),
        (TWO.replace("2027", "2025"), "ends after it starts"),
        (TWO.replace("epsilon = 3", "epsilon = 0"), "epsilon"),
        (TWO.replace("epsilon = 3", "epsilon = inf"), "epsilon"),
        (TWO.replace("1e-7", "1.0"), "delta"),
        (TWO.replace("institution", "record"), "unit"),
        (TWO.replace("letters", "../x"), "dataset"),
        (TWO.replace("unit =", "per ="), "per"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(tmp_path, more, says):
    with pytest.raises(ConfigurationError, match=says):
        load_config(written(tmp_path, more))


def test_the_federation_caps_institutions_by_name_or_all(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        """
federation = "demo"
[listen]
address = "127.0.0.1:1"
enrolment = "127.0.0.1:2"
public_address = "127.0.0.1:1"
[ledger]
url = "sqlite:///ledger.sqlite"
[[privacy.budget]]
epsilon = 8.0
delta = 1e-6
[[privacy.budget]]
institution = "a"
epsilon = 2.0
delta = 1e-6
"""
    )
    caps = load_coordinator(path).caps
    claim = claim_of(private_plan("record-local"), 0, 1000)
    assert cap_for(caps, NodeId("a"), claim).epsilon == 2.0
    assert cap_for(caps, NodeId("b"), claim).epsilon == 8.0
    whole = claim_of(private_plan("institution"), 0, 1000)
    assert cap_for(caps, NodeId("a"), whole) is None
    path.write_text(path.read_text().replace('"a"', '"A a"'))
    with pytest.raises(ConfigurationError, match="institution"):
        load_coordinator(path)
