"""How a worker comes to run: as a child on this machine."""
