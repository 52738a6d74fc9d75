"""``python -m tests.bench.peers``: measure other systems doing a whole round without training.

Each peer gets its own virtual environment in a cache folder, made on first use. One that cannot
be installed, started or finished in time is reported as skipped, with the reason; the command
still succeeds, because a missing peer is not a fault of Minga.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.bench.peers.base import Peer, measure
from tests.bench.peers.flower import Flower
from tests.bench.peers.nvflare import NvFlare
from tests.bench.peers.openfl import OpenFl
from tests.bench.rows import Row, report, table

PEERS: tuple[Peer, ...] = (NvFlare(), OpenFl(), Flower())
SIZES = (2_500_000, 25_000_000)


def default_work() -> Path:
    """Where environments and logs are kept: MINGA_BENCH_CACHE, or ~/.cache/minga-bench."""
    return Path(os.environ.get("MINGA_BENCH_CACHE") or Path.home() / ".cache" / "minga-bench")


def peer_rows(
    *, names: Iterable[str], sizes: Iterable[int], rounds: int, timeout_s: float, work: Path
) -> list[Row]:
    """The rows of the named peers, one after the other: never two at once."""
    chosen = set(names)
    rows = []
    for params in sizes:
        for peer in PEERS:
            if peer.name in chosen:
                print(f"measuring {peer.system}, {params} parameters", file=sys.stderr, flush=True)
                rows.append(
                    measure(peer, params=params, rounds=rounds, timeout_s=timeout_s, work=work)
                )
    return rows


def main() -> None:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("--only", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--params", action="append", type=int, help="repeatable; default: both")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one warm-up")
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds for each peer")
    parser.add_argument("--work", type=Path, default=default_work(), help="cache folder")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = peer_rows(
        names=options.only or names,
        sizes=options.params or SIZES,
        rounds=options.rounds,
        timeout_s=options.timeout,
        work=options.work.absolute(),
    )
    print(table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
