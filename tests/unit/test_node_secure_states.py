"""The durable states of secure sums: whole or not at all, private, forgotten when replaced."""

from __future__ import annotations

import os
import stat

import pytest

from node_agent import secure_state
from node_agent.secure_state import RANK, STAGES, SecureKnown, SecureStates, outline
from protocols.errors import CorruptStateError, StorageFullError
from protocols.identifiers import RoundId, RunId
from protocols.secagg import node as machine
from protocols.secagg import states as all_states
from tests.support.secagg import identity, make_attempt, seed_of
from tests.support.secagg_stages import A, B, at

RUN = RunId("run-1")
IN_ORDER = ("ready", "dealt", "acknowledged", "masking", "uploaded", "committed", "revealed")


def state_at(stage):
    """The state of node A when its world is at a stage."""
    return at(stage).members[A].state


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "secagg"


@pytest.fixture
def states(folder):
    return SecureStates(folder, node=A)


def secrets_of(state):
    """Every byte string of a state that must not be seen."""
    found = [getattr(state, name, b"") for name in ("seed", "rk_secret", "self_seed", "noise_seed")]
    found += [opening for held in getattr(state, "held", ()) for opening in shares_of(held)]
    return [secret for secret in found if secret]


def shares_of(held):
    return [held.opening(kind).share for kind in ("rk", "b")]


# -- on the disk ---------------------------------------------------------------------------------


def test_what_was_kept_is_there_for_the_next_process(states, folder):
    for stage in IN_ORDER:
        state = state_at(stage)
        states.keep(RUN, state)

        assert SecureStates(folder, node=A).load(RUN) == state
    assert [path.name for path in folder.iterdir()] == ["run-1.state"]
    assert states.runs() == (RUN,)


def test_only_its_owner_may_read_it(states, folder):
    states.keep(RUN, state_at("masking"))

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "run-1.state").stat().st_mode) == 0o600


def test_a_state_is_synced_before_it_has_its_name(states, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, secure_state.Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), real_sync(handle))[1])
    monkeypatch.setattr(
        secure_state.Path, "replace", lambda a, b: (done.append("name"), real_replace(a, b))[1]
    )
    monkeypatch.setattr(secure_state, "sync_folder", lambda folder: done.append("folder"))

    states.keep(RUN, state_at("ready"))

    assert done == ["sync", "name", "folder"]


def test_the_replaced_file_is_overwritten(states, folder):
    """A second name of the same file shows what a raw look at the disk would find."""
    old = state_at("masking")
    states.keep(RUN, old)
    os.link(folder / "run-1.state", folder / "what-was-there")
    assert any(secret.hex().encode() in old.to_bytes() for secret in secrets_of(old))

    states.keep(RUN, state_at("uploaded"))

    left = (folder / "what-was-there").read_bytes()
    assert left == bytes(len(left))


def test_a_torn_write_is_destroyed_at_the_next_start(states, folder):
    states.keep(RUN, state_at("ready"))
    torn = folder / "run-1.tmp"
    torn.write_bytes(state_at("masking").to_bytes()[:500])
    os.link(torn, folder / "what-was-there")

    SecureStates(folder, node=A).recover()

    assert not torn.exists()
    assert (folder / "what-was-there").read_bytes() == bytes(500)
    assert SecureStates(folder, node=A).load(RUN) == state_at("ready")


def test_a_full_disk_leaves_the_old_state(states, folder, monkeypatch):
    states.keep(RUN, state_at("ready"))

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match="No space left"):
            states.keep(RUN, state_at("dealt"))

    assert states.load(RUN) == state_at("ready")
    assert SecureStates(folder, node=A).load(RUN) == state_at("ready")
    states.keep(RUN, state_at("dealt"))
    assert states.load(RUN) == state_at("dealt")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.write_bytes(at("masking").members[B].record),
        lambda path: path.rename(path.with_name("other.state")),
    ],
    ids=["empty", "cut off", "no file", "of another node", "of another run"],
)
def test_a_file_that_cannot_be_used_is_as_good_as_lost(states, folder, spoil):
    states.keep(RUN, state_at("masking"))
    spoil(folder / "run-1.state")

    again = SecureStates(folder, node=A)

    assert [again.load(RunId(run)) for run in ("run-1", "other")] == [None, None]
    assert again.known(RUN) is None


def test_a_state_never_goes_back(states):
    states.keep(RUN, state_at("uploaded"))

    for stage in ("ready", "dealt", "acknowledged", "masking"):
        with pytest.raises(CorruptStateError, match="cannot go back"):
            states.keep(RUN, state_at(stage))
    assert states.load(RUN) == state_at("uploaded")


def test_an_attempt_after_an_abort_is_no_step_back(states):
    first = state_at("masking")
    states.keep(RUN, first)
    given_up = machine.abort(first, "test.abort", identity(1)).state
    states.keep(RUN, given_up)
    second = machine.ready(
        given_up,
        make_attempt(4, number=2),
        A,
        identity(1),
        seed=seed_of("second"),
        seen_size=0,
        seen_root="0" * 64,
    ).state

    states.keep(RUN, second)

    assert states.known(RUN) == SecureKnown(round=RoundId(RUN, 4), attempt=2, stage="ready")


# -- what may be told ----------------------------------------------------------------------------


def test_stages_grow_along_the_protocol():
    orders = [outline(state_at(stage)).order for stage in IN_ORDER]

    assert orders == sorted(orders)
    assert len(set(orders)) == len(orders)
    assert set(STAGES) == set(all_states._BY_SCHEMA.values())
    assert list(RANK)[-2:] == ["aborted", "closed"]


@pytest.mark.parametrize("stage", IN_ORDER)
def test_no_secret_is_printed(stage, states, caplog):
    state = state_at(stage)
    states.keep(RUN, state)
    secrets = secrets_of(state)

    told = f"{state!r} {states!r} {states.known(RUN)!r} {state.attempt} {caplog.text}"

    assert stage == "revealed" or secrets  # else nothing was looked for
    for secret in secrets:
        assert repr(secret)[2:-1] not in told
        assert secret.hex() not in told
