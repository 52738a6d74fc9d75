"""What the Slurm launcher decides, what it reads, and the batch script it writes: all pure."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from node_agent.launchers.slurm import Memory, SlurmLauncher, read_memory
from node_agent.launchers.slurm_commands import Slurm, slurm_environment
from node_agent.launchers.slurm_config import LauncherConfig
from node_agent.launchers.slurm_rules import (
    Allocation,
    Facts,
    JobSeen,
    WorkerEnd,
    decide,
    find,
    how_it_ended,
    read_accounts,
    read_ends,
    read_queue,
    span,
    waits_line,
    why_not_join,
)
from node_agent.launchers.slurm_script import job_name, write_script
from node_agent.spool import Spool
from protocols.errors import ConfigurationError, MalformedMessageError

NEW = Allocation(nonce="ab12", name="minga-usach-ab12", intended_at=1000.0)
JOB = replace(NEW, job=17)
STARTED = replace(JOB, started_at=1100.0, served=True)


def seen(state: str, **changes) -> JobSeen:
    values = {
        "job": 17,
        "name": "minga-usach-ab12",
        "comment": "minga-usach-ab12",
        "state": state,
        "reason": "",
        "submitted": 1000.0,
        "starts": None,
        "restarts": 0,
    }
    return JobSeen(**values | changes)


def facts(**changes) -> Facts:
    values = {
        "now": 1200.0,
        "allocation": STARTED,
        "seen": seen("RUNNING"),
        "asked": True,
        "wanted": True,
        "expected": False,
        "worker_ready": True,
        "idle_release_s": 900.0,
        "start_within_s": 300.0,
        "hangs_after_s": 120.0,
        "keep_late": True,
    }
    return Facts(**values | changes)


@pytest.mark.parametrize(
    ("change", "action", "says"),
    [
        ({"allocation": None, "wanted": False}, "wait", "asleep"),
        ({"allocation": None}, "submit", "asking Slurm"),
        ({"allocation": None, "wanted": False, "expected": True}, "submit", "asking Slurm"),
        ({"allocation": None, "held": "somebody said no"}, "wait", "somebody said no"),
        ({"allocation": None, "resting_s": 7.0}, "wait", "in 7 s"),
        ({"asked": False}, "wait", "asking Slurm about Slurm job 17"),
        # A crash between sbatch and its answer: by the name, or it never was.
        ({"allocation": NEW, "seen": seen("PENDING")}, "adopt", "Slurm job 17 is this node's"),
        ({"allocation": NEW, "seen": None, "now": 1029.0}, "wait", "looking for"),
        ({"allocation": NEW, "seen": None, "now": 1030.0}, "settle", "was never handed in"),
        ({"allocation": JOB, "seen": None, "now": 1029.0}, "wait", "looking for Slurm job 17"),
        ({"seen": None}, "settle", "does not know Slurm job 17"),
        ({"allocation": JOB, "seen": seen("PENDING", reason="Resources")}, "wait", "(Resources)"),
        (
            {"allocation": JOB, "seen": seen("PENDING"), "wanted": False, "keep_late": False},
            "cancel",
            "nothing is left to do",
        ),
        ({"allocation": JOB, "seen": seen("PENDING"), "wanted": False}, "wait", "queued in Slurm"),
        ({}, "wait", "serving"),
        ({"worker_ready": False}, "wait", "starting its worker"),
        ({"silent_s": 119.0}, "wait", "serving"),
        ({"silent_s": 120.0}, "kill_step", "no sign of life for 120 s"),
        ({"silent_s": 120.0, "killed_step": True}, "wait", "serving"),
        ({"silent_s": 120.0, "worker_ready": False}, "wait", "starting"),
        ({"silent_s": 300.0, "worker_ready": False}, "kill_step", "not ready after 300 s"),
        ({"idle_s": 900.0, "wanted": False}, "drain", "nothing to do for 900 s"),
        ({"idle_s": 900.0}, "wait", "serving"),
        ({"idle_s": 900.0, "wanted": False, "expected": True}, "wait", "serving"),
        (
            {"allocation": replace(STARTED, asked_to_end="idle"), "idle_s": 1e6, "wanted": False},
            "wait",
            "is ending: idle",
        ),
        ({"seen": seen("COMPLETING")}, "wait", "running"),
        ({"seen": seen("CANCELLED")}, "settle", "CANCELLED"),
        ({"seen": seen("SOMETHING_NEW")}, "settle", "SOMETHING_NEW"),
    ],
)
def test_decide(change, action, says):
    answer = decide(facts(**change))

    assert answer.action == action
    assert says in answer.why


END = WorkerEnd(job=17, restarts=0, attempt=1, status=0, why="walltime")


@pytest.mark.parametrize(
    ("allocation", "state", "ends", "kind", "loss"),
    [
        (NEW, None, (), "never", False),
        (STARTED, "COMPLETED", (END,), "walltime", False),
        (replace(STARTED, served=False), "COMPLETED", (END,), "walltime", True),
        (STARTED, "TIMEOUT", (), "walltime", False),
        (STARTED, "CANCELLED", (), "person", False),
        (JOB, "CANCELLED", (), "person", False),
        (replace(STARTED, asked_to_end="idle"), "CANCELLED", (), "released", False),
        (replace(STARTED, asked_to_end="idle"), None, (), "released", False),
        (STARTED, "NODE_FAIL", (), "site", False),
        (STARTED, "PREEMPTED", (), "site", False),
        (STARTED, "FAILED", (replace(END, status=7, why="none"),), "failed", True),
        (STARTED, "OUT_OF_MEMORY", (), "failed", True),
        (STARTED, "COMPLETED", (replace(END, why="agent"),), "released", False),
        (STARTED, None, (END,), "walltime", False),  # gone from the queue, no accounting
        (STARTED, None, (), "unknown", True),
    ],
)
def test_how_it_ended(allocation, state, ends, kind, loss):
    ended = how_it_ended(allocation, state, ends)

    assert (ended.kind, ended.loss) == (kind, loss)
    assert "\n" not in ended.sentence


@pytest.mark.parametrize(
    ("allocation", "shown", "says"),
    [
        (None, None, None),
        (JOB, None, None),
        (STARTED, seen("RUNNING"), None),
        (JOB, seen("PENDING"), None),  # it tries once
        (replace(JOB, missed=1), seen("PENDING"), "a round was over before it started"),
        (replace(JOB, missed=2), seen("PENDING"), "2 rounds were over"),
        (JOB, seen("PENDING", starts=1200.0 + 1801.0), "too late for a round of 60 min"),
        (replace(JOB, missed=1), seen("PENDING", starts=1200.0 + 1799.0), None),
        (replace(JOB, missed=1), seen("PENDING", starts=1100.0), "over before"),  # an old guess
    ],
)
def test_which_rounds_are_not_joined(allocation, shown, says):
    why = why_not_join(allocation, shown, now=1200.0, round_s=3600.0)

    assert why is None if says is None else says in why


class Deaf(Slurm):
    """A controller that does not answer until it is let."""

    answers = threading.Event()
    asked = 0

    def queue(self):
        Deaf.asked += 1
        self.answers.wait(60)
        return (seen("RUNNING"),)


def test_a_controller_that_does_not_answer_does_not_stop_the_node(tmp_path):
    launcher = SlurmLauncher(
        spool=Spool(tmp_path).make(),
        config=LauncherConfig(kind="slurm", python="/p", on_stop="keep"),
        institution="usach",
        worker=("w",),
        ranks=1,
        environment={},
        slurm=Deaf({}),
        start_within_s=60.0,
        hangs_after_s=60.0,
        rng=Random(1),
    )
    launcher.marks.root.mkdir()
    launcher._save(Memory(allocation=JOB))

    async def drive() -> None:
        launcher.clear_leftovers()
        for _ in range(3):
            await launcher.tick()
        assert Deaf.asked == 1  # one question at a time
        assert "asking Slurm about" in launcher.state or launcher.state == "asleep"
        Deaf.answers.set()
        while "is running" not in launcher.state:
            await launcher.tick()
        await launcher.close()

    asyncio.run(asyncio.wait_for(drive(), 60))
    assert read_memory(launcher.marks.record).allocation.started_at is not None
    # It was not given back at once, however long this agent has had nothing to do.
    assert not read_memory(launcher.marks.record).allocation.asked_to_end


# -- what Slurm says -------------------------------------------------------------------------------


def answer(**job) -> bytes:
    return json.dumps({"meta": {}, "errors": [], "jobs": [{"job_id": 17, **job}]}).encode()


@pytest.mark.parametrize(
    "job",
    [
        {  # 22.05
            "name": "n", "comment": "c", "job_state": "PENDING", "state_reason": "Resources",
            "submit_time": 1000, "start_time": 1300, "restart_cnt": 2,
        },
        {  # 23.11
            "name": "n", "comment": "c", "job_state": ["PENDING"], "state_reason": "Resources",
            "submit_time": {"set": True, "infinite": False, "number": 1000},
            "start_time": {"set": True, "infinite": False, "number": 1300}, "restart_cnt": 2,
        },
    ],
)  # fmt: skip
def test_both_ways_in_which_squeue_speaks(job):
    expected = seen("PENDING", name="n", comment="c", reason="Resources", starts=1300.0, restarts=2)
    assert read_queue(answer(**job)) == (expected,)


def test_an_unknown_start_is_unknown():
    for start in (0, {"set": False, "infinite": False, "number": 0}, None):
        (job,) = read_queue(answer(job_state="PENDING", start_time=start))
        assert job.starts is None


@pytest.mark.parametrize(
    "data",
    [b"", b"slurm_load_jobs error", b"[]", b"{}", b'{"jobs":[1]}', answer(), answer(job_state=[]),
     b'{"jobs":[{"job_state":"RUNNING"}]}', b'{"jobs":' + b"[" * 5000],
)  # fmt: skip
def test_what_is_no_answer_of_squeue_is_refused(data):
    with pytest.raises(MalformedMessageError):
        read_queue(data)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_answer_is_read_or_refused(data):
    with suppress(MalformedMessageError):
        read_queue(data)


@pytest.mark.parametrize("state", ["CANCELLED by 1000", ["CANCELLED"], {"current": "CANCELLED"},
                                   {"current": ["CANCELLED"], "reason": "None"}])  # fmt: skip
def test_accounting(state):
    assert read_accounts(answer(state=state), 17) == "CANCELLED"
    assert read_accounts(answer(state=state), 18) is None


def test_an_allocation_is_found_by_its_number_or_its_name():
    other = seen("RUNNING", job=3, name="minga-usach-9999", comment="")
    mine = seen("RUNNING", job=4, name="x", comment="minga-usach-ab12")

    assert find([other, mine], NEW) == mine
    assert find([other], NEW) is None
    assert find([other, mine], replace(NEW, job=3)) == other
    assert find([mine], replace(NEW, job=5)) is None  # never another one by its name


def test_torn_lines_of_the_ends_are_left_out():
    text = "17 0 1 7 none\n9 0 1 0 drain\n17 0\n17 x 1 2 none\n17 1 1 0 walltime\n17 1 2 0 dr"

    assert [(end.restarts, end.status, end.why) for end in read_ends(text, 17)] == [
        (0, 7, "none"),
        (1, 0, "walltime"),
    ]


def test_words_for_waits():
    assert [span(s) for s in (0, 89, 90, 5400, 11_100)] == [
        "0 s", "89 s", "2 min", "1 h 30 min", "3 h 05 min",
    ]  # fmt: skip
    assert waits_line([]).startswith("no allocation")
    assert waits_line([30.0, 600.0, 7200.0]) == (
        "the last 3 allocations waited 10 min (median), at most 2 h 00 min, in the queue"
    )


def test_the_memory_survives_and_a_spoilt_one_is_no_memory(tmp_path):
    path = tmp_path / "allocation.json"
    assert read_memory(path) == Memory()
    for text in ("garbage", "{}", '{"allocation":{"odd":1},"waits":[]}', "[]"):
        path.write_text(text)
        assert read_memory(path) == Memory()


# -- the batch script ------------------------------------------------------------------------------

SITE = LauncherConfig(
    kind="slurm",
    partition="gpu",
    account="latam",
    nodes=12,
    gpus_per_node=8,
    cpus_per_task=64,
    memory="0",
    sbatch=("--exclusive", "--constraint=h200&ib"),
    setup=("module load cuda/12.6",),
    environment={"NCCL_DEBUG": "WARN"},
    python="/shared/minga/.venv/bin/python",
)


def script(config: LauncherConfig = SITE, **changes) -> str:
    values = {
        "name": "minga-usach-ab12",
        "nonce": "ab12",
        "spool": Path("/shared/minga/usach/spool"),
        "worker": ("node_agent.worker", "--spool", "/shared/minga/usach/spool"),
        "ranks": 8,
        "environment": {"HF_HUB_OFFLINE": "1"},
    }
    return write_script(config, **values | changes)


def test_the_script_of_the_guide_is_what_is_written():
    """infra/slurm/example.sh: an administrator reads it before the first job runs."""
    pinned = Path(__file__).parents[2] / "infra" / "slurm" / "example.sh"

    assert script() == pinned.read_text(), "if it is meant: write it anew"


def test_one_process_needs_no_torchrun():
    text = script(LauncherConfig(kind="slurm", python="/p"), ranks=1)

    assert "torch.distributed.run" not in text
    assert "srun --kill-on-bad-exit=1 --ntasks-per-node=1 /p -m node_agent.worker" in text


@pytest.mark.parametrize("config", [SITE, LauncherConfig(kind="slurm", python="/p")])
def test_bash_can_read_it(config):
    done = subprocess.run(
        ["bash", "-n"], input=script(config), text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


HOSTILE = "x; touch /tmp/pwned\n#SBATCH --uid=0"


@pytest.mark.parametrize(
    "change",
    [
        {"partition": HOSTILE},
        {"partition": "a b"},
        {"partition": "--uid=0"},
        {"account": "$(id)"},
        {"qos": "`id`"},
        {"memory": "1G;id"},
        {"sbatch": ("--wrap=id",)},
        {"sbatch": ("--export=ALL",)},
        {"sbatch": ("--uid=0",)},
        {"sbatch": ("--signal=KILL@1",)},
        {"sbatch": ("-p gpu",)},
        {"sbatch": ("--nice=1 --uid=0",)},
        {"sbatch": ("--nice=1\n--uid=0",)},
        {"setup": ("module load a\nrm -rf /",)},
        {"environment": {"A=B; id #": "1"}},
        {"environment": {"LD": "a\nb"}},
        {"python": "python3"},
        {"python": "/p\nid"},
        {"warn_s": 60, "time_minutes": 2},
        {"nodes": 0},
        {"unknown": 1},
    ],
)
def test_values_that_would_mean_something_to_a_shell_are_refused(change):
    with pytest.raises(ValidationError):
        LauncherConfig(kind="slurm", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"spool": Path("/a b")},
        {"spool": Path("/a%j")},
        {"spool": Path('/a"$(id)')},
        {"spool": Path("relative")},
        {"name": "x\ny"},
        {"nonce": "$(id)"},
        {"environment": {"A B": "1"}},
        {"environment": {"A": "1\n2"}},
    ],
)
def test_paths_and_names_are_checked_too(change):
    with pytest.raises(ConfigurationError):
        script(**change)


@given(st.text(st.characters(blacklist_characters="\n\r\0", blacklist_categories=["Cs", "Cc"])))
def test_an_environment_is_quoted(value):
    """bash itself says what it read."""
    lines = script(LauncherConfig(kind="slurm", python="/p"), ranks=1, environment={"X": value})
    (line,) = [line for line in lines.split("\n") if line.startswith("export X=")]
    done = subprocess.run(
        ["bash", "-c", f'{line}; printf %s "$X"'], capture_output=True, check=True
    )
    assert done.stdout.decode() == value


def test_a_local_site_has_no_slurm_keys():
    with pytest.raises(ValidationError, match="nodes has a meaning only with"):
        LauncherConfig(nodes=2)
    assert LauncherConfig().kind == "local"


def test_sbatch_sees_no_secret():
    outside = {"PATH": "/bin", "SLURM_CONF": "/c", "MINGA_TOKEN": "secret", "SBATCH_ACCOUNT": "x"}

    assert slurm_environment(outside) == {"PATH": "/bin", "SLURM_CONF": "/c"}


def test_names():
    assert job_name("usach", "ab12") == "minga-usach-ab12"
    with pytest.raises(ConfigurationError):
        job_name("usach", "ab 12")
