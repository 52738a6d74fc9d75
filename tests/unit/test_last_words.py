"""The line that is quoted of a worker that ended, out of what torchrun 2.13 and Slurm print."""

import pytest

from node_agent.launchers.last_words import last_words, last_words_in, start_line

START = """
*****************************************
Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, to avoid
*****************************************
"""
API = "/venv/lib/python3.11/site-packages/torch/distributed/elastic/multiprocessing/api.py"
CLOSING = f"W1129 22:24:01.880000 28297 {API}:1028] Sending process 28302 closing signal SIGTERM\n"
FAILED = f"E1129 22:24:01.881000 28297 {API}:1002] failed (exitcode: 3) local_rank: 1 (pid: 283)\n"
TRACEBACK = """\
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/venv/lib/python3.11/site-packages/torch/distributed/elastic/errors.py", line 367, in wrapper
    return f(*args, **kwargs)
           ^^^^^^^^^^^^^^^^^^
  File "/venv/lib/python3.11/site-packages/torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
"""  # noqa: E501, W291
SAID = "worker: the worker was told to use CUDA, and torch finds no CUDA device [configuration]"
LOST = "RuntimeError: [/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
ITS_TRACEBACK = f"""\
Traceback (most recent call last):
  File "/minga/node_agent/resident.py", line 415, in end_at_once
    status = main()
             ^^^^^^
{LOST}
"""


def table(rank: int, exitcode: str, traceback: str) -> str:
    """torchrun's, of another rank that failed with status 1 and of the root cause."""
    return f"""\
============================================================
node_agent.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-29_22:24:07
  host      : localhost
  rank      : 7 (local_rank: 1)
  exitcode  : 1 (pid: 28312)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_22:24:07
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {exitcode}
  error_file: <N/A>
  traceback : {traceback}
============================================================
"""


STATUS_3 = table(1, "3 (pid: 28303)", "To enable traceback see: https://pytorch.org/docs/")
KILLED = table(0, "-9 (pid: 28311)  (SIGKILL)", "Signal 9 (SIGKILL) received by PID 28311")
SLURM = "srun: error: arica1: task 0: Exited with exit code 1\nslurmstepd: error: *** STEP\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("\n \n", ""),
        ("worker: leaving: drain\n", "worker: leaving: drain"),
        ("one\n  two   words \n\n", "two words"),
        (START + f"{SAID}\n{SAID}\n" + CLOSING + FAILED + TRACEBACK + STATUS_3, SAID),
        (
            START + ITS_TRACEBACK + FAILED + TRACEBACK + KILLED,
            f"rank 0 was ended by SIGKILL; {LOST}",
        ),
        (FAILED + TRACEBACK + KILLED, "rank 0 was ended by SIGKILL"),
        (f"{SAID}\n{SLURM}", SAID),
        (SLURM, "slurmstepd: error: *** STEP"),  # there is nothing else
        (TRACEBACK + KILLED + f"{SAID}\n" + TRACEBACK + STATUS_3 + SLURM, SAID),  # the last one
        (TRACEBACK + KILLED[:-61] + "\n", "rank 0 was ended by SIGKILL"),  # torn before its end
        ("=" * 60 + f"\n{SAID}\n" + "=" * 60, SAID),  # bars of its own
        ("x" * 1000, "x" * 400),
    ],
)
def test_the_worker_itself_is_quoted(text, expected):
    assert last_words(text) == expected


def test_only_the_end_of_a_log_is_read(tmp_path):
    log = tmp_path / "worker.log"
    assert last_words_in(log) == ""
    log.write_bytes(b"\xff" * 1_000_000 + f"\n{SAID}\n{SLURM}".encode())
    assert last_words_in(log) == SAID


def test_what_an_earlier_worker_said_is_not_quoted_for_this_one(tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("worker: leaving: drain\n")
    began = log.stat().st_size
    assert last_words_in(log, since=began) == ""  # it was killed before it said anything
    with log.open("a") as more:
        more.write(f"{SAID}\n")
    assert last_words_in(log, since=began) == SAID


def test_each_worker_of_a_job_has_its_own_words(tmp_path):
    """As the batch script writes them; the third was killed, and only Slurm says something."""
    log = tmp_path / "job-7.log"
    first, second, third = (start_line(0, number) for number in (1, 2, 3))
    srun = "srun: error: arica1: task 0: Killed"
    log.write_text(f"module load cuda\n{first}\n{SAID}\n{second}\n{LOST}\n{third}\n{srun}\n")

    assert [last_words_in(log, start=each) for each in (first, second, third)] == [SAID, LOST, srun]
    assert last_words_in(log, start=start_line(1, 1)) == "module load cuda"  # its own never came


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ChildFailedError:\n====\n" * 7000, ""),
        ("ChildFailedError:\n====\n" + "Root Cause\n rank : 1\n" * 7000, ""),
        ("Traceback (most recent call last):\n" + " a\n" * 50_000, "a"),
        ("\n" * 160_000, ""),
        ("_" * 160_000 + "a", "_" * 400),
    ],
)
def test_no_log_takes_long_to_read(text, expected):
    """The agent waits for it: a first version needed 9 s for a tenth of one of these."""
    assert last_words(text) == expected
