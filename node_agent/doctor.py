"""`minga node doctor`: what keeps this node from taking part, each with what mends it.

Every check gives one finding, also when all is well. A check never raises: what it cannot find out
is itself a finding. Levels: ``ok``; ``warning``, the node works; ``refused`` (exit 3), somebody has
to change something; ``not_ready`` (exit 4), it may pass by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import SystemRandom
from typing import Any, Final, Literal, cast

from cryptography import x509

from node_agent import consent
from node_agent.client import Connection
from node_agent.config import NodeConfig, NodeFolder, load_config
from node_agent.journal import Journal
from node_agent.keys import KeyStore, TlsIdentity
from node_agent.launchers.local import LocalLauncher, check_started, worker_command
from node_agent.launchers.local import worker_environment as environment_of
from node_agent.launchers.slurm_commands import Slurm, SlurmBusyError, SlurmError
from node_agent.launchers.slurm_rules import waits_line
from node_agent.launchers.slurm_script import job_name
from node_agent.lock import lock_holder
from node_agent.model_folder import FolderError, open_folder
from node_agent.models import Models
from node_agent.site import site_capability, slurm_launcher
from node_agent.site_policy import load_site_rules
from node_agent.spool import Spool
from node_agent.trust_facts import governance_line, log_line
from node_agent.view import View, read_view
from node_agent.worker.data import index_corpus
from node_agent.worker.mixture import check_apart, slots_of
from node_agent.worker.text_files import DataError
from protocols.crypto.identity import Identity, identity_of_certificate
from protocols.errors import (
    FederationError,
    NotReadyError,
    UnreachableError,
)
from protocols.gen import rounds_pb2
from protocols.outer_optimizers import optimizer_for
from protocols.tensors.manifest import Manifest

Level = Literal["ok", "warning", "refused", "not_ready"]
CLOCK_LIMIT_S: Final = 30.0
EXPIRES_SOON: Final = timedelta(days=3)
_WORST: Final[dict[Level, int]] = {"ok": 0, "warning": 0, "not_ready": 4, "refused": 3}
_CUDA_PROBE: Final = (
    "import json, torch; print(json.dumps({'cuda': torch.cuda.is_available(),"
    " 'devices': torch.cuda.device_count() if torch.cuda.is_available() else 0}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str  # "clock", "certificate", …
    level: Level
    sentence: str
    mend: str = ""

    def facts(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


def ok(what: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(what=what, level="ok", sentence=sentence)


def exit_code(findings: Sequence[Finding]) -> int:
    """0; 3 when something has to be changed; 4 when it may pass by itself."""
    codes = {_WORST[finding.level] for finding in findings}
    return 3 if 3 in codes else max(codes, default=0)


# -- single checks, each a function of what was found --------------------------------------------


def check_certificate(
    identity: TlsIdentity, config: NodeConfig, now: datetime
) -> Iterator[Finding]:
    """Dates, name and issuer of the certificate."""
    leaf = x509.load_pem_x509_certificate(identity.chain)
    again = "join again with a new invitation: minga node join --token … --dir …"
    try:
        named = identity_of_certificate(leaf, config.federation)
    except FederationError as error:
        yield Finding(what="certificate", level="refused", sentence=str(error), mend=again)
        return
    if named != Identity("node", config.institution):
        sentence = f"it names {named}, config.toml says {config.institution}"
        yield Finding(what="certificate", level="refused", sentence=sentence, mend=again)
        return
    try:
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.root))
    except Exception:  # noqa: BLE001 - several libraries' errors, one meaning
        sentence = "keys/root.pem did not issue it"
        yield Finding(what="certificate", level="refused", sentence=sentence, mend=again)
        return
    until = f"{identity.not_after:%Y-%m-%d %H:%M}Z"
    if now >= identity.not_after:
        sentence = f"it expired at {until}"
        yield Finding(what="certificate", level="refused", sentence=sentence, mend=again)
    elif now < identity.not_before:
        yield Finding(
            what="certificate",
            level="refused",
            sentence=f"it is not valid before {identity.not_before:%Y-%m-%d %H:%M}Z",
            mend="set this machine's clock",
        )
    elif identity.not_after - now < EXPIRES_SOON:
        yield Finding(
            what="certificate",
            level="warning",
            sentence=f"it expires soon, at {until}",
            mend="leave the agent running: it renews by itself; else look at its diagnostics",
        )
    else:
        yield ok("certificate", f"in force until {until}, for {config.institution}")


def check_clock(offset_s: float) -> Finding:
    """The coordinator's clock against ours."""
    if abs(offset_s) > CLOCK_LIMIT_S:
        ahead = "behind" if offset_s > 0 else "ahead of"
        return Finding(
            what="clock",
            level="refused",
            sentence=f"this machine is {abs(offset_s):.0f} s {ahead} the coordinator",
            mend="set the clock and keep it set, for instance with chrony or systemd-timesyncd",
        )
    return ok("clock", f"{abs(offset_s):.1f} s from the coordinator's")


def check_data(
    name: str, paths: tuple[str, ...], *, needed: bool, weights: tuple[float, ...] = ()
) -> Finding:
    """Whether a site's text is there, readable and whole: all of it is read as the worker does."""
    what, key = f"data ({name})", f"config.toml [data] {name}"
    try:
        corpus = index_corpus(paths)
        if weights:
            slots_of(weights)
            check_apart(paths)
    except DataError as error:
        mends = {
            "data.malformed": "correct or remove that line or row; nothing is skipped silently",
            "data.weights": f"correct {key} and weights: one number for each, no file twice",
            "data.missing": f"correct {key}, or let the user who runs the agent read the files",
        }
        level: Level = (
            "refused" if needed or error.code in ("data.malformed", "data.weights") else "warning"
        )
        return Finding(
            what=what,
            level=level,
            sentence=str(error),
            mend=mends.get(error.code, f"name files with text in {key}"),
        )
    size = int(corpus.text.sum()) / 2**20
    return ok(what, f"{corpus.documents} documents in {len(corpus.files)} files, {size:.1f} MiB")


def check_budgets(config: NodeConfig) -> Finding:
    """Whether plans in private modes can be afforded at all."""
    mine = [b for b in config.privacy.budget if b.dataset == config.data.dataset]
    if not mine:
        return Finding(
            what="privacy",
            level="warning",
            sentence=f"data set {config.data.dataset} has no budget: private plans are declined",
            mend="write [[privacy.budget]] in config.toml",
        )
    told = ", ".join(f"epsilon {b.epsilon:g} at delta {b.delta:g} by {b.unit.value}" for b in mine)
    return ok("privacy", f"data set {config.data.dataset} may lose {told}")


def check_base_model(config: NodeConfig) -> Finding | None:
    """Whether the base model's folder can be used; its digest is checked against each plan.

    None: the site has none, and plans that name one are declined.
    """
    if config.worker.base_model is None:
        return None
    try:
        folder = open_folder(Path(config.worker.base_model))
        size = sum(file.stat().st_size for file in folder.files) / 2**30
    except (FolderError, OSError) as error:
        return Finding(
            what="base model",
            level="refused",
            sentence=str(error),
            mend="correct config.toml [worker] base_model, or take it out",
        )
    return ok("base model", f"{len(folder.files)} files, {size:.1f} GiB, in {folder.root}")


def check_devices(config: NodeConfig, probe: Callable[[], dict[str, Any]]) -> Finding:
    """Whether the GPUs that the config wants are there; asked of another process."""
    if config.worker.device == "cpu":
        return ok("devices", "the worker uses the CPU")
    try:
        found = probe()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Finding(
            what="devices",
            level="refused",
            sentence=f"torch cannot be started: {error!s:.200}",
            mend="install the node's packages: pip install 'minga[node]'",
        )
    devices = int(found.get("devices", 0))
    if config.worker.device == "cuda" and devices < config.worker.ranks:
        return Finding(
            what="devices",
            level="refused",
            sentence=f"config.toml wants {config.worker.ranks} CUDA devices, {devices} are here",
            mend="check the driver (nvidia-smi), or set [worker] device and ranks",
        )
    return ok(
        "devices", f"{devices} CUDA devices" if devices else "no GPU: the worker uses the CPU"
    )


def probe_cuda() -> dict[str, Any]:
    """Ask torch in a process of its own: the agent never imports it."""
    done = subprocess.run(
        [sys.executable, "-c", _CUDA_PROBE], capture_output=True, timeout=180, check=False
    )
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(last[-1] if last else f"status {done.returncode}")
    value = json.loads(done.stdout)
    if not isinstance(value, dict):
        raise TypeError("the probe did not answer with an object")
    return value


def check_disk(node: NodeFolder, view: View | None) -> Iterator[Finding]:
    """Room for the active runs' models, or for anything at all."""
    free = shutil.disk_usage(node.root).free
    if free < 2**30:
        yield Finding(
            what="disk",
            level="not_ready",
            sentence=f"{free / 2**20:.0f} MiB are free",
            mend="free some space, or move the node's folder",
        )
        return
    models, short = Models(node.models), False
    for seen in view.runs if view and node.journal.exists() else ():
        if seen.status != "active":
            continue
        journal = Journal(node.journal, now=lambda: datetime.now(UTC), read_only=True)
        try:
            record = journal.run(seen.run)
        finally:
            journal.close()
        path = models.manifest_path(seen.run)
        if record is None or not path.exists():
            continue
        size = Manifest.from_bytes(path.read_bytes()).coordinates
        buffers = len(optimizer_for(record.plan.outer).buffer_names)
        needed = consent.disk_needed(record.plan, size, buffers)
        used = sum(p.stat().st_size for p in models.folder(seen.run).rglob("*") if p.is_file())
        if free + used < needed:
            short = True
            yield Finding(
                what="disk",
                level="not_ready",
                sentence=f"run {seen.run} needs {needed / 2**30:.1f} GiB,"
                f" {(free + used) / 2**30:.1f} GiB can be used",
                mend="free some space, or move the node's folder",
            )
    if not short:
        yield ok("disk", f"{free / 2**30:.1f} GiB are free")


def check_policy(
    node: NodeFolder, config: NodeConfig, now: datetime, *, governed: bool
) -> Iterator[Finding]:
    """Whether the site's own policy can be read, and whether it declares every text.

    Where nothing that a consortium signed is asked for, undeclared texts are only a warning.
    """
    bad: Level = "refused" if governed else "warning"
    what, mend = "site policy", f"edit {node.policy} and {node.rules}; the sentence says where"
    try:
        site = load_site_rules(node)
    except FederationError as error:
        yield Finding(what=what, level="refused", sentence=str(error), mend=mend)
        return
    policy, own = site.policy, [name for name in site.rules.rules if name.startswith("site.")]
    yield ok(what, f"{len(policy.datasets)} data sets, {len(own)} rules of its own")
    undeclared = policy.undeclared((*config.data.train, *config.data.valid))
    if undeclared:
        sentence = f"no data set declares {undeclared[0]}"
        mend = f"name it in the paths of a [[datasets]] of {node.policy}"
        yield Finding(what=what, level=bad, sentence=sentence, mend=mend)
    for item in policy.datasets:
        if item.licence == "unknown" or item.jurisdiction == "XX" or not item.use:
            yield Finding(
                what=what,
                level=bad,
                sentence=f"data set {item.id} is not declared: licence, jurisdiction or use",
                mend=f"say in {node.policy} what these texts are and what they may be used for",
            )
    if not policy.open_at(site.local(now)):
        yield Finding(
            what=what,
            level="warning",
            sentence=f"it is {site.local(now):%a %H:%M} here, outside the site's hours",
            mend="nothing, if that is meant: rounds are declined until the hours begin",
        )


# -- all together --------------------------------------------------------------------------------


async def _ask(config: NodeConfig, identity: TlsIdentity) -> View:
    connection = Connection(config.coordinators, identity, rng=SystemRandom())
    try:
        request = rounds_pb2.SyncRequest(seen=0, wait_ms=0, state="")
        answer = await connection.call(connection.rounds.Sync, request, timeout_s=10.0)
        return read_view(answer)
    finally:
        await connection.close()


def _connection(
    config: NodeConfig, identity: TlsIdentity, found: list[Finding], now: Callable[[], datetime]
) -> View | None:
    try:
        view = asyncio.run(_ask(config, identity))
    except UnreachableError as error:
        found.append(
            Finding(
                what="coordinator",
                level="not_ready",
                sentence=str(error),
                mend=f"check that {config.coordinator} is right and reachable from here:"
                " outbound TCP, its name, its certificate",
            )
        )
    except FederationError as error:
        level: Level = "not_ready" if isinstance(error, NotReadyError) else "refused"
        found.append(
            Finding(what="coordinator", level=level, sentence=str(error), mend=error.advice)
        )
    else:
        found.append(ok("coordinator", f"{config.coordinator} answers, {len(view.runs)} runs"))
        found.append(check_clock((view.now - now()).total_seconds()))
        return view
    return None


def _worker_starts(node: NodeFolder, config: NodeConfig) -> Finding:
    if lock_holder(node) is not None:
        return ok("worker", "an agent is running and looks after it")
    spool = Spool(node.spool.absolute() / "doctor")
    launcher = LocalLauncher(
        spool=spool,
        command=lambda: worker_command(config.worker, spool, parent=os.getpid()),
        environment=environment_of(config.worker, os.environ),
        start_within_s=config.worker.start_within_s,
        hangs_after_s=config.worker.hangs_after_s,
        rng=SystemRandom(),
    )
    try:
        seconds = check_started(launcher, within_s=config.worker.start_within_s)
    except FederationError as error:
        mend = f"see {spool.root / 'worker.log'}"
        return Finding(what="worker", level="not_ready", sentence=str(error), mend=mend)
    shutil.rmtree(spool.root, ignore_errors=True)
    return ok("worker", f"ready after {seconds:.1f} s")


def check_slurm(
    node: NodeFolder, config: NodeConfig, slurm: Slurm, *, hand_in: bool
) -> Iterator[Finding]:
    """Whether Slurm would take this site's allocation, and when it would start."""
    what, mend = "slurm", "correct [launcher] in config.toml; infra/slurm/README.md explains it"
    missing = slurm.missing()
    if missing:
        sentence = f"{', '.join(missing)} cannot be found: is this a login node of the cluster?"
        yield Finding(what=what, level="refused", sentence=sentence, mend=mend)
        return
    launcher = slurm_launcher(node, config, rng=SystemRandom())
    held = launcher.held
    if held:
        yield Finding(what=what, level="refused", sentence=held, mend="minga node resume --dir …")
    try:
        text = launcher.script(job_name(config.institution, "doctor"), "doctor")
        if not hand_in:
            yield ok(what, f"a batch script for {config.launcher.nodes} nodes can be written")
            return
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "doctor.sh"
            script.write_text(text, encoding="utf-8")
            said = slurm.test(script)
    except SlurmBusyError as error:
        again = "try again later; Slurm's controller must be reachable from here"
        yield Finding(what=what, level="not_ready", sentence=str(error), mend=again)
    except (SlurmError, FederationError) as error:
        yield Finding(what=what, level="refused", sentence=str(error), mend=mend)
    else:
        yield ok(what, said)
    yield ok("slurm queue", f"{waits_line(launcher.waits)}: plans' deadlines should allow for it")


def examine(
    folder: Path,
    *,
    start_worker: bool = True,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    probe: Callable[[], dict[str, Any]] = probe_cuda,
) -> list[Finding]:
    """Look at everything; every finding, the good ones too.

    Args:
        folder: of the node.
        start_worker: whether to start the training worker once.
        now: UTC.
        probe: asks another process about GPUs.
    """
    node = NodeFolder(folder)
    try:
        config = load_config(node)
    except FederationError as error:
        mend = "correct the file, or join with `minga node join`"
        return [Finding(what="config", level="refused", sentence=str(error), mend=mend)]
    found = [ok("config", f"{config.institution} of federation {config.federation}")]
    keys, view = KeyStore(node.keys), None
    try:
        identity = keys.tls()
        keys.signing_key()
    except FederationError as error:
        mend = "join again with a new invitation: minga node join --token … --dir …"
        found.append(Finding(what="certificate", level="refused", sentence=str(error), mend=mend))
    else:
        found.extend(check_certificate(identity, config, now()))
        view = _connection(config, identity, found, now)
    for what, (level, sentence) in (
        ("governance", governance_line(node, config, now())),
        ("round log", log_line(node, config)),
    ):
        found.append(Finding(what=what, level=cast("Level", level), sentence=sentence))
    governed = (node.keys / "trust-root.json").exists()
    if governed or node.policy.exists() or node.rules.exists():
        found.extend(check_policy(node, config, now(), governed=governed))
    trains = {"builtin", "flower"} & set(config.allow.local_steps)
    found.append(
        check_data("train", config.data.train, needed=bool(trains), weights=config.data.weights)
    )
    found.append(check_data("valid", config.data.valid, needed=False))
    found.append(check_budgets(config))
    if (base := check_base_model(config)) is not None:
        found.append(base)
    found.extend(check_disk(node, view))
    if trains:
        found.append(ok("capability", str(site_capability(config))))
    if trains and config.launcher.slurm:
        found.extend(check_slurm(node, config, Slurm.here(), hand_in=start_worker))
    elif trains:
        found.append(check_devices(config, probe))
        if start_worker:
            found.append(_worker_starts(node, config))
    return found
