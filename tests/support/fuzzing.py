"""Messages that no honest node would send: made from the descriptors, or from good ones by changes.

    messages(SyncRequest.DESCRIPTOR)           a random message, its fields filled from a pool of
                                               words and bytes that mean something here
    changed(good)                              a good message with one field replaced, or one byte
    raw(descriptor, seeds)                     the bytes of either, or no message at all

What is drawn reaches far when it starts from something good: a pool of names that exist, digests of
blobs that are there, signed headers. Hypothesis shrinks what it finds.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

import protocols.gen

EXAMPLES = int(os.environ.get("MINGA_FUZZ_EXAMPLES", "12"))  # `make fuzz` asks for many
WORDS = [
    "", "a", "b", "demo", "r1", "sec", "none", "Open", "Uploading", "running", "paused", "start",
    "survivors", "commit", "deal", "0" * 64, "f" * 64, "metadata/root.json", "1.root.json",
    "../../keys/ca.key", "metadata/../../keys/ca.key", "/etc/passwd", "..", "%2e%2e/x", "a\x00b",
    "a" * 5000, "\u202e", "\u00f1", "model_disagreement", "measured",
    "\u00b2", "r1/" + "9" * 5000, "r1/\u00b2",
]  # fmt: skip
DEEP = b"[" * 30_000 + b"]" * 30_000
BYTES = [
    b"", bytes(32), b"\xff" * 32, bytes(64), b"{}", b"null", b"[]", DEEP, b"9" * 5000,
    b'{"a":' * 500 + b"1" + b"}" * 500, b'{"a":1,"a":2}', b'{"a":1e999}', b'{"a":NaN}',
    b'"\\ud800"', b"\xff\xfe", b"\x30\x82\xff\xff", b"-----BEGIN CERTIFICATE-----\n",
    b"\x80" * 100, b"a" * 100_000,
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


def methods() -> Iterator[tuple[str, MethodDescriptor]]:
    """Every method of every service in ``protocols/gen``: "Service/Method" and its descriptor."""
    for module in pkgutil.iter_modules(protocols.gen.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"protocols.gen.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                for method in service.methods:
                    yield f"{service.name}/{method.name}", method


def _range(field: FieldDescriptor) -> tuple[int, int]:
    bits = 64 if "64" in _kind(field) or "fixed64" in _kind(field) else 32
    if _kind(field).startswith(("UINT", "FIXED")):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _kind(field: FieldDescriptor) -> str:
    names = ("INT32", "INT64", "UINT32", "UINT64", "SINT32", "SINT64", "FIXED32", "FIXED64")
    more = ("SFIXED32", "SFIXED64", "BOOL", "STRING", "BYTES", "MESSAGE", "DOUBLE", "FLOAT")
    for name in (*names, *more):
        if field.type == getattr(FieldDescriptor, f"TYPE_{name}"):
            return name
    raise NotImplementedError(f"{field.full_name}: teach the fuzzer this type")


def value(field: FieldDescriptor, pool: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """One value of a field."""
    kind = _kind(field)
    known = [item for item in pool if isinstance(item, str if kind == "STRING" else bytes)]
    match kind:
        case "BOOL":
            return st.booleans()
        case "DOUBLE" | "FLOAT":
            return st.floats(width=64 if kind == "DOUBLE" else 32)
        case "STRING":
            return st.sampled_from([*known, *WORDS]) | st.text(max_size=12)
        case "BYTES":
            good = st.sampled_from([*known, *BYTES])
            return good | good.flatmap(edited) | st.binary(max_size=40)
        case "MESSAGE":
            return messages(field.message_type, pool)
        case _:
            low, high = _range(field)
            return st.sampled_from([n for n in NUMBERS if low <= n <= high]) | st.integers(
                low, high
            )


def fill(message: Message, field: FieldDescriptor, drawn: Any) -> None:
    """Set a field to what was drawn for it."""
    message.ClearField(field.name)
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            target = getattr(message, field.name)
            for entry in drawn:
                if field.message_type.fields_by_name["value"].message_type is None:
                    target[entry.key] = entry.value
                else:
                    target[entry.key].CopyFrom(entry.value)
        else:
            getattr(message, field.name).extend(drawn)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(drawn)
    else:
        setattr(message, field.name, drawn)


def field_value(field: FieldDescriptor, pool: Sequence[Any]) -> st.SearchStrategy[Any]:
    """What ``fill`` takes: one value, or a list of a repeated field."""
    one = value(field, pool)
    return st.lists(one, max_size=3) if field.is_repeated else one


@st.composite
def messages(draw: st.DrawFn, of: Descriptor, pool: Sequence[Any] = ()) -> Message:
    """A message of a type, some of its fields set."""
    made = GetMessageClass(of)()
    for field in of.fields:
        if draw(st.integers(0, 3)):
            fill(made, field, draw(field_value(field, pool)))
    return made


@st.composite
def edited(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a few of them changed, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + cut :]
    return data


@st.composite
def changed(draw: st.DrawFn, good: Message, pool: Sequence[Any] = ()) -> Message:
    """A good message with one field, somewhere in it, replaced."""
    made = type(good)()
    made.CopyFrom(good)
    at: Message = made
    while at.DESCRIPTOR.fields:
        field = draw(st.sampled_from(list(at.DESCRIPTOR.fields)))
        inner = field.message_type is not None and not field.is_repeated
        if inner and at.HasField(field.name) and draw(st.booleans()):
            at = getattr(at, field.name)
            continue
        fill(at, field, draw(field_value(field, pool)))
        break
    return made


@st.composite
def raw(draw: st.DrawFn, of: Descriptor, seeds: Sequence[Message], pool: Sequence[Any]) -> bytes:
    """Bytes that a peer might send to a method."""
    match draw(st.sampled_from(("changed", "changed", "changed", "random", "edited", "noise"))):
        case "changed":
            return draw(changed(draw(st.sampled_from(list(seeds))), pool)).SerializeToString()
        case "random":
            return draw(messages(of, pool)).SerializeToString()
        case "edited":
            return draw(edited(draw(st.sampled_from(list(seeds))).SerializeToString()))
        case _:
            return draw(st.sampled_from(BYTES) | st.binary(max_size=60))
