"""``python -m node_agent.model_folder DIR``: a model's folder as one digest. No torch.

Every site holds the same files of a base model; the plan names their digest and the worker refuses
others. What counts is what transformers reads to build the model and its tokenizer: weights as
safetensors, JSON, and a SentencePiece model. Pickles and Python files are neither hashed nor read:
weights that run code when they are loaded are not taken from anybody.

    {"files":[{"name":"config.json","sha256":"...","size":651},...],"schema":"minga.model-folder/1"}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from node_agent.resident import JobFailedError
from protocols.canonical import canonical_bytes, hash_hex, parse_json
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest

_SCHEMA: Final = "minga.model-folder/1"
_LABEL: Final = "minga/model-folder/v1"
_NAMED: Final = frozenset(
    {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    }
)
_READ: Final = 8 * 2**20  # bytes


class FolderError(JobFailedError):
    """The base model's folder cannot be used: ``model.base``."""

    def __init__(self, message: str) -> None:
        super().__init__("model.base", message)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The files of a base model that count."""

    root: Path
    files: tuple[Path, ...]  # ascending by name

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(file for file in self.files if file.suffix == ".safetensors")

    def marks(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of each file: while they stay, the digest does."""
        found = []
        for file in self.files:
            stat = file.stat()
            found.append((file.name, stat.st_size, stat.st_mtime_ns))
        return tuple(found)

    def config(self) -> dict[str, Any]:
        """config.json. Raises: FolderError."""
        try:
            value = parse_json((self.root / "config.json").read_bytes())
        except (OSError, MalformedMessageError) as error:
            raise FolderError(f"{self.root}/config.json cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise FolderError(f"{self.root}/config.json is not a JSON object")
        return value

    def digest(self) -> Digest:
        """What a plan names. Reads every byte.

        Raises:
            FolderError: a file cannot be read.
        """
        files = []
        for file in self.files:
            state, size = hashlib.sha256(), 0
            try:
                with file.open("rb") as stream:
                    while piece := stream.read(_READ):
                        state.update(piece)
                        size += len(piece)
            except OSError as error:
                raise FolderError(f"{file} cannot be read: {error.strerror}") from None
            files.append({"name": file.name, "sha256": state.hexdigest(), "size": size})
        return hash_hex(_LABEL, canonical_bytes({"schema": _SCHEMA, "files": files}))


def open_folder(path: Path) -> ModelFolder:
    """The files that count in a folder.

    Raises:
        FolderError: no folder, no config.json, or no safetensors.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from None
    files = tuple(path / name for name in names if name in _NAMED or name.endswith(".safetensors"))
    found = ModelFolder(path, files)
    if path / "config.json" not in files:
        raise FolderError(f"{path} has no config.json")
    if not found.weights:
        raise FolderError(f"{path} has no *.safetensors; pickled weights are not read")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the digest and the files that count."""
    parser = argparse.ArgumentParser(prog="python -m node_agent.model_folder", description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        folder = open_folder(options.folder)
        digest = folder.digest()
    except FolderError as error:
        print(f"model_folder: {error} [{error.code}]", file=sys.stderr)
        return 3
    print(json.dumps({"base": digest, "files": [file.name for file in folder.files]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
