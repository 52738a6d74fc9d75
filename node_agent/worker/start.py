"""Importing torch and putting one rank together; kept apart so that arguments are read first."""

from __future__ import annotations

import argparse
import os

# The worker never reads the network; transformers must not try.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch

from node_agent.resident import Clock, Duty, JobContext
from node_agent.spool import Job, Result, Spool, WorkerInfo
from node_agent.worker import distributed
from node_agent.worker.distributed import Ranks
from node_agent.worker.trainer import Options, Trainer
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest

_CHECKPOINTING = {"auto": None, "on": True, "off": False}


def duty(options: argparse.Namespace, spool: Spool, clock: Clock) -> Duty:
    """Join the ranks as rank 0.

    Raises:
        ConfigurationError: the devices are not as configured.
    """
    trainer, ranks = _make(options, spool, clock)

    def end() -> None:
        trainer.dismiss()
        distributed.leave()

    info = WorkerInfo(
        pid=os.getpid(),
        ranks=ranks.world,
        backend=ranks.backend,
        device=ranks.describe(),
        torch=str(torch.__version__),
        started_at=clock.now(),
    )
    return Duty(
        info=info,
        work=trainer.do,
        idle=trainer.idle,
        fatal=trainer.fatal,
        lost=lambda error: ranks.sharded and distributed.peer_lost(error),
        end=end,
    )


def follow(options: argparse.Namespace, spool: Spool, clock: Clock) -> None:
    """Join the ranks as another one and do what rank 0 says until it leaves.

    Raises:
        ConfigurationError: the devices are not as configured.
    """
    trainer, _ = _make(options, spool, clock)
    trainer.follow()
    distributed.leave()


def _make(options: argparse.Namespace, spool: Spool, clock: Clock) -> tuple[Trainer, Ranks]:
    def flower(job: Job, context: JobContext, plan: Plan, manifest: Manifest) -> Result:
        # flwr is imported only for plans that need it.
        from node_agent.flower import Site, run_app

        return run_app(job, context, plan, manifest, site=Site.of(options))

    ranks = distributed.start(options.device, environment=os.environ, timeout_s=options.timeout_s)
    made = Options(
        micro_batch=options.micro_batch,
        checkpointing=_CHECKPOINTING[options.checkpointing],
        put_away_every_s=options.checkpoint_every_s or None,
        flower=flower,
    )
    return Trainer(ranks, options=made, clock=clock, spool=spool), ranks
