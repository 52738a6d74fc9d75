"""Code that runs inside a peer's own environment; nothing of Minga is imported here."""
