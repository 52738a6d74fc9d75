"""What every group of `minga admin` does with a signing request: show it, sign it, publish it.

REQUEST                     a signing request, as `propose` wrote it
REQUEST.<person>.sig.json   one person's signatures, as `sign` wrote them

Showing and signing are offline: the request carries the repository, and it is verified here, from
the root that the reader holds. Publishing brings what was signed to the coordinator.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from getpass import getpass
from pathlib import Path
from typing import Any

from infra.admin.keys import PASSPHRASE_VARIABLE, card_path, load_signer, read_card
from policies.agreement import must_agree
from policies.deciding import policy_of, preview
from policies.effect import takes_effect
from policies.offices import out_of_office
from policies.trust import Change
from protocols.canonical import parse_json
from protocols.errors import ConfigurationError, ExistsError, NotFoundError
from protocols.governance import roles
from protocols.governance.building import serialize
from protocols.governance.errors import TrustRefusedError
from protocols.governance.requests import (
    Opened,
    Signatures,
    SigningRequest,
    add_signatures,
    canonical_request,
    open_request,
    sign_request,
    tally,
)
from protocols.governance.signers import Quorum


def utc_now() -> datetime:
    """The machine's clock, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def read_bytes(path: Path) -> bytes:
    """Raises: ConfigurationError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


def ask_secret(file: Path | None, prompt: str = "passphrase: ") -> Callable[[], str]:
    """Where a passphrase comes from: a file, the variable, or a prompt; never an argument."""

    def ask() -> str:
        if file is not None:
            return read_bytes(file).decode().strip("\r\n")
        return os.environ.get(PASSPHRASE_VARIABLE) or getpass(prompt)

    return ask


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet. Raises: ExistsError."""
    if path.exists():
        raise ExistsError(f"{path} exists; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_request(path: Path, request: SigningRequest) -> None:
    """Write a signing request. Raises: ExistsError."""
    write_new(path, canonical_request(request))


def read_request(path: Path) -> SigningRequest:
    """Raises: ConfigurationError, MalformedMessageError."""
    return SigningRequest.read(read_bytes(path))


def proposed_document(path: Path, name: str, *, now: datetime) -> bytes:
    """A document as a request would publish it.

    Raises:
        NotFoundError: the request does not bring it.
        TrustRefusedError, MalformedMessageError: the request does not hold.
    """
    opened = open_request(read_request(path), trusted_root=None, now=now)
    after, _, _ = preview(opened, now=now)
    data = after.documents.get(name)
    if data is None:
        raise NotFoundError(f"{path} brings no {name}")
    return data


def read_signatures(request: Path, files: Iterable[Path]) -> list[Signatures]:
    """Signatures by name, or all that lie beside the request."""
    chosen = list(files) or sorted(request.parent.glob(f"{request.name}.*.sig.json"))
    return [Signatures.from_value(parse_json(read_bytes(path), limit=2**20)) for path in chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A request as a person reads it."""

    opened: Opened
    changes: tuple[Change, ...]
    needs: dict[str, int]  # institutions, by role
    agree: tuple[str, ...]  # institutions that must agree to a larger budget, each by itself
    waits: str  # how long a new policy waits after its leaf; empty: there is none
    quorums: tuple[Quorum, ...]
    anchored: bool

    def missing(self) -> list[str]:
        """What is still missing, one sentence each."""
        found = []
        for quorum in self.quorums:
            need = max(quorum.need, self.needs.get(quorum.role, 0))
            if quorum.missing is not None:
                found.append(quorum.missing)
            elif quorum.counted < need:
                found.append(
                    f"{quorum.role} {quorum.version} is signed for {quorum.counted} institutions, "
                    f"what it changes needs {need}"
                )
        return found

    def facts(self) -> dict[str, Any]:
        """For scripts."""
        request = self.opened.request
        return {
            "federation": request.federation,
            "title": request.title,
            "digest": request.digest,
            "created": request.created,
            "expires": request.expires,
            "anchored": self.anchored,
            "changes": [change.words for change in self.changes],
            "roles": [
                {
                    "role": quorum.role,
                    "version": quorum.version,
                    "needs": max(quorum.need, self.needs.get(quorum.role, 0)),
                    "signed": [str(holder) for holder in quorum.signed],
                    "may_sign": [str(holder) for holder in quorum.unsigned],
                }
                for quorum in self.quorums
            ],
            "must_agree": list(self.agree),
            "takes_effect": self.waits,
            "missing": self.missing(),
        }

    def lines(self) -> list[str]:
        """For people."""
        facts = self.facts()
        lines = [
            f"{facts['title']} of federation {facts['federation']}",
            f"digest {facts['digest']}",
            f"proposed {facts['created']}, to be signed before {facts['expires']}",
        ]
        if not self.anchored:
            lines.append("UNANCHORED: verified from the request's own first root only (--root)")
        lines += ["", "If it is published, it"]
        lines += [f"  - {change.words}" for change in self.changes] or ["  - changes nothing"]
        lines.append("")
        for role in facts["roles"]:
            signed = ", ".join(role["signed"]) or "nobody yet"
            lines.append(f"{role['role']} {role['version']}: {role['needs']} must sign")
            lines.append(f"    signed: {signed}")
            if role["may_sign"]:
                lines.append(f"    can sign: {', '.join(role['may_sign'])}")
        if self.agree:
            lines.append(
                f"{', '.join(self.agree)} must agree before it is published, each under its own "
                "key: minga admin policy agree"
            )
        if self.waits:
            lines.append(self.waits)
        lines.append("")
        lines += self.missing() or ["complete: it can be published"]
        return lines


def view(
    request: SigningRequest, signatures: Iterable[Signatures], *, root: bytes | None, now: datetime
) -> View:
    """Verify a request and see how far it is.

    Raises:
        TrustRefusedError, ForgedError, MalformedMessageError.
    """
    opened = open_request(request, trusted_root=root, now=now)
    after, changes, needs = preview(opened, now=now)
    candidates = add_signatures(opened, signatures)
    old = policy_of(opened.before) if opened.before is not None else None
    new = policy_of(after)
    waits = ""
    if old is not None and new != old:
        since = takes_effect(old, new, now)
        waits = f"published now it would take effect at {since:%F %H:%M}Z; until then policy "
        waits += f"{old.policy_version} counts"
    return View(
        opened=opened,
        changes=tuple(changes),
        needs=needs,
        agree=must_agree(old, new, after.members),
        waits=waits,
        quorums=tuple(tally(opened, candidates)),
        anchored=root is not None or opened.before is None,
    )


def sign(
    path: Path,
    key: Path,
    *,
    root: bytes | None,
    secret: Callable[[], str],
    module: Path | None,
    confirm: Callable[[View], bool],
    now: datetime,
) -> Path | None:
    """Sign a request with one key; where its signatures were written. None: not confirmed.

    Raises:
        TrustRefusedError: it does not verify, or the key signs none of it.
        ConfigurationError: the key cannot be opened.
    """
    request = read_request(path)
    seen = view(request, read_signatures(path, ()), root=root, now=now)
    if not confirm(seen):
        return None
    person = read_card(card_path(key)).holder.person
    before = seen.opened.before
    if before is not None and any(item.id == person for item in before.admins.admins()):
        why = out_of_office([before.admins], person, now)
        if why is not None:
            raise TrustRefusedError(f"{why}: a signature would not count", rule="trust.expired")
    made = sign_request(seen.opened, load_signer(key, secret, module=module))
    target = path.with_name(f"{path.name}.{person}.sig.json")
    if target.exists():
        if read_bytes(target) != made.to_bytes():
            target.unlink()  # of an earlier request of this name
        else:
            return target
    write_new(target, made.to_bytes())
    return target


def signed_files(path: Path, signatures: Iterable[Path], *, now: datetime) -> dict[str, bytes]:
    """The files to publish, once enough have signed.

    Raises:
        TrustRefusedError: trust.quorum or trust.majority: too few signed.
    """
    request = read_request(path)
    seen = view(request, read_signatures(path, signatures), root=None, now=now)
    missing = seen.missing()
    if missing:
        raise TrustRefusedError("; ".join(missing), rule="trust.quorum")
    files = dict(seen.opened.files)
    for item in seen.opened.candidates:
        files[item.name] = serialize(item.metadata)
    return files


def publish(files: dict[str, bytes], *, folder: Path | None, config: Path | None) -> list[str]:
    """Bring signed files to the coordinator; what came into force, in words.

    Raises:
        TrustRefusedError: the coordinator does not take them; its sentence says why.
    """
    from infra.runs.client import AdminClient
    from infra.runs.operator import find_operator

    operator = find_operator(folder=folder, config=config, environment=os.environ)
    with AdminClient(operator) as client:
        return client.publish_trust(files)


def deliver(entry: bytes, *, folder: Path | None, config: Path | None) -> None:
    """Bring a signed leaf to the coordinator. Raises: what the log refuses, with its rule."""
    from infra.runs.client import AdminClient
    from infra.runs.operator import find_operator

    operator = find_operator(folder=folder, config=config, environment=os.environ)
    with AdminClient(operator) as client:
        client.deliver(entry)


def online_key_of(statement: Path) -> tuple[str, Any]:
    """Federation and online key from a coordinator's founding.json.

    Raises:
        MalformedMessageError, ConfigurationError.
    """
    from protocols.errors import MalformedMessageError
    from protocols.governance.keys import parse_key

    value = parse_json(read_bytes(statement), limit=65_536)
    wanted = {"schema", "federation", "online", "ca_sha256"}
    if not isinstance(value, dict) or set(value) != wanted:
        raise MalformedMessageError(f"{statement} is no founding statement of a coordinator")
    if value["schema"] != "minga.founding/1" or not isinstance(value["federation"], str):
        raise MalformedMessageError(f"{statement} is no founding statement of a coordinator")
    return value["federation"], parse_key(value["online"])


def root_bytes(path: Path | None, repository: Path | None = None) -> bytes | None:
    """The root that the reader holds; None: none was given."""
    if path is not None:
        return read_bytes(path)
    return None


def fingerprint(repository: Path) -> str:
    """SHA-256 of the first root: what members compare by telephone. Raises: NotFoundError."""
    path = repository / "metadata" / "1.root.json"
    if not path.exists():
        raise NotFoundError(f"{repository} has no first root")
    return hashlib.sha256(path.read_bytes()).hexdigest()


ROLES = (roles.TARGETS, *roles.CENTRAL)
