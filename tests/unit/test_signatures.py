"""Ed25519 under a context: what verifies, and everything that must not."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.crypto.signatures import (
    _LOW_ORDER_Y,
    BadSignatureError,
    Context,
    parse_public_key,
    public_bytes,
    sign,
    signing_input,
    verify,
)
from protocols.errors import MalformedMessageError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_bytes(KEY)
P = 2**255 - 19


@pytest.mark.parametrize(  # RFC 8032, section 7.1, TEST 1 and TEST 3
    ("secret", "public", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            (
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
                "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
            ),
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            (
                "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
                "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
            ),
        ),
    ],
)
def test_the_library_signs_as_rfc_8032(secret, public, message, signature):
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert public_bytes(key).hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature


def test_a_signature_verifies_as_what_it_is():
    verify(PUBLIC, Context.COMMIT, b"body", sign(KEY, Context.COMMIT, b"body"))


def test_signing_twice_gives_the_same_bytes():
    assert sign(KEY, Context.DEAL, b"x") == sign(KEY, Context.DEAL, b"x")


@pytest.mark.parametrize(
    ("public", "context", "body", "change"),
    [
        pytest.param(PUBLIC, Context.ABORT, b"body", None, id="another context"),
        pytest.param(PUBLIC, Context.COMMIT, b"bodY", None, id="another body"),
        pytest.param(PUBLIC, Context.COMMIT, b"", None, id="no body"),
        pytest.param(
            public_bytes(Ed25519PrivateKey.from_private_bytes(bytes(32))),
            Context.COMMIT,
            b"body",
            None,
            id="another key",
        ),
        pytest.param(PUBLIC, Context.COMMIT, b"body", lambda s: s[:-1], id="short"),
        pytest.param(PUBLIC, Context.COMMIT, b"body", lambda s: s + b"\0", id="long"),
        pytest.param(PUBLIC, Context.COMMIT, b"body", lambda s: bytes(64), id="zero"),
        pytest.param(
            PUBLIC,
            Context.COMMIT,
            b"body",
            # S + L is the same scalar: RFC 8032 wants it refused, or a signature has two forms
            lambda s: (
                s[:32]
                + (
                    int.from_bytes(s[32:], "little")
                    + 2**252
                    + 27742317777372353535851937790883648493
                ).to_bytes(32, "little")
            ),
            id="malleated",
        ),
    ],
)
def test_refused(public, context, body, change):
    signature = sign(KEY, Context.COMMIT, b"body")
    with pytest.raises(BadSignatureError):
        verify(public, context, body, change(signature) if change else signature)


def test_every_context_is_its_own_and_cannot_run_into_the_body():
    values = [context.value for context in Context]
    assert len(set(values)) == len(values)
    assert all("\n" not in value and value.isascii() for value in values)
    # "a" + newline + "b" must not be readable as another split
    assert signing_input(Context.DEAL, b"x") != signing_input(Context.DEAL_OK, b"x")
    inputs = {signing_input(context, b"body") for context in Context}
    assert len(inputs) == len(values)


def _on_curve_doubled(y: int) -> int | None:
    """y coordinate of the double of a point with this y; None if there is no such point."""
    d = -121665 * pow(121666, -1, P) % P
    x2 = (y * y - 1) * pow(d * y * y + 1, -1, P) % P
    if x2 and pow(x2, (P - 1) // 2, P) != 1:
        return None
    # y of the double: (y^2 + x^2) / (1 - d x^2 y^2)
    return (y * y + x2) * pow(1 - d * x2 * y * y, -1, P) % P


def test_the_low_order_points_are_the_ones_that_eight_maps_to_the_identity():
    for y in _LOW_ORDER_Y:
        times_8: int | None = y
        for _ in range(3):
            times_8 = _on_curve_doubled(times_8)
            assert times_8 is not None
        assert times_8 == 1  # the identity


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(PUBLIC[:31], id="short"),
        pytest.param(PUBLIC + b"\0", id="long"),
        pytest.param((1).to_bytes(32, "little"), id="identity"),
        pytest.param(bytes(32), id="order 4"),
        pytest.param((P + 1).to_bytes(32, "little"), id="identity, not canonical"),
        pytest.param((P - 1).to_bytes(32, "little"), id="order 2"),
        pytest.param(b"\xff" * 32, id="not canonical"),
        *(
            pytest.param((y | 1 << 255).to_bytes(32, "little"), id=f"low order, sign bit, {y % 97}")
            for y in sorted(_LOW_ORDER_Y)
        ),
    ],
)
def test_keys_that_identify_nobody_are_refused(data):
    with pytest.raises(MalformedMessageError):
        parse_public_key(data)
    with pytest.raises(MalformedMessageError):
        verify(data, Context.COMMIT, b"body", bytes(64))


def test_without_the_check_a_low_order_key_would_have_signed_anything():
    """The refusal above is not idle: the identity as key verifies R = identity, S = 0."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    identity = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(identity).verify(identity + bytes(32), b"anything at all")
