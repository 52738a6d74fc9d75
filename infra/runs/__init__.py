"""The `minga run` group: submit a plan, follow its rounds, ask why, stop it."""
