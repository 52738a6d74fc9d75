"""`minga audit witness`: one command that lets anybody cosign a log over plain HTTP.

The state machine and the store are the node's own (``node_agent.witness``); only the standard
library listens. Put a TLS proxy in front of it where the way to it is not trusted: what it answers
is signed in any case, so a proxy can at most keep it from answering.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from node_agent.witness import KEY_FILE, Witness, make_witness, open_witness, read_key
from protocols.errors import ConfigurationError, MalformedMessageError
from protocols.tlog.note import KeyRing, KeyType, VerifierKey

LOGS = "logs.txt"


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


def prepare(folder: Path, *, name: str, log_keys: tuple[Path, ...]) -> Witness:
    """The witness of a folder; key and memory are made the first time.

    Args:
        folder: where key, memory and the list of logs are.
        name: of the key, used the first time; a URL prefix without scheme.
        log_keys: files with the vkey of a log each, added to the list.

    Raises:
        ConfigurationError: a file holds no log key, or none was ever given: then the sentence
            has the witness's own key, which a log that begins may name.
        CorruptStateError: the memory is lost: the witness is retired, begin another folder.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = folder / LOGS
    lines = known.read_text("utf-8").splitlines() if known.exists() else []
    for path in log_keys:
        try:
            line = path.read_text("utf-8").strip()
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}") from None
        if line not in lines:
            lines.append(line)
    keys = [_log_key(line) for line in lines]
    if not (folder / KEY_FILE).exists():
        make_witness(folder, name)
    if not keys:
        vkey = read_key(folder / KEY_FILE).verifier.to_text()
        raise ConfigurationError(
            f"say which log to watch: --log FILE with its vkey; the key of this witness is {vkey}"
        )
    known.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    rings: dict[str, list[VerifierKey]] = {}
    for key in keys:
        rings.setdefault(key.name, []).append(key)
    logs = {origin: KeyRing.of(found) for origin, found in rings.items()}
    return open_witness(folder, logs, now=_now)


def _log_key(line: str) -> VerifierKey:
    try:
        key = VerifierKey.parse(line)
    except MalformedMessageError as error:
        raise ConfigurationError(f"not the key of a log: {error}") from None
    if key.type is not KeyType.ED25519:
        raise ConfigurationError(f"{key.name} is not the key of a log")
    return key
