"""``python -m tests.bench``: Minga beside its floor, and beside its peers, in one run.

Absolute times on a shared machine mean nothing; ratios inside one run do. So every row of ours is
measured next to the row that it is compared with, and the ratios are computed here.

Groups: ``bulk`` (transfer over loopback), ``link`` (transfer over 100 ms
and 1 Gb/s, where it runs as root), ``round`` (a whole round without training), ``memory``
(the coordinator's peak, with more nodes and with a larger model), ``audit`` (verifying a log, and
appending to one), ``peers`` (other systems; needs the network the first time, so it runs only when
it is named or with ``--peers``).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench import auditing, floor, link, logging_rate, masking, ours
from tests.bench.page import RESULTS, keep
from tests.bench.peers.__main__ import PEERS, default_work, peer_rows
from tests.bench.rows import Row, table, together

GROUPS = ("bulk", "link", "round", "masking", "audit", "memory", "peers")
QUICK_RESULTS = RESULTS.parent / "out" / "quick.json"  # not what the page shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is measured."""

    sizes: tuple[int, ...]  # parameters of a whole round
    turns: int  # of floor, ours and, with --peers, NVIDIA FLARE, one after the other
    rounds: int  # measured in each turn, after one warm-up
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
    turns=3,
    rounds=4,
    memory=((25_000_000, 4), (25_000_000, 33), (100_000_000, 4)),
    bulk_repetitions=5,
    peer_timeout_s=420.0,
)
QUICK = Amount(
    sizes=(2_500_000,),
    turns=1,
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


def long_link(settings: Settings) -> Iterator[Row]:
    repetitions = max(2, settings.amount.bulk_repetitions - 1)
    yield from link.rows(repetitions=repetitions, work=settings.scratch)


def whole_round(settings: Settings, *, peers: bool = False) -> Iterator[Row]:
    """Floor, ours and FLARE take turns, and the floor comes last too: what else goes on on the
    machine meets all of them. The slow peers have one turn."""
    amount, scratch = settings.amount, settings.scratch
    for params in amount.sizes:
        size = {"params": params, "nodes": 4}
        rows: dict[str, list[Row]] = {}

        def keep(*found: Row, rows: dict[str, list[Row]] = rows) -> None:
            for row in found:
                rows.setdefault(row.system, []).append(row)

        def floors(size: dict[str, int] = size) -> Iterator[Row]:
            for hashed in (False, True):
                seconds = floor.measure_rounds(
                    **size, rounds=amount.rounds, work=scratch, hashed=hashed
                )
                yield floor.round_row(seconds, **size, hashed=hashed)

        for turn in range(amount.turns):
            keep(*floors())
            keep(ours.round_row(**size, rounds=amount.rounds, work=scratch))
            if peers:
                keep(*_peers(settings, [params], everybody=turn == 0))
        keep(*floors())
        yield from (together(turns) for turns in rows.values())


def _peers(settings: Settings, sizes: Sequence[int], *, everybody: bool) -> list[Row]:
    return peer_rows(
        names=[peer.name for peer in PEERS if everybody or peer.name == "nvflare"],
        sizes=sizes,
        rounds=settings.amount.rounds,
        timeout_s=settings.amount.peer_timeout_s,
        work=settings.work,
    )


def masks(settings: Settings) -> Iterator[Row]:
    quick = settings.amount is QUICK
    yield from masking.rows(
        d=1_000_000 if quick else 10_000_000, nodes=33, repetitions=3 if quick else 5
    )


def audit(settings: Settings) -> Iterator[Row]:
    quick = settings.amount is QUICK
    yield from auditing.rows(rounds=10 if quick else 45, repetitions=3)
    yield from logging_rate.rows(leaves=100 if quick else 500, repetitions=3)


def memory(settings: Settings) -> Iterator[Row]:
    for params, nodes in settings.amount.memory:
        yield ours.memory_row(params=params, nodes=nodes, work=settings.scratch)


def peers(settings: Settings) -> Iterator[Row]:
    yield from _peers(settings, settings.amount.sizes, everybody=True)


RUN: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "bulk": bulk,
    "link": long_link,
    "round": whole_round,
    "masking": masks,
    "audit": audit,
    "memory": memory,
    "peers": peers,
}


def run(groups: Sequence[str], settings: Settings) -> list[Row]:
    """The rows of the chosen groups. Peers take turns with the round they are compared with."""
    rows: list[Row] = []
    both = {"round", "peers"} <= set(groups)
    for name in ("bulk", "link", "round", "masking", "audit", "peers", "memory"):
        if name in groups and not (name == "peers" and both):
            found = whole_round(settings, peers=True) if name == "round" and both else None
            for row in found or RUN[name](settings):
                print(f"measured: {row.what}: {row.system}", file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def sha256_speed() -> float:
    """MB/s of one thread, the best of some tries: without instructions for it, it decides much."""
    unit, best = bytes(4 * 2**20), 0.0
    for _ in range(10):
        begun = time.perf_counter()
        hashlib.sha256(unit).digest()
        best = max(best, len(unit) / 1e6 / (time.perf_counter() - begun))
    return best


def machine() -> dict[str, object]:
    """What the figures were taken on, and of which commit."""
    git = ["git", "-C", str(RESULTS.parents[1]), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "sha256_mb_per_s": round(sha256_speed()),
        "python": platform.python_version(),
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="repeatable")
    parser.add_argument("--peers", action="store_true", help="measure the peers too")
    parser.add_argument("--quick", action="store_true", help="2.5 M parameters, few repetitions")
    parser.add_argument("--work", type=Path, default=default_work(), help="cache of the peers")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; wants 16 GB")
    parser.add_argument("--params", action="append", type=int, help="of whole rounds; repeatable")
    parser.add_argument("--turns", type=int, help="of whole rounds")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    groups = options.only or [name for name in GROUPS if name != "peers"]
    if options.peers and "peers" not in groups:
        groups = [*groups, "peers"]
    amount = QUICK if options.quick else FULL
    amount = replace(
        amount, sizes=tuple(options.params or amount.sizes), turns=options.turns or amount.turns
    )
    settings = Settings(
        amount=amount,
        work=options.work.absolute(),
        scratch=options.scratch,
    )
    found_on = machine()
    rows = run(groups, settings)
    out = options.out or (QUICK_RESULTS if options.quick else RESULTS)
    keep(rows, found_on, out)
    print(table(rows))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
