"""Masks: lane order, seeking, signs, uniformity; and what a wrong stream looks like."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.secagg import masks as masks_module
from protocols.secagg.keys import pair_mask_key, self_mask_key, x25519_public
from protocols.secagg.masks import MaskAdder, MaskKey, lane_dtype, node_masks
from protocols.tensors.ring import Ring
from protocols.tensors.sizes import CHUNK
from tests.support.secagg import MODEL, World, node_name, seed_of, unpack_all

KEYS = [seed_of("mask", k) for k in range(4)]
MASKS = [MaskKey(key=key, sign=sign) for key, sign in zip(KEYS, (1, -1, 1, -1), strict=True)]


def plain_stream(key: bytes, size: int) -> bytes:
    """The whole key stream from counter zero, in one call of the library."""
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def expected(masks, coordinates, ring, start=0):
    """The sum of all masks by the definition: whole streams, Python-sized integers."""
    dtype = lane_dtype(ring)
    total = np.zeros(coordinates, np.int64)
    for mask in masks:
        stream = plain_stream(mask.key, coordinates * dtype.itemsize)
        total += mask.sign * np.frombuffer(stream, dtype).astype(np.int64)
    return (total % ring.modulus)[start:].astype(np.uint32)


@pytest.mark.parametrize("bits", [16, 20, 24])
@pytest.mark.parametrize("size", [1, 7, 32768, 32769, 65537, CHUNK - 1, CHUNK])
def test_the_first_chunk_is_the_key_stream_in_little_endian_lanes(bits, size):
    ring = Ring(bits)
    lanes = np.zeros(size, np.uint32)
    MaskAdder(MASKS, ring).add(0, lanes)
    np.testing.assert_array_equal(lanes & (ring.modulus - 1), expected(MASKS, size, ring))


def test_lanes_are_little_endian():
    """Pinned without numpy's byte order: AES-256 of counter 0 under the zero key."""
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    assert plain_stream(bytes(32), 16) == block
    for bits, width in ((16, 2), (20, 4)):
        lanes = np.zeros(16 // width, np.uint32)
        MaskAdder([MaskKey(key=bytes(32), sign=1)], Ring(bits)).add(0, lanes)
        want = [int.from_bytes(block[k : k + width], "little") for k in range(0, 16, width)]
        assert lanes.tolist() == want


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_chunks_are_pieces_of_one_stream(bits):
    ring = Ring(bits)
    size = 2 * CHUNK + 1003  # ends within a cipher block: the next chunk must not go on from it
    want = expected(MASKS, size, ring)
    adder = MaskAdder(MASKS, ring)
    for chunk in (2, 0, 1):  # any order: the stream is sought, not continued
        start = chunk * CHUNK
        lanes = np.zeros(min(CHUNK, size - start), np.uint32)
        adder(chunk, start, lanes)
        np.testing.assert_array_equal(lanes & (ring.modulus - 1), want[start : start + lanes.size])


def test_a_counter_that_is_off_by_one_would_show(monkeypatch):
    """The oracle above convicts: one block too far and the chunk is another."""
    monkeypatch.setattr(masks_module, "CHUNK", CHUNK + 4)
    lanes = np.zeros(64, np.uint32)
    MaskAdder(MASKS, Ring(20)).add(1, lanes)
    want = expected(MASKS, CHUNK + 64, Ring(20), start=CHUNK)
    assert not np.array_equal(lanes & (2**20 - 1), want)


def test_chunks_far_out_have_their_own_stream():
    """The counter does not wrap at 32 bits: chunk 2**17 begins at block 2**33."""
    adder = MaskAdder(MASKS[:1], Ring(20))
    far, near = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    adder.add(2**17, far)
    adder.add(0, near)
    counter = (2**17 * CHUNK * 4 // 16).to_bytes(16, "big")
    want = Cipher(algorithms.AES256(KEYS[0]), modes.CTR(counter)).encryptor().update(bytes(256))
    assert far.tobytes() == want
    assert not np.array_equal(far, near)


@pytest.mark.parametrize("bits", [16, 20])
def test_threads_do_not_change_the_result(bits):
    ring, size = Ring(bits), 3 * CHUNK + 5
    adder = MaskAdder(MASKS, ring)

    def run(threads: int) -> np.ndarray:
        lanes = np.arange(size, dtype=np.uint32)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda k: adder.add(k, lanes[k * CHUNK : (k + 1) * CHUNK]), [3, 1, 0, 2]))
        return lanes & (ring.modulus - 1)

    alone = run(1)
    for _ in range(3):
        np.testing.assert_array_equal(run(4), alone)


def test_narrow_lanes_are_the_low_bits_of_wide_ones():
    narrow, wide = np.arange(5000, dtype=np.uint16), np.arange(5000, dtype=np.uint32)
    adder = MaskAdder(MASKS, Ring(16))
    adder.add(0, narrow)
    adder.add(0, wide)
    np.testing.assert_array_equal(narrow, wide.astype(np.uint16))


def test_removing_is_adding_with_the_other_sign():
    lanes = np.arange(70_000, dtype=np.uint32)
    before = lanes.copy()
    MaskAdder(MASKS, Ring(20)).add(3, lanes)
    assert not np.array_equal(lanes, before)
    back = [MaskKey(key=mask.key, sign=-mask.sign) for mask in MASKS]
    MaskAdder(back, Ring(20)).add(3, lanes)
    np.testing.assert_array_equal(lanes, before)


@pytest.mark.parametrize(
    ("chunk", "lanes"),
    [
        pytest.param(0, np.zeros(8, np.int32), id="signed"),
        pytest.param(0, np.zeros(8, np.uint16), id="narrow lanes in a ring of 20 bits"),
        pytest.param(0, np.zeros(8, np.uint64), id="wide"),
        pytest.param(0, np.zeros((2, 4), np.uint32), id="matrix"),
        pytest.param(0, np.zeros(16, np.uint32)[::2], id="strided"),
        pytest.param(0, np.zeros(0, np.uint32), id="empty"),
        pytest.param(0, np.zeros(CHUNK + 1, np.uint32), id="longer than a chunk"),
        pytest.param(-1, np.zeros(8, np.uint32), id="before the beginning"),
    ],
)
def test_lanes_refused(chunk, lanes):
    with pytest.raises(ValueError):
        MaskAdder(MASKS, Ring(20)).add(chunk, lanes)


def test_a_start_that_is_not_the_chunks_is_refused():
    with pytest.raises(ValueError):
        MaskAdder(MASKS, Ring(20))(1, 0, np.zeros(8, np.uint32))


@pytest.mark.parametrize(("key", "sign"), [(bytes(31), 1), (bytes(32), 0), (bytes(32), 2)])
def test_mask_keys_refused(key, sign):
    with pytest.raises(ValueError):
        MaskKey(key=key, sign=sign)


# -- which masks -------------------------------------------------------------------------------


def keys_of(n: int, ctxs=None):
    """Every member's masks; ``ctxs`` may show some of them another context."""
    secrets = {i: seed_of("rk", i) for i in range(1, n + 1)}
    rks = {i: x25519_public(secret) for i, secret in secrets.items()}
    return {
        i: node_masks(
            (ctxs or {}).get(i, MODEL),
            index=i,
            self_seed=seed_of("b", i),
            rk_secret=secrets[i],
            rks=rks,
        )
        for i in secrets
    }


@pytest.mark.parametrize("n", [3, 4, 7])
def test_pair_masks_cancel_and_self_masks_stay(n):
    ring = Ring(20)
    total = np.zeros(500, np.uint32)
    alone = np.zeros(500, np.uint32)
    for masks in keys_of(n).values():
        assert len(masks) == n
        MaskAdder(masks, ring).add(0, total)
        MaskAdder(masks[:1], ring).add(0, alone)
    np.testing.assert_array_equal(total, alone)


def test_signs_follow_the_index():
    masks = keys_of(4)
    assert [mask.sign for mask in masks[1]] == [1, 1, 1, 1]
    assert [mask.sign for mask in masks[3]] == [1, -1, -1, 1]  # self, 1, 2, 4


def test_both_sides_derive_one_pair_key_and_everything_in_it_matters():
    a, b = seed_of("a"), seed_of("b")
    pa, pb = x25519_public(a), x25519_public(b)
    key = pair_mask_key(MODEL, a, own=(2, pa), peer=(5, pb))
    assert key == pair_mask_key(MODEL, b, own=(5, pb), peer=(2, pa))
    assert key != pair_mask_key(MODEL, a, own=(2, pa), peer=(6, pb))
    assert key != pair_mask_key(MODEL, a, own=(3, pa), peer=(5, pb))
    assert key != pair_mask_key(MODEL[::-1], a, own=(2, pa), peer=(5, pb))
    assert self_mask_key(MODEL, a, 1) != self_mask_key(MODEL, a, 2)
    assert self_mask_key(MODEL, a, 1) != self_mask_key(MODEL[::-1], a, 1)


# -- uniformity --------------------------------------------------------------------------------

# Chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6. The threshold is the
# mean plus 8 deviations: a uniform vector passes but for about once in 10**12 keys, and the keys
# here are fixed anyway.
LIMIT = 255 + 8 * (2 * 255) ** 0.5


def chi_square(residues: np.ndarray, ring: Ring) -> float:
    """Against the uniform law on 256 equal bins of the ring."""
    bins = np.bincount(residues >> (ring.bits - 8), minlength=256)
    assert bins.size == 256
    mean = residues.size / 256
    return float(((bins - mean) ** 2 / mean).sum())


def low_chi_square(residues: np.ndarray) -> float:
    """The same for the 8 lowest bits."""
    bins = np.bincount(residues & 255, minlength=256)
    mean = residues.size / 256
    return float(((bins - mean) ** 2 / mean).sum())


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_a_masked_vector_is_uniform_over_the_ring(bits):
    world = World.make(4, d=200_000, bits=bits, vectors=lambda i: np.full(200_000, i, np.int32))
    world.up_to_go()
    for node in world.members:
        residues = unpack_all(world.members[node].mask(), 200_000, world.ring)
        assert chi_square(residues, world.ring) < LIMIT
        assert low_chi_square(residues) < LIMIT


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_an_unmasked_or_half_masked_vector_is_not(bits):
    """The oracle convicts: no mask at all; masks on every second coordinate; 8 bits of mask."""
    ring = Ring(bits)
    rng = np.random.default_rng(7)
    plain = rng.integers(-400, 401, 200_000, dtype=np.int32).view(np.uint32) & (ring.modulus - 1)
    assert chi_square(plain, ring) > LIMIT

    masked = plain.copy()
    MaskAdder(MASKS, ring).add(0, masked)
    masked &= ring.modulus - 1
    assert chi_square(masked, ring) < LIMIT

    half = plain.copy()
    half[::2] = masked[::2]
    assert chi_square(half, ring) > LIMIT

    shallow = (plain + (masked & 255)) & (ring.modulus - 1)
    assert chi_square(shallow, ring) > LIMIT
    high_only = (plain & 0) + (masked & ~np.uint32(255)) + 3
    assert low_chi_square(high_only) > LIMIT


def test_one_member_on_another_context_makes_the_sum_undecodable():
    """What a node that was shown another model would do to the sum: nothing decodes."""
    ring, n, d = Ring(20), 33, 2000
    x = {i: np.full(d, i, np.int32) for i in range(1, n + 1)}
    want = np.full(d, n * (n + 1) // 2, np.uint32)

    def opened(masks) -> np.ndarray:
        total = np.zeros(d, np.uint32)
        for i, mine in masks.items():
            lanes = x[i].copy().view(np.uint32)
            MaskAdder(mine, ring).add(0, lanes)
            total += lanes
        removed = [MaskKey(key=mine[0].key, sign=-1) for mine in keys_of(n).values()]
        MaskAdder(removed, ring).add(0, total)
        return total & (ring.modulus - 1)

    np.testing.assert_array_equal(opened(keys_of(n)), want)
    split = opened(keys_of(n, ctxs={17: MODEL[::-1]}))
    # a uniform value hits the right one once in 2**20: none of 2000, but for 0.2 %; fixed keys
    assert np.count_nonzero(split == want) == 0
    mean = d / 16
    bins = np.bincount(split >> 16, minlength=16)
    assert ((bins - mean) ** 2 / mean).sum() < 15 + 8 * 30**0.5


def test_secrets_do_not_print():
    adder = MaskAdder(MASKS, Ring(20))
    for mask in MASKS:
        assert mask.key.hex() not in repr(mask)
        assert repr(mask.key) not in repr(mask)
    assert repr(adder) == "MaskAdder(4 masks)"


def test_node_names_sort_as_indices():
    """The support world relies on it: roster order is name order."""
    assert sorted(node_name(i) for i in range(1, 65)) == [node_name(i) for i in range(1, 65)]
