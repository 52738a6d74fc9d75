"""How a node gets its certificate, its next one, and what people see of it: the real coordinator.

Also `minga node doctor`, `status`, `journal`, `pause` and `resume`, as a person at a site does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from infra.cli import main
from node_agent import enrol
from node_agent.cli import app
from node_agent.cli.joining import JoinRequest, join_folder
from node_agent.client import Connection
from node_agent.config import NodeFolder, load_config
from node_agent.doctor import (
    check_certificate,
    check_clock,
    check_data,
    check_devices,
    examine,
    exit_code,
)
from node_agent.enrol import join, renew
from node_agent.journal import Journal
from node_agent.keys import KeyStore
from node_agent.lock import FolderLock
from protocols.crypto.identity import spki_digest
from protocols.enrolment import Invitation
from protocols.errors import (
    ConfigurationError,
    ExistsError,
    MalformedMessageError,
    NotEnrolledError,
    TokenRefusedError,
    UnreachableError,
)
from protocols.gen import admin_pb2, rounds_pb2
from protocols.identifiers import FederationId
from tests.support.door import served
from tests.support.node import ME, NOW, ROUND, Authority, node_config, node_folder, rng


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with served(tmp_path_factory.mktemp("door")) as made:
        yield made


@pytest.fixture
def invite(door):
    """Make an invitation."""
    operator = door.operator()

    def made(name=ME):
        request = admin_pb2.InviteRequest(institution=name, valid_hours=1)
        return operator.admin.Invite(request, timeout=20).token

    return made


def request(door, folder, token, **changes):
    values = {
        "folder": folder,
        "token": token,
        "coordinator": door.address,
        "enrolment": door.enrolment,
        "train": (),
        "valid": (),
        "ranks": 1,
        "device": "cpu",
        "threads": None,
    }
    return JoinRequest(**values | changes)


def sync(door, folder):
    """One call as the node."""
    node = NodeFolder(folder)
    config = load_config(node)

    async def ask():
        connection = Connection(config.coordinator, KeyStore(node.keys).tls(), rng=rng())
        try:
            return await connection.call(connection.rounds.Sync, rounds_pb2.SyncRequest())
        finally:
            await connection.close()

    return asyncio.run(ask())


# -- joining ---------------------------------------------------------------------------------------


def test_an_invitation_becomes_a_working_node(door, invite, tmp_path):
    facts = join_folder(request(door, tmp_path / "n", invite("site-1")))

    assert (facts["institution"], facts["federation"]) == ("site-1", "demo")
    assert sync(door, tmp_path / "n").now_ms > 0
    assert "minga1" not in repr(request(door, tmp_path / "n", "minga1.x"))


@pytest.mark.parametrize("lost", ["answer", "certificate", "config"])
def test_a_join_is_repeated_at_any_instant(door, invite, tmp_path, monkeypatch, lost):
    """The answer is lost, or the process dies before or after the certificate is stored."""
    token, folder = invite(f"lost-{lost}"), tmp_path / "n"
    keys = KeyStore(folder / "keys")
    with monkeypatch.context() as patched:

        def crash(*_args, **_named):
            raise KeyboardInterrupt

        if lost == "answer":
            patched.setattr(KeyStore, "accept", crash)
        elif lost == "certificate":
            patched.setattr("node_agent.keys.write_secret", _dies_at("tls.pem"))
        else:
            patched.setattr("node_agent.cli.joining.atomic_write", crash)
        with pytest.raises(KeyboardInterrupt):
            join_folder(request(door, folder, token))
    before = (keys.signing_path.read_bytes(), (folder / "keys/request/csr.der").read_bytes())

    join_folder(request(door, folder, token))

    after = (keys.signing_path.read_bytes(), (folder / "keys/request/csr.der").read_bytes())
    assert before == after  # the same keys, the same request
    assert sync(door, folder).now_ms > 0
    join_folder(request(door, folder, token))  # and once more when all is well
    assert sync(door, folder).now_ms > 0


def _dies_at(name):
    from node_agent.keys import write_secret

    def write(path, data):
        if path.name == name:
            raise KeyboardInterrupt
        write_secret(path, data)

    return write


def test_a_used_invitation_does_not_make_a_second_node(door, invite, tmp_path):
    token = invite("used")
    join_folder(request(door, tmp_path / "one", token))

    with pytest.raises(TokenRefusedError, match="used before"):
        join_folder(request(door, tmp_path / "two", token))
    assert not (tmp_path / "two" / "config.toml").exists()


def test_a_folder_belongs_to_one_institution(door, invite, tmp_path):
    join_folder(request(door, tmp_path / "n", invite("first")))

    with pytest.raises(ExistsError, match="belongs to first"):
        join_folder(request(door, tmp_path / "n", invite("second")))


def test_joining_again_keeps_what_people_wrote(door, invite, tmp_path):
    folder = tmp_path / "n"
    join_folder(request(door, folder, invite("again")))
    config = folder / "config.toml"
    config.write_text(config.read_text() + "\n# a note\n")
    certificate = KeyStore(folder / "keys").certificate()

    join_folder(request(door, folder, invite("again")))  # a new invitation, say after expiry

    assert "# a note" in config.read_text()
    assert spki_digest(KeyStore(folder / "keys").certificate()) != spki_digest(certificate)
    assert sync(door, folder).now_ms > 0


def test_a_server_of_another_federation_is_not_told_the_secret(door, invite, tmp_path, monkeypatch):
    """The root in the invitation is not the one that certified the server."""
    monkeypatch.setattr(enrol, "Backoff", enrol_backoff)
    invitation = Invitation.parse(invite("stranger"))
    foreign = Invitation(
        institution=invitation.institution,
        secret=invitation.secret,
        root_der=Authority.create().ca.certificate.public_bytes(_der()),
    )

    with pytest.raises(UnreachableError):
        asyncio.run(join(KeyStore(tmp_path / "keys"), foreign, enrolment=door.enrolment, rng=rng()))
    # The secret is not burned: the right root still works.
    join_folder(request(door, tmp_path / "n", invitation.to_text()))


def enrol_backoff():
    from node_agent.client import Backoff

    return Backoff(first_s=0.001, cap_s=0.002)


def _der():
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"token": "minga1.a.b"}, TokenRefusedError),
        ({"coordinator": "no-port"}, MalformedMessageError),
        ({"device": "gpu"}, MalformedMessageError),
    ],
)
def test_wrong_arguments_are_one_sentence(door, invite, tmp_path, changes, error):
    arguments = {"token": invite(), **changes}
    with pytest.raises(error) as caught:
        join_folder(request(door, tmp_path / "n", arguments.pop("token"), **arguments))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "n").exists()


# -- renewal ---------------------------------------------------------------------------------------


def test_a_renewal_is_for_a_new_key_and_needs_no_restart(door, invite, tmp_path):
    folder = tmp_path / "n"
    join_folder(request(door, folder, invite("renews")))
    keys, config = KeyStore(folder / "keys"), load_config(NodeFolder(folder))

    async def work():
        connection = Connection(config.coordinator, keys.tls(), rng=rng())
        try:
            before = [keys.tls().serial, spki_digest(keys.certificate())]
            await connection.call(connection.rounds.Sync, rounds_pb2.SyncRequest())
            for _ in range(2):
                await renew(keys, connection, node="renews", federation=FederationId("demo"))
                before += [keys.tls().serial, spki_digest(keys.certificate())]
                await connection.call(connection.rounds.Sync, rounds_pb2.SyncRequest())
            return before
        finally:
            await connection.close()

    seen = asyncio.run(work())
    assert len(set(seen)) == 6  # three serials, three keys
    assert not (folder / "keys/request/purpose").exists()


def test_a_lost_renewal_keeps_the_certificate_that_works(door, invite, tmp_path, monkeypatch):
    folder = tmp_path / "n"
    join_folder(request(door, folder, invite("loses")))
    keys = KeyStore(folder / "keys")
    before = keys.tls().serial

    async def work():
        connection = Connection(door.address, keys.tls(), rng=rng())
        try:
            await renew(keys, connection, node="loses", federation=FederationId("elsewhere"))
        finally:
            await connection.close()

    with pytest.raises(NotEnrolledError, match="is of federation 'demo'"):
        asyncio.run(work())
    assert keys.tls().serial == before
    assert sync(door, folder).now_ms > 0


# -- what people see -------------------------------------------------------------------------------


@pytest.fixture
def site(door, invite, tmp_path):
    """A joined node with good text."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text":"minga"}\n' * 3)
    name = "s" + os.urandom(4).hex()
    join_folder(request(door, tmp_path / "n", invite(name), train=(str(text),), valid=(str(text),)))
    return tmp_path / "n"


def command(*arguments):
    """A node command as a person types it: (exit status, stdout)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def findings(folder, **changes):
    found = examine(
        folder, start_worker=False, probe=lambda: {"cuda": False, "devices": 0}, **changes
    )
    return {finding.what: finding for finding in found}


def test_doctor_is_content(site):
    found = findings(site)

    undeclared = found.pop("site policy")  # join wrote it, and nobody has edited it
    assert undeclared.level == "warning"
    for what in ("governance", "round log"):  # this federation has neither, and says so
        missing = found.pop(what)
        assert missing.level == "warning"
        assert missing.sentence.startswith("UNSAFE")
    assert {finding.level for finding in found.values()} == {"ok"}, found
    assert exit_code(list(found.values())) == 0
    status, out = command("doctor", "--dir", site, "--no-worker", "--json")
    assert status == 0
    assert {"config", "certificate", "coordinator", "clock", "data (train)", "disk"} <= {
        line["what"] for line in json.loads(out)
    }


def test_doctor_names_a_broken_line(site, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text":"minga"}\n{"text":\n')

    finding = findings(site)["data (train)"]

    assert finding.level == "refused"
    assert f"{tmp_path / 'text.jsonl'}:2" in finding.sentence
    assert "remove that line" in finding.mend
    assert command("doctor", "--dir", site, "--no-worker")[0] == 3


def test_doctor_names_a_broken_row_and_weights_that_cannot_be(tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": ["minga", None]}), path)
    broken = check_data("train", (str(path),), needed=True)
    pq.write_table(pa.table({"text": ["minga", "mutirão"]}), path)
    twice = check_data("train", (str(path), str(tmp_path)), needed=True, weights=(1.0, 2.0))
    whole = check_data("train", (str(path),), needed=True, weights=(1.0,))

    assert (broken.level, twice.level, whole.level) == ("refused", "refused", "ok")
    assert f'{path}: row 2 has no "text"' in broken.sentence
    assert "two weighted data sets" in twice.sentence
    assert "minga" not in broken.sentence


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_doctor_sees_missing_text(site, tmp_path, damage):
    path = tmp_path / "text.jsonl"
    path.unlink() if damage == "gone" else path.write_text("")

    finding = findings(site)["data (train)"]

    assert finding.level == "refused"
    assert str(path) in finding.sentence
    assert finding.mend


def test_doctor_sees_a_wrong_clock(site):
    found = findings(site, now=lambda: datetime.now(UTC) - timedelta(minutes=3))

    assert found["clock"].level == "refused"
    assert "behind the coordinator" in found["clock"].sentence
    assert "chrony" in found["clock"].mend


def test_doctor_sees_that_nobody_answers(site):
    config = site / "config.toml"
    lines = config.read_text().splitlines()
    lines[2] = 'coordinator = "127.0.0.1:9"'
    config.write_text("\n".join(lines))

    finding = findings(site)["coordinator"]

    assert finding.level == "not_ready"
    assert "127.0.0.1:9" in finding.mend
    assert command("doctor", "--dir", site, "--no-worker")[0] == 4


def test_doctor_sees_that_the_keys_are_gone(site):
    shutil.rmtree(site / "keys")

    finding = findings(site)["certificate"]

    assert finding.level == "refused"
    assert "minga node join" in finding.mend


def test_doctor_in_a_folder_that_is_none(tmp_path):
    status, out = command("doctor", "--dir", tmp_path, "--no-worker")

    assert status == 3
    assert "minga node join" in out


def test_doctor_wants_the_gpus_that_the_config_names():
    want = node_config(
        worker=node_config().worker.model_copy(update={"device": "cuda", "ranks": 2})
    )

    assert check_devices(want, lambda: {"devices": 1}).level == "refused"
    assert check_devices(want, lambda: {"devices": 2}).level == "ok"
    assert check_devices(node_config(), lambda: {"devices": 0}).level == "ok"

    def broken():
        raise ValueError("No module named 'torch'")

    assert "torch" in check_devices(node_config(), broken).sentence


@pytest.mark.parametrize(
    ("offset", "level"),
    [(0.0, "ok"), (30.0, "ok"), (-30.0, "ok"), (30.1, "refused"), (-31, "refused")],
)
def test_clock(offset, level):
    assert check_clock(offset).level == level


@pytest.mark.parametrize(
    ("at", "level", "says"),
    [
        (timedelta(), "ok", "in force until"),
        (timedelta(days=28), "warning", "expires soon"),
        (timedelta(days=31), "refused", "expired at"),
        (timedelta(days=-2), "refused", "not valid before"),
    ],
)
def test_certificate_dates(tmp_path, at, level, says):
    identity = Authority.create(now=NOW - timedelta(days=9)).enrol(
        KeyStore(node_folder(tmp_path).keys), now=NOW, lifetime=timedelta(days=30)
    )

    (finding,) = check_certificate(identity, node_config(), NOW + at)

    assert finding.level == level
    assert says in finding.sentence
    assert (finding.mend == "") == (level == "ok")


def test_certificate_of_somebody_else(tmp_path):
    identity = Authority.create().enrol(KeyStore(node_folder(tmp_path).keys))

    for config in (
        node_config(institution="b"),
        node_config(federation=FederationId("elsewhere")),
    ):
        (finding,) = check_certificate(identity, config, datetime.now(UTC))
        assert finding.level == "refused"


def test_held_out_text_is_only_recommended():
    assert check_data("valid", (), needed=False).level == "warning"
    assert check_data("train", (), needed=True).level == "refused"


def test_status_and_journal_without_an_agent(site):
    journal = Journal(site / "journal.sqlite", now=lambda: NOW)
    journal.add_decision(ROUND, index=0, start_root="a" * 64, refusal=None)
    journal.close()

    (site / "status.json").write_text(
        json.dumps(
            {
                "schema": "minga.node-status/1",
                "at": "2026-03-01T12:00:00Z",
                "connected": True,
                "trouble": "",
                "certificate_until": "2026-04-01T12:00:00Z",
                "workers": {"builtin": "serving, process 1"},
                "runs": [],
            }
        )
    )
    status, out = command("status", "--dir", site)
    assert status == 0
    assert "no agent is running" in out
    assert "what the last one said, at 2026-03-01T12:00:00Z" in out
    assert "connected" not in out  # it was; nobody is now
    assert "serving" not in out
    assert "join" in out
    facts = json.loads(command("status", "--dir", site, "--json")[1])
    assert facts["agent_pid"] is None
    assert [line["what"] for line in facts["journal"]] == ["join"]
    (line,) = command("journal", "--dir", site, "--json")[1].splitlines()
    assert json.loads(line)["round"] == 0
    assert "aaaaaaaaaaaa…" in command("journal", "--dir", site)[1]
    assert command("journal", "--dir", site, "--run", "other")[1] == ""
    with FolderLock(NodeFolder(site), pid=4711):
        assert json.loads(command("status", "--dir", site, "--json")[1])["agent_pid"] == 4711


def test_pause_and_resume(site):
    assert "paused" in command("pause", "--dir", site)[1]
    assert json.loads(command("pause", "--dir", site, "--json")[1])["paused"] is True
    assert json.loads(command("status", "--dir", site, "--json")[1])["paused"] is True
    assert "taking part" in command("resume", "--dir", site)[1]
    assert json.loads(command("status", "--dir", site, "--json")[1])["paused"] is False


def test_text_from_elsewhere_is_not_markup(site):
    journal = Journal(site / "journal.sqlite", now=lambda: NOW)
    journal.note("start", {"reason": "[red]not red[/red] [unclosed"})
    journal.close()

    assert "[red]not red[/red] [unclosed" in command("journal", "--dir", site)[1]


def test_a_command_in_a_folder_that_is_no_nodes(tmp_path):
    for name in ("status", "pause", "journal", "run"):
        with pytest.raises(ConfigurationError, match="minga node join"):
            command(name, "--dir", tmp_path)


def test_exit_status_by_family(door, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["node", "status", "--dir", str(tmp_path)])
    assert ended.value.code == 3
    where = ["--dir", str(tmp_path / "n"), "--coordinator", door.address]
    with pytest.raises(SystemExit) as ended:
        main(["node", "join", "--token", "bad", *where])
    assert ended.value.code == 3
    assert "token_refused" in capsys.readouterr().err
