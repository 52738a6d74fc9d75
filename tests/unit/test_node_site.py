"""Configuration, keys, the folder's lock, consent and the check of plans."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from node_agent import consent
from node_agent.config import (
    AllowConfig,
    DataConfig,
    NodeFolder,
    WorkerConfig,
    load_config,
    render_config,
)
from node_agent.consent import SiteFacts, check_disk, check_site, disk_needed, text_trouble
from node_agent.doctor import check_base_model
from node_agent.enrol import renewal_due
from node_agent.keys import KeyStore
from node_agent.lock import FolderLock, lock_holder
from node_agent.plan_check import check_plan, check_round
from protocols.cohort import terms_of
from protocols.crypto.identity import Identity
from protocols.errors import ConfigurationError, LedgerBusyError, NotEnrolledError
from protocols.identifiers import FederationId, NodeId
from protocols.rounds import Open, Released
from tests.support.node import (
    FIRST,
    ME,
    NOW,
    SECOND,
    Authority,
    confirmed,
    digest,
    node_config,
    node_folder,
    rng,
    round_seen,
    run_seen,
    snapshot,
    the_plan,
)

# -- config.toml -----------------------------------------------------------------------------------
from tests.support.plans import plan as small_plan


def rendered(**changes):
    values = {
        "institution": ME,
        "federation": FederationId("demo"),
        "coordinator": "minga.example:443",
        "enrolment": "[::1]:8444",
        "data": DataConfig(train=('/data/ñandú "x".jsonl',), valid=()),
        "worker": WorkerConfig(ranks=2, device="cuda", threads=3),
    }
    return render_config(**values | changes)


def test_what_join_writes_can_be_read(tmp_path):
    folder = node_folder(tmp_path)
    folder.config.write_text(rendered(), "utf-8")

    config = load_config(folder)

    assert (config.institution, config.federation) == (ME, "demo")
    assert config.data.train == ('/data/ñandú "x".jsonl',)
    assert (config.worker.ranks, config.worker.device, config.worker.threads) == (2, "cuda", 3)
    assert config.allow == AllowConfig()


def test_data_paths_are_relative_to_the_file(tmp_path):
    folder = node_folder(tmp_path)
    folder.config.write_text(rendered(data=DataConfig(train=("text/*.jsonl",))), "utf-8")

    assert load_config(folder).data.train == (str(folder.root.resolve() / "text/*.jsonl"),)
    assert load_config(folder).worker.base_model is None
    text = folder.config.read_text("utf-8").replace("[worker]", '[worker]\nbase_model = "llama"')
    folder.config.write_text(text, "utf-8")
    assert load_config(folder).worker.base_model == str(folder.root.resolve() / "llama")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace("ranks = 2", "ranks = 0"), "worker.ranks"),
        (lambda text: text.replace("ranks", "rankes"), "worker.rankes"),
        (lambda text: text.replace("minga.example:443", "minga.example"), "coordinator"),
        (lambda text: text.replace('"a"', '"A B"', 1), "institution"),
        (lambda text: text.replace("[allow]", "[allow"), "line"),
        (lambda text: text + "\nlocal_steps = 3\n", "local_steps"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_key(tmp_path, change, named):
    folder = node_folder(tmp_path)
    folder.config.write_text(change(rendered()), "utf-8")

    with pytest.raises(ConfigurationError) as caught:
        load_config(folder)
    assert str(folder.config) in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigurationError, match="minga node join"):
        load_config(NodeFolder(tmp_path / "nowhere"))


# -- keys ------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    return KeyStore(node_folder(tmp_path).keys)


def test_keys_are_made_once_and_private(keys):
    authority = Authority.create()
    first = keys.make_signing_key().public_key().public_bytes_raw()
    request = keys.request(ME, purpose="join 1")
    assert (
        keys.request(ME, purpose="join 1").csr == request.csr
    )  # a repeated join sends the same bytes

    authority.enrol(keys)

    assert keys.make_signing_key().public_key().public_bytes_raw() == first
    for path in (keys.tls_path, keys.signing_path, keys.root_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.request(ME, purpose="renew 2").csr != request.csr  # a renewal is for a new key
    assert b"PRIVATE" not in repr(keys.tls()).encode()
    assert b"PRIVATE" not in repr(request).encode()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("key", "another key"),
        ("name", "this node is a"),
        ("role", "this node is a"),
        ("federation", "not an identity of federation"),
        ("issuer", "trust anchor"),
        ("garbage", "trust anchor"),
    ],
)
def test_a_certificate_that_is_not_ours_is_not_taken(keys, tmp_path, wrong, says):
    authority, request = Authority.create(), keys.request(ME, purpose="join 1")
    other = KeyStore(tmp_path / "other").request(ME, purpose="join 1")
    issued = {
        "key": lambda: authority.certify(other, ME),
        "name": lambda: authority.certify(request, "b"),
        "role": lambda: authority.certify(request, ME, identity=Identity("operator", "a")),
        "federation": lambda: Authority.create("elsewhere").certify(request, ME),
        "issuer": lambda: Authority.create().certify(request, ME),
        "garbage": lambda: b"0",
    }[wrong]()

    with pytest.raises(NotEnrolledError, match=says):
        keys.accept(
            request,
            certificate=issued,
            issuers=(),
            root=authority.root,
            node=ME,
            federation=FederationId("demo"),
        )
    assert not keys.tls_path.exists()


def test_a_node_without_keys_is_told_so(keys):
    with pytest.raises(NotEnrolledError, match="has not joined"):
        keys.tls()


def test_damaged_keys_are_named(keys):
    Authority.create().enrol(keys)
    text = keys.tls_path.read_bytes()
    keys.tls_path.write_bytes(text[:100])
    with pytest.raises(ConfigurationError, match=r"tls\.pem"):
        keys.tls()


def test_a_key_with_anothers_certificate_is_named(keys, tmp_path):
    authority, other = Authority.create(), KeyStore(tmp_path / "other")
    authority.enrol(keys)
    authority.enrol(other)
    chain = other.tls_path.read_bytes().partition(b"-----BEGIN CERTIFICATE")[2]
    key = keys.tls_path.read_bytes().partition(b"-----BEGIN CERTIFICATE")[0]
    keys.tls_path.write_bytes(key + b"-----BEGIN CERTIFICATE" + chain)

    with pytest.raises(ConfigurationError, match="not the certificate's"):
        keys.tls()


def test_renewal_is_due_from_two_thirds_of_the_lifetime(keys):
    now = datetime(2026, 3, 1, tzinfo=UTC)
    identity = Authority.create(now=now - timedelta(days=9)).enrol(
        keys, lifetime=timedelta(days=30), now=now
    )
    lifetime = identity.not_after - identity.not_before

    for seed in range(50):
        share = (renewal_due(identity, rng=rng()) - identity.not_before) / lifetime
        assert 2 / 3 <= share < 0.77, seed


# -- the lock --------------------------------------------------------------------------------------


def test_a_second_agent_is_refused_and_names_the_first(tmp_path):
    folder = node_folder(tmp_path)
    script = (
        "import sys; from pathlib import Path; from node_agent.config import NodeFolder;"
        "from node_agent.lock import FolderLock; import os;"
        f"lock = FolderLock(NodeFolder(Path({str(folder.root)!r})), pid=os.getpid());"
        "lock.__enter__(); print(os.getpid(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        pid = int(first.stdout.readline())
        assert pid == first.pid
        assert lock_holder(folder) == pid
        with (
            pytest.raises(LedgerBusyError, match=f"process {pid}"),
            FolderLock(folder, pid=os.getpid()),
        ):
            pass
        first.kill()  # a lock dies with its process
        first.wait()
    assert lock_holder(folder) is None
    with FolderLock(folder, pid=os.getpid()):
        assert lock_holder(folder) == os.getpid()


# -- consent ---------------------------------------------------------------------------------------

WELL = SiteFacts(train=None, valid=None, free_bytes=2**40)


def builtin(**changes):
    return the_plan(local_step={"kind": "builtin", "max_steps": 1}, **changes)


def from_folder():
    """A plan that trains a model which every site holds in a folder."""
    model = {"family": "huggingface", "manifest": "1" * 64, "initial": "2" * 64, "base": "3" * 64}
    return small_plan(model=model, local_step={"kind": "builtin", "max_steps": 1})


FLOWER = {"kind": "flower", "app": "their.app:client"}


@pytest.mark.parametrize(
    ("plan", "config", "facts", "rule"),
    [
        (the_plan(), {}, WELL, None),
        (builtin(), {}, WELL, None),
        (builtin(), {"allow": AllowConfig(local_steps=("synthetic",))}, WELL, "site.local_step"),
        (the_plan(local_step=FLOWER), {}, WELL, "site.local_step"),
        (
            the_plan(local_step=FLOWER),
            {"allow": AllowConfig(local_steps=("flower",))},
            WELL,
            "site.flower_app",
        ),
        (
            the_plan(local_step=FLOWER),
            {"allow": AllowConfig(local_steps=("flower",), flower_apps=("their.app:client2",))},
            WELL,
            "site.flower_app",
        ),
        (
            the_plan(local_step=FLOWER),
            {"allow": AllowConfig(local_steps=("flower",), flower_apps=("their.app:client",))},
            WELL,
            None,
        ),
        (builtin(), {}, SiteFacts(train="gone", valid=None, free_bytes=1), "site.data"),
        (the_plan(), {}, SiteFacts(train="gone", valid="gone", free_bytes=1), None),
        (
            builtin(evaluation={"languages": ["es"]}),
            {},
            SiteFacts(train=None, valid="gone", free_bytes=1),
            "site.data",
        ),
        (builtin(), {}, SiteFacts(train=None, valid="gone", free_bytes=1), None),
        (from_folder(), {}, WELL, "site.base_model"),
        (
            from_folder(),
            {"worker": WorkerConfig(base_model="/nowhere/at/all")},
            WELL,
            "site.base_model",
        ),
        (from_folder(), {"worker": WorkerConfig(base_model="/tmp")}, WELL, None),
    ],
)
def test_what_a_site_allows(plan, config, facts, rule):
    refusal = check_site(plan, node_config(**config), facts)

    assert (refusal.rule if refusal else None) == rule


def test_a_site_without_room_refuses():
    plan = the_plan()
    needed = disk_needed(plan, 10**6, 0)
    enough = SiteFacts(train=None, valid=None, free_bytes=needed)
    short = SiteFacts(train=None, valid=None, free_bytes=needed - 1)

    assert needed >= 3 * 4 * 10**6 + 2 * 2.5 * 10**6  # three models, two vectors
    assert check_disk(plan, enough, coordinates=10**6, buffers=0) is None
    assert check_disk(plan, short, coordinates=10**6, buffers=0).rule == "site.disk"


def test_what_is_wrong_with_text(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "full.jsonl").write_text('{"text":"minga"}\n')

    assert text_trouble((str(tmp_path / "full.jsonl"),)) is None
    assert text_trouble((str(tmp_path),)) is None
    assert "no text" in text_trouble((str(tmp_path / "empty.jsonl"),))
    assert "no data at" in text_trouble((str(tmp_path / "*.txt"),))
    assert text_trouble(()) is not None
    assert consent.site_facts(node_config(), tmp_path).train is not None


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "changes", "rule"),
    [
        (the_plan(), {}, None),
        (the_plan(), {"said": digest("other")}, "plan.digest"),
        (the_plan(run="r2"), {}, "plan.run"),
        (the_plan(federation="elsewhere"), {}, "plan.federation"),
        (the_plan(roster=["b", "c"]), {}, "plan.roster"),
        (
            the_plan().model_copy(update={"mode": "of tomorrow"}),
            {},
            "plan.mode",
        ),
        (the_plan(outer={"optimizer": "flower:Krum"}), {}, "plan.optimizer"),
    ],
)
def test_what_a_plan_must_be(plan, changes, rule):
    arguments = {
        "said": plan.digest,
        "seen": run_seen(digest_=plan.digest),
        "federation": FederationId("demo"),
        "node": ME,
    }
    refusal = check_plan(plan, **arguments | changes)

    assert (refusal.rule if refusal else None) == rule


OPEN = Open(terms=terms_of(the_plan()), closes_at=NOW)
LAST = round_seen(Released(attempt=1, survivors=frozenset({NodeId("b")})), following=SECOND)


@pytest.mark.parametrize(
    ("seen", "confirm", "rule"),
    [
        (run_seen(round_seen(OPEN)), None, None),
        (run_seen(round_seen(OPEN, number=3, index=0)), None, "model.initial"),
        (run_seen(round_seen(OPEN, number=1)), None, "round.index"),
        (run_seen(round_seen(OPEN, number=1), last=LAST), None, None),
        (run_seen(round_seen(OPEN, number=4, index=1), last=LAST), None, None),
        (run_seen(round_seen(OPEN, number=2), last=LAST), None, "round.index"),
        (run_seen(round_seen(OPEN, number=1, index=0), last=LAST), None, "round.index"),
        (
            run_seen(round_seen(OPEN, number=1), last=LAST),
            confirmed(computed=SECOND.model_root, answered=True),
            None,
        ),
        (
            run_seen(round_seen(OPEN, number=1), last=LAST),
            confirmed(computed=snapshot(7).model_root, answered=True),
            "model.chain",
        ),
        (run_seen(), None, None),
    ],
)
def test_what_a_round_must_follow_from(seen, confirm, rule):
    refusal = check_round(the_plan(), seen, confirm)

    assert (refusal.rule if refusal else None) == rule


def test_a_round_past_the_plans_end_is_refused():
    late = round_seen(OPEN, number=2)
    before = round_seen(
        Released(attempt=1, survivors=frozenset({NodeId("b")})), number=1, following=snapshot(2)
    )

    assert check_round(the_plan(rounds=2), run_seen(late, last=before), None).rule == "round.index"
    assert check_round(the_plan(rounds=3), run_seen(late, last=before), None) is None


def test_the_first_model_is_pinned():
    assert the_plan().model.initial == FIRST.model_root


def test_the_doctor_looks_at_the_base_model(tmp_path):
    def found(path):
        return check_base_model(node_config(worker=WorkerConfig(base_model=str(path))))

    assert check_base_model(node_config()) is None
    assert "cannot be read" in found(tmp_path / "nowhere").sentence
    (tmp_path / "config.json").write_text("{}")
    assert (found(tmp_path).level, "safetensors" in found(tmp_path).sentence) == ("refused", True)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert found(tmp_path).level == "ok"
