"""Golden vectors: bytes and values that every implementation must reproduce.

``python -m protocols.vectors.regenerate`` writes them, with ``--check`` it compares.
"""
