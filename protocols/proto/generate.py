"""Generate ``protocols/gen`` from the proto files, or check that it is up to date.

python protocols/proto/generate.py [--check]
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "gen"
_PLAIN_IMPORT = re.compile(r"^import (\w+_pb2)", re.MULTILINE)


def generate(target: Path) -> None:
    """Write the generated modules, with imports that work inside the package."""
    from grpc_tools import protoc  # noqa: PLC0415 - a development tool only

    sources = sorted(path.name for path in HERE.glob("*.proto"))
    arguments = ["protoc", f"-I{HERE}", f"--python_out={target}", f"--pyi_out={target}"]
    status = protoc.main([*arguments, f"--grpc_python_out={target}", *sources])
    if status != 0:
        raise SystemExit(status)
    for path in target.iterdir():
        if path.suffix in {".py", ".pyi"}:
            text = path.read_text()
            text = re.sub(
                r"^import (\w+_pb2)", r"from protocols.gen import \1", text, flags=re.MULTILINE
            )
            path.write_text(text)
    (target / "__init__.py").write_text('"""Generated from protocols/proto; do not edit."""\n')


def main(arguments: list[str]) -> int:
    """Generate in place, or compare with a fresh generation."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        generate(TARGET)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        names = {p.name for p in fresh.iterdir()} | {
            p.name for p in TARGET.iterdir() if p.suffix in {".py", ".pyi"}
        }
        stale = [
            name
            for name in sorted(names)
            if not (fresh / name).is_file()
            or not (TARGET / name).is_file()
            or (fresh / name).read_bytes() != (TARGET / name).read_bytes()
        ]
    for name in stale:
        print(f"protocols/gen/{name} is not what the proto files say: run `make proto`")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
