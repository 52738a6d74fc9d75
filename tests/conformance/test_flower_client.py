"""A Flower ClientApp that uses only Flower's public API runs under Minga, unmodified.

The first half guards the few Flower names that are not public: a new Flower must fail here and
nowhere else. The apps below are written as Flower's own templates are.
"""

from __future__ import annotations

import ast
import inspect
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from node_agent import flower, flower_state
from node_agent.flower_terms import parse_node_config, read_counts, read_evaluation
from node_agent.resident import Clock, Duty, JobFailedError, Stop, serve
from node_agent.spool import WorkerInfo, last_status, read_status, request_cancel
from protocols.errors import ConfigurationError, CorruptStateError
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.support.worker import ROOT, Site, events, final, make_plan, wait_for, worker

MANIFEST = Manifest((TensorSpec("w", (3, 2)), TensorSpec("b", (2,))))
INFO = WorkerInfo(pid=1, ranks=1, backend="none", device="flower", torch="none", started_at=1.0)

# Least squares on the site's own numbers: numpy and flwr's public names, nothing of Minga.
APP = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    w, b = msg.content["arrays"].to_numpy_ndarrays()
    lr = msg.content["config"]["lr"]
    rng = np.random.default_rng(context.node_config["partition-id"])
    x = rng.standard_normal((50, 3)).astype(np.float32)
    y = x @ np.ones((3, 2), dtype=np.float32) + 2
    error = x @ w + b - y
    seen = context.state.config_records.get("seen", ConfigRecord({"rounds": []}))
    seen["rounds"] = [*seen["rounds"], msg.content["config"]["server-round"]]
    context.state["seen"] = seen
    arrays = ArrayRecord()
    arrays["w"] = Array(w - lr * (x.T @ error / 50))
    arrays["b"] = Array(b - lr * error.mean(axis=0))
    metrics = MetricRecord(
        {"num-examples": 50, "train_loss": float((error**2).mean()), "rounds": len(seen["rounds"])}
    )
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)
"""

EVALUATED = """

@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    metrics = MetricRecord(
        {"num-examples": 7, "nll-nats/es": 12.5, "bytes/es": 40, "documents/es": 7, "acc": 0.5}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
"""


@pytest.fixture
def names():
    """Module names of this test, forgotten afterwards: Python caches modules by name."""
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("siteapp"):
            del sys.modules[name]
    sys.path[:] = path


COUNT = iter(range(10**6))


def make_site(tmp_path: Path, source: str, **plan) -> tuple[Site, flower.Site]:
    """A site whose plan names an app that lies in ``tmp_path/apps``."""
    name = f"siteapp{next(COUNT)}"
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps" / f"{name}.py").write_text(source, encoding="utf-8")
    local = {"kind": "flower", "app": f"{name}:app", "lr": 0.1} | plan.pop("local_step", {})
    made = make_plan(MANIFEST, config={}, local_step=local, **plan)
    theta = np.linspace(-0.5, 0.5, MANIFEST.coordinates, dtype=np.float32)
    site = Site.make(tmp_path / "site", theta=theta, manifest=MANIFEST, plan=made)
    lent = flower.Site(python_path=(tmp_path / "apps",), node_config={"partition-id": 3})
    return site, lent


def answer(site: Site, lent: flower.Site, *, clock: Clock | None = None) -> str:
    """Answer what waits, in this process."""
    stop = Stop(site.spool)
    clock = clock or Clock(sleep=lambda _: None)
    work = flower._duty(lent, clock).work
    duty = Duty(info=INFO, work=work, idle=lambda: stop.tell("nothing to do"))
    return serve(site.spool, duty=duty, stop=stop, clock=clock)


def by_hand(theta: np.ndarray, *, seed: int = 3, lr: float = 0.1) -> tuple[np.ndarray, float]:
    """The app's own step, from its source: the update and the loss."""
    w, b = theta[:6].reshape(3, 2), theta[6:]
    x = np.random.default_rng(seed).standard_normal((50, 3)).astype(np.float32)
    error = x @ w + b - (x @ np.ones((3, 2), dtype=np.float32) + 2)
    new = np.concatenate([(w - lr * (x.T @ error / 50)).ravel(), b - lr * error.mean(axis=0)])
    return new - theta, float((error**2).mean())


# -- the names that are not public ---------------------------------------------------------------


def test_the_internal_way_to_make_a_message_is_there():
    from flwr.app import Message, Metadata

    assert "metadata" in inspect.signature(Message.__init__).parameters
    assert list(inspect.signature(Metadata.__init__).parameters)[1:10] == [
        "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id",
        "group_id", "created_at", "ttl", "message_type",
    ]  # fmt: skip


def test_a_reply_refers_to_our_message_without_any_process_global_identity(tmp_path):
    from flwr.app import ConfigRecord, Message, RecordDict

    site, _ = make_site(tmp_path, APP)
    content = RecordDict({"config": ConfigRecord({"lr": 0.5})})
    sent = flower._message(content, "train", job=site.job(4), node=9, run=8, now=1e9 * 2)
    reply = Message(RecordDict(), reply_to=sent)

    assert sent.metadata.message_id == "tiny.4.train"
    assert reply.metadata.reply_to_message_id == "tiny.4.train"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (9, 1)
    assert reply.metadata.run_id == 8
    assert sent.content["config"]["lr"] == 0.5


def test_an_app_without_evaluate_says_so_in_these_words(tmp_path):
    from flwr.app import Context, RecordDict
    from flwr.clientapp import ClientApp

    site, _ = make_site(tmp_path, APP)
    sent = flower._message(RecordDict(), "evaluate", job=site.job(), node=9, run=8, now=2e9)
    with pytest.raises(ValueError, match=r"^No evaluate function registered") as refused:
        ClientApp()(sent, Context(8, 9, {}, RecordDict(), {}))

    assert not flower._evaluates(refused.value)
    assert flower._evaluates(ValueError("shapes do not match"))
    assert flower._evaluates(KeyError("No evaluate function registered"))


def test_private_flower_names_stay_in_two_functions():
    """Everything else imports from flwr.app and flwr.clientapp, and there is no other flwr here."""
    tree = ast.parse(Path(flower.__file__).read_text("utf-8"))
    imported = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flwr")
    }
    using = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if (isinstance(node, ast.Name) and node.id == "Metadata")
        or (isinstance(node, ast.Constant) and "function registered" in str(node.value))
    }
    assert imported == {"flwr.app", "flwr.clientapp"}
    assert using == {"_message", "_evaluates"}
    for other in (ROOT / "node_agent").rglob("*.py"):
        if other.name != "flower.py":
            assert "import flwr" not in other.read_text("utf-8"), other
            assert "from flwr" not in other.read_text("utf-8"), other


def test_flower_does_not_phone_home_from_here():
    code = "import node_agent.flower, os; print(os.environ['FLWR_TELEMETRY_ENABLED'],"
    code += "os.environ['FLWR_DISABLE_UPDATE_CHECK'], 'torch' in __import__('sys').modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
        env={"FLWR_TELEMETRY_ENABLED": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip

    assert found.stdout.split() == [b"0", b"1", b"False"]


# -- an app at work ------------------------------------------------------------------------------


def test_an_unmodified_app_trains(tmp_path, names):
    site, lent = make_site(tmp_path, APP)
    job = site.ask()
    answer(site, lent)

    wanted, loss = by_hand(site.theta)
    result = site.result(job)
    np.testing.assert_allclose(site.delta(job), wanted, atol=1e-7)
    assert np.abs(wanted).max() > 0.1
    assert (result.records, result.tokens, result.steps) == (50, 50, 1)
    assert result.loss_nats == pytest.approx(50 * loss)
    assert result.evaluation == ()  # the app has no such function
    assert result.device.startswith("flower:siteapp")


def test_only_the_selected_tensors_leave(tmp_path, names):
    site, lent = make_site(tmp_path, APP)
    job = site.ask(select=("b",))
    answer(site, lent)

    assert site.result(job).delta_coordinates == 2
    np.testing.assert_allclose(site.delta(job), by_hand(site.theta)[0][6:], atol=1e-7)


def test_the_context_is_kept_between_rounds_and_restarts(tmp_path, names):
    site, lent = make_site(tmp_path, APP)
    for number in (0, 1, 4):
        site.ask(number)
        answer(site, lent)
    rounds = [
        record.values["rounds"]
        for record in flower_state.load(site.spool.state("tiny"), 5)
        if record.name == "seen"
    ]
    assert rounds == [[1, 2, 5]]  # Flower counts from 1

    site.spool.result("tiny.4").unlink()  # the round is done again: from the state before it
    site.spool.status("tiny.4").unlink()
    answer(site, lent)
    kept = flower_state.load(site.spool.state("tiny"), 5)
    assert [r.values["rounds"] for r in kept if r.name == "seen"] == [[1, 2, 5]]
    names_ = sorted(path.name for path in site.spool.state("tiny").iterdir())
    assert names_ == ["000001.flower", "000004.flower"]


def test_runs_of_one_series_are_one_run_to_the_app(tmp_path, names):
    """Each round of a strategy is a run of its own; the app's Context must not start anew."""
    site, _ = make_site(tmp_path, APP)
    spool, run = site.spool, site.plan.run

    def told(app_config, **changes):
        step = site.plan.local_step.model_copy(update={"app_config": app_config} | changes)
        return site.plan.model_copy(update={"local_step": step})

    memories = [
        flower.memory_of(site.job(), told({"minga-series": series, "server-round": n}), spool)
        for series, n in (("credit", 1), ("credit", 2), ("other", 2))
    ]
    first, second, other = memories
    assert (first.folder, first.run_id) == (second.folder, second.run_id)
    assert (first.round, second.round) == (1, 2)
    assert other.folder != first.folder

    config = {"minga-series": "credit", "server-round": 2}
    another_app = flower.memory_of(site.job(), told(config, app="elsewhere:app"), spool)
    assert another_app.folder != first.folder

    own = spool.state(run)
    for nothing in ({}, {"minga-series": "credit"}, {"minga-series": 3, "server-round": 1},
                    {"minga-series": "credit", "server-round": 0}):  # fmt: skip
        memory = flower.memory_of(site.job(4), told(nothing), spool)
        assert (memory.folder, memory.round) == (own, 4)


def test_an_app_that_evaluates_gives_sums_per_language(tmp_path, names):
    site, lent = make_site(tmp_path, APP + EVALUATED)
    job = site.ask()
    last = site.ask(1, select="none")
    answer(site, lent)

    for each, steps in ((job, 1), (last, 0)):
        (row,) = site.result(each).evaluation
        assert (row.language, row.nll_nats, row.bytes, row.documents) == ("es", 12.5, 40, 7)
        assert site.result(each).steps == steps
    assert site.result(last).delta_coordinates == 0


def test_what_the_app_is_told(tmp_path, names):
    source = APP.replace(
        "    lr = msg",
        "    raise RuntimeError(repr(sorted(msg.content['config'].items())) + "
        "repr(context.run_config) + repr(sorted(context.node_config)))\n    lr = msg",
    )
    step = {"app_config": {"depth": 2, "name": "x"}, "max_steps": 9, "proximal_mu": 0.5}
    site, lent = make_site(tmp_path, source, local_step=step)
    job = site.ask(2, max_steps=7)
    answer(site, lent)

    told = last_status(site.spool, job.id).message
    assert "('server-round', 3)" in told
    assert "('max-steps', 7)" in told
    assert "('proximal-mu', 0.5)" in told
    assert "('depth', 2)" in told
    assert "{'depth': 2, 'name': 'x'}" in told
    assert "['partition-id', 'train-paths', 'valid-paths']" in told
    assert "max-seconds" not in told


def test_a_legacy_style_list_of_arrays_is_taken_in_order(tmp_path, names):
    source = APP.replace(
        'RecordDict({"arrays": arrays',
        'RecordDict({"arrays": ArrayRecord([arrays["w"].numpy(), arrays["b"].numpy()])',
    )
    site, lent = make_site(tmp_path, source)
    job = site.ask()
    answer(site, lent)

    np.testing.assert_allclose(site.delta(job), by_hand(site.theta)[0], atol=1e-7)


RETURN = "    return Message(RecordDict({"  # the last line of ``train``
LOSS = '"train_loss": float((error**2).mean())'
MISTAKES = {  # what the app does wrong -> (code, words of the sentence, edits of its source)
    "raises": (
        "flower.app",
        "raised ZeroDivisionError: division",
        [("    lr =", "    1 / 0; lr =")],
    ),
    "exits": (
        "flower.app",
        "raised SystemExit: 3",
        [("    lr =", "    raise SystemExit(3); lr =")],
    ),
    "is broken": ("flower.app", "cannot import", [("app = ClientApp()", "app = undefined")]),
    "has another name": (
        "flower.app",
        "has no app",
        [("app = ClientApp()", "flower_app = ClientApp()"), ("@app.train", "@flower_app.train")],
    ),
    "is no ClientApp": (
        "flower.app",
        "is a dict, not a ClientApp",
        [("app = ClientApp()", "a = ClientApp()\napp = {}"), ("@app.train", "@a.train")],
    ),
    "replies an error": (
        "flower.app",
        "the app replied with: no GPU",
        [
            ("import Array,", "import Array, Error,"),
            (RETURN, f"    return Message(Error(7, 'no GPU'), reply_to=msg)\n{RETURN}"),
        ],
    ),
    "returns nothing": ("flower.reply", "returned a NoneType", [(RETURN, f"    return\n{RETURN}")]),
    "has no count": ("flower.reply", "lack num-examples", [('"num-examples": 50, ', "")]),
    "counts down": ("flower.reply", "num-examples is -1", [(": 50", ": -1")]),
    "counts to NaN": ("flower.reply", "num-examples is nan", [(": 50", ": np.nan")]),
    "counts to infinity": ("flower.reply", "num-examples is inf", [(": 50", ": np.inf")]),
    "flattens": ("flower.reply", "shape [6]", [("Array(w - ", "Array(w.ravel() if 1 else w - ")]),
    "renames": ("flower.reply", "are not the model's 2", [('arrays["b"] =', 'arrays["c"] =')]),
    "leaves one out": ("flower.reply", "1 arrays that are not", [('arrays["b"] =', "_ =")]),
    "sends text": (
        "flower.reply",
        "came back as <U1",
        [("Array(w - ", "Array(np.full((3, 2), 'x') if 1 else w - ")],
    ),
    "measures twice": (
        "flower.reply",
        "2 MetricRecords",
        [('"metrics": metrics}', '"metrics": metrics, "m": metrics}')],
    ),
    "sends no arrays": ("flower.reply", "0 ArrayRecords", [('"arrays": arrays, ', "")]),
    "diverges": ("train.non_finite", "tensor w", [("Array(w - ", "Array(w * np.nan - ")]),
    "loses": ("train.non_finite", "the app's loss", [(LOSS, '"loss": np.inf')]),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_an_app_that_goes_wrong_is_a_failed_job(tmp_path, names, what):
    code, words, edits = MISTAKES[what]
    source = APP
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    site, lent = make_site(tmp_path, source)
    job = site.ask()
    answer(site, lent)

    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", code)
    assert words in last.message
    assert not site.spool.result(job.id).exists()
    assert list(site.spool.state("tiny").glob("*")) == []  # a failed round leaves no state


@pytest.mark.parametrize("app", ["os:system", "json:loads", "no_such_module:app"])
def test_what_the_site_did_not_lend_is_not_even_imported(tmp_path, names, app):
    site, lent = make_site(tmp_path, APP, local_step={"app": app})
    job = site.ask()
    answer(site, lent)

    assert last_status(site.spool, job.id).code == "flower.app"
    assert "python path" in last_status(site.spool, job.id).message


def test_a_module_that_shadows_an_installed_package_elsewhere_is_refused(tmp_path, names):
    """``flwr`` is importable, but it does not lie in the site's folder."""
    site, lent = make_site(tmp_path, APP, local_step={"app": "flwr.clientapp:ClientApp"})
    job = site.ask()
    answer(site, lent)

    assert "does not come from the site's python path" in last_status(site.spool, job.id).message


@pytest.mark.parametrize("why", ["cancelled", "interrupted", "deadline"])
def test_an_app_that_does_not_end_is_abandoned_with_its_process(tmp_path, names, why):
    source = APP.replace("    lr = msg", "    import time; time.sleep(30)\n    lr = msg")
    site, lent = make_site(tmp_path, source)
    job = site.ask(deadline_unix=1000.0 if why == "deadline" else None)
    asked = iter(range(10**6))

    def now() -> float:
        if next(asked) > 3:  # the app is called by then
            if why == "cancelled":
                request_cancel(site.spool, job.id)
            elif why == "interrupted":
                site.spool.drain.touch()
            return 2000.0
        return 999.0

    polls = flower._Call._still_wanted

    def poll(self):
        now()
        return polls(self)

    flower._Call._still_wanted = poll
    try:
        left = answer(site, lent, clock=Clock(now=now, sleep=lambda _: None))
    finally:
        flower._Call._still_wanted = polls

    last = last_status(site.spool, job.id)
    assert last.event == {"deadline": "failed"}.get(why, why)
    assert (last.code == "flower.deadline") == (why == "deadline")
    assert "abandoned" in left  # the process must end: a thread cannot be stopped


# -- a real process ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_host_serves_a_spool_without_torch(tmp_path):
    source = APP.replace(
        "    lr = msg", "    import sys; assert 'torch' not in sys.modules\n    lr = msg"
    )
    site, _ = make_site(tmp_path, source)
    arguments = ("--python-path", str(tmp_path / "apps"), "--node-config", "partition-id=3")
    with worker(site.spool, *arguments, module="node_agent.flower") as process:
        job = site.ask()
        wait_for(lambda: final(site, job), process=process)
        site.spool.drain.touch()
        assert process.wait(timeout=30) == 0

    assert events(read_status(site.spool, job.id)) == ["started", "done"]
    np.testing.assert_allclose(site.delta(job), by_hand(site.theta)[0], atol=1e-7)


@pytest.mark.slow
def test_the_torch_worker_hosts_the_same_app(tmp_path):
    site, _ = make_site(tmp_path, APP)
    arguments = ("--python-path", str(tmp_path / "apps"), "--node-config", "partition-id=3")
    with worker(site.spool, *arguments) as process:
        job = site.ask()
        wait_for(lambda: final(site, job), process=process)

    np.testing.assert_allclose(site.delta(job), by_hand(site.theta)[0], atol=1e-7)


# -- plain parts ---------------------------------------------------------------------------------


def test_a_state_of_every_kind_survives_its_bytes():
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    arrays = ArrayRecord()
    for key, dtype in (("a", "float64"), ("b", "int8"), ("empty", "float32")):
        size = 0 if key == "empty" else 4
        arrays[key] = Array(np.arange(size).astype(dtype).reshape(-1, 1))
    state = RecordDict({
        "arrays": arrays,
        "config": ConfigRecord({"s": "ñ", "b": b"\x00\xff", "lb": [b"x"], "t": True, "l": [1.5]}),
        "metrics": MetricRecord({"i": 3, "f": 0.1, "l": [1, 2], "inf": math.inf}),
    })  # fmt: skip
    data = flower_state.encode(flower.to_plain(state))
    back = flower.from_plain(flower_state.decode(data))

    assert dict(back["config"]) == dict(state["config"])
    assert dict(back["metrics"]) == dict(state["metrics"])
    for key in arrays:
        np.testing.assert_array_equal(back["arrays"][key].numpy(), arrays[key].numpy())
        assert back["arrays"][key].numpy().dtype == arrays[key].numpy().dtype
    assert b"pickle" not in data
    for cut in (0, 5, 20, len(data) - 1):
        with pytest.raises(CorruptStateError):
            flower_state.decode(data[:cut])


def test_node_config_is_read_as_flower_reads_it():
    assert parse_node_config("partition-id=0 num-partitions=4 name='a b' x=1.5 f=true") == {
        "partition-id": 0, "num-partitions": 4, "name": "a b", "x": 1.5, "f": True,
    }  # fmt: skip
    assert parse_node_config("") == {}
    for wrong in ("a", "=1", "a=", "a=b", "a=[1]", "a='"):
        with pytest.raises(ConfigurationError, match="node config"):
            parse_node_config(wrong)


def test_metrics_are_counts_or_nothing():
    counts = read_counts({"num-examples": 10.0, "num-tokens": 640, "num-steps": 5, "loss": 0.5})
    assert (counts.examples, counts.tokens, counts.steps, counts.loss_nats) == (10, 640, 5, 320.0)
    with pytest.raises(JobFailedError, match="lack bytes/es"):
        read_evaluation({"nll-nats/es": 1.0})
    with pytest.raises(JobFailedError, match="not a sum of nats"):
        read_evaluation({"nll-nats/": 1.0})


def test_the_app_above_is_what_flower_users_write():
    """It must not lean on anything of ours, or the claim "unmodified" would be empty."""
    for source in (APP, APP + EVALUATED):
        tree = ast.parse(textwrap.dedent(source))
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert modules == {"flwr.app", "flwr.clientapp"}
