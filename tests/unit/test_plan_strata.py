"""Held-out figures by country and language: what plans may say, sites count, and sites want."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from infra.runs.outlook import _held_out, _held_out_text
from node_agent.config import DataConfig
from node_agent.consent import SiteFacts, check_site
from node_agent.contribution import LocalWork, metrics_of
from protocols.errors import MalformedMessageError
from protocols.identifiers import NodeId
from protocols.plan import Plan
from protocols.round_vector import by_stratum, metric_names
from tests.support.node import node_config
from tests.support.plans import plan_value

NODES = ["a", "b", "c", "d", "e", "f"]
SITES = {
    "a": {"country": "AR", "languages": ["es"]},
    "b": {"country": "AR", "languages": ["es", "gn"]},
    "c": {"country": "AR", "languages": ["es", "gn"]},
    "d": {"country": "BR", "languages": ["pt"]},
    "e": {"country": "BR", "languages": ["es", "pt"]},
    "f": {"country": "PE", "languages": ["es", "quy"]},
}
KEYS = {node: f"{number:064x}" for number, node in enumerate(NODES, start=1)}
MASKED = {
    "mode": "aggregate-only",
    "min_participants": 5,
    "secagg": {"threshold": 5, "colluders": 1, "min_surviving": 5, "keys": KEYS},
}


def strata_plan(sites=SITES, *, evaluation=None, **changes) -> Plan:
    spoken = sorted({language for site in sites.values() for language in site["languages"]})
    evaluation = {"languages": spoken, "sites": sites, **(evaluation or {})}
    step = {"kind": "builtin", "max_steps": 1}
    return Plan.from_value(
        plan_value(roster=NODES, local_step=step, evaluation=evaluation) | changes
    )


def strata_in(plan: Plan) -> list[str]:
    names = (name.partition("/") for name in metric_names(plan, 0))
    return [stratum for kind, _, stratum in names if kind == "bytes"]


def test_small_strata_are_not_opened():
    """Of two sites: gn, pt, BR. Of one: quy, PE."""
    assert strata_in(strata_plan()) == ["es", "other", "AR", "ZZ"]


def test_nodes_that_a_masked_sum_may_lose_do_not_count():
    """One may be lost: a stratum of three could open with two."""
    assert strata_in(strata_plan(**MASKED)) == ["es", "other"]
    lossless = MASKED | {"min_participants": 6}
    lossless["secagg"] = MASKED["secagg"] | {"min_surviving": 6}
    assert strata_in(strata_plan(**lossless)) == strata_in(strata_plan())


def test_a_plan_without_sites_keeps_its_bytes():
    """What was signed before plans could say what sites hold still has its digest."""
    old = Plan.from_value(plan_value(evaluation={"languages": ["es", "pt"]}))
    assert b"min_sites" not in old.to_bytes()
    assert b'"sites"' not in old.to_bytes()
    assert old.strata is None
    assert strata_in(old) == ["es", "pt"]
    new = strata_plan()
    assert Plan.from_bytes(new.to_bytes()) == new


@pytest.mark.parametrize(
    ("sites", "evaluation", "says"),
    [
        (SITES | {"z": SITES["a"]}, {}, "z is not on the roster"),
        ({"a": SITES["a"], "b": SITES["b"]}, {}, "2 sites; 3 are needed"),
        (SITES, {"languages": ["es"]}, "must be those of evaluation.sites"),
        (SITES | {"a": {"country": "ar", "languages": ["es"]}}, {}, "country"),
        (SITES | {"a": {"country": "ZZ", "languages": ["es"]}}, {}, "stand for"),
        (SITES | {"a": {"country": "AR", "languages": ["other"]}}, {}, "stand for"),
        (SITES | {"a": {"country": "AR", "languages": ["pt", "es"]}}, {}, "ascending"),
        (SITES, {"min_sites": 1}, "min_sites"),
        (SITES, {"sites": None, "min_sites": 4}, "needs evaluation.sites"),
    ],
)
def test_a_wrong_declaration_is_refused(sites, evaluation, says):
    with pytest.raises(MalformedMessageError, match=says):
        strata_plan(sites, evaluation=evaluation)


def test_the_sums_are_those_of_the_strata():
    """Site i's nats are 4**i: the sums name who was counted, and how often."""
    plan, total = strata_plan(), Counter()
    for number, node in enumerate(NODES):
        scores = dict.fromkeys(SITES[node]["languages"], (4.0**number, 1, 1))
        scores["xx"] = (1e6, 1, 1)  # a language that the plan does not list for this site
        work = LocalWork(
            delta=np.zeros(1, np.float32),
            tokens=0,
            records=0,
            steps=0,
            loss_nats=0.0,
            seconds=0.0,
            evaluation=scores,
        )
        total.update(metrics_of(work, weight=1, plan=plan, index=0, node=NodeId(node)))

    def of(*numbers: int) -> int:
        return 1000 * sum(4**number for number in numbers)

    assert total["nll_millinats/es"] == of(0, 1, 2, 4, 5)
    assert total["nll_millinats/other"] == of(1, 2, 3, 4, 5)
    assert total["nll_millinats/AR"] == of(0, 1, 1, 2, 2)
    assert total["nll_millinats/ZZ"] == of(3, 4, 4, 5, 5)
    assert not any("gn" in name or "quy" in name for name in total)


def test_a_site_that_declares_nothing_counts_nothing():
    plan = strata_plan({node: SITES[node] for node in "abcde"})
    assert by_stratum(plan, NodeId("f"), {"es": (1.0, 1, 1)}) == {}


WELL = SiteFacts(train=None, valid=None, free_bytes=10**12)
MASKED_OLD = {"local_step": {"kind": "builtin", "max_steps": 1}, "roster": NODES, **MASKED}


@pytest.mark.parametrize(
    ("plan", "public", "rule"),
    [
        (strata_plan(**MASKED), False, None),
        (strata_plan(evaluation={"min_sites": 2}, **MASKED), False, "site.held_out"),
        (strata_plan(evaluation={"min_sites": 2}, **MASKED), True, None),
        (strata_plan(evaluation={"min_sites": 2}), False, None),  # open: everything is seen
        (
            Plan.from_value(plan_value(evaluation={"languages": ["es"]}, **MASKED_OLD)),
            False,
            "site.held_out",
        ),
        (Plan.from_value(plan_value(evaluation={"languages": ["es"]}, **MASKED_OLD)), True, None),
        (Plan.from_value(plan_value(**MASKED_OLD)), False, None),
    ],
)
def test_a_site_does_not_let_its_score_be_seen_alone(plan, public, rule):
    config = node_config(data=DataConfig(valid_public=public))
    refusal = check_site(plan, config, WELL)
    assert (refusal.rule if refusal else None) == rule


def test_the_planner_says_what_would_be_opened():
    said = _held_out(strata_plan())
    assert said == {
        "strata": ["es", "other", "AR", "ZZ"],
        "min_sites": 3,
        "merged": ["BR", "PE", "gn", "pt", "quy"],
    }
    assert "nor any difference of some" in _held_out_text(said)
    masked = _held_out(strata_plan(**MASKED))
    assert masked is not None
    assert masked["merged"] == ["AR", "BR", "PE", "gn", "pt", "quy"]
    old = Plan.from_value(plan_value(evaluation={"languages": ["es"]}))
    assert "however few" in _held_out_text(_held_out(old) or {})
    assert _held_out(Plan.from_value(plan_value())) is None
