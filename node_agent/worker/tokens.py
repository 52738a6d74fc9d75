"""From text to tokens: bytes, or the tokenizer of a base model's folder. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from node_agent.model_folder import FolderError

BOS: Final = 256
EOS: Final = 257
PAD: Final = 258
VOCABULARY: Final = 259

Tokens = NDArray[np.int64]


class Encoder(Protocol):
    """How a document becomes tokens. The same text always gives the same ones."""

    @property
    def name(self) -> str:
        """What it is, for fingerprints."""

    def encode(self, text: bytes) -> Tokens:
        """Tokens of a document, from its first token to its last; never empty.

        Args:
            text: UTF-8.
        """

    def scored(self, text: bytes) -> Tokens:
        """A beginning, then the tokens of the text: what evaluation predicts, without an end."""


@dataclass(frozen=True, slots=True)
class ByteEncoder:
    """A document is ``BOS bytes EOS``."""

    name: str = "bytes"

    def encode(self, text: bytes) -> Tokens:
        """See Encoder."""
        tokens = np.empty(len(text) + 2, dtype=np.int64)
        tokens[0], tokens[-1] = BOS, EOS
        tokens[1:-1] = np.frombuffer(text, dtype=np.uint8)
        return tokens

    def scored(self, text: bytes) -> Tokens:
        """See Encoder."""
        return self.encode(text)[:-1]


BYTES: Final = ByteEncoder()


class FolderEncoder:
    """The tokenizer of a model's folder, between its own first and last token."""

    def __init__(self, root: Path, *, digest: str) -> None:
        """Read the tokenizer.

        Args:
            root: the folder.
            digest: of the folder.

        Raises:
            FolderError: there is no tokenizer, or it lacks a last token.
        """
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(root), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001  the library raises whatever its parts raise
            raise FolderError(f"the tokenizer in {root} cannot be read: {error}") from None
        last, first = self._tokenizer.eos_token_id, self._tokenizer.bos_token_id
        if last is None:
            raise FolderError(f"the tokenizer in {root} has no last token (eos_token)")
        self._last: int = last
        self._first: int = last if first is None else first
        self.size = len(self._tokenizer)
        self.name = f"folder {digest}"

    def _body(self, text: bytes) -> list[int]:
        found: list[int] = self._tokenizer.encode(text.decode(), add_special_tokens=False)
        return found

    def encode(self, text: bytes) -> Tokens:
        """See Encoder."""
        return np.array([self._first, *self._body(text), self._last], dtype=np.int64)

    def scored(self, text: bytes) -> Tokens:
        """See Encoder."""
        return np.array([self._first, *self._body(text)], dtype=np.int64)
