"""Tiles, bundles and proof files: published vectors, boundary sizes, refusals."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from protocols.errors import MalformedMessageError
from protocols.tlog import tiles
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.proof_file import ProofFile, verify_proof_file
from protocols.tlog.proofs import (
    BadProofError,
    make_consistency,
    make_inclusion,
    root_of,
    stored,
    verify_consistency,
)
from protocols.tlog.tiles import (
    Tile,
    bundle_of,
    parse_bundle,
    parse_tile,
    tile_hashes,
    tiles_between,
    write_bundle,
    write_tile,
)
from protocols.tlog.trust_policy import TrustPolicy
from tests.support.tlog import NOW, b64, big_tree, formats

TILES = formats()["tiles"]
OWN = formats()["own_log_600"]
PROOFS = formats()["tlog_proof_text"]


def files_of(entries):
    """Every tile and bundle of a log, by path."""
    hashes = stored([leaf_hash(entry) for entry in entries])
    return {
        tile.path: write_bundle(entries[tile.n * 256 : tile.n * 256 + tile.width])
        if tile.level is None
        else write_tile(hashes, tile)
        for tile in tiles_between(0, len(entries))
    }


@pytest.mark.parametrize("row", TILES["paths"], ids=lambda row: row["path"])
def test_paths(row):
    tile = Tile(level=row["level"], n=row["n"], width=row["width"])
    assert tile.path == row["path"]
    assert Tile.parse(row["path"]) == tile


@pytest.mark.parametrize("row", TILES["entry_bundle_of_index"], ids=lambda row: row["path"])
def test_the_bundle_of_an_entry(row):
    tile = bundle_of(row["index"], row["size"])
    assert tile.path == row["path"]
    assert Tile.parse(row["path"]) == tile


@pytest.mark.parametrize("row", TILES["bad_paths"], ids=lambda row: f"{row['level']}/{row['n']}")
def test_bad_paths(row):
    with pytest.raises(MalformedMessageError):
        Tile.parse(f"tile/{row['level']}/{row['n']}")


@pytest.mark.parametrize(
    "path", ["", "/tile/0/000", "tile/0/000/", "tile/0/000\n", "tile/0/٠٠٠", "tile/entries/0"]
)
def test_more_bad_paths(path):
    with pytest.raises(MalformedMessageError):
        Tile.parse(path)


@pytest.mark.parametrize(
    "path", ["tile/8/0/000", "tile/8/data/000", "tile/data/000", "tile/8/1/000.p/17"]
)
def test_7_paths_of_go_sumdb_are_refused(path):
    with pytest.raises(MalformedMessageError):
        Tile.parse(path)


def layout(size):
    """The shape of the vectors: full tiles and the partial one of each level."""
    found = {}
    for tile in tiles_between(0, size):
        if tile.level is not None:
            row = found.setdefault(str(tile.level), {"full": 0, "partial": None})
            if tile.width == 256:
                row["full"] += 1
            else:
                row["partial"] = tile.path
    return found


@pytest.mark.parametrize("size", TILES["layout_by_size"])
def test_the_layout_of_a_log(size):
    assert layout(int(size)) == TILES["layout_by_size"][size]
    bundles = [tile for tile in tiles_between(0, int(size)) if tile.level is None]
    assert sum(tile.width for tile in bundles) == int(size)


def test_the_layout_convicts_a_level_that_hashes_partial_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "HEIGHT", 7)
    assert layout(600) != TILES["layout_by_size"]["600"]


def test_growing_in_steps_writes_what_one_step_writes_and_partial_tiles_between():
    steps = (0, 1, 255, 256, 257, 600, 65_535, 65_536, 70_000)
    written = {t for a, b in itertools.pairwise(steps) for t in tiles_between(a, b)}

    assert written >= set(tiles_between(0, 70_000))
    assert written == {t for size in steps for t in tiles_between(0, size)}
    assert list(tiles_between(600, 600)) == []
    for old, new in ((-1, 5), (6, 5), (0, 2**63)):
        with pytest.raises(ValueError, match="want 0"):
            list(tiles_between(old, new))


def test_the_files_of_the_log_that_go_accepted():
    entries = [b'{"n":%d,"kind":"round.event"}' % i for i in range(600)]
    files = files_of(entries)
    want = {k: v for k, v in OWN["sha256_hex_by_file"].items() if k != "checkpoint"}

    assert {path: hashlib.sha256(data).hexdigest() for path, data in files.items()} == want
    head = OWN["checkpoint_600"].encode()
    assert hashlib.sha256(head).hexdigest() == OWN["sha256_hex_by_file"]["checkpoint"]
    hashes = tile_hashes(600, lambda tile: files[tile.path])
    proof = make_inclusion(hashes, OWN["inclusion"]["index"], 600)
    assert proof == tuple(map(b64, OWN["inclusion"]["proof"]))
    proof = make_consistency(hashes, OWN["consistency"]["old"], 600)
    assert proof == tuple(map(b64, OWN["consistency"]["proof"]))
    again = [
        entry
        for tile in tiles_between(0, 600)
        if tile.level is None
        for entry in parse_bundle(files[tile.path], tile.width)
    ]
    assert again == entries


def test_the_files_of_tessera():
    log = formats()["tessera_log"]
    files = files_of([entry.encode() for entry in log["entries"]])
    digest = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert digest == {
        "tile/0/000.p/15": log["sha256_hex_of_tile_0_000_p_15"],
        "tile/entries/000.p/15": log["sha256_hex_of_entry_bundle_15"],
    }


@pytest.mark.parametrize("size", [255, 256, 257, 65_535, 65_536, 70_000])
def test_proofs_out_of_tiles_are_those_out_of_memory(size):
    reads = []

    def read(tile):
        reads.append(tile)
        return write_tile(big_tree(), tile)

    hashes = tile_hashes(size, read)
    assert root_of(hashes, size) == root_of(big_tree(), size)
    for index in (0, 254, size - 1):
        assert make_inclusion(hashes, index, size) == make_inclusion(big_tree(), index, size)
    for old in (1, 254, 255, size):
        assert make_consistency(hashes, old, size) == make_consistency(big_tree(), old, size)
    assert set(reads) <= set(tiles_between(0, size))  # nothing is read that is not written
    with pytest.raises(ValueError, match="no complete subtree"):
        hashes(8, size // 256)


def test_a_tile_with_a_changed_hash_gives_another_root():
    def read(tile):
        data = write_tile(big_tree(), tile)
        return bytes(32) + data[32:] if tile.level == 0 and tile.n == 1 else data

    # Level 1 vouches for what stands below it, so only a reader of level 0 meets the lie.
    hashes = tile_hashes(600, read)
    assert root_of(hashes, 300) != root_of(big_tree(), 300)
    with pytest.raises(BadProofError):
        verify_consistency(
            old=300,
            old_root=root_of(big_tree(), 300),
            new=600,
            new_root=root_of(big_tree(), 600),
            proof=make_consistency(hashes, 300, 600),
        )


def test_tiles_and_bundles_have_exactly_their_length():
    for data in (b"", bytes(31), bytes(33), bytes(64)):
        with pytest.raises(MalformedMessageError):
            parse_tile(data, 1)
    good = write_bundle([b"a", b"", b"ccc"])
    assert parse_bundle(good, 3) == (b"a", b"", b"ccc")
    for data, width in ((good, 2), (good, 4), (good[:-1], 3), (good + b"\0", 3), (b"\0", 1)):
        with pytest.raises(MalformedMessageError):
            parse_bundle(data, width)
    for entries in ([], [b""] * 257):
        with pytest.raises(MalformedMessageError):
            write_bundle(entries)
    with pytest.raises(ValueError, match="entries"):
        write_tile(big_tree(), Tile(level=None, n=0))


def test_5_an_entry_has_at_most_65535_bytes():
    longest = bytes(65_535)
    assert parse_bundle(write_bundle([longest]), 1) == (longest,)
    with pytest.raises(MalformedMessageError, match="65536 bytes"):
        write_bundle([bytes(65_536)])


# -- proof files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PROOFS["marshal"], ids=lambda row: str(row["index"]))
def test_proof_files(row):
    proof = ProofFile(
        index=row["index"],
        hashes=tuple(map(b64, row["hashes"])),
        checkpoint=row["checkpoint"].encode(),
        extra=b64(row["extra"]) if "extra" in row else None,
    )
    assert proof.to_bytes().decode() == row["text"]
    assert ProofFile.parse(row["text"].encode()) == proof


@pytest.mark.parametrize("row", PROOFS["refuse"], ids=lambda row: row["why"])
def test_proof_files_that_are_refused(row):
    with pytest.raises(MalformedMessageError):
        ProofFile.parse(row["text"].encode())


@pytest.mark.parametrize(
    "text",
    [
        "c2sp.org/tlog-proof@v1\nindex 0\n\n",
        "c2sp.org/tlog-proof@v1\nindex 0\nextra AAAA\n\ncheckpoint\n",
        "c2sp.org/tlog-proof@v1\nextra AAAA\nextra AAAA\nindex 0\n\ncheckpoint\n",
        "c2sp.org/tlog-proof@v1\r\nindex 0\n\ncheckpoint\n",
        "c2sp.org/tlog-proof@v1\nindex 9223372036854775808\n\ncheckpoint\n",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + ("A" * 43 + "=\n") * 64 + "\ncheckpoint\n",
        "",
    ],
)
def test_more_proof_files_that_are_refused(text):
    with pytest.raises(MalformedMessageError):
        ProofFile.parse(text.encode())


def test_the_proof_file_of_our_own_log_end_to_end():
    policy = TrustPolicy.parse(
        f"log {OWN['log_vkey']}\nwitness w {OWN['witness_vkey']}\nquorum w\n".encode()
    )
    data = OWN["tlog_proof"].encode()
    entry = b'{"n":123,"kind":"round.event"}'

    assert ProofFile.parse(data).to_bytes() == data
    index, accepted = verify_proof_file(data, entry, policy, now=NOW)
    assert (index, accepted.opened.checkpoint.size, accepted.times["w"]) == (123, 600, NOW)
    with pytest.raises(BadProofError):
        verify_proof_file(data, entry + b" ", policy, now=NOW)
    with pytest.raises(BadProofError):
        verify_proof_file(data.replace(b"index 123", b"index 122"), entry, policy, now=NOW)
