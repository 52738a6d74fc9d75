"""A leaf and its proof as files that anybody can check anywhere."""

from __future__ import annotations

from pathlib import Path

from infra.audit.loading import AuditFailedError, Loaded
from infra.audit.mirror import write_file
from protocols.errors import NotFoundError
from protocols.tlog.proof_file import ProofFile
from protocols.tlog.proofs import make_inclusion


def make_proof(loaded: Loaded, index: int) -> bytes:
    """The proof file of one leaf under the newest checkpoint.

    Raises:
        NotFoundError: there is no such leaf.
        AuditFailedError: the tree does not hold, so nothing can be proved from it.
    """
    tree = loaded.audit.evidence.tree
    if not 0 <= index < tree.size:
        raise NotFoundError(f"the log has leaves 0 to {tree.size - 1}, not {index}")
    if tree.faults:
        raise AuditFailedError(f"{tree.faults[0].place}: {tree.faults[0].reason}")
    hashes = make_inclusion(tree.subtrees, index, tree.size)
    return ProofFile(index=index, hashes=hashes, checkpoint=loaded.files.checkpoint).to_bytes()


def write_proof(loaded: Loaded, index: int, target: Path) -> Path:
    """Write proof and leaf; the leaf's file.

    Raises:
        NotFoundError, AuditFailedError: see ``make_proof``.
    """
    write_file(target, make_proof(loaded, index))
    leaf = target.with_name(f"{target.stem}.leaf.json")
    write_file(leaf, bytes(loaded.files.entries[index]))
    return leaf
