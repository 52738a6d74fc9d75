"""The matrix of faults: every commit point and every trouble, on both databases, with its outcome.

``points`` finds in the source where something becomes durable; ``arming`` kills a process there;
``kills`` and ``troubles`` are the cases; ``python -m tests.matrix`` runs them and writes
docs/faults.json, from which docs/faults.md is made. Nothing in those two files is typed.
"""
