"""Play many schedules: ``make soak ARGS='--schedules 10000 --seed 0'``.

Every finished schedule is a line in the results file, so a soak that was stopped goes on where it
was when it is started again with the same arguments. A schedule that breaks a promise is shrunk and
printed as a literal to keep in ``test_found.py``. Exit status: 0 nothing found, 1 something was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

REPORT_S = 10.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=Path("bench/out/soak.jsonl"))
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


def summary(found: dict[int, dict[str, object]]) -> None:
    """What was reached: a soak that disturbs nothing shows nothing."""
    ends: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for one in found.values():
        ends.update(one.get("ends", {}))  # type: ignore[arg-type]
        fired.update(one.get("fired", {}))  # type: ignore[arg-type]
        runs[str(one.get("status", "violation"))] += 1
    deaths = sum(int(str(one.get("deaths", 0))) for one in found.values())
    refused = sum(int(str(one.get("refused", 0))) for one in found.values())
    cpu = sum(float(str(one.get("cpu_s", 0))) for one in found.values())
    print(f"runs {dict(runs)}; rounds {dict(ends)}; processes killed {deaths}")
    print(f"calls disturbed {dict(fired)}; writes refused by a full disk {refused}")
    print(f"{cpu / max(1, len(found)):.2f} CPU seconds a schedule")


def main() -> int:
    options = arguments()
    if options.only is not None:
        from tests.simulation.schedules import play, schedule

        made = schedule(options.only)
        print(made)
        print(play(made))
        return 0
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
