"""``python -m tests.bench.sizes``: a whole round at 4 and 33 nodes, of 10^6 to 10^8 parameters.

Real agents, one process each, round log and fsyncs as in a deployment, no training; beside it raw
TLS sockets that move and store the same bytes, in the same run. Of each size the CPU time of the
coordinator and of all nodes is counted from the moment the first measured round opens to the moment
the last one ends, so that one sees what a size adds: for each node, for each byte, or for nothing.

A size whose files would not fit on the disk is left out, with the reason. Figures go to
``bench/sizes.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from protocols.decimals import read_decimal
from protocols.tensors.sizes import MAX_NODES
from tests.bench import floor, ours
from tests.bench.__main__ import machine
from tests.bench.federation import Job, Measured
from tests.bench.page import BENCH, FIGURES, PAGE, figures, load, render
from tests.bench.processes import Stage

OUT: Final = BENCH / "sizes.json"
SIZES: Final = tuple((nodes, 10**power) for nodes in (4, 33) for power in (6, 7, 8))
LEAST_PARAMS: Final = 1000
SAMPLE_S: Final = 0.25
FEW_BYTES: Final = 4e9  # in a round, of all nodes: of more, one round is measured instead of three
WHO: Final = {"server": "the coordinator", "client": "all nodes"}

Sample = tuple[float, dict[str, float]]  # seconds since 1970; CPU seconds of each role until then


def cpu_seconds(stage: Stage) -> dict[str, float]:
    """Of all living processes of each role, and of those that they have waited for."""
    tick = os.sysconf("SC_CLK_TCK")
    found: dict[str, float] = {}
    for pid, role in stage.mine().items():
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        found[role] = found.get(role, 0.0) + sum(map(int, words[11:15])) / tick
    return found


def spent(samples: Sequence[Sample], begun: float, ended: float) -> dict[str, float]:
    """CPU seconds of each role between two moments, as the line through the samples has it."""

    def at(moment: float, role: str) -> float:
        after = min(max(1, bisect_left(times, moment)), len(times) - 1)
        (t0, one), (t1, two) = samples[after - 1], samples[after]
        share = min(1.0, max(0.0, (moment - t0) / (t1 - t0)))
        before = one.get(role, 0.0)
        return before + share * (two.get(role, 0.0) - before)

    times = [time_ for time_, _ in samples]
    return {role: at(ended, role) - at(begun, role) for role in samples[-1][1]}


class Meter:
    """Looks at the CPU time of a stage now and then."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    @contextmanager
    def watching(self, stage: Stage) -> Iterator[None]:
        """For as long as the block lasts."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_S):
                self.samples.append((time.time(), cpu_seconds(stage)))

        thread = threading.Thread(target=watch, name="cpu")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was measured of one size."""

    nodes: int
    params: int
    round: Measured
    floor: list[float]  # seconds
    cpu: dict[str, float]  # seconds of each role, for one round


def disk_bytes(nodes: int, params: int) -> int:
    """What the files of a run take at most: two models, vector and sum at each node; two models and
    the vectors and sums of two rounds at the coordinator."""
    vector, model = floor.vector_bytes(params), 4 * params
    return nodes * (2 * model + 2 * vector) + 3 * model + 2 * (nodes + 1) * vector


def measure(nodes: int, params: int, work: Path | None) -> Found:
    """Floor, rounds, floor."""
    rounds = 3 if 2 * nodes * floor.vector_bytes(params) <= FEW_BYTES else 1
    limit = 300 + (rounds + 2) * (30 + 4e-7 * params * nodes)
    job = Job(params=params, nodes=nodes, rounds=rounds, timeout_s=limit)
    before = floor.measure_rounds(params=params, nodes=nodes, rounds=rounds, work=work)
    meter = Meter()
    round_ = ours.play(job, light=False, work=work, beside=meter.watching)
    after = floor.measure_rounds(params=params, nodes=nodes, rounds=rounds, work=work)
    total = spent(meter.samples, round_.begun, round_.ended)
    cpu = {role: seconds / rounds for role, seconds in total.items()}
    return Found(nodes=nodes, params=params, round=round_, floor=before + after, cpu=cpu)


def row_of(found: Found) -> dict[str, Any]:
    """One line of the page."""
    mine, least = statistics.median(found.round.seconds), statistics.median(found.floor)
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.round.phases.items())
    cpu = ", ".join(f"{who} {found.cpu.get(role, 0.0):.2f}" for role, who in WHO.items())
    size = f"{found.nodes} nodes, {found.params / 1e6:g} M parameters"
    return {
        "what": f"whole round without training, {size}",
        "ours": f"{mine:.2f} s", "beside": "raw TLS sockets plus fsync",
        "other": f"{least:.2f} s", "ratio": round(mine / least, 2), "target": "", "met": None,
        "note": (
            f"CPU seconds a round: {cpu}; coordinator's peak {found.round.rss_mb:.0f} MB; seconds"
            f" by phase: {phases}"
        ),
    }  # fmt: skip


def size_of(text: str) -> tuple[int, int]:
    """Nodes and parameters of ``NODES,PARAMS``; ``ValueError`` for anything else."""
    nodes, _, params = (read_decimal(part, most=10**12) or 0 for part in text.partition(","))
    if not 3 <= nodes <= MAX_NODES or params < LEAST_PARAMS:
        raise ValueError(
            f"--only is NODES,PARAMS: 3 to {MAX_NODES} nodes and at least {LEAST_PARAMS}"
            f" parameters, not {text!r:.40}"
        )
    return nodes, params


def keep(
    rows: list[dict[str, Any]], left_out: list[str], found_on: dict[str, Any], out: Path
) -> None:
    """Write what was measured so far, and the page if it is the page's file."""
    text = (
        "Real agents, mode open, with a round log, beside raw TLS sockets that move and store the"
        " same bytes. All parties share the cores, so the time of a round of many nodes is that of"
        " their work, not of waiting for each other; where every node has a machine of its own, its"
        " share of the CPU time is what it has to do. A node reads and checks what every other one"
        " signed, so that share grows with their number."
        f" Measured on {found_on['date']} at commit {found_on['commit']}."
    )
    facts = {
        "schema": FIGURES, "title": "A round by nodes and parameters",
        "repeat": "make bench-sizes", "machine": found_on,
        "text": " ".join([text, *(f"Left out: {reason}." for reason in left_out)]),
        "rows": rows,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    if out == OUT:
        PAGE.write_text(render(load(), figures()))


def main() -> None:
    """Measure each size; keep and show what was measured, whatever comes of the next."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sizes", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NODES,PARAMS", help="repeatable")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    try:
        sizes = [size_of(text) for text in options.only or ()] or SIZES
    except ValueError as error:
        parser.error(str(error))
    found_on, rows, left_out = machine(), [], []
    place = options.scratch or Path(tempfile.gettempdir())
    for nodes, params in sizes:
        free, wanted = shutil.disk_usage(place).free, disk_bytes(nodes, params)
        if wanted > 0.9 * free:
            left_out.append(
                f"{nodes} nodes and {params / 1e6:g} M parameters take up to {wanted / 1e9:.0f} GB"
                f" of files; {free / 1e9:.0f} GB were free"
            )
            print(left_out[-1], file=sys.stderr, flush=True)
            keep(rows, left_out, found_on, options.out)
            continue
        begun = time.monotonic()
        rows.append(row_of(measure(nodes, params, options.scratch)))
        took = timedelta(seconds=round(time.monotonic() - begun))
        line = rows[-1]
        print(
            f"{line['what']}: {line['ours']}, {line['ratio']} of the floor; {line['note']}"
            f" (measured in {took})", flush=True,
        )  # fmt: skip
        keep(rows, left_out, found_on, options.out)


if __name__ == "__main__":
    main()
