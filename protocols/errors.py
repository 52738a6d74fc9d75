"""Every error that crosses a boundary.

    FederationError                     code, sentence, advice
    |- RefusedError                     change something, then try again     exit 3
    |  |- MalformedMessageError         what was sent cannot be read (also a ValueError)
    |  |- NotEnrolledError              no certificate, or one that is not in force
    |  |- TokenRefusedError             the invitation is used, expired or unknown
    |  |- NotPermittedError             this identity may not do that
    |  |- NotFoundError                 no such run, round, blob or node
    |  |- ExistsError                   would overwrite what is there
    |  |- WrongPhaseError               the round has left that phase, or has not reached it
    |  |- NotListedError                not on the roster, in the cohort or among the survivors
    |  |- EquivocationError             a second, different statement
    |  |- ConflictingUploadError        other bytes for the same upload
    |  |- PlanRefusedError              a rule forbids it: rule id and reason
    |  `- ConfigurationError            a file at the site is missing or wrong
    |- NotReadyError                    nothing is wrong: try again later    exit 4
    |  |- UnreachableError              nobody answers
    |  |- LedgerBusyError               another process holds the ledger
    |  |- OffsetError                   resume from another offset
    |  |- TooManyRequestsError          the caller's share is used up for now
    |  |- StorageFullError              no room at the spool
    |  `- WorkerError                   the worker died, hung or failed
    `- IntegrityError                   stop, keep the evidence              exit 5
       |- DigestMismatchError           bytes are not what their digest says
       |- ManifestMismatchError         a parameter set is not the plan's
       |- NonFiniteUpdateError          NaN or infinity in an update
       |- WrappedSumError               the sum may have left the ring
       |- ModelDisagreementError        two parties computed different models
       `- CorruptStateError             what is on disk contradicts itself

A family says what the caller should do; ``code`` is stable and travels over gRPC, where
``GRPC_STATUS`` names the status. A programmer's mistake is a plain ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

from typing import ClassVar, Final

from protocols.decimals import read_decimal


class FederationError(Exception):
    """Base of all errors that another party or person may see. Never carries a secret."""

    code: ClassVar[str] = "error"
    advice: ClassVar[str] = ""

    def diagnostics(self) -> str:
        """The sentence, the code, and what to do next; for a person."""
        advice = f" {self.advice}" if self.advice else ""
        return f"{self} [{self.code}]{advice}"


class RefusedError(FederationError):
    """The request cannot be taken as it is."""

    code = "refused"


class NotReadyError(FederationError):
    """Nothing is wrong; the same request may succeed later."""

    code = "not_ready"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IntegrityError(FederationError):
    """Something that must be true is not: stop and keep the evidence."""

    code = "integrity"


class MalformedMessageError(RefusedError, ValueError):
    """Bytes, a field or an argument cannot be read. The only error parsers raise."""

    code = "malformed"


class NotEnrolledError(RefusedError):
    """The caller's certificate is missing, foreign, expired, or names nobody we know."""

    code = "not_enrolled"
    advice = "Run `minga node doctor`; if the certificate expired, join again with a new token."


class TokenRefusedError(RefusedError):
    """The invitation cannot be used (again)."""

    code = "token_refused"
    advice = "Ask the operator for a new invitation."


class NotPermittedError(RefusedError):
    """The caller is known, but its role may not do this."""

    code = "not_permitted"


class NotFoundError(RefusedError):
    """There is no such thing here."""

    code = "not_found"


class ExistsError(RefusedError):
    """Doing this would overwrite what is there."""

    code = "exists"


class WrongPhaseError(RefusedError):
    """A message arrived for a phase its round has left, or has not reached."""

    code = "wrong_phase"
    advice = "Nothing was recorded. The node joins the next round by itself."


class NotListedError(RefusedError):
    """The node is not on the roster, not in the cohort, or not among the survivors."""

    code = "not_listed"


class EquivocationError(RefusedError):
    """The node has signed another, contradicting statement before."""

    code = "equivocation"


class ConflictingUploadError(RefusedError):
    """The node sent other bytes, or another header, for an upload that has begun."""

    code = "conflicting_upload"


class PlanRefusedError(RefusedError):
    """A rule forbids the plan, the run or the round."""

    code = "plan_refused"

    def __init__(self, message: str, *, rule: str) -> None:
        super().__init__(message)
        self.rule = rule

    def diagnostics(self) -> str:
        """The sentence with the rule that was applied."""
        return f"{self} [{self.code}: {self.rule}]"


class ConfigurationError(RefusedError):
    """A file that a person wrote is missing or wrong; the sentence names file and key."""

    code = "configuration"


class UnreachableError(NotReadyError):
    """Nobody answers there."""

    code = "unreachable"
    advice = "`minga node doctor` checks address, certificate and clock."


class LedgerBusyError(NotReadyError):
    """Another process holds the ledger or the folder."""

    code = "ledger_busy"


class OffsetError(NotReadyError):
    """The upload goes on from another offset."""

    code = "wrong_offset"

    def __init__(self, message: str, *, expected: int) -> None:
        super().__init__(message, retry_after_s=0.0)
        self.expected = expected


class TooManyRequestsError(NotReadyError):
    """The caller asked for more than its share; it says when to come again."""

    code = "too_many_requests"


class StorageFullError(NotReadyError):
    """No room for what should be stored; nothing was acknowledged."""

    code = "storage_full"
    advice = "Free some space; the sender tries again by itself."


class WorkerError(NotReadyError):
    """The local worker died, hung, or reported a failure; the sentence says which."""

    code = "worker_failed"


class DigestMismatchError(IntegrityError):
    """Bytes do not have the digest they were promised to have."""

    code = "digest_mismatch"


class ManifestMismatchError(IntegrityError):
    """A parameter set has other tensors, shapes or sizes than the plan."""

    code = "manifest_mismatch"


class NonFiniteUpdateError(IntegrityError):
    """An update holds NaN or infinity; nothing was quantized."""

    code = "non_finite"


class WrappedSumError(IntegrityError):
    """A coordinate of the sum is so large that it may have left the ring."""

    code = "wrapped_sum"


class ModelDisagreementError(IntegrityError):
    """Two parties computed different models from the same sum."""

    code = "model_disagreement"


class CorruptStateError(IntegrityError):
    """What is on disk contradicts itself."""

    code = "corrupt_state"


EXIT_STATUS: Final[dict[type[FederationError], int]] = {
    RefusedError: 3,
    NotReadyError: 4,
    IntegrityError: 5,
}  # 0 done, 1 bug, 2 usage

# Most specific first: the first class that matches names the gRPC status.
GRPC_STATUS: Final[tuple[tuple[type[FederationError], str], ...]] = (
    (MalformedMessageError, "INVALID_ARGUMENT"),
    (NotEnrolledError, "UNAUTHENTICATED"),
    (TokenRefusedError, "PERMISSION_DENIED"),
    (NotPermittedError, "PERMISSION_DENIED"),
    (NotFoundError, "NOT_FOUND"),
    (ExistsError, "ALREADY_EXISTS"),
    (ConflictingUploadError, "ALREADY_EXISTS"),
    (TooManyRequestsError, "RESOURCE_EXHAUSTED"),
    (RefusedError, "FAILED_PRECONDITION"),
    (OffsetError, "OUT_OF_RANGE"),
    (StorageFullError, "RESOURCE_EXHAUSTED"),
    (NotReadyError, "UNAVAILABLE"),
    (IntegrityError, "DATA_LOSS"),
)


def grpc_status_name(error: FederationError) -> str:
    """The gRPC status of an error, by its class."""
    return next((name for cls, name in GRPC_STATUS if isinstance(error, cls)), "INTERNAL")


def exit_status(error: FederationError) -> int:
    """The exit status of the ``minga`` command for an error."""
    return next((status for cls, status in EXIT_STATUS.items() if isinstance(error, cls)), 1)


def _all_codes() -> dict[str, type[FederationError]]:
    found: dict[str, type[FederationError]] = {}
    waiting: list[type[FederationError]] = [FederationError]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        found.setdefault(cls.code, cls)
    return found


def error_from_code(code: str, message: str, details: dict[str, str]) -> FederationError:
    """Rebuild an error that came over the wire; an unknown code becomes its nearest family.

    Args:
        code: the sender's ``code``.
        message: its sentence.
        details: ``rule`` for plan_refused, ``expected`` for wrong_offset, ``retry_after_s``.
    """
    cls = _all_codes().get(code, RefusedError)
    if issubclass(cls, PlanRefusedError):
        return cls(message, rule=details.get("rule", "unknown"))
    if issubclass(cls, OffsetError):
        text = details.get("expected", "")
        return cls(message, expected=read_decimal(text, most=2**63) or 0)
    if issubclass(cls, NotReadyError):
        try:
            retry = min(60.0, max(0.0, float(details.get("retry_after_s", "1"))))
        except ValueError:
            retry = 1.0
        return cls(message, retry_after_s=retry)
    return cls(message)


def error_details(error: FederationError) -> dict[str, str]:
    """The typed fields of an error that travel beside its sentence."""
    if isinstance(error, PlanRefusedError):
        return {"rule": error.rule}
    if isinstance(error, OffsetError):
        return {"expected": str(error.expected)}
    if isinstance(error, NotReadyError):
        return {"retry_after_s": f"{error.retry_after_s:g}"}
    return {}
