"""The journal: what was said stands, and survives the process that said it."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from node_agent.journal import Journal, UploadRecord
from node_agent.rules import Refusal
from node_agent.secure_state import SecureKnown
from protocols.errors import (
    ConflictingUploadError,
    CorruptStateError,
    EquivocationError,
    NotFoundError,
)
from protocols.identifiers import RoundId
from tests.support.node import (
    FIRST,
    NOW,
    ROUND,
    RUN,
    SECOND,
    confirmed,
    digest,
    the_plan,
    uploaded,
)

NO = Refusal("site.data", "no text")


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "journal.sqlite", now=lambda: NOW)
    yield made
    made.close()


def join(journal, round_=ROUND, root=FIRST.model_root):
    return journal.add_decision(round_, index=0, start_root=root, refusal=None)


def test_what_was_said_is_there_after_a_restart(tmp_path):
    path = tmp_path / "journal.sqlite"
    first = Journal(path, now=lambda: NOW)
    first.add_run(the_plan())
    join(first)
    first.add_outcome(ROUND, left=None, detail={"steps": 3})
    first.add_upload(uploaded(), {"attempt": 1})
    first.add_receipt(ROUND, 1, b"r" * 32)
    first.add_confirm(confirmed(computed=SECOND.model_root, answered=False))
    first.close()

    again = Journal(path, now=lambda: NOW)
    assert again.run(RUN).plan == the_plan()
    assert again.round(ROUND).outcome == "ready"
    assert again.upload(ROUND, 1) == uploaded(receipt=b"r" * 32)
    assert again.confirm(ROUND) == confirmed(computed=SECOND.model_root, answered=False)
    assert [entry.what for entry in again.entries()] == [
        "plan",
        "join",
        "ready",
        "upload",
        "receipt",
        "confirm",
    ]
    again.close()


def test_a_commit_is_synced_before_it_returns(journal):
    """SQLite's own word: WAL with FULL syncs the log on every commit."""
    with journal._engine.connect() as connection:
        cursor = connection.connection.cursor()
        assert cursor.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert cursor.execute("PRAGMA synchronous").fetchone() == (2,)


def test_what_a_killed_process_committed_is_there(tmp_path):
    """SIGKILL right after each of 20 statements; nothing acknowledged is missing."""
    path = tmp_path / "journal.sqlite"
    script = f"""
import os, signal, sys
from pathlib import Path
from node_agent.journal import Journal
from protocols.identifiers import RoundId, RunId
from tests.support.node import FIRST, NOW
journal = Journal(Path({str(path)!r}), now=lambda: NOW)
for number in range(20):
    journal.add_decision(
        RoundId(RunId("r1"), number), index=number, start_root=FIRST.model_root, refusal=None
    )
    print(number, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = [int(line) for line in done.stdout.split()]

    journal = Journal(path, now=lambda: NOW)
    assert acknowledged == list(range(20))
    assert journal.open_rounds(RUN) == tuple(acknowledged)
    journal.close()


def test_what_is_remembered_is_never_older_than_what_was_written(journal):
    """Each row is asked for before and after each write: a memory kept too long convicts."""
    journal.add_run(the_plan())

    def rows():
        return (
            journal.run(RUN),
            journal.round(ROUND),
            journal.upload(ROUND, 1),
            journal.confirm(ROUND),
            journal.unsent_confirms(RUN),
            journal.stage(RUN),
        )

    seen = [rows(), rows()]
    assert seen[0] == seen[1]
    for write in (
        lambda: join(journal),
        lambda: journal.add_upload(uploaded(), {}),
        lambda: journal.add_receipt(ROUND, 1, b"r" * 32),
        lambda: journal.add_confirm(confirmed(computed=SECOND.model_root, answered=False)),
        lambda: journal.confirm_answered(ROUND),
        lambda: journal.add_stage(SecureKnown(round=ROUND, attempt=1, stage="ready")),
        lambda: journal.stop_run(RUN, NO),
    ):
        write()
        assert rows() != seen[-1]
        seen.append(rows())


def test_a_reader_of_another_process_remembers_nothing(journal, tmp_path):
    """`minga node journal` looks on while the agent writes."""
    reader = Journal(tmp_path / "journal.sqlite", now=lambda: NOW, read_only=True)
    assert reader.round(ROUND) is None
    join(journal)
    assert reader.round(ROUND).joined
    reader.close()


# -- nobody is told two things ---------------------------------------------------------------------


def test_the_first_decision_stands(journal):
    journal.add_decision(ROUND, index=0, start_root=FIRST.model_root, refusal=NO)

    assert join(journal).refusal == NO
    assert len(journal.entries()) == 1


def test_a_round_is_not_joined_from_two_models(journal):
    join(journal)

    with pytest.raises(EquivocationError):
        join(journal, root=SECOND.model_root)


def test_a_round_is_not_both_left_and_ready(journal):
    join(journal)
    journal.add_outcome(ROUND, left=NO, detail={})
    journal.add_outcome(ROUND, left=Refusal("other", "later"), detail={})  # the first stands

    with pytest.raises(EquivocationError):
        journal.add_outcome(ROUND, left=None, detail={})
    assert journal.round(ROUND).left == NO


def test_only_a_joined_round_has_an_outcome(journal):
    with pytest.raises(NotFoundError):
        journal.add_outcome(ROUND, left=None, detail={})


def test_an_attempt_has_one_vector(journal):
    journal.add_upload(uploaded(), {})
    journal.add_upload(uploaded(), {})  # the same again is no error

    with pytest.raises(ConflictingUploadError):
        journal.add_upload(replace(uploaded(), header=b'{"x":1}'), {})
    assert journal.upload(ROUND, 1) == uploaded()


def test_a_run_has_one_plan(journal):
    journal.add_run(the_plan())

    with pytest.raises(EquivocationError):
        journal.add_run(the_plan(title="another"))


def test_a_round_is_released_once(journal):
    journal.add_confirm(confirmed(computed=SECOND.model_root, answered=False))
    other = replace(confirmed(computed=SECOND.model_root, answered=False), sum=digest("other"))

    with pytest.raises(EquivocationError):
        journal.add_confirm(other)


def test_an_objection_and_the_end_of_the_part_in_the_run_are_one_write(journal, monkeypatch):
    """Killed between them, a run would have stopped whose objection is never said."""
    journal.add_run(the_plan())
    objection = replace(confirmed(computed=None, answered=False), objection="bad")

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_stop_run", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.add_confirm(objection, NO)
    assert journal.confirm(objection.round) is None
    assert journal.run(RUN).stopped is None

    journal.add_confirm(objection, NO)
    assert journal.confirm(objection.round) == objection
    assert journal.run(RUN).stopped == NO


def test_a_stopped_run_keeps_its_first_reason(journal):
    journal.add_run(the_plan())
    journal.stop_run(RUN, NO)
    journal.stop_run(RUN, Refusal("later", "later"))

    assert journal.run(RUN).stopped == NO


# -- reading ---------------------------------------------------------------------------------------


def test_entries_by_run_and_from_the_end(journal):
    journal.add_run(the_plan())
    for number in range(4):
        join(journal, RoundId(RUN, number))
    journal.note("start", {"pid": 1})

    assert [entry.what for entry in journal.entries(last=2)] == ["join", "start"]
    assert [entry.number for entry in journal.entries(run=RUN, last=2)] == [2, 3]
    assert [entry.id for entry in journal.entries(after=5)] == [6]


def test_the_files_of_a_run(journal):
    journal.add_upload(uploaded(), {})
    journal.add_upload(replace(uploaded(attempt=2), header=b"[]"), {})

    assert journal.upload_files(RUN) == {"r1.0.1.bin": ROUND, "r1.0.2.bin": ROUND}


def test_the_last_confirmed_round_of_each_run(journal):
    assert journal.last_confirmed() == ()
    for number in (0, 1, 2):
        record = replace(
            confirmed(computed=SECOND.model_root, answered=False), round=RoundId(RUN, number)
        )
        journal.add_confirm(record)
        if number < 2:
            journal.confirm_answered(record.round)

    assert journal.last_confirmed() == (RoundId(RUN, 1),)


def test_the_journal_is_private(tmp_path, journal):
    mode = stat.S_IMODE((tmp_path / "journal.sqlite").stat().st_mode)

    assert mode == 0o600


def test_reading_needs_a_journal(tmp_path):
    with pytest.raises(NotFoundError):
        Journal(tmp_path / "none.sqlite", now=lambda: NOW, read_only=True)
    assert not (tmp_path / "none.sqlite").exists()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look", None])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "journal.sqlite"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            other.execute("INSERT INTO meta VALUES ('schema', '99')")
        other.close()
    else:
        path.write_bytes(content)

    with pytest.raises(CorruptStateError):
        Journal(path, now=lambda: NOW)


def test_a_known_plan_is_not_parsed_again(journal):
    journal.add_run(the_plan())
    first = journal.run(RUN)

    assert journal.run(RUN, first).plan is first.plan


def test_secrets_stay_out_of_reprs():
    record = UploadRecord(
        round=ROUND,
        attempt=1,
        header=b"{}",
        signature=b"S" * 64,
        unit_hashes=(b"H" * 32,),
        file="f",
        receipt=None,
    )

    assert "SSSS" not in repr(record)
