"""The head of the log in one process: signed, cosigned, witnessed; and who waits for which.

    writer --offer--> signed --witnesses answer--> witnessed --> nodes that follow, files

A head is *witnessed* once the witnesses that the log itself names are enough (``quorums``). While a
head gathers cosignatures the next may be offered already; a witness is always asked about the
newest one. Nothing here is durable: whatever is lost is asked for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError, NotReadyError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.cosignature import MAX_TIME, open_checkpoint
from protocols.tlog.leaf import Seen
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import KeyRing, Note, SignatureLine, VerifierKey
from protocols.tlog.proof_file import ProofFile
from protocols.tlog.proofs import make_consistency, make_inclusion
from protocols.tlog.text import decode_decimal
from protocols.tlog.tree import GrowingTree
from protocols.tlog.trust_policy import TrustPolicy
from protocols.tlog.witness import add_lines, parse_answer, write_request

logger = logging.getLogger(__name__)
KEPT: Final = 16  # signed heads whose cosignatures are still collected


@dataclass(slots=True, kw_only=True)
class Head:
    """A signed head and the cosignatures it has so far."""

    checkpoint: Checkpoint
    note: Note
    policies: tuple[TrustPolicy, ...]  # all of them must be satisfied
    lines: dict[str, SignatureLine] = field(default_factory=dict)  # by the policy's name

    @property
    def size(self) -> int:
        """Leaves."""
        return self.checkpoint.size

    @property
    def witnessed(self) -> bool:
        """Whether the cosignatures are enough."""
        return all(policy.satisfied(self.lines.keys()) for policy in self.policies)

    @property
    def missing(self) -> tuple[str, ...]:
        """Witnesses that have not cosigned it."""
        names = {name for policy in self.policies for name in policy.witnesses}
        return tuple(sorted(names - self.lines.keys()))

    def to_bytes(self) -> bytes:
        """The note with its cosignatures."""
        lines = [self.lines[name] for name in sorted(self.lines)]
        return add_lines(self.note, lines).to_bytes()


class LogHub:
    """Shared by the writer, the services and the files of one process. Used on one event loop.

    Args:
        log: the log's public key; its name is the origin.
    """

    def __init__(self, log: VerifierKey) -> None:
        self.log = log
        self.tree = GrowingTree()
        self.leads = False  # whether this process writes the log
        self.signed: Head | None = None
        self.witnessed: Head | None = None
        self.keys: dict[str, VerifierKey] = {}  # of witnesses, by the policy's name
        self.heads: dict[str, Checkpoint | None] = {}  # what each said it cosigned last
        self.silent: tuple[str, ...] = ()  # a new writer waits for what they cosigned last
        self.trouble: dict[str, str] = {}  # why a witness does not cosign
        self._known: dict[str, int] = {}  # size that each cosigned last, as far as we know
        self._open: dict[int, Head] = {}
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    # -- news ----------------------------------------------------------------------------------

    async def changed(self, timeout_s: float, until: Callable[[], bool] = lambda: True) -> None:
        """Wait until something happened, or for a while.

        Args:
            timeout_s: how long at most.
            until: asked whenever something happened, and cheap: only then is it over. Of n nodes
                each cosigns each head, and each follows the log twice; were all woken by every
                answer, a head would cost n² times what waking costs.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = until
        try:
            with suppress(TimeoutError):  # nothing happened: the caller looks again
                async with asyncio.timeout(timeout_s):
                    await future
        finally:
            del self._waiting[future]

    def _tell(self) -> None:
        for future, until in self._waiting.items():
            if not future.done() and until():
                future.set_result(None)

    def lead(self, leads: bool) -> None:
        """This process writes the log from now on, or does not."""
        self.leads = leads
        if not leads:
            self.signed = self.witnessed = None
            self._open.clear()
            self.heads.clear()  # who leads again asks again
            self.silent = ()
        self._tell()

    def show(self, note: Note, checkpoint: Checkpoint) -> None:
        """Another process writes the log: this is the newest head that it published."""
        if not self.leads:
            self.witnessed = Head(checkpoint=checkpoint, note=note, policies=())
            self._tell()

    # -- heads ---------------------------------------------------------------------------------

    def offer(self, note: Note, checkpoint: Checkpoint, policies: Iterable[TrustPolicy]) -> None:
        """A head was signed: witnesses are asked about it."""
        head = Head(checkpoint=checkpoint, note=note, policies=tuple(policies))
        self.signed = self._open[head.size] = head
        for size in sorted(self._open)[:-KEPT]:
            del self._open[size]
        self._settle(head)
        self._tell()

    def _settle(self, head: Head) -> None:
        newest = self.witnessed.size if self.witnessed else -1
        if head.size > newest and head.witnessed:
            self.witnessed = head
            for size in [size for size in self._open if size < head.size]:
                del self._open[size]

    def seen(self) -> Seen:
        """The last witnessed head, for our own leaves."""
        if self.witnessed is None:
            return Seen(size=0, root=EMPTY_ROOT)
        head = self.witnessed.checkpoint
        return Seen(size=head.size, root=head.root)

    def goes_beyond(self, size: int) -> bool:
        """Whether there is more to show than so many leaves, or nothing is shown any more."""
        if self.witnessed is None:
            return not self.leads
        return self.witnessed.size > size

    def waits_for(self) -> tuple[str, ...]:
        """The witnesses that the log waits for: those that a new writer has not heard yet, else
        those whose cosignatures the newest head lacks; empty when it is witnessed."""
        if self.silent:
            return self.silent
        if self.signed is None or self.signed.witnessed:
            return ()
        return self.signed.missing

    # -- witnesses -----------------------------------------------------------------------------

    def greet(self, name: str, latest: bytes) -> None:
        """A witness says what it cosigned last; empty: nothing of this log.

        Whatever the time of that cosignature: a witness whose clock was ahead has cosigned this
        head all the same, and must not be left out until the time that it wrote has come.

        Raises:
            MalformedMessageError, BadSignatureError: it is not this log's checkpoint, or not
                cosigned by this witness.
        """
        if not latest:
            self.heads[name] = None
            self._known[name] = 0
        else:
            key = self.keys.get(name)
            ring = KeyRing.of([self.log] if key is None else [self.log, key])
            opened = open_checkpoint(latest, ring, now=MAX_TIME)
            if key is not None and not opened.cosignatures:
                raise BadSignatureError(f"{name} shows a checkpoint that it has not cosigned")
            self.heads[name] = opened.checkpoint
            self._known[name] = opened.checkpoint.size
        self._tell()

    def answered(self, names: Iterable[str]) -> dict[str, Checkpoint | None]:
        """What those of ``names`` that have spoken cosigned last."""
        return {name: self.heads[name] for name in names if name in self.heads}

    def asks(self, name: str) -> Head | None:
        """The newest head, if a witness is to be asked about it: it has not cosigned it."""
        head = self.signed
        if head is None or name in head.lines or name not in self.keys:
            return None
        return head if self._known.get(name, 0) <= head.size else None

    def request_for(self, name: str) -> tuple[Head, bytes] | None:
        """What to ask a witness now: the newest head, unless it has cosigned that."""
        head = self.asks(name)
        if head is None:
            return None
        old = self._known.get(name, 0)
        proof = make_consistency(self.tree.hashes, old, head.size) if old else ()
        return head, write_request(old=old, proof=proof, checkpoint=head.note.to_bytes())

    def answer(self, name: str, head: Head, status: int, body: bytes, *, now: int) -> bool:
        """Take a witness's answer. Returns whether asking again at once makes sense."""
        key = self.keys.get(name)
        if key is None:
            return False
        try:
            if status == 200:
                found = parse_answer(body, text=head.note.text, ring=KeyRing.of([key]), now=now)
                head.lines[name] = found[0][0]
                self._known[name] = head.size
                self.heads[name] = head.checkpoint
                self.trouble.pop(name, None)
                self._settle(head)
                self._tell()
                return True
            if status == 409:
                size = decode_decimal(body.decode("ascii").removesuffix("\n"), "a size")
                again = size != self._known.get(name) and size <= head.size
                self._known[name] = size
                if not again:
                    self.trouble[name] = f"has cosigned size {size}, ours is {head.size}"
                return again
            why = body.decode("utf-8", "replace").strip()[:200]
            self.trouble[name] = f"answered {status}: {why}"
        except (MalformedMessageError, BadSignatureError, UnicodeDecodeError) as error:
            self.trouble[name] = str(error)[:200]
        logger.warning("witness %s: %s", name, self.trouble[name])
        return False

    # -- proofs --------------------------------------------------------------------------------

    def prove(self, index: int) -> bytes:
        """A tlog-proof file of a leaf under the witnessed head.

        Raises:
            NotReadyError: no witnessed head has it yet.
        """
        head = self.witnessed
        if head is None or index >= head.size:
            raise NotReadyError(f"leaf {index} is not under a witnessed checkpoint yet")
        hashes = make_inclusion(self.tree.hashes, index, head.size)
        return ProofFile(index=index, hashes=hashes, checkpoint=head.to_bytes()).to_bytes()


def need_head(hub: LogHub) -> None:
    """Raises: NotReadyError: this process neither writes the log nor has seen it published."""
    if not hub.leads and hub.witnessed is None:
        raise NotReadyError("nobody writes the log yet, or nothing of it is published")


def need_leader(hub: LogHub) -> None:
    """Raises: NotReadyError: another process writes the log."""
    if not hub.leads:
        raise NotReadyError("another coordinator process writes the log, or none does yet")


def describe_waiting(hub: LogHub | None) -> str:
    """For ``minga run why``: whose cosignatures are waited for, and why they do not come."""
    names = hub.waits_for() if hub is not None else ()
    if not names or hub is None:
        return ""
    parts: Mapping[str, str] = hub.trouble
    listed = [f"{name} ({parts[name]})" if name in parts else name for name in names]
    if hub.silent:
        return f"a new writer of the log waits for what {', '.join(listed)} cosigned last"
    return f"the log waits for cosignatures of {', '.join(listed)}"
