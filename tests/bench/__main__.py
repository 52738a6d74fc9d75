"""``python -m tests.bench``: Minga beside its floor, and beside its peers, in one run.

Absolute times on a shared machine mean nothing; ratios inside one run do. So every row of ours is
measured next to the row that it is compared with, and the ratios are computed here.

Groups: ``bulk`` (transfer over loopback), ``round`` (a whole round without training), ``memory``
(the coordinator's peak, with more nodes and with a larger model), ``peers`` (other systems; needs
the network the first time, so it runs only when it is named or with ``--peers``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import floor, masking, ours
from tests.bench.peers.__main__ import PEERS, default_work, peer_rows
from tests.bench.rows import Row, report, table

GROUPS = ("bulk", "round", "masking", "memory", "peers")
OUT = Path(__file__).parents[2] / "bench" / "out" / "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is measured."""

    sizes: tuple[int, ...]  # parameters of a whole round
    rounds: int  # measured, after one warm-up
    memory: tuple[tuple[int, int], ...]  # (parameters, nodes)
    bulk_repetitions: int
    peer_timeout_s: float  # for each peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much, and where."""

    amount: Amount
    work: Path  # cache of the peers
    scratch: Path | None  # where files are written; None: the system's temporary folder


FULL = Amount(
    sizes=(2_500_000, 25_000_000),
    rounds=5,
    memory=((25_000_000, 4), (25_000_000, 33), (100_000_000, 4)),
    bulk_repetitions=5,
    peer_timeout_s=420.0,
)
QUICK = Amount(
    sizes=(2_500_000,),
    rounds=2,
    memory=((2_500_000, 4), (2_500_000, 33)),
    bulk_repetitions=2,
    peer_timeout_s=240.0,
)


def bulk(settings: Settings) -> Iterator[Row]:
    half = max(1, settings.amount.bulk_repetitions // 2)
    before = floor.measure_bulk(repetitions=half, work=settings.scratch)
    mine = ours.bulk_rows(repetitions=settings.amount.bulk_repetitions, work=settings.scratch)
    after = floor.measure_bulk(repetitions=half, work=settings.scratch)
    yield from floor.bulk_rows([before, after])
    yield from mine


def whole_round(settings: Settings) -> Iterator[Row]:
    for params in settings.amount.sizes:
        amount, size = settings.amount, {"params": params, "nodes": 4}
        half = max(2, amount.rounds // 2)
        # The floor before and after ours: what else goes on on the machine meets both.
        before = floor.measure_rounds(**size, rounds=half, work=settings.scratch)
        mine = ours.round_row(**size, rounds=amount.rounds, work=settings.scratch)
        after = floor.measure_rounds(**size, rounds=half, work=settings.scratch)
        yield floor.round_row([*before, *after], **size)
        yield mine


def masks(settings: Settings) -> Iterator[Row]:
    quick = settings.amount is QUICK
    yield from masking.rows(
        d=1_000_000 if quick else 10_000_000, nodes=33, repetitions=3 if quick else 5
    )


def memory(settings: Settings) -> Iterator[Row]:
    for params, nodes in settings.amount.memory:
        yield ours.memory_row(params=params, nodes=nodes, work=settings.scratch)


def peers(settings: Settings) -> Iterator[Row]:
    yield from peer_rows(
        names=[peer.name for peer in PEERS],
        sizes=settings.amount.sizes,
        rounds=settings.amount.rounds,
        timeout_s=settings.amount.peer_timeout_s,
        work=settings.work,
    )


RUN: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "bulk": bulk,
    "round": whole_round,
    "masking": masks,
    "memory": memory,
    "peers": peers,
}


def run(groups: Sequence[str], settings: Settings) -> list[Row]:
    """The rows of the chosen groups. Peers come right after the round they are compared with."""
    rows: list[Row] = []
    for name in ("bulk", "round", "masking", "peers", "memory"):
        if name in groups:
            for row in RUN[name](settings):
                print(f"measured: {row.what}: {row.system}", file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def machine() -> dict[str, object]:
    """What the figures were taken on, and of which commit."""
    git = ["git", "-C", str(OUT.parents[2]), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "commit": commit or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="repeatable")
    parser.add_argument("--peers", action="store_true", help="measure the peers too")
    parser.add_argument("--quick", action="store_true", help="2.5 M parameters, few repetitions")
    parser.add_argument("--work", type=Path, default=default_work(), help="cache of the peers")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; wants 16 GB")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    options = parser.parse_args()
    groups = options.only or [name for name in GROUPS if name != "peers"]
    if options.peers and "peers" not in groups:
        groups = [*groups, "peers"]
    settings = Settings(
        amount=QUICK if options.quick else FULL,
        work=options.work.absolute(),
        scratch=options.scratch,
    )
    found_on = machine()
    rows = run(groups, settings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": found_on, **report(rows)}
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
