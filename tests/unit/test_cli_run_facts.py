"""What `minga run show` makes of the coordinator's answer: figures that can be redone by hand."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from infra.runs.facts import (
    Evaluation,
    RunReport,
    human_bytes,
    read_run_facts,
    round_to_json,
    run_to_json,
    spans_of,
    sparkline,
)
from infra.runs.show import (
    activity,
    round_line,
    run_view,
    runs_table,
    seconds_by_phase,
    traffic_of,
    used_phases,
)
from infra.runs.watch import live_view, patient
from protocols.errors import UnreachableError
from protocols.gen import admin_pb2, rounds_pb2
from protocols.rounds_codec import to_ms
from tests.support.plans import plan as plan_of_abc

START = datetime(2026, 11, 23, 7, 0, tzinfo=UTC)
MODEL, NEXT, SUM = "a" * 64, "b" * 64, "c" * 64


def ms(seconds: float) -> int:
    return to_ms(START + timedelta(seconds=seconds))


def round_facts(number: int, *, bits: float, **phase) -> admin_pb2.RoundFacts:
    """A released round in which two languages were evaluated on 1,000 and 3,000 bytes."""
    nats = bits * math.log(2)
    view = rounds_pb2.PhaseView(
        **({"name": "Released", "attempt": 1, "sum": SUM, "model_root": NEXT} | phase)
    )
    view.survivors.extend(["a", "b"])
    return admin_pb2.RoundFacts(
        round=rounds_pb2.RoundRef(run="andes-7", number=number),
        index=number,
        phase=view,
        why="the sum of 2 updates is public",
        model_root_in=MODEL,
        times=[
            admin_pb2.PhaseTime(phase="Open", entered_at_ms=ms(0)),
            admin_pb2.PhaseTime(phase="Training", entered_at_ms=ms(2)),
            admin_pb2.PhaseTime(phase="Uploading", entered_at_ms=ms(12.5)),
            admin_pb2.PhaseTime(phase="Released", entered_at_ms=ms(13)),
            admin_pb2.PhaseTime(phase="Released", entered_at_ms=ms(13.25)),
        ],
        traffic=[
            admin_pb2.NodeTraffic(node="b", bytes_up=20, bytes_down=5),
            admin_pb2.NodeTraffic(node="a", bytes_up=10, bytes_down=6, confirmed=NEXT),
        ],
        metrics={
            "nll_millinats/es": round(1000 * 1000 * nats),
            "bytes/es": 1000,
            "documents/es": 4,
            "nll_millinats/pt": round(1000 * 3000 * 2 * nats),
            "bytes/pt": 3000,
            "documents/pt": 9,
            "nll_millinats/qu": 0,
            "bytes/qu": 0,
            "documents/qu": 0,
            "tokens": 500,
            "loss_micronats": 1_250_000_000,
        },
    )


def answer(*rounds: admin_pb2.RoundFacts, status: str = "done") -> admin_pb2.RunFacts:
    """What the coordinator says of a run."""
    return admin_pb2.RunFacts(
        run="andes-7",
        title="a title",
        status=status,
        plan_digest="d" * 64,
        submitted_at_ms=ms(-5),
        rounds_planned=2,
        rounds=rounds,
    )


def run_facts(*rounds: admin_pb2.RoundFacts, status: str = "done") -> RunReport:
    return read_run_facts(answer(*rounds, status=status))


def test_bits_per_byte_is_nats_over_log_two_over_bytes():
    evaluation = Evaluation(nll_millinats=693_147, text_bytes=100, documents=1)

    assert evaluation.bits_per_byte == pytest.approx(10.0, rel=1e-5)
    assert Evaluation(nll_millinats=0, text_bytes=0, documents=0).bits_per_byte is None


def test_a_language_is_evaluated_by_its_own_sums_and_all_by_the_sum_of_sums():
    (round_,) = run_facts(round_facts(0, bits=2.0)).rounds

    by_language = {name: item.bits_per_byte for name, item in round_.evaluations.items()}

    assert by_language == {"es": pytest.approx(2.0, abs=1e-5), "pt": pytest.approx(4.0, abs=1e-5)}
    # (1,000 bytes at 2 bits + 3,000 bytes at 4 bits) / 4,000: a mean of means would say 3.
    assert round_.bits_per_byte == pytest.approx(3.5, abs=1e-5)


def test_countries_count_no_text_twice():
    facts = round_facts(0, bits=2.0)
    for kind in ("nll_millinats", "bytes", "documents"):
        facts.metrics[f"{kind}/PE"] = facts.metrics[f"{kind}/pt"]
    (round_,) = run_facts(facts).rounds

    assert round_.evaluations["PE"].bits_per_byte == pytest.approx(4.0, abs=1e-5)
    assert round_.bits_per_byte == pytest.approx(3.5, abs=1e-5)


def test_the_training_loss_is_a_mean_over_tokens():
    (round_,) = run_facts(round_facts(0, bits=2.0)).rounds

    assert round_.training_loss == pytest.approx(2.5)


def test_learning_counts_training_rounds_behind_the_model():
    run = run_facts(round_facts(0, bits=8.0), round_facts(1, bits=3.0))

    assert run.learning("es") == [(0, pytest.approx(8, abs=1e-4)), (1, pytest.approx(3, abs=1e-4))]
    assert run.learning("fr") == []
    assert run.languages() == ("es", "pt")


def test_phases_last_from_entry_to_entry():
    (round_,) = run_facts(round_facts(0, bits=2.0)).rounds

    assert seconds_by_phase(round_) == {
        "Open": 2.0,
        "Training": 10.5,
        "Uploading": 0.5,
        "Released": 0.25,
    }
    assert round_.seconds == 13.25
    assert used_phases([round_]) == ("Open", "Training", "Uploading", "Released")


def test_the_phase_that_goes_on_has_no_end():
    (span,) = spans_of([("Open", START)])

    assert span.seconds is None


@pytest.mark.parametrize(
    ("phase", "released", "ended"),
    [
        ({}, True, True),
        ({"sum": "", "model_root": ""}, False, False),  # being added up
        ({"name": "Aborted", "sum": "", "model_root": "", "code": "too_few"}, False, True),
        ({"name": "Burned", "sum": "", "model_root": "", "code": "wrapped_sum"}, False, True),
        ({"name": "Training", "sum": "", "model_root": ""}, False, False),
    ],
)
def test_a_round_is_over_when_nothing_can_happen_to_it(phase, released, ended):
    (round_,) = run_facts(round_facts(0, bits=2.0, **phase)).rounds

    assert (round_.released, round_.ended) == (released, ended)
    assert (round_.seconds is not None) == ended


def test_a_stopped_run_ends_with_its_last_round():
    going_on = round_facts(0, bits=2.0, name="Uploading", sum="", model_root="")

    assert not run_facts(going_on, status="stopped").ended
    assert run_facts(round_facts(0, bits=2.0), status="stopped").ended
    assert not run_facts(round_facts(0, bits=2.0), status="active").ended


def test_traffic_adds_up_by_node():
    run = run_facts(round_facts(0, bits=2.0), round_facts(1, bits=2.0))

    total = traffic_of(run.rounds)

    assert {node: (entry.up, entry.down) for node, entry in total.items()} == {
        "a": (20, 12),
        "b": (40, 10),
    }
    assert run.rounds[0].confirmed == {"a"}


def test_json_names_units_and_keeps_the_raw_sums():
    run = run_facts(round_facts(0, bits=2.0))
    value = run_to_json(run)
    round_ = round_to_json(run.rounds[0])

    assert value["rounds"] == [round_]
    assert round_["round"] == "andes-7/0"
    assert round_["bits_per_byte_by_language"] == pytest.approx({"es": 2.0, "pt": 4.0}, abs=1e-5)
    assert round_["metrics"]["bytes/pt"] == 3000
    assert round_["phases"][1] == {
        "phase": "Training",
        "entered_at": "2026-11-23T07:00:02+00:00",
        "seconds": 10.5,
    }
    assert round_["traffic"][0] == {
        "node": "a",
        "bytes_up": 10,
        "bytes_down": 6,
        "confirmed": NEXT,
    }


def printed(view, *, width: int = 120) -> str:
    from rich.console import Console

    out = Console(width=width, markup=False, highlight=False, record=True, file=_Nowhere())
    out.print(view)
    return out.export_text()


class _Nowhere:
    def write(self, _text: str) -> int:
        return 0

    def flush(self) -> None:
        """Nothing is kept."""


def test_the_view_shows_every_figure_and_takes_no_markup():
    facts = round_facts(0, bits=2.0)
    facts.why = "[bold]not markup[/bold]"

    text = printed(run_view(run_facts(facts, status="active")))

    for words in ("andes-7", "a title", "10.50", "2.000", "4.000", "3.500", "20 B", "10 B"):
        assert words in text
    assert "[bold]not markup[/bold]" in text
    assert "model bbbbbbbbbbbb… confirmed" in text


def test_a_masked_round_with_all_phases_fits_into_80_columns():
    facts = round_facts(0, bits=2.0)
    del facts.times[:]
    names = "Open Training Dealing Uploading Committing Revealing Released Released"
    for second, name in enumerate(names.split()):
        facts.times.append(admin_pb2.PhaseTime(phase=name, entered_at_ms=ms(second * 1000)))

    text = printed(run_view(run_facts(facts)), width=80)

    for name in names.split():
        assert name in text
    assert text.count("1000.00") == 7
    assert "…" not in text.replace("bbbbbbbbbbbb…", "")


def test_many_languages_are_shown_in_several_sheets():
    facts = round_facts(0, bits=2.0)
    for number in range(20):
        facts.metrics[f"nll_millinats/l{chr(97 + number)}"] = 1_000_000
        facts.metrics[f"bytes/l{chr(97 + number)}"] = 1000
    run = run_facts(facts)

    text = printed(run_view(run), width=80)

    assert set(run.languages()) <= set(text.split())
    assert text.count("continued") == 3  # 22 languages, six beside each other
    assert "22 languages, from" in round_line(run.rounds[0])


def test_who_is_not_in_the_sum_is_named():
    """Nodes a and b are in it; c declined, left or died. It took two attempts."""
    plan = plan_of_abc()
    facts = admin_pb2.RunFacts(
        run="r1",
        status="done",
        plan_digest=plan.digest,
        plan=plan.to_bytes(),
        rounds=[round_facts(0, bits=2.0, attempt=2), round_facts(1, bits=2.0, name="Open")],
    )
    run = read_run_facts(facts)
    told = "2 of 3 nodes in the sum, without c; attempt 2"

    assert told in round_line(run.rounds[0])
    text = printed(run_view(run), width=80)
    assert f"round 0: {told}" in text
    assert "round 1:" not in text  # not released: nobody is missing yet
    assert "mode open" in text
    written = run_to_json(run)
    assert written["mode"] == "open"
    assert [(r["attempt"], r["absent"]) for r in written["rounds"]] == [(2, ["c"]), (1, [])]


def test_an_objection_is_not_forgotten():
    first, second = round_facts(0, bits=2.0), round_facts(1, bits=2.0)
    first.traffic[1].confirmed = "objection: model_disagreement"
    second.traffic[1].confirmed = NEXT

    total = traffic_of(run_facts(first, second).rounds)

    assert total["a"].confirmed == "objection: model_disagreement"


def test_a_round_that_gave_no_sum_says_why_in_its_line():
    facts = round_facts(3, bits=2.0, name="Aborted", sum="", model_root="", code="too_few_ready")
    facts.why = "1 ready, 2 needed, the others left"
    run = run_facts(facts, status="active")

    assert round_line(run.rounds[0]) == (
        "round andes-7/3  Aborted  1 ready, 2 needed, the others left"
    )
    assert "Aborted" in printed(run_view(run))


# -- watching ------------------------------------------------------------------------------------


class Asked:
    """Answers in turn; an error stands for nobody answering."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_watcher_outlives_a_coordinator_that_is_away():
    active, done = run_facts(status="active"), run_facts(status="done")
    asked = Asked(active, UnreachableError("away"), UnreachableError("away"), active, done)

    seen = list(patient(asked, sleep=lambda _: None, monotonic=iter(range(100)).__next__))

    assert seen == [active, None, None, active, done]


def test_a_watcher_gives_up_in_the_end():
    asked = Asked(UnreachableError("away"))

    with pytest.raises(UnreachableError):
        list(patient(asked, sleep=lambda _: None, monotonic=iter(range(0, 999, 50)).__next__))


def test_a_node_that_says_what_it_does_is_shown():
    progress = rounds_pb2.Progress(
        activity="training", step=3, max_step=40, tokens=3072, bytes_done=1000, bytes_total=2000
    )

    assert activity(progress) == "training, step 3/40, 3072 tokens, 1.0 kB of 2.0 kB"
    assert activity(rounds_pb2.Progress()) == "idle"


def test_the_live_view_says_who_has_done_what():
    facts = round_facts(0, bits=2.0, name="Training", sum="", model_root="")
    facts.phase.ready.append("a")
    ref = rounds_pb2.RoundRef(run="andes-7", number=0)
    old = rounds_pb2.RoundRef(run="andes-7", number=7)
    nodes = [
        admin_pb2.NodeFacts(
            node="b",
            progress=[
                rounds_pb2.Progress(round=ref, activity="training", step=7, at_ms=1),
                rounds_pb2.Progress(round=old, activity="fetching", at_ms=2),
            ],
        ),
        admin_pb2.NodeFacts(node="a", state="running"),
    ]

    text = printed(live_view(run_facts(facts, status="active"), nodes))

    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "a done running" in rows
    assert "b waiting training, step 7" in rows
    assert any(row.startswith("andes-7 active 0 of 2 rounds released") for row in rows)


def test_a_run_without_rounds_and_no_runs_have_a_view():
    assert "no round was opened yet" in printed(run_view(run_facts(status="active")))
    assert "no runs" in printed(runs_table([]))
    assert "andes-7" in printed(runs_table([run_facts()]))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_499, "999.5 kB"),
        (999_500, "1.0 MB"),
        (1_650_240, "1.7 MB"),
        (2_500_000_000_000, "2.5 TB"),
        (2_500_000_000_000_000, "2500.0 TB"),
    ],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


def test_a_sparkline_shows_the_shape_in_ascii():
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "__"
    line = sparkline([8.1, 3.5, 3.2, 3.0, 2.9, 2.8])
    assert line.isascii()
    assert (line[0], line[-1]) == ("@", "_")
    assert len(set(line)) >= 4  # late rounds differ too
