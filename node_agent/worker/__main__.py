"""``python -m node_agent.worker --spool DIR``: one rank of the resident worker.

Started by torchrun (one process per rank) or directly (one process, no torchrun: a second or two
and a few hundred megabytes less). Exit status: 0 told to leave, 2 usage, 3 the machine is not as
configured, 4 the spool is taken, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from node_agent.resident import Clock, Duty, Pulse, Stop, add_arguments, end_at_once, live, watched
from node_agent.spool import Spool
from protocols.errors import FederationError, exit_status


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m node_agent.worker", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=0,
        metavar="ROWS",
        help="sequences per forward pass of a rank; 0 takes the whole batch at once",
    )
    parser.add_argument(
        "--checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="recompute activations instead of keeping them; auto: large models on CUDA",
    )
    parser.add_argument(
        "--checkpoint-every-s",
        type=float,
        default=600.0,
        help="of training: put the middle of a round away, for a worker that is killed; 0: never",
    )
    parser.add_argument(
        "--timeout-s", type=float, default=3600.0, help="of one collective between ranks"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank until told to leave."""
    options = parse(arguments)
    spool = Spool(options.spool.absolute()).make()
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    stop = Stop(spool, watched=watched(options, through_launcher=launched))
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            _answer_for(options, spool, stop)
        else:
            _follow(options, spool, stop)
    except FederationError as error:
        print(f"worker: {error.diagnostics()}", file=sys.stderr)
        return exit_status(error)
    return 0


def _answer_for(options: argparse.Namespace, spool: Spool, stop: Stop) -> None:
    """Rank 0: holds the spool, answers jobs."""
    clock = Clock()

    def begin() -> Duty:
        from node_agent.worker.start import duty  # imports torch: seconds

        return duty(options, spool, clock)

    live(spool, begin=begin, stop=stop, clock=clock, lock_wait_s=options.lock_wait_s)


def _follow(options: argparse.Namespace, spool: Spool, stop: Stop) -> None:
    """Another rank: does what rank 0 says; signals are rank 0's to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Pulse(stop, touch=None).start()
    from node_agent.worker.start import follow

    follow(options, spool, Clock())


if __name__ == "__main__":
    end_at_once(main)
