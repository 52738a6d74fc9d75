"""Whose cosignatures count: witnesses that the log enrolled, of institutions that are members now.

The log brings witnesses in (``cert.issued``), the signed membership takes them out again: whoever
is suspended there, expelled or left counts no more, and neither does a name that no membership
knows, whatever the coordinator certified. An emergency notice changes nothing: two admins cannot
choose the witnesses. Each reader goes by the membership that it verified itself, never by a leaf's
word.
Normative text: protocols/spec/log.md, 14.6.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from protocols.tlog.note import VerifierKey


def counted(
    witnesses: Mapping[str, VerifierKey], active: Collection[str] | None
) -> dict[str, VerifierKey]:
    """The witnesses of nodes that count.

    Args:
        witnesses: by node, as the log enrolled them.
        active: active members by the signed list; None: no list is known, and all count.

    Returns:
        Those of active members. All, where none of them is: a list that leaves nobody to vouch for
        the log makes no log that needs no witness.
    """
    if active is None:
        return dict(witnesses)
    kept = {node: key for node, key in witnesses.items() if node in active}
    return kept or dict(witnesses)
