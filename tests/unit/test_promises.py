"""The page of promises: every test on it exists, and nobody typed its figures."""

from __future__ import annotations

import pytest

from tests.promises import page


def test_every_test_that_is_named_exists():
    gone = [test for test in page.all_tests(page.read()) if not page.exists(test)]
    assert not gone, f"docs/promises.toml names tests that do not exist: {gone}"


def test_every_promise_has_a_test_and_known_figures():
    for group in page.read():
        assert group["promise"]
        for promise in group["promise"]:
            assert promise.keys() <= {"says", "from", "tests", "figures"}
            assert promise["tests"], promise["says"]
            for of in promise.get("figures", ()):
                assert all(isinstance(text, str) for text in page.figure(of))


def test_the_page_is_what_the_source_says():
    """Figures aside: they change with every measurement, and `make docs` fetches them."""
    shown = page.PAGE.read_text("utf-8")
    assert page.without_figures(shown) == page.without_figures(page.render()), "run make docs"


def test_a_test_that_is_gone_is_noticed(monkeypatch):
    here = "tests/unit/test_promises.py"
    assert page.exists(f"{here}::test_a_test_that_is_gone_is_noticed")
    assert page.exists(here)
    for gone in (f"{here}::test_that_never_was", f"{here}::page", "tests/unit/test_none.py",
                 "docs/promises.toml", f"{here}::"[:-2] + "x"):  # fmt: skip
        assert not page.exists(gone)
    groups = [
        {"title": "t", "promise": [{"says": "s", "from": "f", "tests": [f"{here}::test_no"]}]}
    ]
    monkeypatch.setattr(page, "read", lambda: groups)
    with pytest.raises(ValueError, match="test_no"):
        page.render()


def test_what_was_not_measured_is_shown_as_that(monkeypatch, tmp_path):
    monkeypatch.setattr(page.bench, "BENCH", tmp_path)
    monkeypatch.setattr(page, "FAULTS", tmp_path / "faults.json")
    assert page.figure({"row": "load / x"}) == page.figure({"faults": ""}) == []
    assert f"the matrix of faults: {page.OPEN}" in page.render()
    (tmp_path / "load.json").write_text(
        '{"rows": [{"what": "x y", "ours": "3 s", "other": "4 s", "beside": "z",'
        ' "target": "at most 2", "met": false, "note": "n"}]}'
    )
    assert page.figure({"row": "load / x"}) == [
        "x y: 3 s, beside 4 s of z, at most 2: **missed** (n)"
    ]
    (tmp_path / "faults.json").write_text(
        '{"columns": ["outcome", "went_on_s"],'
        ' "cases": {"a": {"rows": [["same", 1.25], ["other", null]]}}}'
    )
    (said,) = page.figure({"faults": ""})
    assert said.startswith("[2 faults]")
    assert "after 1 of them" in said
    assert said.endswith("1.2 s")
    with pytest.raises(ValueError, match="nonsense"):
        page.figure({"nonsense": ""})
