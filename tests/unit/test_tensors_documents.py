"""Manifest, layout, snapshot and unit hashes: what parties name by digest."""

from __future__ import annotations

import json

import pytest

from protocols.canonical import canonical_bytes
from protocols.errors import MalformedMessageError, ManifestMismatchError
from protocols.tensors import (
    BLOCK,
    CHUNK,
    UNIT,
    Manifest,
    Scales,
    Snapshot,
    TensorSpec,
    UnitHasher,
    VectorLayout,
    blob_digest,
    first_scales,
    root_of_units,
    unit_count,
    unit_hashes,
)
from protocols.tensors.layout import Run
from protocols.tensors.manifest import Segment
from protocols.tensors.ring import Ring
from tests.support import tensors_reference as reference
from tests.support.tensors import manifest_of

SMALL = manifest_of(embed=(5, 3), norm=(3,), head=(2, 3), bias=())


# -- manifest ------------------------------------------------------------------------------------


def test_a_manifest_is_its_canonical_bytes():
    data = SMALL.to_bytes()

    assert data == (
        b'{"schema":"minga.manifest/1","tensors":[{"name":"embed","shape":[5,3]},'
        b'{"name":"norm","shape":[3]},{"name":"head","shape":[2,3]},{"name":"bias","shape":[]}]}'
    )
    assert Manifest.from_bytes(data) == SMALL
    assert SMALL.digest == reference.blob_name(data)


def test_tensors_lie_one_after_the_other_in_manifest_order():
    assert SMALL.coordinates == 15 + 3 + 6 + 1
    assert [SMALL.offset(t.name) for t in SMALL.tensors] == [0, 15, 18, 24]
    assert SMALL.blocks == 4
    assert SMALL.tensor_at(17) == "norm"


def test_a_selection_is_in_manifest_order_whatever_the_order_given():
    assert SMALL.select(["head", "embed"]) == (
        Segment("embed", 0, 15, 0),
        Segment("head", 18, 24, 2),
    )
    assert SMALL.select("all") == SMALL.segments
    assert SMALL.select("none") == ()


def test_blocks_are_counted_over_the_whole_manifest():
    manifest = manifest_of(a=(BLOCK + 1,), b=(BLOCK,), c=(1,))

    assert [segment.first_block for segment in manifest.segments] == [0, 2, 3]
    assert manifest.blocks == 4
    assert [b.number for b in VectorLayout.of(manifest, ["b", "c"], ()).blocks()] == [2, 3]


def document(**changes: object) -> bytes:
    value = {"schema": "minga.manifest/1", "tensors": [{"name": "w", "shape": [2]}]} | changes
    return canonical_bytes(value)


@pytest.mark.parametrize(
    ("clause", "data"),
    [
        ("2.1 not canonical", b'{"tensors":[],"schema":"minga.manifest/1"}'),
        ("2.1 not JSON", b"{"),
        ("2.1 not an object", b"[]"),
        ("2.1 another schema", document(schema="minga.manifest/2")),
        ("2.1 an unknown field", document(more=1)),
        ("2.1 a tensor with an unknown field", document(tensors=[{"name": "w"}])),
        ("2.2 no tensor", document(tensors=[])),
        ("2.2 a name twice", document(tensors=[{"name": "w", "shape": [1]}] * 2)),
        ("2.2 an empty name", document(tensors=[{"name": "", "shape": [1]}])),
        ("2.2 a name with a space", document(tensors=[{"name": "a b", "shape": [1]}])),
        ("2.2 a name that is no text", document(tensors=[{"name": 1, "shape": [1]}])),
        ("2.2 a size of 0", document(tensors=[{"name": "w", "shape": [0]}])),
        ("2.2 a negative size", document(tensors=[{"name": "w", "shape": [-1]}])),
        ("2.2 a size that is a truth value", document(tensors=[{"name": "w", "shape": [True]}])),
        ("2.2 a size that is a fraction", document(tensors=[{"name": "w", "shape": [1.5]}])),
        ("2.2 a shape that is no list", document(tensors=[{"name": "w", "shape": 3}])),
        ("2.2 17 sizes", document(tensors=[{"name": "w", "shape": [1] * 17}])),
        ("2.3 too many", document(tensors=[{"name": "w", "shape": [2**20, 2**20, 2]}])),
    ],
)
def test_a_manifest_is_refused(clause, data):
    with pytest.raises(MalformedMessageError):
        Manifest.from_bytes(data)


def test_the_refusals_above_start_from_a_good_manifest():
    """Else each of them could be refused for a reason of its own."""
    assert Manifest.from_bytes(document()).coordinates == 2


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["nothing"], ManifestMismatchError),
        (["head", "head"], MalformedMessageError),
        ("head", MalformedMessageError),
    ],
)
def test_a_selection_is_refused(names, error):
    with pytest.raises(error):
        SMALL.select(names)


def test_an_unknown_tensor_has_no_offset():
    with pytest.raises(ManifestMismatchError, match="no tensor 'nothing'"):
        SMALL.offset("nothing")


# -- layout --------------------------------------------------------------------------------------


def test_the_vector_holds_selected_tensors_and_then_metrics():
    layout = VectorLayout.of(SMALL, ["norm", "head"], ("weight", "nodes"))

    assert layout.model_coordinates == 9
    assert layout.coordinates == 9 + 12
    assert list(layout.chunks()) == [(0, 0, 21)]
    assert [tuple(b) for b in layout.blocks()] == [(1, 0, 3, 15), (2, 3, 9, 18)]
    assert layout.tensor_at(3) == "head"
    assert layout.tensor_at(9) == "a metric"


def test_a_round_without_tensors_has_metrics_only():
    layout = VectorLayout.of(SMALL, "none", ("weight",))

    assert (layout.model_coordinates, layout.coordinates, layout.chunk_count) == (0, 6, 1)
    assert list(layout.blocks()) == []
    assert list(layout.runs(0, 25)) == []


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_last_chunk_may_be_short(extra):
    layout = VectorLayout.of(manifest_of(w=(CHUNK + extra - 6,)), "all", ("weight",))

    assert layout.coordinates == CHUNK + extra
    assert list(layout.chunks())[-1] == (
        (0, 0, CHUNK + extra) if extra <= 0 else (1, CHUNK, CHUNK + 1)
    )
    with pytest.raises(IndexError):
        layout.chunk(layout.chunk_count)


def test_runs_join_tensors_that_touch():
    manifest = manifest_of(a=(4,), b=(4,), c=(4,), d=(4,))
    layout = VectorLayout.of(manifest, ["a", "b", "d"], ())

    assert list(layout.runs(0, 16)) == [Run(0, 8, 0), Run(12, 16, 8)]
    assert list(layout.runs(2, 13)) == [Run(2, 8, 2), Run(12, 13, 8)]
    assert list(layout.runs(8, 12)) == []


def test_segments_out_of_order_are_a_mistake():
    first, second = manifest_of(a=(4,), b=(4,)).segments

    with pytest.raises(ValueError, match="ascending"):
        VectorLayout((second, first), ())
    with pytest.raises(ValueError, match="twice"):
        VectorLayout((first,), ("weight", "weight"))


# -- units ---------------------------------------------------------------------------------------

SIZES = [0, 1, 255, 256, 257, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, 3 * UNIT + 5]


def pattern(size: int) -> bytes:
    """Bytes that differ from unit to unit, so that a swapped or dropped unit shows."""
    return bytes(range(251)) * (size // 251) + bytes(range(size % 251))


@pytest.mark.parametrize("size", SIZES)
def test_a_blob_is_named_by_the_root_of_its_units(size):
    data = pattern(size)
    whole = UnitHasher()
    whole.update(data)

    assert whole.digest() == blob_digest(data) == reference.blob_name(data)
    assert whole.size == size
    assert len(whole.hashes()) == unit_count(size)
    assert root_of_units(whole.hashes()).hex() == whole.digest()
    assert unit_hashes(data, threads=3) == whole.hashes()


@pytest.mark.parametrize("step", [1_000_003, UNIT, UNIT + 7])
def test_the_name_does_not_depend_on_the_pieces(step):
    data = pattern(2 * UNIT + 99)
    hasher = UnitHasher()
    for at in range(0, len(data), step):
        hasher.update(memoryview(data)[at : at + step])

    assert hasher.digest() == blob_digest(data)


def test_a_swapped_unit_changes_the_name():
    """The names above can tell: the same bytes in another order are another blob."""
    data = pattern(2 * UNIT)

    assert blob_digest(data[UNIT:] + data[:UNIT]) != blob_digest(data)


def test_the_root_may_be_asked_for_before_the_end():
    hasher = UnitHasher()
    hasher.update(b"abc")
    early = hasher.digest()
    hasher.update(b"def")

    assert early == blob_digest(b"abc")
    assert hasher.digest() == blob_digest(b"abcdef")


# -- snapshot ------------------------------------------------------------------------------------

RING = Ring(20)
SCALES = first_scales(SMALL, bound=0.05, ring=RING, nodes=3)
SNAPSHOT = Snapshot.initial(SMALL, blob_digest(bytes(100)), SCALES)


def test_the_initial_snapshot_has_no_buffers_and_no_steps():
    value = json.loads(SNAPSHOT.to_bytes())

    assert value == {
        "schema": "minga.snapshot/1",
        "round": 0,
        "manifest": SMALL.digest,
        "theta": blob_digest(bytes(100)),
        "buffers": {},
        "scales": SCALES.digest,
        "counters": {"steps": 0},
    }
    assert SNAPSHOT.model_root == reference.framed_hash(
        "minga/snapshot/v1", reference.canonical(value)
    )
    assert Snapshot.from_bytes(SNAPSHOT.to_bytes()) == SNAPSHOT
    assert SNAPSHOT.blobs() == (SNAPSHOT.theta, SNAPSHOT.scales)


@pytest.mark.parametrize(
    "change",
    [
        {"round": 1},
        {"theta": "0" * 64},
        {"manifest": "0" * 64},
        {"scales": "0" * 64},
        {"buffers": {"momentum": "0" * 64}},
        {"counters": {"steps": 1}},
    ],
)
def test_every_field_is_in_the_model_root(change):
    """Else two parties with different momentum or scales would believe that they agree."""
    value = json.loads(SNAPSHOT.to_bytes()) | change

    assert Snapshot.from_bytes(canonical_bytes(value)).model_root != SNAPSHOT.model_root


@pytest.mark.parametrize(
    ("clause", "change"),
    [
        ("7.1 another schema", {"schema": "minga.snapshot/2"}),
        ("7.1 an unknown field", {"more": 1}),
        ("7.2 a negative round", {"round": -1}),
        ("7.2 a round that is a truth value", {"round": True}),
        ("7.2 not a digest", {"theta": "00"}),
        ("7.2 a digest in capitals", {"theta": "A" * 64}),
        ("7.2 not a digest in a buffer", {"buffers": {"momentum": "00"}}),
        ("7.2 buffers are no object", {"buffers": []}),
        ("7.2 a buffer whose name is a path", {"buffers": {"../theta": "0" * 64}}),
        ("7.2 a negative counter", {"counters": {"steps": -1}}),
        ("7.2 counters are no object", {"counters": 3}),
    ],
)
def test_a_snapshot_is_refused(clause, change):
    value = json.loads(SNAPSHOT.to_bytes()) | change

    with pytest.raises(MalformedMessageError):
        Snapshot.from_bytes(canonical_bytes(value))


def test_scales_of_another_manifest_are_refused():
    with pytest.raises(ManifestMismatchError, match="1 scales for a manifest of 4 blocks"):
        Snapshot.initial(SMALL, SNAPSHOT.theta, Scales([3]))
    with pytest.raises(ManifestMismatchError):
        Scales.from_bytes(b"\x01\x02", SMALL)


def test_tensor_specs_are_values():
    assert TensorSpec("w", (2, 3)).coordinates == 6
    assert TensorSpec("w", ()).coordinates == 1
    assert TensorSpec("w", (BLOCK + 1,)).blocks == 2
