"""A node agent whose worker is tests/support/fake_worker.py: all of a node without its torch.

python -m tests.support.light_node --dir NODE_FOLDER [--finish-within-s S]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

from node_agent.agent import serve
from node_agent.client import Backoff
from node_agent.config import NodeFolder, load_config
from node_agent.launchers.local import LocalLauncher
from node_agent.lock import FolderLock
from node_agent.site import open_site
from node_agent.spool import Spool

ROOT = Path(__file__).parents[2]


def launcher(folder: NodeFolder, *, finish_within_s: float) -> LocalLauncher:
    """The real launcher; its command starts the light worker."""
    spool = Spool(folder.spool.resolve()).make()
    command = [
        *(sys.executable, "-m", "tests.support.fake_worker", "--spool", str(spool.root)),
        *("--exit-with-parent", "--parent-pid", str(os.getpid())),
    ]
    return LocalLauncher(
        spool=spool,
        command=lambda: command,
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
        start_within_s=120.0,
        hangs_after_s=120.0,
        finish_within_s=finish_within_s,
        rng=Random(1),
        backoff=Backoff(first_s=0.01, cap_s=0.02),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--finish-within-s", type=float, default=300.0)
    options = parser.parse_args()
    folder = NodeFolder(options.dir)

    async def work() -> None:
        site = open_site(folder, load_config(folder), rng=Random(1))
        light = launcher(folder, finish_within_s=options.finish_within_s)
        await serve(replace(site, launchers={"builtin": light}))

    with FolderLock(folder, pid=os.getpid()):
        asyncio.run(work())


if __name__ == "__main__":
    main()
