"""CPU time of a round by role, and its line."""

from __future__ import annotations

import sys
import time

import pytest

from tests.bench import sizes
from tests.bench.federation import Measured
from tests.bench.processes import Stage

SAMPLES = [
    (10.0, {"server": 1.0}),
    (12.0, {"server": 3.0, "client": 4.0}),
    (16.0, {"server": 3.0, "client": 8.0}),
]


@pytest.mark.parametrize(
    ("begun", "ended", "found"),
    [
        (10.0, 16.0, {"server": 2.0, "client": 8.0}),
        (11.0, 12.0, {"server": 1.0, "client": 2.0}),
        (12.0, 14.0, {"server": 0.0, "client": 2.0}),
        (0.0, 99.0, {"server": 2.0, "client": 8.0}),  # nothing is known beyond the samples
    ],
)
def test_what_was_spent_between_two_moments(begun, ended, found):
    assert sizes.spent(SAMPLES, begun, ended) == found


def test_the_time_of_children_that_ended_counts(tmp_path):
    burn = "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.5: pass"
    code = (
        f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {burn!r}]);"
        " print('ended', flush=True); time.sleep(60)"
    )
    meter = sizes.Meter()
    with Stage(folder=tmp_path) as stage, meter.watching(stage):
        process = stage.start("parent", [sys.executable, "-c", code], role="client")
        until = time.monotonic() + 30
        while "ended" not in (tmp_path / "parent.log").read_text():
            assert time.monotonic() < until, "it does not end"
            assert process.poll() is None
            time.sleep(0.05)
        assert 0.5 <= sizes.cpu_seconds(stage)["client"] < 3.0
        time.sleep(4 * sizes.SAMPLE_S)
    assert meter.samples[-1][1]["client"] >= 0.5
    assert sizes.spent(meter.samples, 0.0, time.time())["client"] <= 3.0


def test_a_line_says_how_much_and_of_what():
    measured = Measured(
        seconds=[4.0, 2.0, 3.0], phases={"Open": 1.0, "Uploading": 2.0}, up=1, down=1,
        rss_mb=150.0, private_mb=100.0, peak_in="", begun=0.0, ended=9.0,
    )  # fmt: skip
    line = sizes.row_of(
        sizes.Found(
            nodes=33,
            params=10**7,
            round=measured,
            floor=[2.0, 1.0, 1.5],
            cpu={"server": 1.25, "client": 7.5},
        )
    )
    assert line["what"] == "whole round without training, 33 nodes, 10 M parameters"
    assert (line["ours"], line["other"], line["ratio"]) == ("3.00 s", "1.50 s", 2.0)
    assert "the coordinator 1.25, all nodes 7.50" in line["note"]


def test_the_smallest_size_is_measured_and_what_does_not_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "SIZES", ((3, 1000), (33, 10**13)))
    out = tmp_path / "sizes.json"
    monkeypatch.setattr(sys, "argv", ["sizes", "--out", str(out)])
    sizes.main()
    facts = out.read_text()
    assert "3 nodes, 0.001 M parameters" in facts
    assert "Left out: 33 nodes and 1e+07 M parameters" in facts


@pytest.mark.parametrize(
    "text", ["", "4", "4,", "x,1000", "2,1000", "65,1000", "4,999", "4,1e6", "4,1000,1"]
)
def test_a_size_that_is_none_is_refused_in_one_sentence(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sizes", "--only", text])
    with pytest.raises(SystemExit) as ended:
        sizes.main()
    assert ended.value.code == 2
    assert "--only is NODES,PARAMS" in capsys.readouterr().err
