"""Flower over a real federation: processes, mutual TLS, masked sums.

The app below uses Flower's public API and numpy, nothing of Minga; so do the strategies. What
comes out is compared with the same strategy on the single replies of the same app, which differs
by fixed-point rounding: the steps of the sum are 2**-21, see TOLERANCE.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import strategy

from coordinator.flower import run_strategy
from coordinator.flower_state import load
from coordinator.flower_strategies import record_of
from infra.runs.flower import OperatorFederation, open_grid
from infra.runs.plan_file import complete_plan, federation_of, read_initial_model
from infra.runs.submission import submit
from node_agent import flower as host
from protocols.errors import NotFoundError, RefusedError
from protocols.identifiers import RunId
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.support.federation import running
from tests.support.flower_rounds import plain_rounds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SITES = {"ar-archivo": 64, "br-saude": 32, "cl-usach": 128}  # examples, of a cap of 256
CAP = 256
SHAPES = {"w": (4,), "b": (1,)}
ROUNDS = 3
# Updates are rounded by chance to steps of 2**-21: three sites, weights of 7/8 together, so at
# most 1.7e-6 for each round. Adam divides by sqrt(v) + tau: near 0 it enlarges that up to 8-fold.
TOLERANCE = {"FedAvg": 1e-5, "FedAdam": 1e-4}
VECTOR = {"ring_bits": 24, "scale": {"first_bound": 1.0}}
DEADLINES = dict.fromkeys(("join", "train", "deal", "upload", "commit", "reveal"), 60)

# Logistic regression. It insists that its Context is kept from round to round.
APP = """
import json, os, time
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def rows(context):
    found = []
    for path in str(context.node_config["train-paths"]).split(os.pathsep):
        with open(path) as file:
            found += [json.loads(line) for line in file]
    return np.array([row["x"] for row in found]), np.array([row["y"] for row in found])


@app.train()
def train(msg: Message, context: Context) -> Message:
    config = msg.content["config"]
    memory = context.state.config_records.get("memory", ConfigRecord({"round": 0}))
    if config["server-round"] != memory["round"] + 1:
        raise RuntimeError(f"round {config['server-round']} after round {memory['round']}")
    context.state["memory"] = ConfigRecord({"round": config["server-round"]})
    time.sleep(config.get("pause-s", 0))
    model = {name: array.numpy().astype(float) for name, array in msg.content["arrays"].items()}
    x, y = rows(context)
    for _ in range(5):
        p = 1 / (1 + np.exp(-(x @ model["w"] + model["b"])))
        loss = -np.log(np.where(y == 1, p, 1 - p)).mean()
        model["w"] = model["w"] - config["lr"] * x.T @ (p - y) / len(y)
        model["b"] = model["b"] - config["lr"] * (p - y).mean()
    arrays = ArrayRecord()
    for name, array in model.items():
        arrays[name] = Array(array.astype(np.float32))
    metrics = MetricRecord({"num-examples": len(y), "train_loss": float(loss)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)
"""

STRATEGY_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam
from coordinator.flower import run_strategy
from infra.runs.flower import open_grid
from tests.conformance.test_flower_end_to_end import GRID, ROUNDS, start

folder, state = map(Path, sys.argv[1:])
with open_grid(name="adam", folder=folder, **GRID) as grid:
    run_strategy(FedAdam(fraction_evaluate=0.0), grid, start(), ROUNDS, config={"lr": 0.5},
                 state=state)
"""
GRID = {
    "app": "clinic:app",
    "roster": tuple(SITES),
    "weight_cap": CAP,
    "app_config": {"pause-s": 0.5},
    "plan": {"vector": VECTOR, "deadlines": DEADLINES},
}


def write_site(data: Path, site: str) -> None:
    """Numbers of one site: the sites differ in where their points lie."""
    rng = np.random.default_rng(list(SITES).index(site))
    x = rng.standard_normal((SITES[site], 4)) + 0.3 * list(SITES).index(site)
    y = (x @ [1.0, -2.0, 0.5, 0.0] + rng.standard_normal(len(x)) > 0.4).astype(int)
    data.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"x": list(a), "y": int(b)}) for a, b in zip(x, y, strict=True)]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three sites that allow the app, and nothing else."""
    folder = tmp_path_factory.mktemp("flower")
    apps = folder / "apps"
    apps.mkdir()
    (apps / "clinic.py").write_text(APP)
    with running(folder / "fed", nodes=sorted(SITES), start=False) as made:
        for site in SITES:
            write_site(made.federation.data_folder(site), site)
            path = made.federation.node_folder(site) / "config.toml"
            text = path.read_text()
            for old, new in (
                ('local_steps = ["builtin", "synthetic"]', 'local_steps = ["flower"]'),
                ("flower_apps = []", 'flower_apps = ["clinic:app"]'),
                ("# [flower]", f'[flower]\npython_path = ["{apps}"]'),
            ):
                assert old in text
                text = text.replace(old, new)
            path.write_text(text)
            made.start_node(site)
        yield made


@pytest.fixture(scope="module")
def wanted(federation):
    """By strategy: what it makes of single replies of the same app, here in this process."""
    apps = federation.folder.parent / "apps"
    app = host.load_app("clinic:app", host.Site(python_path=(apps,)))

    def site(name):
        data = federation.federation.data_folder(name) / "train.jsonl"
        context = Context(1, 1, {"train-paths": str(data)}, RecordDict(), {})

        def step(model, config):
            arrays = ArrayRecord({key: Array(array) for key, array in model.items()})
            told = ConfigRecord({**config, "lr": 0.5})
            message = Message(RecordDict({"arrays": arrays, "config": told}), 5, "train")
            return {k: a.numpy() for k, a in app(message, context).content["arrays"].items()}

        return step

    def made(name):
        sites = {each: (SITES[each], site(each)) for each in SITES}
        return plain_rounds(fresh(name), sites, zeros(), ROUNDS)

    found = {name: made(name) for name in TOLERANCE}
    assert furthest(found["FedAvg"], zeros()) > 0.3  # it learns
    assert furthest(found["FedAvg"], found["FedAdam"]) > 0.05  # and the strategy matters
    return found


def fresh(name):
    return getattr(strategy, name)(fraction_evaluate=0.0)


def zeros():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def start():
    return record_of(zeros())


def furthest(a, b):
    assert list(a) == list(b) == list(SHAPES)
    return max(float(np.abs(a[name] - b[name]).max()) for name in SHAPES)


def plain(record):
    return {name: array.numpy() for name, array in record.items()}


def submit_plan(federation, run: str, optimizer: str) -> RunId:
    """A plan whose rounds are Minga's own; the outer optimizer makes the next model."""
    folder = federation.folder / "start" / run
    folder.mkdir(parents=True)
    manifest = Manifest(tuple(TensorSpec(name, shape) for name, shape in SHAPES.items()))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    np.zeros(manifest.coordinates, "<f4").tofile(folder / "theta.f32")
    model = read_initial_model(folder)
    operator = federation.federation.operator()
    written = {
        "run": run,
        "mode": "aggregate-only",
        "roster": sorted(SITES),
        "min_participants": 3,
        "rounds": ROUNDS,
        "model": {"family": "vector"},
        "local_step": {"kind": "flower", "app": "clinic:app", "lr": 0.5},
        "outer": {"optimizer": optimizer},
        "vector": VECTOR | {"weight_cap_tokens": CAP},
        "deadlines": DEADLINES,
    }
    keys = federation.client.signing_keys()
    submit(
        federation.client,
        complete_plan(written, model, federation_of(operator.certificate), keys),
        model,
    )
    return RunId(run)


def trained_once(report) -> None:
    """Every round of the run was released at its first try, with all sites in it."""
    assert report.status == "done"
    for round_ in report.rounds:
        assert round_.released, round_.why
        assert round_.metrics["nodes"] == 3
        assert round_.metrics["weight"] == sum(SITES.values()) * 65_536 // CAP


@pytest.mark.parametrize(
    ("optimizer", "name"), [("average", "FedAvg"), ("flower:FedAdam", "FedAdam")]
)
def test_an_app_as_the_local_step_of_a_plan(federation, wanted, optimizer, name):
    run = submit_plan(federation, name.lower(), optimizer)
    report = federation.confirmed(run)

    trained_once(report)
    assert len(report.rounds) == ROUNDS
    for round_ in report.rounds:  # every node computed the same next model, Adam's too
        assert {entry.confirmed for entry in round_.traffic} == {round_.model_out}
    operator = federation.federation.operator()
    served = OperatorFederation(
        client=federation.client, federation=federation_of(operator.certificate)
    )
    theta = served.theta(report.released[-1].next_snapshot)
    made = {"w": theta[:4], "b": theta[4:]}
    assert furthest(made, wanted[name]) < TOLERANCE[name]


def test_an_unmodified_strategy_over_the_grid(federation, wanted):
    with open_grid(name="avg", folder=federation.folder, **GRID) as grid:
        result = run_strategy(fresh("FedAvg"), grid, start(), ROUNDS, config={"lr": 0.5})

    assert furthest(plain(result.arrays), wanted["FedAvg"]) < TOLERANCE["FedAvg"]
    losses = [result.metrics[number]["train_loss"] for number in (1, 2, 3)]
    assert losses == sorted(losses, reverse=True)
    for number in (1, 2, 3):
        trained_once(federation.client.show(RunId(f"avg-{number}")))


def test_a_strategy_whose_process_is_killed(federation, wanted, tmp_path):
    """SIGKILL in the middle of round 2: whoever starts it again finds that round under way."""
    state = tmp_path / "adam.npz"
    command = [sys.executable, "-c", STRATEGY_PROCESS, str(federation.folder), str(state)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 120
        while not begun(federation, "adam-2"):
            assert child.poll() is None, child.stderr.read().decode()
            assert time.monotonic() < give_up, federation.logs()
            time.sleep(0.02)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert load(state).round == 1  # else nothing was tested: round 2 was over
    with open_grid(name="adam", folder=federation.folder, **GRID) as grid:
        result = run_strategy(
            fresh("FedAdam"), grid, start(), ROUNDS, config={"lr": 0.5}, state=state
        )

    assert result.resumed_after == 1
    assert furthest(plain(result.arrays), wanted["FedAdam"]) < TOLERANCE["FedAdam"]
    names = [run.run for run in federation.client.runs() if run.run.startswith("adam-")]
    assert sorted(names) == ["adam-1", "adam-2", "adam-3"]
    for name in names:
        report = federation.client.show(RunId(name))
        trained_once(report)
        assert len(report.rounds) == 1


def begun(federation, run: str) -> bool:
    try:
        federation.client.show(RunId(run))
    except NotFoundError:
        return False
    return True


def test_an_app_that_a_site_does_not_allow(federation):
    """The site has the last word, and the strategy's process hears why."""
    with open_grid(name="other", folder=federation.folder, **GRID | {"app": "json:app"}) as grid:
        grid.admit(fresh("FedAvg"))
        messages = fresh("FedAvg").configure_train(1, start(), ConfigRecord({"lr": 0.5}), grid)
        names = list(grid.push_messages(messages))
        federation.wait(RunId("other-1"), lambda run: bool(run.rounds and run.rounds[0].ended))
        federation.client.stop(RunId("other-1"), "seen enough")
        federation.wait(RunId("other-1"))
        with pytest.raises(RefusedError, match="does not allow the Flower app json:app"):
            grid.pull_messages(names)
