"""How a worker comes to run: as a child on this machine, or in an allocation of Slurm."""
