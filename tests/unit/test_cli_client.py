"""The operator's client: what a failed call stands for."""

from __future__ import annotations

import grpc
import pytest

from infra.runs.client import error_of
from protocols.errors import (
    FederationError,
    NotPermittedError,
    NotReadyError,
    OffsetError,
    PlanRefusedError,
    StorageFullError,
    UnreachableError,
    error_details,
)


class Failed(grpc.RpcError):
    """A call that failed."""

    def __init__(self, code, details, metadata=()):
        super().__init__(details)
        self._answer = (code, details, metadata)

    def code(self):
        return self._answer[0]

    def details(self):
        return self._answer[1]

    def trailing_metadata(self):
        return self._answer[2]


def sent(error: FederationError) -> Failed:
    """As the coordinator's interceptor sends it."""
    details = tuple((f"minga-{name}", value) for name, value in error_details(error).items())
    return Failed(grpc.StatusCode.UNKNOWN, str(error), (("minga-code", error.code), *details))


@pytest.mark.parametrize(
    "error",
    [
        NotPermittedError("a node may not submit"),
        PlanRefusedError("a rule forbids it", rule="modes"),
        OffsetError("goes on at 7", expected=7),
        StorageFullError("no room", retry_after_s=30.0),
    ],
)
def test_an_error_arrives_as_it_was_raised(error):
    rebuilt = error_of(sent(error), "c:1")

    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert error_details(rebuilt) == error_details(error)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnreachableError, "no coordinator answers at c:1"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnreachableError, "took too long"),
        (grpc.StatusCode.INTERNAL, NotReadyError, "the coordinator answered INTERNAL"),
    ],
)
def test_a_failure_without_a_code_has_one_line(code, kind, words):
    error = error_of(Failed(code, "first line\nsecond line"), "c:1")

    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)


def test_nothing_is_said_about_nothing():
    assert "no reason given" in str(error_of(Failed(grpc.StatusCode.UNAVAILABLE, None), "c:1"))
