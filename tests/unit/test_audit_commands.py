"""`minga audit verify | proof | recompute | export`, on a whole run on disk."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest

from infra.audit.export import cell
from policies.audit.verify import NOT_SHOWN, QUESTIONS
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.proof_file import verify_proof_file
from protocols.tlog.proofs import verify_inclusion
from protocols.tlog.text import decode_base64
from protocols.tlog.trust_policy import TrustPolicy
from tests.support.audit_disk import copy_run, minga, the_run
from tests.support.audit_run import write_log


@pytest.fixture
def run(tmp_path):
    return copy_run(tmp_path / "run")


# -- verify --------------------------------------------------------------------------------------


def test_a_good_log_under_the_auditors_own_trust_policy(run):
    done = minga("audit", "verify", run / "log", "--trust-policy", run / "anchor.txt")

    assert done.status == 0
    assert "anchored: the trust policy came from elsewhere" in done.out
    assert "80 leaves verified" in done.out
    for question in QUESTIONS:
        assert question.text in done.out
    for line in NOT_SHOWN:
        assert line in done.out


@pytest.mark.parametrize("given", [[], ["--trust-policy", "log/trust-policy.txt"]])
def test_keys_found_beside_the_log_anchor_nothing(run, given):
    """Also where somebody passes the very file in the log's folder."""
    arguments = [run / text if "/" in text else text for text in given]

    done = minga("audit", "verify", run / "log", *arguments, "--json")
    facts = json.loads(done.out)

    assert done.status == 0
    assert facts["anchored"] is False
    (record,) = [r for r in facts["records"] if r["id"] == "17"]
    assert record["result"] == "unknown"
    assert "unanchored" in record["reason"]


def test_strict_takes_no_unknown_for_an_answer(run):
    done = minga("audit", "verify", run / "log", "--strict", "--trust-policy", run / "anchor.txt")

    assert done.status == 4
    assert "[audit_unknown]" in done.error


def test_json_has_a_record_for_every_question(run):
    facts = json.loads(minga("audit", "verify", run / "log", "--json").out)

    assert {record["id"] for record in facts["records"]} == {str(n) for n in range(1, 23)}
    assert facts["first_bad"] is None
    assert facts["size"] == facts["leaves_verified"] == 80


def test_the_first_bad_leaf_is_named(run):
    bundle = run / "log/tile/entries/000.p/80"
    data = bytearray(bundle.read_bytes())
    at = data.index(the_run().entries[33]) + 40
    data[at] ^= 1
    bundle.write_bytes(data)

    done = minga("audit", "verify", run / "log")

    assert done.status == 5
    assert "first bad place: leaf 33" in done.error
    assert "[audit_failed]" in done.error


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("tile/entries/000.p/80", "leaf 0"),
        ("tile/0/000.p/80", "leaves 0 to 79"),
        ("checkpoint", None),
    ],
)
def test_a_file_that_is_gone_is_a_bad_place_or_no_log(run, path, place):
    (run / "log" / path).unlink()

    done = minga("audit", "verify", run / "log")

    if place is None:
        assert done.status == 3  # there is no log here
        assert "[not_found]" in done.error
    else:
        assert done.status == 5
        assert f"first bad place: {place}" in done.error


def test_another_logs_trust_policy_is_not_satisfied(run):
    policy = (run / "anchor.txt").read_text()
    lines = policy.splitlines()
    other = lines[1].split(" ")[2].split("+")  # a witness's key as the log's
    assert len(other) >= 3
    (run / "other.txt").write_text("\n".join(lines[1:2]) + "\nquorum none\n")

    done = minga("audit", "verify", run / "log", "--trust-policy", run / "other.txt")

    assert done.status == 5


def test_a_checkpoint_from_elsewhere_convicts_a_log_that_was_cut_back(run):
    """All of an older state, its archive too, holds in itself."""
    cut = run / "cut"
    older = sorted(the_run().checkpoints)[-2]
    shutil.copytree(run / "log", cut)
    shutil.rmtree(cut / "tile")
    write_log(cut, the_run().entries[:older])
    (cut / "checkpoint").write_bytes((run / "log/checkpoints" / str(older)).read_bytes())
    for path in (cut / "checkpoints").iterdir():
        if int(path.name) >= older:
            path.unlink()
    assert minga("audit", "verify", cut).status == 0

    done = minga("audit", "verify", cut, "--seen", run / "log/checkpoint")

    assert done.status == 5
    assert f"leaf {older}" in done.error


def test_a_head_that_was_archived_and_not_yet_published_is_the_newest(run):
    """A writer may die between the two files; a checkpoint that was put back is no way to hide."""
    older = sorted(the_run().checkpoints)[-2]
    (run / "log/checkpoint").write_bytes((run / "log/checkpoints" / str(older)).read_bytes())

    facts = json.loads(minga("audit", "verify", run / "log", "--json").out)

    assert facts["size"] == 80
    assert facts["first_bad"] is None


# -- proof ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 41, 79])
def test_a_proof_can_be_verified_without_the_log(run, index, tmp_path):
    out = tmp_path / "p.tlog-proof"

    assert minga("audit", "proof", run / "log", index, "--out", out).status == 0
    entry = (tmp_path / "p.leaf.json").read_bytes()
    policy = TrustPolicy.parse((run / "anchor.txt").read_bytes())
    now = int(the_run().clock.timestamp()) + 60
    found, _ = verify_proof_file(out.read_bytes(), entry, policy, now=now)

    assert found == index
    assert entry == the_run().entries[index]


def test_there_is_no_proof_of_a_leaf_that_is_not_there(run, tmp_path):
    done = minga("audit", "proof", run / "log", 80, "--out", tmp_path / "p")

    assert done.status == 3
    assert "0 to 79" in done.error


# -- recompute -----------------------------------------------------------------------------------


def recompute(run, *more):
    return minga("audit", "recompute", run / "log", "--uploads", run / "uploads", *more)


def test_every_model_is_made_again_from_the_masked_uploads(run):
    done = recompute(run, "--json")
    facts = json.loads(done.out)

    assert done.status == 0
    assert [item["round"] for item in facts] == ["r1/0", "r1/1", "r1/4"]
    assert all(item["result"] == "pass" and item["from_uploads"] for item in facts)
    assert facts[-1]["model_out"] == the_run().snapshot.model_root
    assert facts[0]["metrics"]["nodes"] == 3


def test_one_round_alone_starts_from_the_published_model(run):
    done = recompute(run, "--round", "4")

    assert done.status == 0
    assert "the published model before" in done.out


def test_a_changed_upload_is_named_with_its_round(run):
    path = run / "uploads/r1/1.2.inst-02.vector"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)

    done = recompute(run)

    assert done.status == 5
    assert "round r1/1" in done.error


def test_uploads_whose_retention_ended_leave_the_round_unknown(run):
    (run / "uploads/r1/0.1.inst-01.vector").unlink()

    done = recompute(run)

    assert done.status == 4
    assert "r1/0: unknown: the published sum leads to the model; its uploads are gone" in done.out


def blob_of(run, digest):
    return run / "blobs" / digest[:2] / digest


def test_two_models_that_changed_places_are_found(run):
    """The blobs of two thetas are swapped: neither is what its name says."""
    thetas = [d for d, data in the_run().blobs.items() if len(data) == 1200]
    one, two = blob_of(run, thetas[0]), blob_of(run, thetas[1])
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)

    done = recompute(run)

    assert done.status == 5
    assert "was changed" in done.error


def test_a_replaced_sum_is_found(run):
    facts = json.loads(minga("audit", "export", run / "log", "--out", run / "x").out and "[]")
    assert facts == []
    sums = [
        json.loads(line)["predicate"]["sum_blob"]
        for line in (run / "x/leaves.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "round.aggregate"
    ]
    blob_of(run, sums[0]).write_bytes(blob_of(run, sums[1]).read_bytes())

    done = recompute(run)

    assert done.status == 5
    assert "round r1/0" in done.error


def test_without_blobs_nothing_is_made_again(run):
    shutil.rmtree(run / "blobs")

    assert recompute(run).status == 3


# -- export --------------------------------------------------------------------------------------


def test_every_exported_leaf_proves_itself(run, tmp_path):
    assert minga("audit", "export", run / "log", "--out", tmp_path / "x").status == 0
    lines = (tmp_path / "x/leaves.jsonl").read_text().splitlines()
    root = the_run().seen.root

    for line in lines:
        leaf = json.loads(line)
        entry = decode_base64(leaf["entry"], "entry")
        assert leaf_hash(entry).hex() == leaf["leaf_hash"]
        verify_inclusion(
            leaf=leaf_hash(entry),
            index=leaf["index"],
            size=leaf["proof"]["size"],
            root=root,
            proof=[decode_base64(h, "hash") for h in leaf["proof"]["hashes"]],
        )
    assert len(lines) == 80


def test_tables_say_who_was_in_which_sum(run, tmp_path):
    minga("audit", "export", run / "log", "--out", tmp_path / "x", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x/csv/participation.csv").read_text())))

    found = {(row["round"], row["institution"]): (row["answer"], row["in_sum"]) for row in rows}
    assert found["r1/0", "inst-04"] == ("joined", "no")
    assert found["r1/1", "inst-04"] == ("declined", "no")
    assert found["r1/4", "inst-04"] == ("joined", "yes")
    outcomes = list(csv.DictReader(io.StringIO((tmp_path / "x/csv/rounds.csv").read_text())))
    assert [row["outcome"] for row in outcomes] == [
        "released", "released", "burned", "aborted", "released",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(text):
    assert cell(text) == f"'{text}"
    assert cell("a=1") == "a=1"


def test_prov_and_slsa_name_the_same_models(run, tmp_path):
    minga("audit", "export", run / "log", "--out", tmp_path / "x")
    prov = json.loads((tmp_path / "x/prov.json").read_text())
    models = {entry["prov:entity"] for entry in prov["wasGeneratedBy"].values()}

    statements = [json.loads(p.read_text()) for p in (tmp_path / "x/slsa").iterdir()]
    assert {f"model:{s['subject'][0]['digest']['sha256']}" for s in statements} == models
    for statement in statements:
        assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
        definition = statement["predicate"]["buildDefinition"]
        assert definition["externalParameters"]["plan"]["run"] == "r1"
    for name in ("used", "wasGeneratedBy", "wasDerivedFrom", "wasAssociatedWith"):
        for relation in prov[name].values():
            known = {*prov["entity"], *prov["activity"], *prov["agent"]}
            assert set(relation.values()) <= known


def test_an_export_overwrites_nothing(run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mine.txt").write_text("mine")

    assert minga("audit", "export", run / "log", "--out", tmp_path / "x").status == 3
