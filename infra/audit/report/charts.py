"""Charts as inline SVG: no script, no font, no image from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

PALETTE = ("#1f5fa8", "#c2571a", "#2a7f4f", "#7a4fa3", "#a3274f", "#4d6a78", "#8a6d1a")
_W, _H = 680, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 34


def lines(series: Mapping[str, Sequence[tuple[int, float]]], *, title: str, x: str) -> str:
    """Lines over round numbers, each with its points and its values in the tooltip.

    Args:
        series: label -> (round, value); empty ones are left out.
        title: for those who do not see.
        x: label of the horizontal axis; may be markup.
    """
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return ""
    xs = [at for points in shown.values() for at, _ in points]
    ys = [value for points in shown.values() for _, value in points]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    low, high = max(0.0, low - pad), high + pad
    first, last = min(xs), max(xs)

    def px(at: float) -> float:
        span = (last - first) or 1
        share = (at - first) / span if last > first else 0.5
        return _LEFT + (_W - _LEFT - _RIGHT) * share

    def py(value: float) -> float:
        return _TOP + (_H - _TOP - _BOTTOM) * (high - value) / (high - low)

    out = [
        f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        y = py(value)
        out.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:.3g}</text>')
    marks = sorted(set(xs))
    every = -(-len(marks) // 12)
    out += [
        f'<text class="tick mid" x="{px(at):.1f}" y="{_H - 14}">{at}</text>'
        for at in marks[::every]
    ]
    out.append(f'<text class="tick end" x="{_W - _RIGHT}" y="{_H - 1}">{x}</text>')
    for number, (name, points) in enumerate(shown.items()):
        colour = PALETTE[number % len(PALETTE)]
        path = " ".join(f"{px(at):.1f},{py(value):.1f}" for at, value in points)
        width = 3 if number == 0 else 1.8
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        )
        for at, value in points:
            tip = escape(f"{name} · {at}: {value:.4g}")
            out.append(
                f'<circle cx="{px(at):.1f}" cy="{py(value):.1f}" r="3" fill="{colour}">'
                f"<title>{tip}</title></circle>"
            )
    out.append("</svg>")
    return "".join(out)


def legend(names: Sequence[str]) -> str:
    """What the colours of ``lines`` stand for; names are markup."""
    items = [
        f'<span class="key"><i style="background:{PALETTE[n % len(PALETTE)]}"></i>{name}</span>'
        for n, name in enumerate(names)
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def bar(value: float, most: float, *, over: bool = False) -> str:
    """A horizontal bar of ``value`` on a scale that ends at ``most``."""
    share = 0.0 if most <= 0 else min(1.0, value / most)
    kind = "bar over" if over else "bar"
    return (
        f'<svg class="{kind}" viewBox="0 0 200 14" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="back" width="200" height="14"/><rect class="fill" width="{200 * share:.1f}"'
        ' height="14"/></svg>'
    )
