"""Known answers: thresholds, Shamir, X25519, HKDF, AES-CTR, Merkle paths."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.errors import MalformedMessageError, PlanRefusedError
from protocols.secagg import shamir
from protocols.secagg.errors import BadShareError, TooFewSharesError
from protocols.secagg.keys import hkdf, parse_x25519, x25519_public, x25519_shared
from protocols.secagg.paths import MAX_PATH, inclusion_path, root_from_path
from protocols.secagg.threshold import SecaggTerms, default_threshold
from protocols.tlog.merkle import leaf_hash, tree_root

# -- thresholds --------------------------------------------------------------------------------

TABLE = {  # n: (t, losses, colluders), privacy note, section 5
    3: (3, 0, 1),
    4: (3, 1, 1),
    5: (4, 1, 2),
    8: (6, 2, 3),
    10: (7, 3, 3),
    16: (11, 5, 5),
    33: (22, 11, 10),
    64: (43, 21, 21),
}


@pytest.mark.parametrize("n", TABLE)
def test_the_table_of_thresholds(n):
    terms = SecaggTerms.for_roster(n)
    assert (terms.threshold, terms.losses_tolerated(n), terms.colluders) == TABLE[n]
    assert terms.least_survivors == terms.threshold


@pytest.mark.parametrize("n", range(3, 65))
def test_default_terms_are_valid_and_no_colluder_more_is(n):
    terms = SecaggTerms.for_roster(n)
    with pytest.raises(PlanRefusedError):
        SecaggTerms(
            roster_size=n,
            threshold=terms.threshold,
            colluders=terms.colluders + 1,
            min_surviving=terms.min_surviving,
        )


@pytest.mark.parametrize("n", [-1, 0, 1, 2, 65])
def test_no_secure_sum_of_so_many(n):
    with pytest.raises(PlanRefusedError):
        default_threshold(n)
    with pytest.raises(PlanRefusedError):
        SecaggTerms(roster_size=n, threshold=2, colluders=0, min_surviving=2)


@pytest.mark.parametrize(
    ("n", "t", "c", "m"),
    [
        pytest.param(3, 2, 1, 3, id="2 of 3 and a colluder: 2t = n + c"),
        pytest.param(10, 5, 0, 5, id="two disjoint halves"),
        pytest.param(10, 7, 4, 7, id="2t = n + c"),
        pytest.param(10, 11, 1, 10, id="more than everybody"),
        pytest.param(10, 7, -1, 7, id="negative colluders"),
        pytest.param(10, 7, 2, 3, id="m - c < 2: one honest update is the sum"),
        pytest.param(10, 7, 2, 11, id="more survivors than members"),
        pytest.param(10, 7, 7, 9, id="colluders open alone"),
    ],
)
def test_terms_refused(n, t, c, m):
    with pytest.raises(PlanRefusedError) as caught:
        SecaggTerms(roster_size=n, threshold=t, colluders=c, min_surviving=m)
    assert caught.value.rule == "secagg.threshold"


# -- Shamir ------------------------------------------------------------------------------------

SECRET = bytes(range(32))
COEFFICIENTS = b"".join(hashlib.sha256(b"shamir-kat" + bytes([k])).digest() for k in range(1, 22))


def shares_of_33() -> dict[int, bytes]:
    indices = range(1, 34)
    dealt = shamir.split(SECRET, threshold=22, indices=indices, randomness=COEFFICIENTS)
    return dict(zip(indices, dealt, strict=True))


def test_shamir_known_answer():
    shares = shares_of_33()
    assert shares[1].hex() == "0071484c1eb1c02bd7d523491c5120e7d3a62cd33b6f8620ccc6b605d5bd59e2d2"
    assert shares[33].hex() == "0015b68741a582089e78d6d58bd30220de761f801d8fbba001bb974977734909fe"
    digest = hashlib.sha256(b"".join(shares[x] for x in range(1, 34))).hexdigest()
    assert digest == "f96694bf15f43f014d6c2cb77312a13be28a0c794becd699a7c5855329c73285"


def test_shamir_small_field(monkeypatch):
    """The textbook example: 1234 + 166 x + 94 x^2 modulo 1613."""
    monkeypatch.setattr(shamir, "PRIME", 1613)
    numbers = [1234, 166, 94]
    raw = [number.to_bytes(32, "big") for number in numbers]
    dealt = shamir.split(raw[0], threshold=3, indices=range(1, 7), randomness=raw[1] + raw[2])
    assert [int.from_bytes(s, "big") for s in dealt] == [1494, 329, 965, 176, 1188, 775]


def test_the_modulus_is_the_next_prime_after_2_to_the_256():
    def is_prime(n: int) -> bool:  # Miller-Rabin with fixed bases
        d, s = n - 1, 0
        while d % 2 == 0:
            d, s = d // 2, s + 1
        for a in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            x = pow(a, d, n)
            if x in (1, n - 1):
                continue
            for _ in range(s - 1):
                x = x * x % n
                if x == n - 1:
                    break
            else:
                return False
        return True

    assert is_prime(shamir.PRIME)
    assert not any(is_prime(k) for k in range(2**256 + 1, shamir.PRIME))


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, SECRET])
def test_any_22_of_33_give_the_secret(secret):
    indices = range(1, 34)
    dealt = shamir.split(secret, threshold=22, indices=indices, randomness=COEFFICIENTS)
    shares = dict(zip(indices, dealt, strict=True))
    for some in (range(1, 23), range(12, 34), [*range(1, 12), *range(23, 34)], range(1, 34)):
        assert shamir.reconstruct({x: shares[x] for x in some}, threshold=22) == secret


def test_21_shares_fit_every_secret():
    """Not only too few: 21 shares and any other secret are consistent with a polynomial."""
    shares = shares_of_33()
    some = {x: shares[x] for x in range(1, 22)}
    with pytest.raises(TooFewSharesError):
        shamir.reconstruct(some, threshold=22)
    other = int.from_bytes(b"\x5a" * 32, "big")
    base = (0, *some)  # interpolate through (0, other) and the 21 shares, evaluate at 22
    values = [other, *(shamir.parse_share(s) for s in some.values())]
    forged = shamir._evaluate(base, values, 22).to_bytes(33, "big")
    assert shamir.reconstruct({**some, 22: forged}, threshold=22) == b"\x5a" * 32


def test_an_extra_share_off_the_polynomial_is_caught():
    shares = shares_of_33()
    wrong = (shamir.parse_share(shares[33]) ^ 1).to_bytes(33, "big")
    with pytest.raises(BadShareError, match="index 33"):
        shamir.reconstruct({**shares, 33: wrong}, threshold=22)
    # and a wrong one among the base makes the right ones look wrong: caught all the same
    wrong = (shamir.parse_share(shares[2]) ^ 1).to_bytes(33, "big")
    with pytest.raises(BadShareError):
        shamir.reconstruct({**shares, 2: wrong}, threshold=22)


@pytest.mark.parametrize("secret", [2**256, 2**256 + 296])
def test_a_result_above_32_bytes_is_refused(secret):
    shares = {x: ((secret + 7 * x) % shamir.PRIME).to_bytes(33, "big") for x in (1, 2, 3)}
    with pytest.raises(BadShareError, match="above 32 bytes"):
        shamir.reconstruct(shares, threshold=2)


@pytest.mark.parametrize(
    "share",
    [b"", bytes(32), bytes(34), shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33],
    ids=["empty", "32 bytes", "34 bytes", "p", "largest"],
)
def test_a_share_that_is_none(share):
    with pytest.raises(MalformedMessageError):
        shamir.parse_share(share)
    with pytest.raises(MalformedMessageError):
        shamir.reconstruct({1: share, 2: bytes(33)}, threshold=2)


@pytest.mark.parametrize("indices", [[0, 1], [1, 1], [65], [-1, 2]])
def test_no_share_at_zero_twice_or_beyond_64(indices):
    with pytest.raises(ValueError):
        shamir.split(SECRET, threshold=2, indices=indices, randomness=bytes(32))
    if len(set(indices)) == len(indices):
        with pytest.raises(ValueError):
            shamir.reconstruct({x: bytes(33) for x in indices}, threshold=1)


@pytest.mark.parametrize(
    ("secret", "threshold", "randomness"),
    [(SECRET[:31], 2, bytes(32)), (SECRET, 2, bytes(31)), (SECRET, 0, b""), (SECRET, 3, bytes(32))],
)
def test_split_refuses_wrong_lengths(secret, threshold, randomness):
    with pytest.raises(ValueError):
        shamir.split(secret, threshold=threshold, indices=[1, 2, 3], randomness=randomness)


# -- X25519, HKDF, AES -------------------------------------------------------------------------


def test_x25519_rfc_7748_section_5_2():
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    want = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert x25519_shared(scalar, point).hex() == want


def test_x25519_rfc_7748_section_5_2_iterated():
    k = u = (9).to_bytes(32, "little")
    for count in range(1, 1001):
        k, u = x25519_shared(k, u), k
        if count == 1:
            once = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
            assert k.hex() == once
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_x25519_rfc_7748_section_6_1():
    a = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    b = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    bob = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert x25519_public(a).hex() == alice
    assert x25519_public(b).hex() == bob
    assert x25519_shared(a, x25519_public(b)).hex() == shared
    assert x25519_shared(b, x25519_public(a)).hex() == shared


LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


@pytest.mark.parametrize("public", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_x25519_keys_with_an_all_zero_output_are_refused(public):
    with pytest.raises(MalformedMessageError):
        parse_x25519(public)
    with pytest.raises(MalformedMessageError):
        x25519_shared(SECRET, public)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_x25519_keys_have_32_bytes(length):
    with pytest.raises(MalformedMessageError):
        parse_x25519(bytes(length))


def test_hkdf_rfc_5869_case_1():
    okm = hkdf(
        ikm=b"\x0b" * 22,
        salt=bytes(range(13)),
        info=bytes(range(0xF0, 0xFA)),
        length=42,
    )
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_hkdf_rfc_5869_case_3():
    okm = hkdf(ikm=b"\x0b" * 22, salt=b"", info=b"", length=42)
    assert okm.hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


@pytest.mark.parametrize(
    ("key", "want"),
    [
        pytest.param(
            "2b7e151628aed2a6abf7158809cf4f3c",
            "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
            "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee",
            id="F.5.1",
        ),
        pytest.param(
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
            "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
            id="F.5.5",
        ),
    ],
)
def test_aes_ctr_sp_800_38a(key, want):
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = Cipher(algorithms.AES(bytes.fromhex(key)), modes.CTR(counter)).encryptor()
    assert cipher.update(plain).hex() == want


# -- paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 66, 127, 128])
def test_every_leaf_leads_to_the_root(size):
    leaves = [leaf_hash(bytes([k])) for k in range(size)]
    root = tree_root(leaves)
    for k in range(size):
        path = inclusion_path(leaves, k)
        assert len(path) <= MAX_PATH
        assert root_from_path(leaves[k], k, size, path) == root
        if size > 1:
            assert root_from_path(leaves[k - 1], k, size, path) != root
        with pytest.raises(MalformedMessageError):
            root_from_path(leaves[k], k, size, (*path, bytes(32)))


def test_no_path_outside_the_tree():
    with pytest.raises(ValueError):
        inclusion_path([bytes(32)], 1)
    with pytest.raises(MalformedMessageError):
        root_from_path(bytes(32), 2, 2, (bytes(32),))
