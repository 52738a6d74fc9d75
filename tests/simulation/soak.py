"""Play many schedules: ``make soak ARGS='--schedules 10000 --seed 0'``.

Every finished schedule is a line in the results file, so a soak that was stopped goes on where it
was when it is started again with the same arguments. A schedule that breaks a promise is shrunk and
printed as a literal to keep in ``test_found.py``. Exit status: 0 nothing found, 1 something was.
``--keep`` writes the figures of a soak that is complete for the pages, and plays nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.bench.page import BENCH, FIGURES

REPORT_S = 10.0
OUT = BENCH / "soak.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=Path("bench/out/soak.jsonl"))
    parser.add_argument("--keep", action="store_true", help="write bench/soak.json")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, default=None, help="play one seed and show its steps")
    return parser.parse_args()


def seeds_of(options: argparse.Namespace) -> range:
    """All of them."""
    return range(options.seed, options.seed + options.schedules)


def results(path: Path) -> dict[int, dict[str, object]]:
    """What is finished, by seed."""
    found: dict[int, dict[str, object]] = {}
    for part in path.parent.glob(f"{path.name}*"):
        for line in part.read_text().splitlines():
            try:
                one = json.loads(line)
                found[one["seed"]] = one
            except (ValueError, KeyError):  # torn by the end of an earlier soak
                continue
    return found


def work(options: argparse.Namespace) -> None:
    """Play this worker's share."""
    from tests.simulation.oracle import ViolationError
    from tests.simulation.schedules import play, schedule, shrunk

    done = results(options.results)
    mine = [s for s in seeds_of(options) if s % options.jobs == options.worker and s not in done]
    with options.results.with_name(f"{options.results.name}.{options.worker}").open("a") as file:
        for seed in mine:
            made, began = schedule(seed), time.process_time()
            line: dict[str, object] = {"seed": seed, "setting": repr(made.setting)}
            try:
                outcome = play(made)
                line |= {
                    "status": outcome.status,
                    "ends": outcome.ends,
                    "deaths": outcome.deaths,
                    "fired": outcome.fired,
                    "refused": outcome.refused_writes,
                }
            except ViolationError as error:
                line |= {"violation": str(error)[:4000], "schedule": repr(made)}
                print(f"seed {seed}: {error}\n{made}", flush=True)
                line["shrunk"] = repr(shrunk(made))
                print(f"shrunk: {line['shrunk']}", flush=True)
            line["cpu_s"] = round(time.process_time() - began, 3)
            print(json.dumps(line), file=file, flush=True)


def show(found: dict[int, dict[str, object]], *, of: int, seconds: float, new: int) -> None:
    """One line of progress."""
    bad = [seed for seed, one in found.items() if "violation" in one]
    rate = new / seconds if seconds else 0.0
    print(f"{len(found)} of {of} schedules, {rate:.2f}/s, violations: {sorted(bad)}", flush=True)


@dataclass(frozen=True, slots=True)
class Reached:
    """What a soak reached: one that disturbs nothing shows nothing."""

    runs: Counter[str]  # by how they ended
    rounds: Counter[str]
    disturbed: Counter[str]  # calls, by how
    settings: Counter[str]
    killed: int  # processes
    refused: int  # writes, by a full disk
    cpu_s: float

    @classmethod
    def of(cls, found: Mapping[int, Mapping[str, Any]]) -> Self:
        """Of the lines of the results."""
        ends: Counter[str] = Counter()
        fired: Counter[str] = Counter()
        for one in found.values():
            ends.update(one.get("ends", {}))
            fired.update(one.get("fired", {}))
        return cls(
            runs=Counter(str(one.get("status", "violation")) for one in found.values()),
            rounds=ends,
            disturbed=fired,
            settings=Counter(str(one["setting"]) for one in found.values()),
            killed=sum(one.get("deaths", 0) for one in found.values()),
            refused=sum(one.get("refused", 0) for one in found.values()),
            cpu_s=sum(one.get("cpu_s", 0.0) for one in found.values()),
        )


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def summary(found: Mapping[int, Mapping[str, Any]]) -> None:
    """What was reached, printed."""
    reached = Reached.of(found)
    print(f"runs {_said(reached.runs)}; rounds {_said(reached.rounds)};", end=" ")
    print(f"processes killed {reached.killed:,}")
    print(f"calls disturbed {_said(reached.disturbed)}; writes refused by a full disk", end=" ")
    print(f"{reached.refused:,}\n{reached.cpu_s / max(1, len(found)):.2f} CPU seconds a schedule")


def figures_of(
    found: Mapping[int, Mapping[str, Any]], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """A complete soak as figures for the pages.

    Args:
        found: the lines of the results, by seed.
        machine: where, when, and at which commit the figures are written.
    """
    reached = Reached.of(found)
    bad = sorted(seed for seed, one in found.items() if "violation" in one)
    row = {"beside": "", "other": "", "ratio": None}
    return {
        "schema": FIGURES,
        "title": "Schedules of faults, simulated",
        "repeat": f"make soak ARGS='--schedules {len(found)} --seed {min(found)}'",
        "machine": dict(machine),
        "text": (
            "Whole federations in one process on a virtual clock, as deployed but for network,"
            " worker and kernel ([tests/simulation](tests/simulation/README.md)). A soak goes on"
            " where it was stopped: its schedules may have been played at several commits. One that"
            " broke a promise was played again after the mend."
        ),
        "rows": [
            row | {
                "what": "schedules with a broken promise", "ours": f"{len(bad)} of {len(found):,}",
                "target": "none of 10,000", "met": not bad and len(found) >= 10_000,
                "note": f"seeds {min(found)} to {max(found)}; settings: {len(reached.settings)}"
                        + (f"; broken: {bad}" if bad else ""),
            },
            row | {
                "what": "faults in these schedules", "ours": f"{reached.killed:,} processes killed",
                "target": "", "met": None,
                "note": f"calls disturbed: {_said(reached.disturbed)}; {reached.refused:,} writes"
                        f" refused by a full disk",
            },
            row | {
                "what": "ends of these schedules", "ours": f"{_said(reached.runs)} (runs)",
                "target": "", "met": None, "note": f"rounds: {_said(reached.rounds)}",
            },
        ],
    }  # fmt: skip


def keep(options: argparse.Namespace) -> int:
    """Write what a complete soak reached where the pages find it."""
    from tests.bench.__main__ import machine

    found = {
        seed: one for seed, one in results(options.results).items() if seed in seeds_of(options)
    }
    if len(found) < options.schedules:
        print(f"{len(found)} of {options.schedules} schedules are played", file=sys.stderr)
        return 1
    text = json.dumps(figures_of(found, machine()), indent=1, ensure_ascii=False)
    OUT.write_text(text + "\n")
    summary(found)
    return 0


def main() -> int:
    options = arguments()
    if options.only is not None:
        from tests.simulation.schedules import play, schedule

        made = schedule(options.only)
        print(made)
        print(play(made))
        return 0
    if options.keep:
        return keep(options)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.worker is not None:
        work(options)
        return 0
    # The order of sets must not depend on the process, or a seed would not repeat what it found.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    shared = [
        "--schedules", str(options.schedules), "--seed", str(options.seed),
        "--jobs", str(options.jobs), "--results", str(options.results),
    ]  # fmt: skip
    before, began = len(results(options.results)), time.monotonic()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulation.soak", *shared, "--worker", str(number)],
            env=environment,
        )
        for number in range(options.jobs)
    ]
    try:
        while any(worker.poll() is None for worker in workers):
            try:
                workers[0].wait(REPORT_S)
            except subprocess.TimeoutExpired:
                pass
            else:
                time.sleep(0.5)
            found = results(options.results)
            seconds = time.monotonic() - began
            show(found, of=options.schedules, seconds=seconds, new=len(found) - before)
    finally:
        for worker in workers:
            worker.terminate()
    found = {
        seed: one for seed, one in results(options.results).items() if seed in seeds_of(options)
    }
    summary(found)
    bad = any("violation" in one for one in found.values())
    return 1 if bad or len(found) < options.schedules else 0


if __name__ == "__main__":
    raise SystemExit(main())
