"""``python -m tests.promises`` (``make docs``): write docs/promises.md again."""

from __future__ import annotations

import sys

from tests.promises.page import PAGE, render

PAGE.write_text(render(), "utf-8")
sys.stdout.write(f"written: {PAGE}\n")
