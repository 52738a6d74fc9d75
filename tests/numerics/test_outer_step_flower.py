"""Flower's optimizers above the integer sum, against its strategies fed one reply per site.

The bounds are those measured for one synthetic reply (the weighted mean of the models) against
individual replies, 6 nodes and 4 rounds. Updates here lie on the grid of the ring, so rounding adds
nothing and what is left is float32.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest

from protocols.errors import IntegrityError, PlanRefusedError
from protocols.outer_step import optimizer_for
from protocols.plan import Outer, Scale
from protocols.tensors import Ring, VectorLayout, accumulate, fixed_scales
from tests.support.tensors import METRICS, encode, manifest_of, outer_step, reader_of

RING = Ring(20)
NODES, ROUNDS, GRID = 6, 4, 18  # grid: deltas are multiples of 2**-18
MANIFEST = manifest_of(w=(40, 25), b=(17,))
LAYOUT = VectorLayout.of(MANIFEST, "all", METRICS)
RULE = Scale(mode="fixed", exponent=GRID + 1)  # weights are 1 and 1/2: one more bit
WEIGHTS = [65536, 32768, 65536, 65536, 32768, 65536]
FEDAVGM = {"server_learning_rate": 0.7, "server_momentum": 0.5}

# name: options, largest difference of a weight after 4 rounds
STRATEGIES = {
    "FedAvg": ({}, 4.8e-7),
    "FedProx": ({}, 4.8e-7),
    "FedAvgM": (FEDAVGM, 9.5e-7),
    "FedAdagrad": ({"eta": 1e-3}, 8.9e-8),
    "FedAdam": ({"eta": 1e-3}, 1.0e-8),
    "FedYogi": ({"eta": 1e-3}, 7.5e-9),
}
STATEFUL = ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"]
each_strategy = pytest.mark.parametrize("name", STRATEGIES)


def site_deltas(round_: int) -> list[np.ndarray]:
    """One update for each site: a common direction and a site's own, on the grid."""
    rng = np.random.default_rng(round_)
    common = rng.integers(-2000, 2000, MANIFEST.coordinates)
    return [
        ((common + rng.integers(-3000, 3000, common.size)) / 2.0**GRID).astype(np.float32)
        for _ in range(NODES)
    ]


class Reply:
    """A reply as a strategy reads it; a real message needs a process-wide identity."""

    def __init__(self, content):
        self.content = content

    def has_error(self):
        return False


def by_tensor(theta: np.ndarray) -> dict[str, np.ndarray]:
    return {
        spec.name: theta[segment.start : segment.stop].reshape(spec.shape)
        for spec, segment in zip(MANIFEST.tensors, MANIFEST.segments, strict=True)
    }


def flowers_own(name: str, options: dict, theta: np.ndarray) -> list[np.ndarray]:
    """The models after each round when the strategy sees every site's model, tensor by tensor."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp import strategy as strategies

    strategy = getattr(strategies, name)(**options)
    models, current = [], theta
    for round_ in range(ROUNDS):
        record = ArrayRecord({k: Array(v) for k, v in by_tensor(current).items()})
        # What configure_train keeps; the rest of it asks a Grid for nodes.
        if name == "FedAvgM":
            strategy.current_arrays = record
        elif hasattr(strategy, "current_arrays"):
            strategy.current_arrays = by_tensor(current)
        replies = []
        for delta, weight in zip(site_deltas(round_), WEIGHTS, strict=True):
            arrays = ArrayRecord({k: Array(v) for k, v in by_tensor(current + delta).items()})
            metrics = MetricRecord({"num-examples": weight / 65536})
            replies.append(Reply(RecordDict({"arrays": arrays, "metrics": metrics})))
        aggregated, _ = strategy.aggregate_train(round_ + 1, replies)
        current = np.concatenate(
            [aggregated[k].numpy().astype(np.float32).ravel() for k in by_tensor(theta)]
        )
        models.append(current)
    return models


def ours(
    name: str, options: dict, theta: np.ndarray, *, restart: bool = False, deltas=site_deltas
) -> list[np.ndarray]:
    """The models after each round through ring, sum and outer step.

    ``restart``: state goes through bytes between rounds, as after a crash.
    """
    outer = Outer(optimizer=f"flower:{name}", options=options)
    scales, buffers, models = fixed_scales(MANIFEST, GRID + 1), {}, []
    for round_ in range(ROUNDS):
        vectors = [
            encode(delta, LAYOUT, scales, RING, roster=NODES, weight=weight)
            for delta, weight in zip(deltas(round_), WEIGHTS, strict=True)
        ]
        packed = b"".join(accumulate([reader_of(v) for v in vectors], LAYOUT, RING))
        result, files = outer_step(
            packed, manifest=MANIFEST, layout=LAYOUT, theta=theta, scales=scales, ring=RING,
            nodes=NODES, outer=outer, buffers=buffers, steps=round_, rule=RULE,
        )  # fmt: skip
        assert result.metrics["clamped"] == 0
        theta = files["theta"]
        buffers = {key: files[key] for key in result.buffer_roots}
        if restart:
            theta = np.frombuffer(theta.tobytes(), "<f4")
            buffers = {k: np.frombuffer(v.tobytes(), "<f4") for k, v in buffers.items()}
        models.append(theta)
    return models


def initial() -> np.ndarray:
    return (np.random.default_rng(99).standard_normal(MANIFEST.coordinates) * 0.02).astype("<f4")


@each_strategy
def test_one_mean_reply_is_as_good_as_one_from_every_site(name):
    options, bound = STRATEGIES[name]
    expected, found = flowers_own(name, options, initial()), ours(name, options, initial())

    for a, b in zip(expected, found, strict=True):
        assert np.abs(a - b).max() <= bound
    assert np.abs(found[-1] - initial()).max() > 1000 * bound, "the model has moved much further"


@pytest.mark.parametrize("name", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_with_flowers_defaults(name):
    """At eta = 0.1 a weight moves by 0.2 and more; float32 differences grow with it."""
    expected, found = flowers_own(name, {}, initial()), ours(name, {}, initial())

    assert np.abs(expected[-1] - found[-1]).max() < 1e-5 * np.abs(found[-1] - initial()).max()


@each_strategy
def test_the_comparison_convicts_a_site_that_is_left_out(name):
    def without_the_last(round_):
        deltas = site_deltas(round_)
        return [*deltas[:-1], np.zeros_like(deltas[-1])]

    options, bound = STRATEGIES[name]
    expected = flowers_own(name, options, initial())
    found = ours(name, options, initial(), deltas=without_the_last)

    assert np.abs(expected[-1] - found[-1]).max() > 10 * bound


@each_strategy
def test_saved_state_continues_exactly(name):
    options, _ = STRATEGIES[name]
    unbroken = ours(name, options, initial())
    restored = ours(name, options, initial(), restart=True)

    for a, b in zip(unbroken, restored, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", STATEFUL)
def test_lost_state_does_not_continue_exactly(name):
    """The test above can fail: without its buffers the second step is another one."""
    options, _ = STRATEGIES[name]
    models = ours(name, options, initial())
    outer = Outer(optimizer=f"flower:{name}", options=options)
    delta = [encode(d, LAYOUT, fixed_scales(MANIFEST, GRID + 1), RING, roster=NODES, weight=w)
             for d, w in zip(site_deltas(1), WEIGHTS, strict=True)]  # fmt: skip
    packed = b"".join(accumulate([reader_of(v) for v in delta], LAYOUT, RING))
    _, files = outer_step(
        packed, manifest=MANIFEST, layout=LAYOUT, theta=models[0],
        scales=fixed_scales(MANIFEST, GRID + 1), ring=RING, nodes=NODES, outer=outer, steps=1,
        rule=RULE,
    )  # fmt: skip

    assert np.abs(files["theta"] - models[1]).max() > 1e-5


def test_slices_are_the_whole():
    """Two units of theta and tensors across them: bit for bit what one call over all gives."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAdam

    manifest = manifest_of(a=(2**20 - 3,), rest=(5,), b=(2**20 + 11,))
    layout = VectorLayout.of(manifest, ["a", "b"], METRICS)
    rng = np.random.default_rng(3)
    theta = (rng.standard_normal(manifest.coordinates) * 0.02).astype(np.float32)
    buffers = {
        "m_t": (rng.standard_normal(theta.size) * 1e-3).astype(np.float32),
        "v_t": (rng.random(theta.size) * 1e-5).astype(np.float32),
    }
    delta = (rng.integers(-999, 999, layout.model_coordinates) / 2**16).astype(np.float32)
    scales = fixed_scales(manifest, 16)
    _, files = outer_step(
        encode(delta, layout, scales, RING, roster=1), manifest=manifest, layout=layout,
        theta=theta, scales=scales, ring=RING, nodes=1, buffers=buffers, steps=4, threads=2,
        outer=Outer(optimizer="flower:FedAdam"),
    )  # fmt: skip

    chosen = np.r_[0 : 2**20 - 3, 2**20 + 2 : manifest.coordinates]
    whole = FedAdam()
    whole.current_arrays = {"w": theta[chosen]}
    whole.m_t, whole.v_t = {"w": buffers["m_t"][chosen]}, {"w": buffers["v_t"][chosen]}
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(theta[chosen] + delta)}),
            "metrics": MetricRecord({"num-examples": 1.0}),
        }
    )
    arrays, _ = whole.aggregate_train(5, [Reply(content)])

    assert np.array_equal(files["theta"][chosen], arrays["w"].numpy().astype(np.float32))
    assert np.array_equal(files["m_t"][chosen], whole.m_t["w"])
    assert np.array_equal(files["v_t"][chosen], whole.v_t["w"])
    rests = slice(2**20 - 3, 2**20 + 2)
    for key, before in (("theta", theta), *buffers.items()):
        assert files[key][rests].tobytes() == before[rests].tobytes()


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("FedMedian", "outer.flower.individual_updates"),
        ("FedTrimmedAvg", "outer.flower.individual_updates"),
        ("Krum", "outer.flower.individual_updates"),
        ("MultiKrum", "outer.flower.individual_updates"),
        ("Bulyan", "outer.flower.individual_updates"),
        ("QFedAvg", "outer.flower.individual_updates"),
        ("FedXgbBagging", "outer.flower.individual_updates"),
        ("FedXgbCyclic", "outer.flower.individual_updates"),
        ("DifferentialPrivacyServerSideFixedClipping", "outer.flower.privacy"),
        ("DifferentialPrivacyServerSideAdaptiveClipping", "outer.flower.privacy"),
        ("DifferentialPrivacyClientSideFixedClipping", "outer.flower.privacy"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "outer.flower.privacy"),
        ("FedOpt", "outer.flower.unknown"),
        ("Strategy", "outer.flower.unknown"),
        ("MyFedAvg", "outer.flower.unknown"),
        ("fedavg", "outer.flower.unknown"),
    ],
)
def test_what_cannot_work_above_a_sum_is_refused_by_name(name, rule):
    with pytest.raises(PlanRefusedError) as caught:
        optimizer_for(Outer(optimizer=f"flower:{name}"))

    assert caught.value.rule == rule
    assert name in str(caught.value)


def test_every_strategy_that_flower_has_is_allowed_or_refused_for_a_reason():
    """A new Flower with a new strategy fails here, until somebody has decided."""
    from flwr.serverapp import strategy

    decided = set(STRATEGIES) | {"Result", "Strategy"}
    for name in set(strategy.__all__) - decided:
        with pytest.raises(PlanRefusedError) as caught:
            optimizer_for(Outer(optimizer=f"flower:{name}"))
        assert caught.value.rule != "outer.flower.unknown", name


@pytest.mark.parametrize(
    ("outer", "why"),
    [
        (Outer(optimizer="flower:FedAdam", lr=0.5), "lr and momentum"),
        (Outer(optimizer="flower:FedAvgM", momentum=0.5), "lr and momentum"),
        (Outer(optimizer="flower:FedAvg", options={"eta": 0.1}), "eta=0.1"),
        (Outer(optimizer="flower:FedAdam", options={"beta_1": 1.0}), "beta_1=1"),
        (Outer(optimizer="flower:FedAdam", options={"tau": 0.0}), "tau=0"),
        (Outer(optimizer="flower:FedAdam", options={"fraction_train": 0.5}), "fraction_train"),
        (Outer(optimizer="flower:FedAvgM", options={"server_momentum": -0.1}), "server_momentum"),
    ],
)
def test_options_are_refused(outer, why):
    with pytest.raises(PlanRefusedError, match=why) as caught:
        optimizer_for(outer)

    assert caught.value.rule == "outer.flower.options"


def test_our_defaults_are_flowers():
    """They are written out in our code so that a plan keeps its meaning; today they agree."""
    import inspect

    from flwr.serverapp import strategy

    for name in STRATEGIES:
        optimizer = optimizer_for(Outer(optimizer=f"flower:{name}"))
        theirs = inspect.signature(getattr(strategy, name)).parameters
        for key, value in optimizer.options.items():
            assert theirs[key].default == value, (name, key)


def test_no_model_is_an_error_and_not_the_old_model(monkeypatch):
    from flwr.serverapp.strategy import FedAvg

    monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_: (None, None))

    with pytest.raises(IntegrityError, match="gave no model"):
        ours("FedAvg", {}, initial())


def test_flower_is_quiet_while_we_call_it_and_only_then(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    ours("FedAvgM", FEDAVGM, initial())
    silent = len(caplog.records)
    flowers_own("FedAvgM", FEDAVGM, initial())

    assert silent == 0
    assert len(caplog.records) == ROUNDS


def test_a_real_message_has_what_our_reply_has():
    """Strategies read these two of a message; a new Flower that reads more fails above."""
    from flwr.app import Message

    assert callable(Message.has_error)
    assert isinstance(Message.content, property)


@pytest.mark.parametrize(
    ("name", "options", "buffers"),
    [
        ("FedAvg", {}, ()),
        ("FedAvgM", {}, ()),
        ("FedAvgM", FEDAVGM, ("momentum_vector",)),
        ("FedAdagrad", {}, ("m_t", "v_t")),
        ("FedAdam", {}, ("m_t", "v_t")),
    ],
)
def test_state_has_flowers_names(name, options, buffers):
    assert optimizer_for(Outer(optimizer=f"flower:{name}", options=options)).buffer_names == buffers
