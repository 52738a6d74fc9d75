"""The page: one HTML file, three languages, nothing from elsewhere.

The language switch is three radio buttons and CSS, so the page works where scripts do not run; its
content security policy allows nothing to be loaded. Everything that comes out of leaves is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Final

from infra.audit.loading import Loaded
from infra.audit.recompute import Recomputed
from infra.audit.report import charts
from infra.audit.report.facts import DECLINED, DROPPED, IN_SUM, JOINED, SILENT, Facts
from infra.audit.report.style import STYLE
from infra.audit.report.words import LANGS, NAMES, NOT_SHOWN, QUESTION, Lang, W, Words
from policies.audit.records import Record, Result, worst
from policies.audit.verify import QUESTIONS, Audit, by_question

_MARK: Final = {IN_SUM: "●", DROPPED: "◐", DECLINED: "○", JOINED: "◌", SILENT: "·"}
_ANSWER: Final = {Result.PASS: "yes", Result.FAIL: "no", Result.UNKNOWN: "open"}


def say(words: Words, tag: str = "span") -> str:
    """A sentence in all three languages; CSS shows one."""
    return "".join(
        f'<{tag} class="{lang}" lang="{lang}">{escape(text)}</{tag}>'
        for lang, text in zip(LANGS, words, strict=True)
    )


def _w(key: str, tag: str = "span", **values: object) -> str:
    words = W[key]
    return say(words.of(**values) if values else words, tag)


def _section(key: str, body: str, *, lead: str = "") -> str:
    head = f"<h2>{_w(key)}</h2>"
    intro = f'<p class="lead">{_w(lead)}</p>' if lead else ""
    return f'<section id="{key}">{head}{intro}{body}</section>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def page(loaded: Loaded, facts: Facts, made: Sequence[Recomputed], *, lang: Lang) -> str:
    """The whole document.

    Args:
        loaded: the log with its audit.
        facts: what is shown.
        made: rounds that were made again, if that was asked for.
        lang: shown first.
    """
    audit = loaded.audit
    parts = [
        _header(audit),
        _verdict(audit, made),
        _figures(audit, facts),
        _section("h_who", _matrix(facts), lead="p_who"),
        _section("h_country", _countries(facts)),
        _section("h_learning", _learning(facts)),
        _section("h_privacy", _privacy(facts)),
        _section("h_troubles", _troubles(facts)),
        _section("h_overrides", _exceptions(facts)),
        _section("h_findings", _findings(audit), lead="p_findings"),
        _section("h_questions", _questions(audit)),
        _section("h_not", _not_shown()),
        _section("h_check", _check(loaded), lead="p_check"),
    ]
    switch = "".join(
        f'<input type="radio" name="lang" id="l-{each}"{" checked" if each == lang else ""}>'
        f'<label for="l-{each}">{NAMES[each]}</label>'
        for each in LANGS
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="{lang}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(getattr(W['title'], lang))}</title><style>{STYLE}</style></head>"
        f"<body>{switch}<main>{''.join(parts)}</main></body></html>\n"
    )


def _header(audit: Audit) -> str:
    evidence = audit.evidence
    federation = evidence.replay.federation or "—"
    origin = evidence.tree.origin or "—"
    return (
        f"<header><h1>{_w('title')}</h1>"
        f"<p>{_w('subtitle', federation=federation, origin=origin)}</p></header>"
    )


def _verdict(audit: Audit, made: Sequence[Recomputed]) -> str:
    first, lines = audit.first, []
    if first is not None:
        kind, head = "bad", _w("bad")
        lines.append(_w("bad_more", place=first.place))
    elif audit.failed:
        kind, head = "bad", _w("failing", count=len(audit.failed))
        lines.append(_w("failing_more"))
    else:
        kind, head = "good", _w("holds")
        lines.append(_w("holds_more", leaves=len(audit.evidence.taken)))
    times = [head_.quorum_at for head_ in audit.evidence.tree.heads if head_.quorum_at]
    if times:
        when = datetime.fromtimestamp(max(times), UTC)
        lines.append(_w("witnessed", when=f"{when:%Y-%m-%d %H:%M}"))
    if made:
        good = sum(item.result is Result.PASS for item in made)
        lines.append(_w("recomputed", good=good, all=len(made)))
    open_ = len({record.id for record in audit.unknown})
    notes = []
    if not audit.evidence.anchored:
        notes.append(_w("unanchored"))
    if open_:
        notes.append(_w("unknown_note", count=open_))
    body = "".join(f"<p>{line}</p>" for line in lines)
    warn = "".join(f'<p class="note">{note}</p>' for note in notes)
    return f'<section class="verdict {kind}"><h2>{head}</h2>{body}{warn}</section>'


def _figures(audit: Audit, facts: Facts) -> str:
    countries = set(facts.countries.values()) - {"—"}
    cards = [
        (len(facts.institutions), _w("institutions")),
        (len(countries), _w("countries")),
        (facts.released, _w("rounds_released", all=len(facts.rounds))),
        (len(audit.failed) + len(audit.evidence.faults), _w("findings_count")),
    ]
    body = "".join(f"<div><b>{number}</b>{text}</div>" for number, text in cards)
    used = _w(
        "resources",
        gpu=f"{facts.gpu_hours:.1f}",
        energy=f"{facts.energy_kwh:.2f}",
        data=f"{facts.megabytes:.1f}",
    )
    return f'<section class="figures">{body}</section><p class="small">{used}</p>'


def _matrix(facts: Facts) -> str:
    if not facts.institutions:
        return f"<p>{_w('none')}</p>"
    heads = "".join(f"<th>{escape(name.rpartition('/')[2])}</th>" for name in facts.rounds)
    rows, last = [], ""
    for name in facts.institutions:
        country = facts.countries[name]
        shown = escape(country) if country != last else ""
        last = country
        cells = []
        for round_ in facts.rounds:
            cell = facts.cells.get((name, round_))
            if cell is None:
                cells.append("<td></td>")
                continue
            tip = escape(f"{round_} {name}: {cell.state} {cell.detail}".strip())
            cells.append(f'<td class="c-{cell.state}" title="{tip}">{_MARK[cell.state]}</td>')
        rows.append(
            f"<tr><th>{shown}</th><th class='name'>{escape(name)}</th>{''.join(cells)}</tr>"
        )
    key = "".join(
        f'<span class="key"><i class="c-{state}">{mark}</i>{_w(state)}</span>'
        for state, mark in _MARK.items()
    )
    top = f"<tr><th>{_w('country')}</th><th>{_w('institution')}</th>{heads}</tr>"
    table = f'<div class="wide"><table class="matrix">{top}{"".join(rows)}</table></div>'
    return f'{table}<p class="legend">{key}</p>'


def _countries(facts: Facts) -> str:
    counts: Counter[str] = Counter()
    members: Counter[str] = Counter(facts.countries.values())
    for (name, _), cell in facts.cells.items():
        counts[facts.countries[name]] += cell.state == IN_SUM
    most = max(counts.values(), default=0)
    rows = [
        (escape(country), str(members[country]), str(counts[country]), charts.bar(count, most))
        for country, count in sorted(counts.items())
    ]
    return _table((_w("country"), _w("institutions"), _w("times_in_sum"), ""), rows)


def _learning(facts: Facts) -> str:
    parts = []
    curves = {name or "Σ": points for name, points in sorted(facts.curves.items())}
    if curves:
        chart = charts.lines(curves, title="bits per byte", x=_svg("round"))
        names = [_w("all_languages") if name == "Σ" else escape(name) for name in curves]
        parts.append(f'<p class="lead">{_w("p_learning")}</p>{chart}{charts.legend(names)}')
        rows = [
            (
                _w("all_languages") if name == "Σ" else escape(name),
                f"{points[0][1]:.3f}",
                f"{points[-1][1]:.3f}",
            )
            for name, points in curves.items()
        ]
        first, last = (
            min(p[0][0] for p in curves.values()),
            max(p[-1][0] for p in curves.values()),
        )
        heads = ("", f"{_w('round')} {first}", f"{_w('round')} {last}")
        parts.append(_table(heads, rows))
    if facts.loss:
        chart = charts.lines({"loss": facts.loss}, title="training loss", x=_svg("round"))
        parts.append(f'<p class="lead">{_w("p_loss")}</p>{chart}')
    return "".join(parts) or f"<p>{_w('no_curves')}</p>"


def _svg(key: str) -> str:
    """Words inside SVG text."""
    return say(W[key], "tspan")


def _privacy(facts: Facts) -> str:
    if facts.spent_unknown:
        return f"<p>{_w('privacy_unknown', why=facts.spent_unknown)}</p>"
    if not facts.spent:
        modes = ", ".join(facts.modes) or "—"
        return f"<p>{_w('no_privacy', modes=modes)}</p>"
    most = max([item.budget or item.epsilon for item in facts.spent])
    rows = []
    for item in facts.spent:
        over = item.budget is not None and item.epsilon > item.budget
        rows.append(
            (
                escape(facts.countries.get(item.institution, "—")),
                escape(item.institution),
                escape(item.dataset),
                escape(item.unit),
                str(item.updates),
                f"{escape(item.printed)} <small>δ {item.delta:g}</small>",
                charts.bar(item.epsilon, most, over=over),
                "—" if item.budget is None else f"{item.budget:g}",
            )
        )
    heads = ("country", "institution", "dataset", "unit", "updates")
    return f'<p class="lead">{_w("p_privacy")}</p>' + _table(
        (*(_w(head) for head in heads), "ε", "", _w("budget")), rows
    )


def _troubles(facts: Facts) -> str:
    rows = [
        (
            escape(item.round),
            _w(item.what),
            escape(item.who),
            f"<code>{escape(item.detail)}</code>",
            str(item.leaf),
        )
        for item in facts.troubles
    ]
    if not rows:
        return f"<p>{_w('none')}</p>"
    heads = ("round", "what", "institution", "detail", "record")
    return _table([_w(head) for head in heads], rows)


def _exceptions(facts: Facts) -> str:
    rows = [
        (
            _w(item.what),
            escape(item.where),
            f"<code>{escape(item.detail)}</code>",
            _w(item.outcome) if item.outcome else "",
            str(item.leaf),
        )
        for item in facts.exceptions
    ]
    if not rows:
        return f"<p>{_w('none')}</p>"
    return _table([_w("what"), _w("round"), _w("detail"), "", _w("record")], rows)


def _findings(audit: Audit) -> str:
    items = [
        f'<li class="no"><b>{escape(fault.place)}</b> <code>{escape(fault.check)}</code>'
        f" {escape(fault.reason)}</li>"
        for fault in audit.evidence.faults[:50]
    ]
    items += [_finding(record, "no") for record in audit.failed]
    fails = f"<ul>{''.join(items)}</ul>" if items else f"<p>{_w('no_findings')}</p>"
    same: dict[tuple[str, str], list[Record]] = {}
    for record in audit.unknown:
        same.setdefault((record.id, record.reason), []).append(record)
    unknown = [_finding(records[0], "open", len(records)) for records in same.values()]
    more = (
        f"<details><summary>{_w('open')} ({len(unknown)})</summary><ul>{''.join(unknown)}</ul>"
        "</details>"
        if unknown
        else ""
    )
    return fails + more


def _finding(record: Record, kind: str, count: int = 1) -> str:
    where = f" [{escape(record.round)}]" if record.round and count == 1 else ""
    times = f" ×{count}" if count > 1 else ""
    question = say(QUESTION[record.id])
    return (
        f'<li class="{kind}"><b>{record.id}. {question}</b>{where}{times}'
        f"<br><code>{escape(record.reason)}</code></li>"
    )


def _questions(audit: Audit) -> str:
    answers = by_question(audit.records)
    rows = []
    for question in QUESTIONS:
        records = answers[question.id]
        result = worst(records)
        shown = {record.reason: record for record in records if record.result is result}
        reason = next(iter(shown), "")
        more = f" (+{len(shown) - 1})" if len(shown) > 1 else ""
        rows.append(
            (
                question.id,
                say(QUESTION[question.id]),
                f'<span class="tag {_ANSWER[result]}">{_w(_ANSWER[result])}</span>',
                f"<code>{escape(reason)}{more}</code>",
            )
        )
    return _table(("", "", "", ""), rows, "questions")


def _not_shown() -> str:
    return "<ul>" + "".join(f"<li>{say(words)}</li>" for words in NOT_SHOWN) + "</ul>"


def _check(loaded: Loaded) -> str:
    tree = loaded.audit.evidence.tree
    root = tree.root(tree.size).hex() if tree.size <= len(tree.hashes) else "—"
    lines = (
        "pip install 'minga[privacy]'",
        "minga audit mirror URL LOG_DIR --trust-policy FILE",
        "minga audit verify LOG_DIR --trust-policy FILE",
        "minga audit recompute LOG_DIR --blobs DIR",
        "",
        f"# origin  {tree.origin}",
        f"# leaves  {tree.size}",
        f"# root    {root}",
    )
    return f"<pre>{escape(chr(10).join(lines))}</pre>"
