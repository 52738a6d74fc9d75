"""What the runs came to: JSON, a table in Markdown, and a plot. This file only computes and writes.

``against`` is a row's bits per byte over those of its yardstick with the same seed, in per cent:
adapters are compared with adapters trained in one place, rows from random weights with theirs,
everything else with centralised training of all weights. A row's figure is the mean over its seeds;
the spread is the smallest and the largest.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from tests.bench.learning.settings import Amount

TARGET = 3.0  # per cent over centralised, of the headline row
WORDS = {
    "base": "base model, trained on the public part",
    "centralised": "centralised, batches of one site, all steps",
    "centralised-wide": "centralised, batches of all sites, fewer steps",
    "federated": "**federated**, in the open",
    "federated-average": "federated, plain mean (outer rate 1, no momentum)",
    "federated-masked": "federated through the secure sum",
    "lora-centralised": "adapters, centralised",
    "lora-ffa": "adapters, FFA-LoRA (only B)",
    "lora-rolora": "adapters, RoLoRA (A and B in turn)",
    "lora-fedit": "adapters, FedIT (A and B)",
    "private-8": "record-local, epsilon 8, FFA-LoRA",
    "private-2": "record-local, epsilon 2, FFA-LoRA",
    "local-only": "each site alone (mean of sites)",
    "centralised-scratch": "from random weights, centralised",
    "federated-scratch": "from random weights, federated",
}


def yardstick(name: str) -> str:
    """The row that a row is compared with."""
    if name.startswith("lora"):
        return "lora-centralised"
    return "centralised-scratch" if name.endswith("scratch") else "centralised"


def read_cells(work: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Row -> seed -> what the run came to."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(work.glob("seed-*/*.json")):
        seed = int(path.parent.name.removeprefix("seed-"))
        found.setdefault(path.stem, {})[seed] = json.loads(path.read_text())
    return found


def local_mean(cells: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[int, dict[str, Any]]:
    """The mean over sites that trained alone, for each seed that has all of them."""
    alone = {name: seeds for name, seeds in cells.items() if name.startswith("local-only-")}
    if not alone:
        return {}
    shared = set.intersection(*(set(seeds) for seeds in alone.values()))
    made = {}
    for seed in sorted(shared):
        runs = [seeds[seed] for seeds in alone.values()]
        made[seed] = {
            "bits": mean(run["bits"] for run in runs),
            "languages": {
                name: mean(run["languages"][name] for run in runs) for name in runs[0]["languages"]
            },
            "tokens": round(mean(run["tokens"] for run in runs)),
        }
    return made


def row_of(
    seeds: Mapping[int, Mapping[str, Any]], beside: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """One row over its seeds."""
    bits = {seed: run["bits"] for seed, run in sorted(seeds.items())}
    against = [
        100 * (run["bits"] / beside[seed]["bits"] - 1)
        for seed, run in sorted(seeds.items())
        if seed in beside
    ]
    first = next(iter(seeds.values()))
    made: dict[str, Any] = {
        "seeds": list(bits),
        "bits_per_byte": round(mean(bits.values()), 4),
        "smallest": round(min(bits.values()), 4),
        "largest": round(max(bits.values()), 4),
        "by_seed": {str(seed): value for seed, value in bits.items()},
        "languages": {
            name: round(mean(run["languages"][name] for run in seeds.values()), 4)
            for name in first["languages"]
        },
        "tokens": first["tokens"],
    }
    if against:
        made["against_percent"] = round(mean(against), 2)
        made["against_spread"] = [round(min(against), 2), round(max(against), 2)]
    for name in ("epsilon", "delta", "noise_multiplier", "rounds"):
        if name in first:
            made[name] = first[name]
    if "curve" in first:
        made["curves"] = {str(seed): run["curve"] for seed, run in sorted(seeds.items())}
    return made


def facts(
    work: Path, *, amount: Amount, sites: Sequence[Any], public: Any, digest: str
) -> dict[str, Any]:
    """Everything that is on disk, as one JSON value without paths."""
    cells = dict(read_cells(work))
    mean_of_sites = local_mean(cells)
    if mean_of_sites:
        cells["local-only"] = mean_of_sites
    order = [name for name in WORDS if name in cells]
    order += sorted(name for name in cells if name not in WORDS)
    plain, masked = cells.get("federated", {}), cells.get("federated-masked", {})
    return {
        "texts": digest,
        "amount": asdict(amount),
        "public": {"bytes": sum(d.size for d in public.train)},
        "sites": {
            site.name: {
                "train_documents": len(site.train),
                "train_bytes": sum(d.size for d in site.train),
                "held_out_bytes": sum(d.size for d in site.report),
                "languages": sorted({d.lang for d in site.train}),
            }
            for site in sites
        },
        "machine": machine(),
        "masked_is_the_same": {
            str(seed): run["sums"] == plain[seed]["sums"] and run["theta"] == plain[seed]["theta"]
            for seed, run in sorted(masked.items())
            if seed in plain
        },
        "rows": {name: row_of(cells[name], cells.get(yardstick(name), {})) for name in order},
        "tuning": {
            path.stem: json.loads(path.read_text())["bits"]
            for path in sorted(work.glob("tuning/*.json"))
        },
    }


def machine() -> dict[str, Any]:
    """What the runs were made with. Figures of learning do not depend on the machine's speed."""
    import torch

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpus": os.cpu_count(),
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same for BENCHMARKS.md (tests/bench/page.py), with everything under ``details``."""
    rows, shown = found["rows"], []
    for name, row in rows.items():
        other = rows.get(yardstick(name)) if yardstick(name) != name else None
        against = row.get("against_percent") if other else None
        spread = row.get("against_spread", [])
        notes = [f"seeds {', '.join(map(str, row['seeds']))}"]
        if against is not None:
            notes.append(f"{against:+.1f} % ({spread[0]:+.1f} to {spread[1]:+.1f})")
        if name == "federated-masked" and found["masked_is_the_same"]:
            same = all(found["masked_is_the_same"].values())
            notes.append("the same integers and model" if same else "NOT the same integers")
        if "epsilon" in row:
            notes.append(f"epsilon {row['epsilon']:.3f} at delta {row['delta']}")
        headline = name == "federated"
        shown.append(
            {
                "what": words_of(name),
                "ours": _figure(row),
                "beside": words_of(yardstick(name)) if other else "",
                "other": _figure(other) if other else "",
                "ratio": None if against is None else round(1 + against / 100, 4),
                "target": f"within {TARGET:g} %" if headline else "",
                "met": against <= TARGET if headline and against is not None else None,
                "note": "; ".join(notes),
            }
        )
    sites = ", ".join(found["sites"])
    return {
        "schema": "minga.figures/1",
        "title": "Learning",
        "repeat": "make bench-learning ARGS='--data DIR'",
        "machine": found["machine"],
        "text": (
            f"Held-out bits per byte, {len(found['sites'])} non-IID sites ({sites}), the same"
            " budget of tokens in every row but the base; mean over seeds, smallest to largest."
            " What was done, and what it does not show: [bench/LEARNING.md](bench/LEARNING.md)."
        ),
        "rows": shown,
        "details": dict(found),
    }


def words_of(name: str) -> str:
    """A row's name for people."""
    return WORDS.get(name, name.replace("local-only-", "alone: ")).replace("**", "")


def _figure(row: Mapping[str, Any]) -> str:
    return f"{row['bits_per_byte']:.3f} ({row['smallest']:.3f} to {row['largest']:.3f})"


def table(found: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    languages = sorted({name for row in found["rows"].values() for name in row["languages"]})
    head = ["row", "seeds", "bits per byte", "spread", "against", *languages]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in found["rows"].items():
        against = row.get("against_percent")
        own = yardstick(name) == name
        cells = [
            WORDS.get(name, name.replace("local-only-", "alone: ")),
            str(len(row["seeds"])),
            f"{row['bits_per_byte']:.3f}",
            f"{row['smallest']:.3f} - {row['largest']:.3f}",
            "" if against is None or own else f"{against:+.1f} %",
            *(f"{row['languages'][language]:.3f}" for language in languages),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    same = found["masked_is_the_same"]
    if same:
        word = "bit for bit the same" if all(same.values()) else "**NOT the same**"
        seeds = ", ".join(same)
        lines += ["", f"Sums and models of the masked runs: {word} as in the open (seeds {seeds})."]
    headline = found["rows"].get("federated", {}).get("against_percent")
    if headline is not None:
        word = "reached" if headline <= TARGET else "**not reached**"
        lines += [
            "",
            f"Target, federated within {TARGET:g} % of centralised: {headline:+.1f} %, {word}.",
        ]
    return "\n".join(lines) + "\n"


# -- the plot ------------------------------------------------------------------------------------

_ROW, _LEFT, _WIDTH, _TOP = 24, 330, 860, 44


def plot(found: Mapping[str, Any]) -> str:
    """Every row as a point with its spread: a self-contained SVG."""
    rows = [
        (name, row) for name, row in found["rows"].items() if not name.startswith("local-only-")
    ]
    low = min(row["smallest"] for _, row in rows)
    high = max(row["largest"] for _, row in rows)
    pad = (high - low) * 0.05 or 0.1
    low, high = low - pad, high + pad

    def px(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 80) * (value - low) / (high - low)

    height = _TOP + _ROW * len(rows) + 40
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
            ' font-family="sans-serif" font-size="13">'
        ),
        "<title>Held-out bits per byte, less is better</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="12" y="24" font-weight="bold">Held-out bits per byte over all sites</text>',
        (
            f'<text x="{_WIDTH - 12}" y="24" text-anchor="end" fill="#555">less is better;'
            " bars: smallest and largest over seeds</text>"
        ),
    ]
    bottom = _TOP + _ROW * len(rows)
    for step in range(6):
        value = low + (high - low) * step / 5
        x = px(value)
        out.append(f'<path d="M{x:.1f} {_TOP - 8}V{bottom}" stroke="#dde3e8"/>')
        out.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">'
            f"{value:.2f}</text>"
        )
    for number, (name, row) in enumerate(rows):
        y = _TOP + _ROW * number + 10
        colour = "#c2571a" if name.startswith("federated") else "#1f5fa8"
        words = words_of(name)
        out.append(f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(words)}</text>')
        out.append(
            f'<path d="M{px(row["smallest"]):.1f} {y}H{px(row["largest"]):.1f}" stroke="{colour}"'
            ' stroke-width="3"/>'
        )
        at = px(row["bits_per_byte"])
        out.append(f'<circle cx="{at:.1f}" cy="{y}" r="5" fill="{colour}"/>')
        out.append(
            f'<text x="{px(row["largest"]) + 9:.1f}" y="{y + 4}">{row["bits_per_byte"]:.3f}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def write(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``learning.json``, ``learning.md`` and ``learning.svg``; nothing where nothing ran."""
    if not found["rows"]:
        return []
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "learning.json": json.dumps(figures(found), indent=1, ensure_ascii=False) + "\n",
        "learning.md": table(found),
        "learning.svg": plot(found),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]
