"""A federation's first ceremony and its first acts, with the commands that people type.

Keys are files with a passphrase, or live in a PKCS#11 token (SoftHSM); proposing, showing and
signing happen on files alone. The coordinator is a real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.admin.cli import app
from infra.admin.keys import card_path, read_card
from protocols.canonical import parse_json
from protocols.errors import ConfigurationError, ExistsError, RefusedError
from protocols.governance.errors import TrustRefusedError
from tests.support.door import served
from tests.support.trust import policy_bytes

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PASSPHRASE = "correct horse"


def run(*arguments: object, says: str = "", fails: type[Exception] | None = None) -> str:
    """Call `minga admin`; its output."""
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails), (result.output, result.exception)
        assert says in str(result.exception), result.exception
        return str(result.exception)
    if result.exception is not None and result.exit_code != 0:
        raise AssertionError(f"{result.output}\n{result.exception!r}") from result.exception
    assert says in result.output, result.output
    assert PASSPHRASE not in result.output
    return result.output


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with keys of three admins and two institutions."""
    monkeypatch.setenv("MINGA_ADMIN_PASSPHRASE", PASSPHRASE)
    monkeypatch.chdir(tmp_path)
    for person, institution, country in (
        ("admin-ar", "ar-1", "AR"), ("admin-br", "br-1", "BR"), ("admin-cl", "cl-1", "CL"),
        ("site-a", "site-a", "AR"), ("site-b", "site-b", "BR"),
    ):  # fmt: skip
        run("key", "make", f"keys/{person}", "--person", person, "--institution", institution,
            "--country", country)  # fmt: skip
    Path("policy.json").write_bytes(
        policy_bytes(admins=3, threshold=2, min_countries=2, approvers=("admin-ar", "admin-br"))
    )
    return tmp_path


FOUND = (
    "key", "found", "--threshold", 2, "--min-countries", 2, "--policy", "policy.json",
    "--admin", "keys/admin-ar.card.json", "--admin", "keys/admin-br.card.json",
    "--admin", "keys/admin-cl.card.json", "--member", "keys/site-a.card.json",
    "--member", "keys/site-b.card.json", "--out", "founding.json",
)  # fmt: skip


def test_a_federation_is_founded_and_its_policy_changed(desk):
    with served(desk / "fed", governed=True) as door:
        statement = desk / "fed/coordinator/founding.json"
        run(*FOUND, "--coordinator", statement, says="founds federation demo: 2 of 3 admins")
        run("key", "publish", "founding.json", "--dir", "fed", fails=TrustRefusedError)
        run("key", "sign", "founding.json", "--key", "keys/admin-ar", "--yes")
        run("key", "show", "founding.json", says="root 1 is signed for 1 institutions, 2 must")
        run("key", "sign", "founding.json", "--key", "keys/admin-cl", "--yes")
        run("key", "show", "founding.json", says="complete: it can be published")
        run("key", "publish", "founding.json", "--dir", "fed", says="founds federation demo")
        run("key", "publish", "founding.json", "--dir", "fed", says="in force already")
        tuf = door.config.trust
        run("key", "status", "--repo", tuf, says="2 of 3 admins decide")

        value = json.loads(Path("policy.json").read_text())
        value["policy_version"] += 1
        value["privacy"]["budgets"]["default"]["eps_total_micro"] = 9_000_000
        Path("looser.json").write_text(json.dumps(value))
        root = tuf / "metadata/1.root.json"
        said = run("policy", "propose", "--repo", tuf, "--root", root, "--policy", "looser.json",
                   "--out", "looser.request")  # fmt: skip
        assert "from 8 to 9" in said  # words, not JSON
        assert "policy 2: 3 must sign" in said  # a budget increase needs more than the role's two
        for person in ("admin-ar", "admin-br"):
            run("policy", "sign", "looser.request", "--key", f"keys/{person}", "--root", root,
                "--yes")  # fmt: skip
        run("policy", "publish", "looser.request", "--dir", "fed", fails=TrustRefusedError,
            says="needs 3")  # fmt: skip
        run("policy", "sign", "looser.request", "--key", "keys/admin-cl", "--yes")
        facts = json.loads(run("policy", "show", "looser.request", "--json"))
        assert facts["missing"] == []
        run("policy", "publish", "looser.request", "--dir", "fed", fails=TrustRefusedError,
            says="each must agree")  # fmt: skip
        assert facts["must_agree"]
        for site in facts["must_agree"]:  # each institution by itself, with its own key
            run("policy", "agree", "looser.request", site, "--repo", tuf, "--out", f"{site}.agrees")
            run("policy", "sign", f"{site}.agrees", "--key", f"keys/{site}", "--yes")
            run(
                "policy",
                "publish",
                f"{site}.agrees",
                "--dir",
                "fed",
                says=f"budget-{value['policy_version']}",
            )
        run("policy", "publish", "looser.request", "--dir", "fed", says="from 8 to 9")

        run(
            "member", "suspend", "site-b", "--repo", tuf, "--code", "key-leak", "--out", "s.request"
        )
        for person in ("admin-ar", "admin-cl"):
            run("member", "sign", "s.request", "--key", f"keys/{person}", "--yes")
        run("member", "publish", "s.request", "--dir", "fed", says="denies institution site-b")
        run("key", "renew", "membership", "--repo", tuf, "--out", "r.request",
            says="signs membership again")  # fmt: skip


def test_what_a_person_is_not_let_do(desk):
    with served(desk / "fed", governed=True) as door:
        run(*FOUND, "--coordinator", door.folder / "coordinator/founding.json")
        run(*FOUND, "--coordinator", door.folder / "coordinator/founding.json", fails=ExistsError)
        run("key", "make", "keys/admin-ar", "--person", "x", "--institution", "x-1", "--country",
            "AR", fails=ExistsError)  # fmt: skip
        # a key that is not an admin's signs nothing
        run("key", "sign", "founding.json", "--key", "keys/site-a", "--yes",
            fails=TrustRefusedError)  # fmt: skip
        os.environ["MINGA_ADMIN_PASSPHRASE"] = "wrong passphrase"
        run("key", "sign", "founding.json", "--key", "keys/admin-ar", "--yes",
            fails=ConfigurationError, says="wrong passphrase")  # fmt: skip
        os.environ["MINGA_ADMIN_PASSPHRASE"] = PASSPHRASE
        Path("keys/admin-br").chmod(0o644)
        run("key", "sign", "founding.json", "--key", "keys/admin-br", "--yes",
            fails=ConfigurationError, says="read by others")  # fmt: skip
        # a request that was changed after signing has another digest
        run("key", "sign", "founding.json", "--key", "keys/admin-ar", "--yes")
        value = parse_json(Path("founding.json").read_bytes(), limit=2**26)
        value["title"] = "another"
        Path("founding.json").write_text(json.dumps(value))
        run("key", "show", "founding.json", fails=RefusedError, says="another request")
    assert Path("keys/admin-ar").stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in Path("keys/admin-ar").read_bytes()


@pytest.mark.skipif(not SOFTHSM.exists(), reason="SoftHSM (Debian softhsm2) is not installed")
def test_an_admin_whose_key_never_leaves_its_token(desk, monkeypatch):
    """The key is ECDSA in a PKCS#11 token; the root takes it beside Ed25519 keys."""
    (desk / "tokens").mkdir()
    (desk / "softhsm.conf").write_text(f"directories.tokendir = {desk}/tokens\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(desk / "softhsm.conf"))
    made = subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "admin", "--pin", "1234",
         "--so-pin", "5678"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "initialized" in made.stdout
    script = (
        "import pkcs11, pkcs11.util.ec as ec\n"
        f"token = pkcs11.lib({str(SOFTHSM)!r}).get_token(token_label='admin')\n"
        "with token.open(rw=True, user_pin='1234') as s:\n"
        "    p = s.create_domain_parameters(pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS:"
        " ec.encode_named_curve_parameters('secp256r1')}, local=True)\n"
        "    p.generate_keypair(id=b'\\x02', label='k', store=True)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
    monkeypatch.setenv("MINGA_ADMIN_PASSPHRASE", "1234")
    run("key", "make", "keys/token", "--person", "admin-pe", "--institution", "pe-1", "--country",
        "PE", "--token", "--token-label", "admin", "--module", SOFTHSM)  # fmt: skip
    card = read_card(card_path(Path("keys/token")))
    assert card.public.keytype == "ecdsa"
    assert not Path("keys/token").exists()  # there is nothing to steal here
    with served(desk / "fed", governed=True) as door:
        found = [str(item).replace("admin-cl.card", "token.card") for item in FOUND]
        run(*found, "--coordinator", door.folder / "coordinator/founding.json")
        run("key", "sign", "founding.json", "--key", "keys/token", "--module", SOFTHSM, "--yes")
        monkeypatch.setenv("MINGA_ADMIN_PASSPHRASE", PASSPHRASE)
        run("key", "sign", "founding.json", "--key", "keys/admin-ar", "--yes")
        run("key", "publish", "founding.json", "--dir", "fed", says="founds federation demo")
        assert "pe-1" in run("key", "status", "--repo", door.config.trust)
