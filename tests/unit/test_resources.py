"""What a local step cost: counted by the worker, claimed by the node, added up for people."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from infra.runs.costs import Prices, RoundUsed, Used, by_institution, by_round
from infra.runs.facts import read_run_facts, run_to_json
from infra.runs.show import run_view
from node_agent.resources import (
    Claim,
    ResourcesConfig,
    as_leaf,
    claim_of,
    coordinates,
    read_claim,
)
from node_agent.spool import Spent, keep_spent, read_spent
from node_agent.worker.distributed import Ranks
from node_agent.worker.resources import Meter, energy_counter
from protocols.gen import accounting_pb2
from protocols.plan import Plan
from protocols.tensors.metrics import RESOURCE_METRICS, metric_names
from tests.support.plans import plan, plan_value
from tests.support.training import StopAfter, Worker, make_site
from tests.unit.test_cli_run_facts import answer, round_facts

CPU = Ranks(0, 1, torch.device("cpu"), "none")
CUDA = Ranks(0, 1, torch.device("cuda", 0), "none")  # nothing here touches the device
TWO = Spent(gpu_seconds=7200.0, cpu_seconds=3600.0, energy_joules=3.6e6)
UNCOUNTED = TWO.model_copy(update={"energy_joules": None})
OPEN = plan()


# -- the worker counts -----------------------------------------------------------------------------


def meter(ranks, joules, *, held=5.0, cpu=2.0):
    """A meter whose clocks and counter say what they are told."""
    times, used, counts = iter([0.0, held]), iter([1.0, 1.0 + cpu]), iter(joules)
    counter = (lambda: next(counts)) if joules else None
    return Meter(ranks, counter, monotonic=lambda: next(times), cpu=lambda: next(used))


@pytest.mark.parametrize(
    ("ranks", "joules", "gpu", "energy"),
    [
        (CPU, [], 0.0, None),
        (CUDA, [], 5.0, None),
        (CUDA, [1000.0, 1600.0], 5.0, 600.0),
        (CUDA, [1000.0, 900.0], 5.0, None),  # the driver was loaded again
        (CUDA, [1000.0, None], 5.0, None),
        (CUDA, [None, 900.0], 5.0, None),
    ],
)
def test_a_meter(ranks, joules, gpu, energy):
    spent = meter(ranks, joules).read()

    assert spent == Spent(gpu_seconds=gpu, cpu_seconds=2.0, energy_joules=energy)


def test_there_is_no_counter_where_there_is_no_gpu():
    assert energy_counter(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert energy_counter(torch.device("cuda", 0)) is None


def test_what_an_interrupted_job_used_is_not_forgotten(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 6})
    job = site.ask()
    stop = StopAfter(site, 6)
    Worker(site).answer(stop=stop)
    before = read_spent(site.spool, job.id)

    Worker(site).answer()

    assert stop.fired
    assert site.result(job).steps == 6
    assert before.cpu_seconds > 0
    assert site.result(job).spent.cpu_seconds > before.cpu_seconds
    assert site.result(job).spent.gpu_seconds == 0


def test_interruptions_add_up_and_a_spoilt_note_is_no_note(tmp_path):
    spool = make_site(tmp_path).spool
    keep_spent(spool, "r1.0", TWO)
    keep_spent(spool, "r1.0", read_spent(spool, "r1.0") + TWO)
    assert read_spent(spool, "r1.0").gpu_seconds == 14_400
    assert read_spent(spool, "r1.0").energy_joules == 7.2e6
    keep_spent(spool, "r1.0", TWO + Spent(gpu_seconds=1.0))  # one part without it spoils the sum
    assert read_spent(spool, "r1.0").energy_joules is None
    spool.spent("r1.0").write_text("garbage")
    assert read_spent(spool, "r1.0") is None


# -- the node claims -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "config", "energy", "source"),
    [
        (TWO, {"gpu_watts": 700}, 1_000_000, "measured"),
        (UNCOUNTED, {"gpu_watts": 700}, 1_400_000, "estimated"),
        (UNCOUNTED, {"cpu_watts": 10}, 10_000, "estimated"),
        (UNCOUNTED, {}, 0, "none"),
        # A counter of nothing is no measurement of a CPU's work.
        (Spent(cpu_seconds=3600.0, energy_joules=0.0), {"cpu_watts": 10}, 10_000, "estimated"),
        (Spent(cpu_seconds=3600.0, energy_joules=0.0), {"gpu_watts": 700}, 0, "none"),
    ],
)  # fmt: skip
def test_energy_is_measured_or_labelled(spent, config, energy, source):
    claim = claim_of(spent, ResourcesConfig(**config), OPEN)

    assert (claim.energy_mwh, claim.source) == (energy, source)
    assert claim.gpu_ms == round(1000 * spent.gpu_seconds)


def test_a_site_may_say_nothing():
    assert claim_of(TWO, ResourcesConfig(report="nothing"), OPEN) is None
    assert claim_of(None, ResourcesConfig(), OPEN) is None
    with pytest.raises(ValidationError):
        ResourcesConfig(report="loud")


def private_plan() -> Plan:
    """A plan with differential privacy; which does not matter."""

    class Private:
        privacy = object()

    return Private()  # type: ignore[return-value]


def test_private_steps_say_no_times_unless_the_site_wants_it():
    assert claim_of(TWO, ResourcesConfig(), private_plan()) is None
    assert claim_of(TWO, ResourcesConfig(private=True), private_plan()) is not None


def test_the_journal_gives_the_claim_back():
    claim = claim_of(TWO, ResourcesConfig(), OPEN)
    assert read_claim({"steps": 3, "resources": claim.to_facts()}) == claim
    for spoilt in (None, 1, {}, {**claim.to_facts(), "source": "?"}):
        assert read_claim({"resources": spoilt}) is None


def test_the_sum_has_coordinates_only_where_the_plan_says_so():
    claim = Claim(gpu_ms=5, cpu_ms=6, energy_mwh=7, source="measured")

    assert coordinates(claim) == {"gpu_ms": 5, "cpu_ms": 6, "energy_mwh": 7, "reporting": 1}
    assert coordinates(None) == dict.fromkeys(RESOURCE_METRICS, 0)
    assert metric_names(["es"])[-1] == "documents/es"
    assert metric_names(["es"], resources=True)[-4:] == RESOURCE_METRICS
    assert not OPEN.vector.resources
    assert Plan.from_value(plan_value(vector={"resources": True})).digest != OPEN.digest


def test_the_leaf_has_whole_units_and_only_what_is_named():
    claim = Claim(gpu_ms=1, cpu_ms=6, energy_mwh=1001, source="estimated")

    leaf = as_leaf(claim, ResourcesConfig(), size=9)
    assert (leaf.gpu_seconds, leaf.energy_wh, leaf.bytes, leaf.source) == (1, 2, 9, "estimated")
    for config in (ResourcesConfig(report="summed"), ResourcesConfig(report="nothing")):
        hidden = as_leaf(claim, config, size=9)
        assert (hidden.gpu_seconds, hidden.energy_wh, hidden.source) == (0, 0, "none")


# -- people read -----------------------------------------------------------------------------------

HOUR = Used(gpu_ms=3_600_000, cpu_ms=7_200_000, energy_mwh=700_000, sources=frozenset({"measured"}))
GUESS = Used(gpu_ms=1_800_000, energy_mwh=350_000, sources=frozenset({"estimated"}))


def costs(number, **used) -> RoundUsed:
    return RoundUsed(
        number=number, survivors=("a", "b"), used=used, summed=None, summed_over=0
    )  # fmt: skip


def test_lines_by_institution_and_by_round():
    rounds = [costs(0, a=HOUR, b=GUESS), costs(1, a=GUESS), costs(2, c=HOUR)]

    told = {line.name: (line.used.gpu_hours, line.reported, line.expected)
            for line in by_institution(rounds)}  # fmt: skip
    assert told == {"a": (1.5, 2, 3), "b": (0.5, 1, 3), "c": (1.0, 1, 1)}
    assert [(line.name, line.used.gpu_hours, line.reported, line.expected)
            for line in by_round(rounds)] == [
        ("0", 1.5, 2, 2), ("1", 0.5, 1, 2), ("2", 1.0, 1, 3),
    ]  # fmt: skip
    assert by_institution(rounds)[0].used.energy_source == "partly estimated"
    assert HOUR.money(Prices(currency="USD", gpu_hour=2.5, kwh=0.2)) == pytest.approx(2.64)


def shown(view) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(run_view(view))
    return console.export_text()


def a_run(*, prices: bool = True):
    facts = answer(round_facts(0, bits=3.0), round_facts(1, bits=2.0))
    used = accounting_pb2.Resources(
        gpu_ms=3_600_000, cpu_ms=60_000, energy_mwh=700_000, source="measured"
    )
    facts.rounds[0].resources.append(accounting_pb2.NodeResources(node="a", used=used))
    if prices:
        facts.prices.currency, facts.prices.gpu_hour, facts.prices.kwh = "[USD]", 2.5, 0.2
    return read_run_facts(facts)


def test_the_table_says_who_did_not_report():
    text = shown(a_run())
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}

    assert "Costs, as the institutions claim them" in text
    assert "cost ([USD])" in text  # text, no markup
    assert lines["a"][1:] == ["measured", "1", "of", "2", "1.0000", "0.0167", "0.7000", "2.64"]
    assert lines["b"][1:] == ["-", "not", "reported", "-", "-", "-", "-"]
    assert lines["all"][2:5] == ["1", "of", "4"]


def test_without_prices_there_is_no_money_and_without_claims_no_table():
    assert "cost (" not in shown(a_run(prices=False))
    silent = read_run_facts(answer(round_facts(0, bits=3.0)))
    assert "Costs" not in shown(silent)


def test_as_json():
    costs_ = run_to_json(a_run())["rounds"][0]["costs"]

    assert costs_["nodes"]["a"]["gpu_hours"] == 1.0
    assert costs_["nodes"]["a"]["cost"] == 2.64
    assert costs_["not_reported"] == ["b"]
    assert costs_["in_the_sum"] is None


def test_what_the_sum_says():
    facts = answer(round_facts(0, bits=3.0))
    for name, value in zip(RESOURCE_METRICS, (3_600_000, 0, 500_000, 2), strict=True):
        facts.rounds[0].metrics[name] = value
    report = read_run_facts(facts)

    assert report.rounds[0].costs.summed.gpu_hours == 1.0
    assert report.rounds[0].costs.summed_over == 2
    assert "in the sums" in shown(report)
