"""docs/promises.md: what Minga promises, the tests that show it, and the figures."""
