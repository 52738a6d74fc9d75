"""Other systems doing the same work, measured in the same run: ``python -m tests.bench.peers``."""
