"""What goes wrong in a secure sum, said once: the clause, and whose doing it is.

IntegrityError
|- CheckFailedError     a clause of protocols/spec/masked-update.md does not hold
|  `- BadShareError     a share is not what its dealer committed to
NotReadyError
`- TooFewSharesError    more reveals are needed before anything can be opened
"""

from __future__ import annotations

from protocols.errors import IntegrityError, NotReadyError
from protocols.identifiers import NodeId


class CheckFailedError(IntegrityError):
    """A clause of the masked-update specification does not hold: stop, keep the evidence."""

    code = "secagg_check"
    advice = "The attempt cannot go on here; what was received is the evidence."

    def __init__(self, message: str, *, clause: str = "", culprit: NodeId | None = None) -> None:
        super().__init__(message)
        self.clause = clause  # number of the MUST in protocols/spec/masked-update.md
        self.culprit = culprit  # the member whose signature proves it; None: the coordinator

    def diagnostics(self) -> str:
        """The sentence with the clause and, where a signature proves it, the member at fault."""
        clause = f" {self.clause}" if self.clause else ""
        who = f" Signed by {self.culprit}." if self.culprit is not None else ""
        return f"{self} [{self.code}{clause}]{who} {self.advice}"


class BadShareError(CheckFailedError):
    """A share does not match its dealer's commitment, or shares do not lie on one polynomial."""

    code = "bad_share"


class TooFewSharesError(NotReadyError):
    """Fewer than ``threshold`` members have revealed what is needed."""

    code = "too_few_shares"
