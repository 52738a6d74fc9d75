"""The learning benchmark on a very small setting: its pieces are the real ones, and they fit."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from tests.bench.learning import cells, report, texts
from tests.bench.learning.__main__ import CORPUS, load
from tests.bench.learning.settings import TINY
from tests.bench.page import render

torch.set_num_threads(1)
SEED = 1


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict, list, object]:
    """The rows that the target is about, and one site alone: where they are, and what they say."""
    work = tmp_path_factory.mktemp("learning")
    sites, public, _ = load(CORPUS, [], "", TINY)
    world = cells.World.make(
        work / "world", TINY, seed=SEED, sites=sites, public=public, say=lambda _: None
    )
    made = {cell.name: cell.run(world) for cell in cells.headline()}
    # As many steps as each site of the federation does.
    alone = world.apart()["br-saude"].model_copy(update={"valid": world.paths[texts.UNION].valid})
    run = world._run(
        "alone",
        world.start(world.base()),
        {"br-saude": alone},
        rates=cells.SITES,
        rounds=TINY.rounds,
        steps=TINY.inner,
    )
    made["local-only-br-saude"] = cells.worth(run)
    folder = work / f"seed-{SEED}"
    folder.mkdir()
    for name, value in made.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return work, made, sites, public


def test_the_masked_run_is_the_run_in_the_open(ran):
    _, made, _, _ = ran
    open_, masked = made["federated"], made["federated-masked"]
    assert masked["sums"] == open_["sums"]
    assert masked["theta"] == open_["theta"]
    assert len({value["theta"] for value in made.values()}) == len(made) - 1  # all others differ


def test_sites_learn_from_each_other(ran):
    """Better than the base, near as many steps in one place, and than one site on others' text."""
    _, made, _, _ = ran
    federated = made["federated"]
    assert federated["bits"] < 0.95 * made["base"]["bits"]
    assert federated["bits"] < 1.03 * made["centralised-wide"]["bits"]
    assert federated["tokens"] == pytest.approx(made["centralised"]["tokens"], rel=0.1)
    assert federated["languages"]["es"] < made["local-only-br-saude"]["languages"]["es"]


def test_what_is_written(ran, tmp_path):
    work, made, sites, public = ran
    facts = report.facts(work, amount=TINY, sites=sites, public=public, digest="d")
    files = report.write(facts, tmp_path)

    found = json.loads(files[0].read_text())["details"]
    assert found["masked_is_the_same"] == {str(SEED): True}
    assert render(None, [json.loads(files[0].read_text())]).count("within 3 %") == 1
    expected = 100 * (made["federated"]["bits"] / made["centralised"]["bits"] - 1)
    assert found["rows"]["federated"]["against_percent"] == pytest.approx(expected, abs=0.01)
    assert str(work) not in files[0].read_text()
    table = files[1].read_text()
    assert "bit for bit the same" in table
    assert "**not reached**" in table  # three rounds are not enough: the table says so
    ET.fromstring(files[2].read_text())  # noqa: S314  our own


def test_a_masked_run_that_differs_is_told(ran, tmp_path):
    _, made, sites, public = ran
    other = tmp_path / f"seed-{SEED}"
    other.mkdir()
    for name, value in made.items():
        changed = value | ({"sums": "0"} if name == "federated-masked" else {})
        (other / f"{name}.json").write_text(json.dumps(changed))
    facts = report.facts(tmp_path, amount=TINY, sites=sites, public=public, digest="d")
    assert "**NOT the same**" in report.table(facts)


def test_noise_is_the_least_that_keeps_epsilon():
    noise = cells.noise_for(2.0, rate=0.2, steps=4)
    assert cells.epsilon_of(noise, rate=0.2, steps=4) <= 2.0
    assert cells.epsilon_of(noise - 0.01, rate=0.2, steps=4) > 2.0
