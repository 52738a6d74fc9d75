"""Work that was done and not sent goes into the next update: error feedback for late sites.

    spool/carry/<run>/
      late-<n>.f32, late-<n>.json    the update of round n, which never left this site
      take-<n>.json                  which of them round n's job adds to its own update
      unsent-<n>.json                round n's sum is public, and its vector is not in it
      mean.json                      steps of a site in the last round whose sum was opened

Each stretch of work is sent at most once, and once if any later round of the same tensors is:

    a job begins      the late updates of its tensors are named in take-<n>, once and for all
    its round is over sent:         what it took went with it, and is removed
                      not sent:     its own update, which holds what it took, becomes late-<n>
                      no update:    what it took waits for the next round

"Sent" is what this node knows of itself: a vector was made from it. That a round failed, or a word
of the coordinator's, does not unsay it, or the same work could be asked for in two sums. One thing
does: this node has no receipt for any vector of the round, and has checked the round's public sum
(``Actor._compute``) and how it was opened, and is not among those whose vectors are in it. No
second sum of a round is ever opened. In mode open, where nothing shows whose vectors are in a sum,
the coordinator is trusted to count every survivor once, here as elsewhere.

Every file appears by one rename, every step may be repeated after a crash: late-<n>.json names what
it holds, so nothing counts twice while the older files still lie there.

The same note of a job caps its steps at ``FASTEST`` times that mean: a site whose machine is ten
times faster would otherwise drift ten times as far in its time box. The mean is of public sums; a
median would need single values.

Never in a private mode (``carries``): there a round's work is charged when it is released, under
the noise and the steps of that round. Work of an earlier round inside it would be released without
having been charged.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from node_agent.spool import Result, Spool, atomic_write, publish
from protocols.canonical import parse_json
from protocols.errors import MalformedMessageError
from protocols.plan import Plan

FASTEST: Final = 4  # times the mean steps of the last round
STALE: Final = 4  # rounds: older work was done on a model that is no more
_NAME: Final = re.compile(r"(late|take|unsent)-(0|[1-9][0-9]{0,5})\.json", re.ASCII)

Selection = Literal["all", "none"] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Late:
    """An update that never left the site."""

    round: int
    selection: str  # canonical JSON of the tensors
    holds: frozenset[int]  # earlier late updates that are in it


def carries(plan: Plan) -> bool:
    """Whether late work of a plan may be carried over at all."""
    return plan.mode in ("open", "aggregate-only") and plan.local_step.kind == "builtin"


def folder_of(spool: Spool, run: str) -> Path:
    """Where a run's late work is."""
    return spool.root / "carry" / run


def delta_of(folder: Path, number: int) -> Path:
    """The values of one late update: float32, its selected tensors in manifest order."""
    return folder / f"late-{number}.f32"


def key_of(selection: Selection) -> str:
    """Tensors by name, in one spelling."""
    return json.dumps(selection if isinstance(selection, str) else list(selection))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, MalformedMessageError):
        return None  # what cannot be read is not carried: lost, as without this file
    return value if isinstance(value, dict) else None


def _found(folder: Path, kind: str) -> list[int]:
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(m[2]) for name in names if (m := _NAME.fullmatch(name)) and m[1] == kind)


def waiting(folder: Path) -> list[Late]:
    """The late updates that nothing else holds, oldest first."""
    found = []
    for number in _found(folder, "late"):
        value = _read(folder / f"late-{number}.json")
        if value is not None and delta_of(folder, number).exists():
            found.append(Late(number, str(value["selection"]), frozenset(value["holds"])))
    held = frozenset().union(*(late.holds for late in found))
    return [late for late in found if late.round not in held]


@dataclass(frozen=True, slots=True)
class Taken:
    """What was decided for one round's job."""

    late: tuple[int, ...]  # rounds
    max_steps: int | None


def taken(folder: Path, number: int) -> Taken | None:
    """What round ``number`` adds to its own update; None: that was not decided yet."""
    value = _read(folder / f"take-{number}.json")
    if value is None:
        return None
    return Taken(tuple(int(late) for late in value["late"]), value["max_steps"])


def note_mean(spool: Spool, run: str, number: int, *, steps: int, nodes: int) -> None:
    """Keep how many steps a site did on average in a round whose sum is public. Blocking."""
    folder = folder_of(spool, run)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    said = {"round": number, "steps": steps, "nodes": nodes}
    atomic_write(folder / "mean.json", json.dumps(said).encode())


def most_steps(mean: dict[str, Any] | None) -> int | None:
    """The cap on steps that follows from an earlier round; None: there is none. Pure."""
    if mean is None or mean["steps"] <= 0 or mean["nodes"] <= 0:
        return None
    return int(-(-FASTEST * mean["steps"] // mean["nodes"]))


def left_out(receipts: Sequence[bytes | None], *, listed: bool, objection: str) -> bool:
    """Whether a round's public sum shows that what this node made for it is not in it. Pure.

    Args:
        receipts: for each vector that this node made in the round; None: it has none.
        listed: whether this node is among those whose vectors were added.
        objection: what this node found wrong with the sum; empty: nothing.
    """
    return bool(receipts) and not any(receipts) and not listed and not objection


def _unsent(folder: Path, number: int) -> Path:
    return folder / f"unsent-{number}.json"


def note_unsent(spool: Spool, run: str, number: int) -> None:
    """Keep that a round's sum is public and has no vector of this node. Blocking."""
    folder = folder_of(spool, run)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(_unsent(folder, number), b"{}")


def was_sent(spool: Spool, run: str, number: int, *, made: bool) -> bool:
    """Whether a round's work counts as sent: see above. Blocking, short.

    Args:
        spool, run, number: of the round.
        made: whether a vector was made from its update.
    """
    return made and not _unsent(folder_of(spool, run), number).exists()


def choose(late: Sequence[Late], *, number: int, selection: str) -> list[int]:
    """Which late updates a round takes: of the very same tensors and not stale. Pure."""
    return [
        one.round
        for one in late
        if one.selection == selection and one.round < number <= one.round + STALE
    ]


def take(
    spool: Spool, run: str, number: int, selection: Selection
) -> tuple[tuple[str, ...], int | None]:
    """Decide what a round's job adds, once; asked again, the answer is the same. Blocking.

    Returns:
        Paths of late updates, and the most steps that the job may do.
    """
    folder = folder_of(spool, run)
    found = taken(folder, number)
    if found is None:
        chosen: list[int] = []
        if selection != "none":
            chosen = choose(waiting(folder), number=number, selection=key_of(selection))
        found = Taken(tuple(chosen), most_steps(_read(folder / "mean.json")))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        said = {"late": chosen, "max_steps": found.max_steps}
        atomic_write(folder / f"take-{number}.json", json.dumps(said).encode())
    return tuple(str(delta_of(folder, one)) for one in found.late), found.max_steps


def close(
    spool: Spool,
    run: str,
    number: int,
    *,
    sent: bool,
    result: Result | None,
    delta: Path,
    selection: Selection,
    keep: bool = True,
) -> bool:
    """A round is over: keep its work if it was not sent. Blocking; may be repeated.

    Args:
        spool, run, number: of the round.
        sent: what ``was_sent`` said.
        result: what the worker left, if it finished.
        delta: the update's file, which may be removed after this.
        selection: the tensors of the round.
        keep: whether unsent work is carried over at all.

    Returns:
        Whether work waits now that did not before.
    """
    folder = folder_of(spool, run)
    found = taken(folder, number)
    chosen = () if found is None else found.late
    kept = False
    if not sent and keep and result is not None and result.delta_coordinates and delta.exists():
        kept = _keep(folder, number, delta, key_of(selection), chosen)
    if sent or kept or (folder / f"late-{number}.json").exists():
        for one in chosen:
            _drop(folder, one)
    for late in waiting(folder):
        if late.round + STALE < number:
            _drop(folder, late.round)
    for old in _found(folder, "unsent"):
        if old + STALE < number:
            _unsent(folder, old).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (folder / f"take-{number}.json").unlink()
    return kept


def _keep(folder: Path, number: int, delta: Path, selection: str, holds: Sequence[int]) -> bool:
    if (folder / f"late-{number}.json").exists():
        return False
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    final = delta_of(folder, number)
    temporary = final.with_name(f".{final.name}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(delta, temporary)  # written and synced by the worker, never changed afterwards
    publish(temporary, final)
    said = {"selection": selection, "holds": list(holds)}
    atomic_write(folder / f"late-{number}.json", json.dumps(said).encode())
    return True


def _drop(folder: Path, number: int) -> None:
    """The description goes first: values without one are nothing."""
    (folder / f"late-{number}.json").unlink(missing_ok=True)
    delta_of(folder, number).unlink(missing_ok=True)


def claimed(spool: Spool, run: str, number: int) -> bool:
    """Whether a round's update was put aside: no vector may be made from it any more."""
    return (folder_of(spool, run) / f"late-{number}.json").exists()
