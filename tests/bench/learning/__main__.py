"""``python -m tests.bench.learning``: centralised, federated, masked, adapters, private, alone.

Held-out bits per byte at the same budget of tokens, on the texts of some sites (``--data``, a
folder with a folder for each site; without it the demonstration's corpus). Long: every finished row
is kept under ``--work`` and not run again, so that it may be interrupted. Writes JSON, a table and
a plot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.learning.settings import FULL, QUICK, TINY, Amount

ROOT = Path(__file__).parents[3]
CORPUS = ROOT / "infra" / "demo" / "corpus"
SITES = ("bo-aymara", "br-portugues", "pe-quechua", "uy-leyes")
AMOUNTS = {"full": FULL, "quick": QUICK, "tiny": TINY}


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def load(
    root: Path, wanted: Sequence[str], public: str, amount: Amount
) -> tuple[list[Any], Any, str]:
    """Texts of the sites, of the public part, and what names them all."""
    from tests.bench.learning import texts

    found = texts.find_sites(root)
    names = [name for name in wanted if name in found] or found[:4]
    sites = [
        texts.read_site(root, name, train=amount.train_bytes, valid=amount.valid_bytes)
        for name in names
    ]
    if public in found and public not in names:
        base = texts.read_site(root, public, train=amount.train_bytes, valid=1)
    else:
        sites, base = texts.share_out(sites)
    digest = hashlib.sha256(amount.digest.encode())
    for site in [*sites, base]:
        for document in [*site.train, *site.tuning, *site.report]:
            digest.update(document.key)
    return sites, base, digest.hexdigest()[:12]


def run(options: argparse.Namespace, amount: Amount) -> dict[str, Any]:
    """Run what is not on disk yet; all of it as JSON."""
    from tests.bench.learning import cells
    from tests.bench.learning.report import facts

    sites, public, digest = load(options.data, options.sites, options.public, amount)
    names = sorted(site.name for site in sites)
    work = options.work / digest
    kinds = {"headline": cells.headline(), "others": cells.others(names)}
    todo = [
        (seed, cell, False)
        for kind in options.kinds
        for seed in options.seeds
        for cell in kinds[kind]
    ]
    if options.tune:
        todo = [(0, cell, True) for cell in cells.tuning()]
    if options.only:
        todo = [item for item in todo if _wanted(item[1].name, options.only)]
    worlds: dict[tuple[int, bool], Any] = {}
    for number, (seed, cell, tuned) in enumerate(todo):
        kept = work / ("tuning" if tuned else f"seed-{seed}") / f"{cell.name}.json"
        if kept.is_file():
            continue
        if (seed, tuned) not in worlds:
            worlds[seed, tuned] = cells.World.make(
                kept.parent / "work",
                amount,
                seed=seed,
                sites=sites,
                public=public,
                tuning=tuned,
                say=say if options.verbose else lambda _: None,
            )
        say(f"{number + 1} of {len(todo)}: seed {seed}: {cell.name}")
        begun = time.process_time()
        made = cell.run(worlds[seed, tuned]) | {"cpu_s": round(time.process_time() - begun, 1)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(".new")
        new.write_text(json.dumps(made) + "\n")
        new.rename(kept)
        say(f"    {made['bits']:.4f} bits per byte, {made['cpu_s']} s of a core")
    return facts(work, amount=amount, sites=sites, public=public, digest=digest)


def _wanted(name: str, words: Sequence[str]) -> bool:
    return any(f"={name}" == word or word in name for word in words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learning", description=__doc__)
    default = os.environ.get("MINGA_BENCH_DATA")
    parser.add_argument("--data", type=Path, default=Path(default) if default else CORPUS)
    parser.add_argument("--sites", type=lambda text: text.split(","), default=list(SITES))
    parser.add_argument(
        "--public", default="", help="the site that makes the base model; else a third of each"
    )
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[1, 2, 3]
    )
    parser.add_argument("--rounds", type=int, help="instead of the size's own")
    parser.add_argument("--size", choices=tuple(AMOUNTS), default="full")
    parser.add_argument("--quick", action="store_const", dest="size", const="quick")
    parser.add_argument("--tune", action="store_true", help="try rates instead of running rows")
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=["headline", "others"]
    )
    parser.add_argument(
        "--only", action="append", help="rows with this in their name, or =NAME; repeatable"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "bench" / "out" / "learning")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    parser.add_argument("--verbose", action="store_true", help="say each round")
    options = parser.parse_args(arguments)
    amount = AMOUNTS[options.size]
    if options.rounds:
        from dataclasses import replace

        amount = replace(amount, rounds=options.rounds)
    from tests.bench.learning import report

    found = run(options, amount)
    for path in report.write(found, options.out):
        say(f"written: {path}")
    print(report.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
