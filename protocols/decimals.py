"""Whole numbers that others wrote as text.

``str.isdigit`` is also true of ``²``, which ``int`` refuses, and ``int`` refuses more than 4,300
digits as well; both with a ``ValueError`` where nobody expects one.
"""

from __future__ import annotations


def read_decimal(text: str, *, most: int) -> int | None:
    """The number from 0 to ``most`` that a text writes; None: it writes none.

    ASCII digits alone, without sign, space or leading zeros: one text for each number.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if number <= most and str(number) == text else None


def split_address(text: str) -> tuple[str, int] | None:
    """Host and port (0 to 65535) of ``HOST:PORT``; None: it is not written so."""
    host, _, port = text.rpartition(":")
    number = read_decimal(port, most=65_535)
    return (host, number) if host and number is not None else None
