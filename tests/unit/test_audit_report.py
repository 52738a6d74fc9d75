"""The report: three languages, nothing from elsewhere, nothing of a leaf taken for markup."""

from __future__ import annotations

import re
import string
from html.parser import HTMLParser

import pytest

from infra.audit.report import words
from policies.audit.verify import NOT_SHOWN, QUESTIONS
from tests.support.audit_disk import copy_run, minga, the_run


class Page(HTMLParser):
    """What is in a page: tags with attributes, and the text of each language."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {"es": "", "pt": "", "en": ""}
        self.open: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs).get("lang")))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for _, lang in reversed(self.open[1:]):
            if lang:
                self.text[lang] += data
                return
        for lang in self.text:
            self.text[lang] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copy_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(folder):
    out = folder / "report/report.html"
    uploads = folder / "uploads"
    done = minga(
        "audit", "report", folder / "log", "--out", out, "--recompute", "--uploads", uploads
    )
    assert done.status == 0, done.error
    return out.read_text("utf-8")


def test_the_page_is_well_formed(html):
    page = Page(html)

    assert page.open == []


def test_nothing_is_loaded_from_anywhere(html):
    page = Page(html)

    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "data", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_each_language_tells_the_whole_story(html):
    page = Page(html)

    for lang, sentence in (
        ("es", "El registro es íntegro."),
        ("pt", "O registro está íntegro."),
        ("en", "The log holds."),
    ):
        assert sentence in page.text[lang]
        for question in words.QUESTION.values():
            assert getattr(question, lang) in page.text[lang]
        for line in words.NOT_SHOWN:
            assert getattr(line, lang) in page.text[lang]
    assert "The log holds." not in page.text["es"]


def test_the_page_shows_what_happened(html):
    english = Page(html).text["en"]

    assert "Models made again from the masked contributions: 3 of 3." in english
    assert "burned (counts as spent)" in english
    assert "inst-02: model.other" in english
    assert "rounds released of 5" in english
    assert "unanchored" in english.lower()
    assert html.count("<polyline") == 4  # three of bits per byte, one of loss


def test_a_broken_log_gives_a_page_that_says_so(tmp_path):
    run = copy_run(tmp_path / "run")
    bundle = run / "log/tile/entries/000.p/80"
    data = bytearray(bundle.read_bytes())
    data[data.index(the_run().entries[33]) + 40] ^= 1
    bundle.write_bytes(data)

    done = minga("audit", "report", run / "log", "--out", run / "r.html", "--lang", "pt")
    page = Page((run / "r.html").read_text("utf-8"))

    assert done.status == 5
    assert "O registro NÃO está íntegro." in page.text["pt"]
    assert "leaf 33" in page.text["pt"]
    assert ("input", {"type": "radio", "name": "lang", "id": "l-pt", "checked": None}) in page.tags


def test_every_sentence_is_there_three_times_with_the_same_gaps():
    def gaps(text: str) -> list[str]:
        return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)

    for key, sentence in {**words.W, **words.QUESTION}.items():
        assert all(sentence), key
        assert gaps(sentence.es) == gaps(sentence.pt) == gaps(sentence.en), key


def test_the_words_are_those_of_the_audit():
    assert {question.id: question.text for question in QUESTIONS} == {
        key: sentence.en for key, sentence in words.QUESTION.items()
    }
    assert tuple(line.en for line in words.NOT_SHOWN) == NOT_SHOWN


def test_what_comes_out_of_leaves_is_text(html):
    """Everything is escaped by the functions that put it there; codes cannot hold markup anyway."""
    from infra.audit.report.page import say
    from infra.audit.report.words import Words

    assert say(Words("<b>", "&", '"')).count("<b>") == 0
    assert not re.search(r"<(?!/?[a-z!])", html)
