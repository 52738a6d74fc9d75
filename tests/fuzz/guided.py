"""Coverage-guided fuzzing of every parser of documents: ``python -m tests.fuzz.guided SECONDS``.

The parsers and a good document for each are those of ``tests/property/test_parsers_from_outside``;
each gets a process of its own, for libFuzzer ends its process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def one(name: str, seconds: int, corpus: str) -> None:
    """Fuzz one parser; does not return."""
    import atheris

    with atheris.instrument_imports(include=["protocols", "policies"]):
        from protocols.errors import FederationError
        from tests.property.test_parsers_from_outside import ROWS

    seed, parse = ROWS[name]
    Path(corpus, "seed").write_bytes(seed)

    def test(data: bytes) -> None:
        try:
            parse(data)
        except FederationError:
            return

    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", "-verbosity=0"]
    atheris.Setup([*arguments, f"-artifact_prefix={corpus}/found-", corpus], test)
    atheris.Fuzz()


def main(seconds: int) -> int:
    """Each parser in turn."""
    from tests.property.test_parsers_from_outside import ROWS

    bad = 0
    for name in sorted(ROWS):
        with tempfile.TemporaryDirectory(prefix="minga-fuzz-") as corpus:
            command = [sys.executable, "-m", "tests.fuzz.guided", str(seconds), name, corpus]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = [path.read_bytes() for path in Path(corpus).glob("found-*")]
            if done.returncode == 0:
                continue
            bad += 1
            print(f"{name}: {found[:1]!r:.2000}\n{done.stderr[-3000:]}", flush=True)
    print(f"{len(ROWS)} parsers, {seconds} s each, {bad} with something found")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one(sys.argv[2], int(sys.argv[1]), sys.argv[3])
    sys.exit(main(int(sys.argv[1])))
