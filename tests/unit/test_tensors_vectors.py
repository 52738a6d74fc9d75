"""The golden vectors: the tree holds what the code makes, and a second implementation agrees."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from protocols.vectors import make_tensors, regenerate
from tests.support import tensors_reference as reference

ROOT = Path(__file__).resolve().parents[2] / "protocols"
PARTS = json.loads((ROOT / "vectors" / "tensors.json").read_text("ascii"))
ROUND = json.loads((ROOT / "vectors" / "tensors_round.json").read_text("ascii"))
SPEC = (ROOT / "spec" / "vector.md").read_text("utf-8")


def test_the_tree_holds_what_the_code_makes():
    assert regenerate.stale(list(make_tensors.FILES)) == []


def test_a_changed_vector_is_noticed(tmp_path, monkeypatch, capsys):
    files = {"a.json": lambda: {"hex": "9cff0064"}, "b.json": lambda: [1]}
    (tmp_path / "a.json").write_text(regenerate.text_of({"hex": "9cff0065"}), "ascii")
    monkeypatch.setattr(regenerate, "HERE", tmp_path)
    monkeypatch.setattr(regenerate, "makers", lambda: files)

    assert regenerate.main(["--check"]) == 1
    assert capsys.readouterr().out == "a.json differs\nb.json differs\n"
    assert regenerate.main([]) == 0
    assert regenerate.main(["--check"]) == 0
    assert regenerate.main(["--help"]) == 2


# -- a second implementation --------------------------------------------------------------------


def lanes(count: int) -> list[int]:
    return [(2_654_435_761 * i + 12_345) % 2**32 for i in range(count)]


def test_manifest_and_segments():
    row = PARTS["manifest"]
    assert row["digest"] == reference.blob_name(row["bytes"].encode())
    start = block = 0
    for tensor, segment in zip(json.loads(row["bytes"])["tensors"], row["segments"], strict=True):
        size = int(np.prod(tensor["shape"], dtype=int))
        assert segment == [tensor["name"], start, start + size, block]
        start, block = start + size, block + -(-size // reference.BLOCK)
    assert (row["coordinates"], row["blocks"]) == (start, block)


@pytest.mark.parametrize(
    "row", PARTS["packing"], ids=lambda row: f"{row['bits']} bits, {row['coordinates']}"
)
def test_packing(row):
    if row["coordinates"] > 300:
        # A slow reading of a whole chunk takes a second: its size suffices here, and
        # tests/unit/test_tensors_ring.py compares all of it with the code that made this row.
        beside = {16: lambda m: 0, 20: lambda m: (m + 1) // 2, 24: lambda m: m}[row["bits"]]
        chunks = [reference.CHUNK, row["coordinates"] - reference.CHUNK]
        cut = [m for m in chunks if m > 0] if chunks[1] > 0 else [row["coordinates"]]
        assert row["bytes"] == sum(2 * m + beside(m) for m in cut)
        return
    packed = reference.pack_vector(lanes(row["coordinates"]), row["bits"])
    if "hex" in row:
        assert packed.hex() == row["hex"]
    else:
        assert (len(packed), hashlib.sha256(packed).hexdigest()) == (row["bytes"], row["sha256"])


def test_sums_and_limits():
    for row in PARTS["sums"]:
        top = row["addends"] * (2 ** row["bits"] - 1)
        assert reference.pack_chunk([top] * 3, row["bits"]).hex() == row["sum"]
    for row in PARTS["limits"]:
        half = 2 ** (row["bits"] - 1)
        assert row["limit"] == (half - 1) // row["nodes"]
        assert row["noisy_limit"] == Fraction(9 * half, 10).__floor__()


def test_rounding():
    for row in PARTS["rounding"]:
        value = reference.f32(row["value"]) * 2.0 ** row["exponent"]
        expected = reference.round_one(value, row["dither"], row["limit"])
        assert (row["q"], bool(row["clamped"])) == expected
    assert {row["clamped"] for row in PARTS["rounding"]} == {0, 1}


def test_scales():
    for row in PARTS["scales"]["largest"]:
        fits = [
            e
            for e in range(-100, 101)
            if reference.two_to(e) * Fraction(row["bound"]) <= row["limit"]
        ]
        assert row["e"] == max(fits, default=-100)
    for row in PARTS["scales"]["next"]:
        mean_square = (
            Fraction(int(row["sum_squares"]), row["coordinates"])
            * (reference.two_to(-row["old"]) * Fraction(65536, row["weight_sum_units"])) ** 2
        )
        k = Fraction(row["k_permille"], 1000)
        fits = [
            e
            for e in range(-100, 101)
            if reference.two_to(e) * Fraction(row["floor"]) <= row["limit"]
            and (reference.two_to(e) * k) ** 2 * mean_square <= row["limit"] ** 2
        ]
        assert row["e"] == max(fits, default=-100), row


def test_metrics_and_weights():
    for row in PARTS["metrics"]["rows"]:
        assert row["limbs"] == reference.limbs(row["value"])
    for row in PARTS["weights"]["weights"]:
        cap = row["cap"]
        share = 1 if cap is None else Fraction(min(row["tokens"], cap), cap)
        assert row["units"] == max(1, (share * 65536).__floor__())
    for row in PARTS["weights"]["clip_factors"]:
        if row["norm"]:
            ratio = row["clip_norm"] / row["norm"]
            assert row["factor"] == min(1.0, ratio) * (1 - 2.0**-20)


def test_units():
    for row in PARTS["units"]:
        data = (bytes(range(251)) * (row["size"] // 251 + 1))[: row["size"]]
        assert row["root"] == reference.blob_name(data)


def floats(text: str) -> list[float]:
    return np.frombuffer(bytes.fromhex(text), "<f4").tolist()


def test_a_sites_vector():
    """From delta and dither to packed bytes, coordinate by coordinate."""
    for site, packed in enumerate(ROUND["average"]["vectors"]):
        seed = bytes([site, *bytes.fromhex(ROUND["seed"])[1:]])
        dither = np.frombuffer(make_tensors.dither_stream(seed, 0, 11), "<u2").tolist()
        delta = [reference.f32(((7 * i + 13 * site) % 23 - 11) / 300) for i in range(11)]
        weight = reference.f32(2.0**-site)
        rounded = [
            reference.round_one(reference.f32(x * weight * 2**21), u, ROUND["limit"])
            for x, u in zip(delta, dither, strict=True)
        ]
        metrics = [65536 >> site, 1, 1000 + site, 0, 0, 2_500_000_000 + site, 0, 0]
        limbs = [limb for value in metrics for limb in reference.limbs(value)]
        assert packed == reference.pack_vector([q for q, _ in rounded] + limbs, 20).hex()
        assert not any(clamped for _, clamped in rounded)


def centred_model(packed: str) -> list[int]:
    """The eleven model coordinates of a packed vector of 59: all in the first half."""
    data = bytes.fromhex(packed)
    return [
        reference.centred(
            int.from_bytes(data[2 * j : 2 * j + 2], "little") | (data[118 + j] & 15) << 16, 20
        )
        for j in range(11)
    ]


@pytest.mark.parametrize("name", ["average", "nesterov"])
def test_the_next_model(name):
    row = ROUND[name]
    sums = [sum(column) for column in zip(*map(centred_model, row["vectors"]), strict=True)]
    assert centred_model(row["sum"]) == sums
    assert row["max_abs"] == max(map(abs, sums))
    theta, chosen = floats(row["theta"]), [*range(6), *range(8, 13)]
    momentum = floats(ROUND["nesterov"]["momentum"])
    for at, s in zip(chosen, sums, strict=True):
        mean = reference.mean_of(s, exponent=21, weight_units=row["weight_sum_units"])
        if name == "average":
            theta[at] = reference.average(theta[at], mean, 1.0)
        else:
            theta[at], momentum[at] = reference.nesterov(theta[at], momentum[at], mean, 0.7, 0.9)

    assert floats(row["next"]["theta"]) == theta
    if name == "nesterov":
        assert floats(row["next"]["momentum"]) == momentum
    after = json.loads(row["next_snapshot"])
    assert after["theta"] == reference.blob_name(bytes.fromhex(row["next"]["theta"]))
    assert after["scales"] == reference.blob_name(bytes.fromhex(row["next_scales"]))
    for document, root in (("snapshot", "model_root"), ("next_snapshot", "next_model_root")):
        data = row[document].encode()
        assert data == reference.canonical(json.loads(data))
        assert row[root] == reference.framed_hash("minga/snapshot/v1", data)
    assert row["sum_root"] == reference.blob_name(bytes.fromhex(row["sum"]))


# -- the specification's examples ----------------------------------------------------------------


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def examples() -> list[str]:
    """Hexadecimal of at least 8 digits, and JSON documents, in the specification."""
    return re.findall(r"\b[0-9a-f]{8,}\b", SPEC) + re.findall(r"^\{.*\}$", SPEC, re.MULTILINE)


def test_every_example_of_the_specification_is_a_golden_vector():
    known = "\n".join([*strings(PARTS), *strings(ROUND)])
    found = examples()

    assert len(found) > 20
    assert [example for example in found if example not in known] == []


def test_clauses_are_numbered_in_order():
    numbers = [tuple(map(int, m)) for m in re.findall(r"^(\d+)\.(\d+) ", SPEC, re.MULTILINE)]
    sections = {section for section, _ in numbers}

    assert numbers == [
        (section, clause + 1)
        for section in sorted(sections)
        for clause in range(sum(1 for s, _ in numbers if s == section))
    ]
    assert sections == set(range(1, 10))
