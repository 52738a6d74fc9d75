"""Unmodified Flower strategies over a Grid of federation rounds.

On a federation without processes; test_flower_end_to_end.py has them, test_flower_names.py guards
the Flower names that are not public.
"""

from __future__ import annotations

import re
import tomllib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy

from coordinator import flower, flower_private, flower_rounds, flower_strategies
from coordinator.flower import MingaGrid, RoundTerms, run_strategy
from coordinator.flower_rounds import RoundFailedError, Rounds
from coordinator.flower_state import load
from infra.runs import flower as connection
from node_agent.config import AllowConfig, FlowerConfig
from protocols.errors import (
    CorruptStateError,
    ExistsError,
    IntegrityError,
    MalformedMessageError,
    NonFiniteUpdateError,
    NotReadyError,
    PlanRefusedError,
    UnreachableError,
)
from protocols.outer_optimizers import optimizer_for
from protocols.plan import LocalStep, Outer, Plan
from tests.support.flower_rounds import FakeFederation, plain_rounds

ROOT = Path(__file__).parents[2]
NODES = ("ar-archivo", "br-saude", "cl-usach")
EXAMPLES = (64, 32, 128)  # of a cap of 256: weights are exact
START = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}
NO_EVALUATION = {"fraction_evaluate": 0.0}
ALLOWED = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.5},
    "FedAdagrad": {},
    "FedAdam": {},
    "FedYogi": {},
}


def pull_to(target, rate):
    """A site that goes some way to its own optimum."""

    def step(model, config):
        return {name: a + np.float32(rate) * (target - a) for name, a in model.items()}

    return step


SITES = {
    node: (examples, pull_to(np.float32(number - 0.5), 0.3))
    for number, (node, examples) in enumerate(zip(NODES, EXAMPLES, strict=True))
}


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def rounds(self, **fields):
        return Rounds(**fields, monotonic=lambda: self.now, sleep=self.sleep)


def made_federation(**changes):
    return FakeFederation(**{"sites": SITES, "cap": 256} | changes)


def made_grid(federation=None, **changes):
    fields = {"name": "credit", "app": "bank:app", "roster": NODES, "weight_cap": 256}
    terms = RoundTerms(**fields | changes)
    return MingaGrid(federation or made_federation(), terms, rounds=Clock().rounds)


def fresh(name):
    return getattr(strategy, name)(**NO_EVALUATION, **ALLOWED[name])


def start():
    return flower_strategies.record_of(START)


def plain(record):
    return {name: array.numpy() for name, array in record.items()}


def furthest(a, b):
    assert list(a) == list(b)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


# -- strategies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALLOWED)
def test_one_reply_is_as_good_as_three(name):
    """The differences are float32 rounding: the mean is rounded once more than single replies."""
    federation = made_federation()
    result = run_strategy(fresh(name), made_grid(federation), start(), 4)

    wanted = plain_rounds(fresh(name), SITES, START, 4)
    assert furthest(plain(result.arrays), wanted) < 2e-6
    assert furthest(plain(result.arrays), START) > 0.02  # it did learn something
    assert federation.begun == [f"credit-{number}" for number in range(1, 5)]


def test_the_comparison_can_fail():
    """A strategy that forgets its momentum, or equal weights, are told apart by far."""
    wanted = plain_rounds(fresh("FedAvgM"), SITES, START, 4)
    assert furthest(plain_rounds(fresh("FedAvg"), SITES, START, 4), wanted) > 0.05
    equal = {node: (1, step) for node, (_, step) in SITES.items()}
    assert furthest(plain_rounds(fresh("FedAvgM"), equal, START, 4), wanted) > 0.05


def test_what_a_strategy_reads_in_the_reply():
    grid = made_grid()
    grid.admit(fresh("FedAvg"))
    messages = fresh("FedAvg").configure_train(1, start(), ConfigRecord(), grid)
    (reply,) = grid.send_and_receive(messages=messages, timeout=5)

    assert not reply.has_error()
    metrics = dict(reply.content["metrics"])
    assert metrics["num-examples"] == 224.0
    assert metrics["train_loss"] == pytest.approx(0.5)
    assert (metrics["total-nodes"], metrics["total-examples"]) == (3, 224)
    first = min(messages, key=lambda m: m.metadata.dst_node_id)
    assert first.metadata.message_id == f"credit-1.{min(grid.get_node_ids())}"
    assert reply.metadata.reply_to_message_id == first.metadata.message_id
    assert reply.metadata.src_node_id == min(grid.get_node_ids())


def test_metrics_of_equal_weights_and_of_an_evaluation():
    sums = dict.fromkeys(("tokens", "records", "steps", "train_ms", "loss_micronats"), 0)
    sums |= {"weight": 3 * 65_536, "nodes": 3, "clamped": 2}
    sums |= {"nll_millinats/es": 12_500, "bytes/es": 40, "documents/es": 7}
    found = flower_rounds.mean_metrics(sums, None)

    assert (found["num-examples"], found["total-clamped"]) == (3.0, 2)
    assert (found["nll-nats/es"], found["bytes/es"], found["documents/es"]) == (12.5, 40, 7)
    assert "train_loss" not in found  # nobody counted a token: there is no mean


def test_pushed_messages_are_answered_once_by_one_message():
    federation = made_federation(held_up={"credit-1"})
    grid = made_grid(federation)
    grid.admit(fresh("FedAvg"))
    messages = list(fresh("FedAvg").configure_train(1, start(), ConfigRecord(), grid))
    names = list(grid.push_messages(messages))
    assert len(set(names)) == 3
    assert list(grid.pull_messages(names)) == []
    federation.held_up.clear()
    assert len(list(grid.pull_messages([*names, "unknown"]))) == 1
    assert list(grid.pull_messages(names)) == []
    assert list(grid.push_messages([])) == []


def test_the_plan_of_a_round():
    federation = made_federation()
    terms = {
        "app_config": {"depth": 2},
        "languages": ("pt", "es"),
        "plan": {"local_step": {"lr": 0.5}, "vector": {"ring_bits": 24}, "deadlines": {"join": 9}},
    }
    run_strategy(fresh("FedProx"), made_grid(federation, **terms), start(), 2, config={"lr": 0.25})
    fields = dict(federation.runs["credit-2"][0])
    fields["model"] |= {"manifest": "0" * 64, "initial": "0" * 64}
    fields |= {"federation": "test", "secagg": None, "mode": "open"}
    assert federation.runs["credit-2"][0]["mode"] == "aggregate-only"
    plan = Plan.from_value(fields)

    assert (plan.rounds, plan.total_rounds, plan.min_participants) == (1, 1, 3)
    assert (plan.outer.optimizer, plan.outer.lr) == ("average", 1.0)
    assert plan.local_step.app_config == {
        "depth": 2, "lr": 0.25, "proximal-mu": 0.1, "server-round": 2, "minga-series": "credit",
    }  # fmt: skip
    assert (plan.local_step.lr, plan.deadlines.join, plan.vector.ring_bits) == (0.5, 9, 24)
    assert plan.vector.weight_cap_tokens == 256
    assert plan.evaluation.languages == ("es", "pt")


def test_two_nodes_have_no_secure_sum():
    sites = {node: SITES[node] for node in NODES[:2]}
    federation = made_federation(sites=sites)
    run_strategy(fresh("FedAvg"), made_grid(federation, roster=NODES[:2]), start(), 1)
    assert federation.runs["credit-1"][0]["mode"] == "open"


# -- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "FedMedian": "outer.flower.individual_updates",
    "FedTrimmedAvg": "outer.flower.individual_updates",
    "Krum": "outer.flower.individual_updates",
    "MultiKrum": "outer.flower.individual_updates",
    "Bulyan": "outer.flower.individual_updates",
    "QFedAvg": "outer.flower.individual_updates",
    "FedXgbBagging": "outer.flower.individual_updates",
    "FedXgbCyclic": "outer.flower.individual_updates",
    "DifferentialPrivacyServerSideFixedClipping": "outer.flower.privacy",
    "DifferentialPrivacyClientSideFixedClipping": "outer.flower.privacy",
    "DifferentialPrivacyServerSideAdaptiveClipping": "outer.flower.privacy",
    "DifferentialPrivacyClientSideAdaptiveClipping": "outer.flower.privacy",
}


@pytest.mark.parametrize("name", REFUSED)
def test_strategies_that_need_single_replies(name):
    federation = made_federation()
    kind = getattr(strategy, name)
    unstarted = kind.__new__(kind)  # its name alone decides
    with pytest.raises(PlanRefusedError) as refused:
        run_strategy(unstarted, made_grid(federation), start(), 1)
    assert refused.value.rule == REFUSED[name]
    assert federation.begun == []


class MyAvg(strategy.FedAvg):
    """Not Flower's."""


NAMESAKE = type("FedAvg", (strategy.FedAvg,), {})

SETTINGS = [
    ("outer.flower.unknown", lambda: MyAvg(**NO_EVALUATION)),
    ("flower.changed", lambda: NAMESAKE(**NO_EVALUATION)),
    ("flower.evaluate", strategy.FedAvg),
    ("flower.cohort", lambda: strategy.FedAvg(**NO_EVALUATION, fraction_train=0.5)),
    ("flower.cohort", lambda: strategy.FedAvg(**NO_EVALUATION, min_train_nodes=4)),
    ("flower.cohort", lambda: strategy.FedAvg(**NO_EVALUATION, min_available_nodes=4)),
    ("flower.keys", lambda: strategy.FedAvg(**NO_EVALUATION, weighted_by_key="n")),
    ("flower.keys", lambda: strategy.FedAvg(**NO_EVALUATION, arrayrecord_key="model")),
]


@pytest.mark.parametrize(("rule", "make"), SETTINGS)
def test_settings_that_would_go_wrong(rule, make):
    with pytest.raises(PlanRefusedError) as refused:
        made_grid().admit(make())
    assert refused.value.rule == rule


def test_nothing_is_sent_for_a_strategy_nobody_checked():
    federation = made_federation()
    grid = made_grid(federation)
    flower_private.identify(grid.run.run_id)
    with pytest.raises(PlanRefusedError) as refused:
        strategy.FedAvg(**NO_EVALUATION).start(grid, start(), num_rounds=1)
    assert refused.value.rule == "flower.admit"
    assert federation.begun == []


def test_flowers_own_loop_works_for_an_admitted_strategy():
    grid, made = made_grid(), fresh("FedAvg")
    grid.admit(made)
    result = made.start(grid, start(), num_rounds=3)
    assert furthest(plain(result.arrays), plain_rounds(fresh("FedAvg"), SITES, START, 3)) < 2e-6


def messages_of(grid, edit):
    """Three good messages, then one mistake."""
    content = RecordDict({"arrays": start(), "config": ConfigRecord({"server-round": 1})})
    made = [grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()]
    return edit(made)


def other_content(**records):
    return RecordDict({"arrays": start(), "config": ConfigRecord({"server-round": 1})} | records)


def replace_last(content):
    def edit(made):
        made[-1].content = content
        return made

    return edit


def replace_all(content):
    def edit(made):
        for message in made:
            message.content = content
        return made

    return edit


def as_evaluate(made):
    return [made[0].__class__(m.content, m.metadata.dst_node_id, "evaluate") for m in made]


def of_another_run(made):
    flower_private.identify(1)
    return [made[0].__class__(m.content, m.metadata.dst_node_id, "train") for m in made]


def with_bytes():
    return other_content(config=ConfigRecord({"server-round": 1, "key": b"x"}))


MISTAKES = {
    "one node left out": ("flower.cohort", lambda made: made[1:]),
    "one node twice": ("flower.cohort", lambda made: [*made, made[0]]),
    "to evaluate": ("flower.message", as_evaluate),
    "of another run": ("flower.message", of_another_run),
    "other arrays": (
        "flower.same",
        replace_last(other_content(arrays=ArrayRecord())),
    ),
    "other config": (
        "flower.same",
        replace_last(other_content(config=ConfigRecord({"server-round": 2}))),
    ),
    "two models": ("flower.records", replace_all(other_content(more=start()))),
    "metrics": (
        "flower.records",
        replace_all(other_content(m=MetricRecord({"n": 1}))),
    ),
    "bytes in the config": ("flower.config", replace_all(with_bytes())),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_messages_that_make_no_round(what):
    rule, edit = MISTAKES[what]
    federation = made_federation()
    grid = made_grid(federation)
    grid.admit(fresh("FedAvg"))
    with pytest.raises(PlanRefusedError) as refused:
        grid.push_messages(messages_of(grid, edit))
    assert refused.value.rule == rule
    assert federation.begun == []


def test_equal_messages_need_not_be_the_same_object():
    federation = made_federation()
    grid = made_grid(federation)
    grid.admit(fresh("FedAvg"))
    grid.push_messages(messages_of(grid, replace_last(other_content())))
    assert federation.begun == ["credit-1"]


@pytest.mark.parametrize(
    ("error", "arrays", "config"),
    [
        (NonFiniteUpdateError, {"w": np.array([1.0, np.nan])}, {"server-round": 1}),
        (NonFiniteUpdateError, {"w": np.array([1e300])}, {"server-round": 1}),
        (PlanRefusedError, {"w": np.array([1, 2])}, {"server-round": 1}),
        (MalformedMessageError, {}, {"server-round": 1}),
        (MalformedMessageError, {"w": np.ones(2)}, {}),
        (MalformedMessageError, {"w": np.ones(2)}, {"server-round": 0}),
        (MalformedMessageError, {"w": np.ones(2)}, {"server-round": True}),
    ],
)
def test_models_and_configs_that_make_no_round(error, arrays, config):
    federation = made_federation()
    with pytest.raises(error):
        Clock().rounds(federation=federation, terms=made_grid().terms).begin(arrays, config)
    assert federation.begun == []


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "Credit"},
        {"name": "x" * 33},
        {"roster": ()},
        {"roster": ("a", "a", "b")},
        {"plan": {"rounds": 3}},
        {"plan": {"outer": {}}},
    ],
)
def test_terms_that_make_no_plan(changes):
    with pytest.raises(MalformedMessageError):
        made_grid(**changes)


# -- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALLOWED)
def test_a_strategy_goes_on_where_it_was(name, tmp_path):
    """Another process: fresh strategy, fresh Grid, the state from its file. The same bits."""
    federation, state = made_federation(), tmp_path / "state.npz"
    run_strategy(fresh(name), made_grid(federation), start(), 2, state=state)
    second = run_strategy(fresh(name), made_grid(federation), start(), 5, state=state)
    unbroken = run_strategy(fresh(name), made_grid(), start(), 5)

    assert second.resumed_after == 2
    for key, array in plain(unbroken.arrays).items():
        np.testing.assert_array_equal(second.arrays[key].numpy(), array)
    assert sorted(second.metrics) == [1, 2, 3, 4, 5]
    assert federation.begun == [f"credit-{number}" for number in range(1, 6)]
    again = run_strategy(fresh(name), made_grid(federation), start(), 5, state=state)
    assert (again.round, again.resumed_after) == (5, 5)
    assert len(federation.begun) == 5


def test_without_its_state_a_strategy_would_go_elsewhere(tmp_path):
    """The test above can fail: momentum matters."""
    first = run_strategy(fresh("FedAvgM"), made_grid(), start(), 2)
    forgot = run_strategy(fresh("FedAvgM"), made_grid(name="other"), first.arrays, 3)
    unbroken = run_strategy(fresh("FedAvgM"), made_grid(), start(), 5)
    assert furthest(plain(forgot.arrays), plain(unbroken.arrays)) > 0.01


def test_killed_after_the_release_and_before_the_state(tmp_path, monkeypatch):
    """The round is asked for again; it is the same run, and nobody trains twice."""
    federation, state = made_federation(), tmp_path / "state.npz"
    killed = []

    def die(path, made):
        if made.round == 2 and not killed:
            killed.append(made.round)
            raise KeyboardInterrupt
        return flower_state_save(path, made)

    flower_state_save = flower_strategies.save
    monkeypatch.setattr(flower_strategies, "save", die)
    with pytest.raises(KeyboardInterrupt):
        run_strategy(fresh("FedAdam"), made_grid(federation), start(), 3, state=state)
    assert killed == [2]  # else nothing was tested
    assert load(state).round == 1
    done = run_strategy(fresh("FedAdam"), made_grid(federation), start(), 3, state=state)

    assert federation.begun == ["credit-1", "credit-2", "credit-3"]
    unbroken = run_strategy(fresh("FedAdam"), made_grid(), start(), 3)
    assert furthest(plain(done.arrays), plain(unbroken.arrays)) == 0


def test_a_run_that_failed_is_tried_again_when_asked_again(tmp_path):
    federation, state = made_federation(lost={"credit-2"}), tmp_path / "state.npz"
    with pytest.raises(RoundFailedError, match="credit-2 failed: too few nodes joined"):
        run_strategy(fresh("FedAvg"), made_grid(federation), start(), 2, state=state)
    done = run_strategy(fresh("FedAvg"), made_grid(federation), start(), 2, state=state)

    assert federation.begun == ["credit-1", "credit-2", "credit-2-try2"]
    assert done.round == 2


def test_a_round_that_takes_too_long_goes_on(tmp_path):
    federation = made_federation(held_up={"credit-1"})
    state = tmp_path / "state.npz"
    with pytest.raises(NotReadyError, match="not done in 3 s"):
        run_strategy(fresh("FedAvg"), made_grid(federation), start(), 1, state=state, timeout_s=3)
    assert not state.exists()
    federation.held_up.clear()
    run_strategy(fresh("FedAvg"), made_grid(federation), start(), 1, state=state, timeout_s=3)
    assert federation.begun == ["credit-1"]


def test_a_coordinator_that_is_restarted_is_waited_for():
    federation = made_federation(away=20)
    run_strategy(fresh("FedAvg"), made_grid(federation), start(), 1)
    assert federation.away == 0
    gone = made_federation(away=10**9)
    with pytest.raises(UnreachableError):
        run_strategy(fresh("FedAvg"), made_grid(gone), start(), 1)


def test_an_objection_stops_the_strategy():
    federation = made_federation(objections=("br-saude: objection: model_disagreement",))
    with pytest.raises(IntegrityError, match="br-saude: objection"):
        run_strategy(fresh("FedAvg"), made_grid(federation), start(), 1)


def test_no_model_is_not_a_model_at_rest(monkeypatch):
    monkeypatch.setattr(strategy.FedAvg, "aggregate_train", lambda *_: (None, None))
    with pytest.raises(IntegrityError, match="gave no model in round 1"):
        run_strategy(fresh("FedAvg"), made_grid(), start(), 1)


def test_a_state_of_something_else_is_not_gone_on_with(tmp_path):
    state = tmp_path / "state.npz"
    run_strategy(fresh("FedAdam"), made_grid(), start(), 1, state=state)
    other = strategy.FedAdam(**NO_EVALUATION, eta=0.5)
    for made, grid, words in (
        (fresh("FedAvg"), made_grid(), "of FedAdam in credit"),
        (fresh("FedAdam"), made_grid(name="debit"), "of FedAdam in credit"),
        (other, made_grid(), "eta=0.1, not 0.5"),
    ):
        with pytest.raises(ExistsError, match=words):
            run_strategy(made, grid, start(), 2, state=state)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_broken_state_is_one_sentence(tmp_path, cut):
    state = tmp_path / "state.npz"
    run_strategy(fresh("FedAdam"), made_grid(), start(), 1, state=state)
    state.write_bytes(state.read_bytes()[:cut])
    with pytest.raises(CorruptStateError, match="cannot be read"):
        load(state)


def test_a_pickle_in_a_state_is_not_opened(tmp_path):
    state = tmp_path / "state.npz"
    with state.open("wb") as file:
        np.savez(file, header=np.array([object()], dtype=object))
    with pytest.raises(CorruptStateError):
        load(state)


def test_what_is_public():
    assert set(flower.__all__) == {"MingaGrid", "RoundTerms", "StrategyResult", "run_strategy"}
    assert flower_rounds.run_name(made_grid().terms, 3, 2) == "credit-3-try2"


def test_the_example_in_the_documentation(tmp_path, monkeypatch, capsys):
    """Its TOML is read as it is, its Python runs as it is, but for the first model."""
    text = (ROOT / "docs" / "flower.md").read_text("utf-8")
    site, plan = (
        tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    )
    assert FlowerConfig.model_validate(site["flower"]).python_path == ("apps",)
    assert AllowConfig.model_validate(site["allow"]).flower_apps == (plan["local_step"]["app"],)
    assert optimizer_for(Outer.model_validate(plan["outer"])).options["eta"] == 0.01
    LocalStep.model_validate(plan["local_step"])

    @contextmanager
    def fake(*, folder, **terms):
        assert folder == Path("fed")
        yield MingaGrid(made_federation(cap=65536), RoundTerms(**terms), rounds=Clock().rounds)

    monkeypatch.setattr(connection, "open_grid", fake)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program.replace("[...]", "[__import__('numpy').zeros(2, 'f4')]"), {})  # noqa: S102 - ours
    assert load(tmp_path / "credit.npz").round == 20
    assert capsys.readouterr().out.strip().endswith("0.5")
