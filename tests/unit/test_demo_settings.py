"""The folder of a demonstration: refused or resumed, never overwritten; and who takes part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.cli import main
from infra.demo.settings import Settings, claim_folder, write_settings
from infra.demo.sites import CORPUS, SiteData, choose_sites, copy_text, find_sites, language_of
from infra.demo.training import EPSILON, ROUNDS, demo_delta, demo_plan
from infra.runs.plan_file import complete_secure_sum
from policies.privacy.budget import Allowance, afford_allowance
from policies.privacy.claim import claim_of
from policies.privacy.sensitivity import Unit
from protocols.errors import (
    ConfigurationError,
    ExistsError,
    MalformedMessageError,
    NotFoundError,
)
from protocols.identifiers import NodeId
from protocols.plan import Plan
from tests.support.node import NOW

SETTINGS = Settings(sites=("a", "b", "c"), rounds=3, mode="open", two_ranks=1, data="/text")


# -- the folder ----------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_taken(tmp_path):
    assert claim_folder(tmp_path, resume=False) is None
    assert claim_folder(tmp_path / "new", resume=False) is None


def test_a_demonstration_that_exists_is_refused(tmp_path):
    write_settings(tmp_path, SETTINGS)

    with pytest.raises(ExistsError, match="go on with it by --resume"):
        claim_folder(tmp_path, resume=False)


def test_it_is_resumed_with_what_it_was_begun_with(tmp_path):
    write_settings(tmp_path, SETTINGS)

    assert claim_folder(tmp_path, resume=True) == SETTINGS


def test_a_folder_of_something_else_is_refused_either_way(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(ExistsError, match="exists and is not empty"):
        claim_folder(tmp_path, resume=False)
    with pytest.raises(ConfigurationError, match="not the folder of a demonstration"):
        claim_folder(tmp_path, resume=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(ExistsError):
        claim_folder(tmp_path / "file", resume=False)


def test_nothing_is_resumed_from_nothing(tmp_path):
    with pytest.raises(NotFoundError, match="no demonstration to resume"):
        claim_folder(tmp_path, resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "minga.demo/9"}', '{"sites": 1}'])
def test_damaged_settings_are_named(tmp_path, text):
    (tmp_path / "demo.json").write_text(text)

    with pytest.raises(ConfigurationError, match=r"demo\.json"):
        claim_folder(tmp_path, resume=True)


def test_the_command_exits_3_and_leaves_the_folder_alone(tmp_path, capsys):
    write_settings(tmp_path, SETTINGS)
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(SystemExit) as ended:
        main(["demo", "--dir", str(tmp_path)])

    assert ended.value.code == 3
    assert "[exists]" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_processes_go_to_the_first_sites():
    assert [SETTINGS.ranks(site) for site in SETTINGS.sites] == [2, 1, 1]


# -- sites and their text ------------------------------------------------------------------------


def site_folder(data: Path, site: str, *, train: list[str], valid: list[str]) -> SiteData:
    folder = data / site
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(train) + "\n", "utf-8")
    (folder / "valid.jsonl").write_text("\n".join(valid) + "\n", "utf-8")
    return SiteData(site=NodeId(site), folder=folder)


TEXT = '{"text": "Ñandú", "lang": "es", "source": "x"}'


def test_the_corpus_that_comes_along_has_four_sites_in_two_languages(tmp_path):
    found = find_sites(CORPUS)

    assert [str(item.site) for item in found] == [
        "ar-archivo",
        "br-saude",
        "cl-leyes",
        "pe-escuela",
    ]
    texts = [copy_text(item, tmp_path / item.site) for item in found]
    assert set().union(*(text.languages for text in texts)) == {"es", "pt"}
    assert all(text.left_out == 0 and text.documents >= 40 for text in texts)


def test_lines_without_a_text_are_left_out_and_counted(tmp_path):
    lines = [TEXT, '{"title": "no text"}', '{"text": 7}', '{"text": ""}', "[1]", "", TEXT]
    source = site_folder(tmp_path / "data", "a", train=lines, valid=[TEXT, '"a string"'])

    text = copy_text(source, tmp_path / "node")

    assert (text.documents, text.text_bytes, text.left_out) == (2, 2 * 7, 5)
    copied = (tmp_path / "node" / "train.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in copied] == [{"text": "Ñandú", "lang": "es"}] * 2


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    source = site_folder(tmp_path / "data", "a", train=[TEXT, '{"text": "\\ud800"}'], valid=[TEXT])

    assert copy_text(source, tmp_path / "node").left_out == 1


def test_a_line_that_is_not_json_is_named_but_not_quoted(tmp_path):
    source = site_folder(tmp_path / "data", "a", train=[TEXT, "{private"], valid=[TEXT])

    with pytest.raises(MalformedMessageError, match=r"train\.jsonl:2: the line is not JSON") as e:
        copy_text(source, tmp_path / "node")
    assert "private" not in str(e.value)


def test_a_site_without_any_text_is_named(tmp_path):
    source = site_folder(tmp_path / "data", "a", train=[TEXT], valid=['{"title": "x"}'])

    with pytest.raises(ConfigurationError, match=r"valid\.jsonl holds no line with a text"):
        copy_text(source, tmp_path / "node")


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("es", "es"),
        ("pt_BR", "pt-br"),
        ("ES", "es"),
        ("quy", "quy"),
        (None, "und"),
        (7, "und"),
        ("x", "und"),
        ("español", "und"),
        ("es/../..", "und"),
    ],
)
def test_a_language_is_one_that_a_plan_may_name(value, tag):
    assert language_of(value) == tag


def sites(*names: str) -> list[SiteData]:
    return [SiteData(site=NodeId(name), folder=Path(name)) for name in names]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [(None, "abc"), ("2", "ab"), ("5", "abcde"), ("e,a", "ae"), (" c ", "c")],
)
def test_sites_are_chosen_by_number_or_name(wanted, chosen):
    found = choose_sites(sites(*"abcde"), wanted, most=3)

    assert "".join(item.site for item in found) == chosen


@pytest.mark.parametrize("wanted", ["0", "6", "z", "a,z", "a,a", "", ","])
def test_sites_that_are_not_there_are_refused(wanted):
    with pytest.raises(ConfigurationError, match="--sites"):
        choose_sites(sites(*"abcde"), wanted, most=3)


def test_a_data_folder_is_checked_before_anything_begins(tmp_path, capsys):
    with pytest.raises(ConfigurationError, match="is no folder"):
        find_sites(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="holds no SITE"):
        find_sites(tmp_path)
    site_folder(tmp_path, "a", train=[TEXT], valid=[TEXT])
    (tmp_path / "a" / "valid.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"valid\.jsonl is missing"):
        find_sites(tmp_path)

    with pytest.raises(SystemExit) as ended:
        main(["demo", "--dir", str(tmp_path / "demo"), "--data", str(tmp_path)])
    assert ended.value.code == 3
    assert not (tmp_path / "demo").exists()


def test_a_site_whose_name_is_no_id_is_named(tmp_path):
    site_folder(tmp_path, "Not_An_Id", train=[TEXT], valid=[TEXT])

    with pytest.raises(ConfigurationError, match="Not_An_Id"):
        find_sites(tmp_path)


# -- the plan ------------------------------------------------------------------------------------


def test_two_sites_cannot_hide_in_their_sum(tmp_path, capsys):
    for site in ("a", "b"):
        site_folder(tmp_path / "data", site, train=[TEXT], valid=[TEXT])

    with pytest.raises(SystemExit) as ended:
        main(["demo", "--dir", str(tmp_path / "demo"), "--data", str(tmp_path / "data")])

    assert ended.value.code == 3
    assert "needs 3 sites or more" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("documents", [1, 3, 52, 10**6])
def test_the_private_plan_is_accepted_and_its_budget_covers_it(documents):
    names = [NodeId(f"site-{number}") for number in range(4)]
    written = demo_plan(
        sites=names, languages=["es"], rounds=ROUNDS, mode="record-local", documents=documents
    )
    written["model"] = {**written["model"], "manifest": "0" * 64, "initial": "0" * 64}
    written["federation"] = "demo"
    complete_secure_sum(written, {name: f"{number:064x}" for number, name in enumerate(names)})
    plan = Plan.from_value(written)

    claim = claim_of(plan, 0, 27_000)
    delta = float(demo_delta(documents))
    budget = Allowance(dataset="default", unit=Unit.DOCUMENT, epsilon=EPSILON, delta=delta)
    answer = afford_allowance(budget, (), claim.charge(), now=NOW, rounds=plan.rounds)

    assert answer.rounds_left == plan.rounds
    assert delta * documents <= 0.1 or documents < 2


@pytest.mark.parametrize("mode", ["aggregate-only", "record-local"])
@pytest.mark.parametrize("count", [3, 4, 11])
def test_the_plan_of_a_masked_sum_is_one_that_a_coordinator_takes(count, mode):
    names = [NodeId(f"site-{number:02}") for number in range(count)]
    written = demo_plan(sites=names, languages=["es"], rounds=5, mode=mode)
    written["model"] = {**written["model"], "manifest": "0" * 64, "initial": "0" * 64}
    written["federation"] = "demo"
    complete_secure_sum(written, {name: f"{number:064x}" for number, name in enumerate(names)})

    plan = Plan.from_value(written)

    assert plan.secagg is not None
    assert plan.min_participants >= plan.secagg.threshold


@pytest.mark.parametrize("count", [1, 2, 4, 11])
def test_the_plan_is_one_that_a_coordinator_takes(count):
    names = [NodeId(f"site-{number:02}") for number in range(count)]
    written = demo_plan(sites=names, languages=["pt", "es"], rounds=5, mode="open")
    written["model"] = {**written["model"], "manifest": "0" * 64, "initial": "0" * 64}

    plan = Plan.from_value({**written, "federation": "demo"})

    assert plan.roster == tuple(names)
    assert plan.total_rounds == 6  # the last one evaluates what was learned
    assert plan.evaluation.languages == ("es", "pt")
    assert plan.min_participants == max(1, count - 1)
