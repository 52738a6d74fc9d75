"""What one caller may use: the bucket holds what it promises, and the tables stay small."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import spool
from coordinator.config import load_config
from coordinator.limits import PRICES, Bucket, Limits, is_full, take, too_slow
from coordinator.services import guard
from coordinator.services.guard import Guard, address_of
from policies.cedar.methods import ACTIONS
from protocols.errors import (
    ConfigurationError,
    NotReadyError,
    TooManyRequestsError,
    error_details,
    error_from_code,
    grpc_status_name,
)
from protocols.tlog.merkle import leaf_hash

PER_S, BURST = 10.0, 50.0
steps = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.floats(0.1, 30.0)), min_size=1, max_size=60
)  # (seconds that pass, price of the next call)


def let_in(schedule, taking=take):
    """The prices of the calls that were let in, with the times."""
    bucket, now, found = None, 100.0, []
    for passes, price in schedule:
        now += passes
        bucket, wait = taking(bucket, price=price, per_s=PER_S, burst=BURST, now=now)
        if not wait:
            found.append((now, price))
    return found


def within(found):
    """Over every stretch of time no more is let in than the brim and what came back."""
    return all(
        sum(price for at, price in found if first <= at <= last)
        <= BURST + PER_S * (last - first) + 1e-6
        for first, _ in found
        for last, _ in found
        if first <= last
    )


@given(steps)
def test_no_stretch_of_time_lets_in_more_than_its_share(schedule):
    assert within(let_in(schedule))


def test_the_oracle_convicts_a_bucket_that_forgets():
    def forgetful(_bucket, **kwargs):
        return take(None, **kwargs)

    assert not within(let_in([(0.0, 10.0)] * 20, forgetful))


@given(steps, st.floats(0.1, 30.0))
def test_whoever_waits_as_long_as_it_is_told_is_let_in(schedule, price):
    bucket, now = None, 5.0
    for passes, cost in schedule:
        now += passes
        bucket, _ = take(bucket, price=cost, per_s=PER_S, burst=BURST, now=now)
    taken = take(bucket, price=price, per_s=PER_S, burst=BURST, now=now)
    if taken.wait_s:
        later = now + taken.wait_s + 1e-6
        again = take(taken.bucket, price=price, per_s=PER_S, burst=BURST, now=later)
        assert again.wait_s == 0


def test_a_refused_call_costs_nothing_and_a_clock_that_went_back_gives_nothing():
    empty = Bucket(0.5, 10.0)
    refused = take(empty, price=1.0, per_s=1.0, burst=5.0, now=10.0)
    assert refused == (empty, 0.5)
    assert take(empty, price=1.0, per_s=1.0, burst=5.0, now=3.0).wait_s == 0.5
    assert take(None, price=99.0, per_s=1.0, burst=5.0, now=0.0) == (Bucket(0.0, 0.0), 0.0)
    assert is_full(Bucket(0.0, 0.0), per_s=1.0, burst=5.0, now=5.0)
    assert not is_full(Bucket(0.0, 0.0), per_s=1.0, burst=5.0, now=4.9)


@pytest.mark.parametrize(
    ("received", "elapsed_s", "slow"),
    [(0, 119.0, False), (0, 120.5, True), (4096 * 10, 130.0, False), (4096 * 10 - 1, 130.0, True)],
)
def test_a_stream_is_slow_only_after_its_patience(received, elapsed_s, slow):
    assert too_slow(received=received, elapsed_s=elapsed_s, limits=Limits()) is slow


def test_every_price_is_of_a_method_that_exists():
    assert {name.removeprefix("/minga.v1.") for name in PRICES} <= ACTIONS.keys()


@pytest.mark.parametrize(
    "change", [{"calls_per_s": 0}, {"message_s": float("nan")}, {"connections": -1}]
)
def test_a_limit_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match="positive"):
        Limits(**change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("calls_per_s = 7\nmessage_s = 3.5", None),
        ("calls_per_s = -7", "limits"),
        ("calls = 7", "limits.calls"),
        ("calls_open = 1.5", "limits.calls_open"),
    ],
)
def test_limits_are_read_from_the_configuration(tmp_path, text, says):
    path = tmp_path / "config.toml"
    path.write_text(
        'federation = "demo"\n[listen]\naddress = "a:1"\nenrolment = "a:2"\n'
        f'public_address = "a:1"\n[ledger]\nurl = "sqlite:///l"\n[limits]\n{text}\n'
    )
    if says is None:
        assert load_config(path).limits == Limits(calls_per_s=7, message_s=3.5)
        return
    with pytest.raises(ConfigurationError, match=says):
        load_config(path)


def test_the_error_travels_with_the_time_to_wait():
    error = TooManyRequestsError("later", retry_after_s=2.5)
    assert grpc_status_name(error) == "RESOURCE_EXHAUSTED"
    again = error_from_code(error.code, "later", error_details(error))
    assert isinstance(again, TooManyRequestsError)
    assert again.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:51234", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3::9%5D:443", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::1]:443", "2001:db8:1:2::/64"),
        ("ipv6:nonsense", "ipv6"),
        ("unix:", "unix"),
    ],
)
def test_an_address_is_a_host_or_a_network(peer, address):
    assert address_of(peer) == address


# -- the tables ----------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


async def at_once(_seconds):
    """Wait for nothing."""


def make(limits=None, **changes):
    clock = Clock()
    return Guard(limits or Limits(), clock=clock, sleep=at_once, **changes), clock


async def admitted(of, caller, calls, method="/minga.v1.Rounds/Join"):
    done = 0
    for _ in range(calls):
        try:
            await of.admit(method, caller)
        except TooManyRequestsError:
            continue
        done += 1
    return done


def test_ten_thousand_joins_in_a_second_are_two_thousand_and_others_do_not_notice():
    async def go():
        of, clock = make()
        assert await admitted(of, "mallory", 10_000) == 2000
        assert await admitted(of, "honest", 500) == 500
        clock.now += 1.0
        assert await admitted(of, "mallory", 10_000) == 100
        assert of.refused == 8000 + 9900

    asyncio.run(go())


def test_a_flood_is_told_in_a_line_now_and_then(caplog):
    async def go():
        of, clock = make(Limits(calls_burst=1, calls_per_s=0.001))
        for _ in range(3):
            await admitted(of, "mallory", 500)
            clock.now += guard.TELL_S / 2

    with caplog.at_level("DEBUG"):
        asyncio.run(go())
    lines = [r.getMessage() for r in caplog.records if r.name == guard.__name__]
    assert lines == [
        "1 calls were over the limits, the last by mallory",
        "999 calls were over the limits, the last by mallory",
    ]


def test_many_callers_do_not_make_the_table_grow(monkeypatch):
    monkeypatch.setattr(guard, "MAX_CALLERS", 100)

    async def go():
        of, clock = make(joins=True)
        for number in range(1000):
            clock.now += 0.001
            await of.admit("/minga.v1.Enrolment/Join", f"192.0.2.{number}")
        assert of.callers() <= 101
        # ... and the newest is still remembered
        assert await admitted(of, "192.0.2.999", 200) == 99

    asyncio.run(go())


def test_places_are_counted_and_given_back():
    method, bulk = "/minga.v1.Rounds/Sync", "/minga.v1.Bulk/Append"

    async def go():
        of, _ = make(Limits(calls_open=3, bulk_open=2))
        with of.under_way(bulk, "a"), of.under_way(bulk, "a"):
            await of.place(method, "a")
            with pytest.raises(TooManyRequestsError, match="at most 2"):
                await of.place(bulk, "a")
            await of.place(bulk, "b")
        with of.under_way(method, "a"), of.under_way(method, "a"), of.under_way(method, "a"):
            for one in (method, bulk):
                with pytest.raises(TooManyRequestsError):
                    await of.place(one, "a")
        await of.place(method, "a")
        assert of.calls_open() == 0

    asyncio.run(go())


def test_refused_calls_wait_in_few_places_only():
    async def go():
        never = asyncio.Event()

        async def waiting(_seconds):
            await never.wait()

        of = Guard(Limits(calls_burst=1, calls_per_s=0.001), clock=Clock(), sleep=waiting)
        await of.admit("/minga.v1.Rounds/Join", "a")
        tasks = [asyncio.create_task(admitted(of, "a", 1)) for _ in range(guard.WAITING + 10)]
        done, held = await asyncio.wait(tasks, timeout=0.2)
        assert (len(done), len(held)) == (10, guard.WAITING)
        never.set()
        assert [await task for task in held] == [0] * guard.WAITING

    asyncio.run(go())


def test_a_stream_that_drips_is_ended():
    async def go():
        of, clock = make(Limits(message_s=10, stream_bytes_per_s=100))

        async def drip():
            clock.now += 5.0
            return b"x"

        stream = of.steady(drip)
        assert [await anext(stream), await anext(stream)] == [b"x", b"x"]
        with pytest.raises(NotReadyError, match="at least 100 bytes"):
            await anext(stream)

    asyncio.run(go())


def test_a_message_that_never_comes_is_not_waited_for():
    async def go():
        of, _ = make(Limits(message_s=0.05))
        with pytest.raises(NotReadyError, match="no whole message"):
            await of.patient(asyncio.get_running_loop().create_future())

    asyncio.run(go())


def test_offsets_of_few_uploads_are_remembered(tmp_path, monkeypatch):
    """Of the others they are read back from the file, as after a restart."""
    monkeypatch.setattr(spool, "MAX_KNOWN", 3)

    async def go():
        kept = spool.Spool(tmp_path, min_free_bytes=0)
        made = [
            spool.Arriving(path=tmp_path / str(n), total=4, unit_hashes=(leaf_hash(b"data"),))
            for n in range(8)
        ]
        for one in made:
            one.path.write_bytes(b"data")
        assert [await kept.durable(one) for one in made] == [4] * 8
        assert len(kept._verified) == 3
        assert [await kept.durable(one) for one in made] == [4] * 8

    asyncio.run(go())
