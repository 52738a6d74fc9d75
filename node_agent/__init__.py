"""What a partner institution runs: the agent (no torch) and, apart from it, the worker."""
