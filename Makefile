# Short recipes: each line can be typed by hand. Needs Python 3.11 or newer, git, make and the network.
#
#   make demo                 a federation of four sites on this machine
#   make test ARGS="-k merkle"  arguments for pytest; every target passes ARGS on
#   make faults               every fault in every phase, and docs/faults.md of it; an hour, resumable
#   make test JOBS=1          one test at a time; two by default, whole files to each

.PHONY: help venv demo test faults slurm-test bench bench-learning bench-peers bench-pieces bench-sizes bench-page load fuzz docs lint fmt proto clean
.DEFAULT_GOAL := help

# The first Python that is new enough and can make environments; or say it: make venv PYTHON=...
PYTHON = $(shell for p in python3.11 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
DIR = demo-run
ARGS =
JOBS = 2
PACKAGES = protocols policies coordinator node_agent infra

help:
	@echo "make venv | demo | test | faults | slurm-test | bench | bench-learning | bench-peers | bench-pieces | bench-sizes | bench-page | load | soak | fuzz | docs | lint | fmt | proto | clean   (ARGS=... is passed on)"

venv: .venv/installed

# Made again only when the dependencies change. pip's own settings (PIP_... variables) apply.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Minga needs Python 3.11 or newer, with its venv module" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv
	.venv/bin/minga demo --dir $(DIR) $(ARGS)

test: venv
	.venv/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Simulated federations under schedules of faults (tests/simulation/README.md); goes on where it was
# stopped. ARGS='--schedules 10000 --seed 0' by default.
.PHONY: soak
soak: venv
	.venv/bin/python -m tests.simulation.soak $(ARGS)

# A part of `make test`: a private Slurm cluster of one node; skipped without slurm-wlm, munge or root.
slurm-test: venv
	.venv/bin/python -m pytest -m slurm tests/faults/test_launcher_slurm.py $(ARGS)

# Kills at every commit point, a killed database, full disks, clocks, networks: writes docs/faults.json
# and docs/faults.md. What has run is kept in build/faults; ARGS="--again" forgets it.
faults: venv
	.venv/bin/python -m tests.matrix $(ARGS)

bench: venv
	.venv/bin/python -m tests.bench $(ARGS)

# What a whole round is made of, each piece alone, beside the round.
bench-pieces: venv
	.venv/bin/python -m tests.bench.pieces $(ARGS)

# 4 and 33 nodes, 10^6 to 10^8 parameters, with CPU seconds; the largest takes up to 61 GB of disk.
bench-sizes: venv
	.venv/bin/python -m tests.bench.sizes $(ARGS)

# Long; every finished row is kept under bench/out/learning. make bench-learning ARGS='--data DIR'
bench-learning: venv
	.venv/bin/python -m tests.bench.learning $(ARGS)

bench-peers: venv
	.venv/bin/python -m tests.bench.peers $(ARGS)

bench-page: venv
	.venv/bin/python -m tests.bench.page

# 33 nodes for 100 rounds, 1,000 nodes that ask, a member that attacks: bench/load.json.
load: venv
	.venv/bin/python -m tests.bench.load $(ARGS)

# Many times what `make test` sends to every method and parser; coverage-guided where atheris is.
fuzz: venv
	.venv/bin/python -m tests.fuzz $(ARGS)

# docs/promises.md: its words are in docs/promises.toml, its figures are those of the last runs.
docs: venv
	.venv/bin/python -m tests.promises

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(PACKAGES)
	.venv/bin/lint-imports
	.venv/bin/python protocols/proto/generate.py --check
	.venv/bin/python protocols/vectors/regenerate.py --check
	.venv/bin/minga governance check

fmt: venv
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

proto: venv
	.venv/bin/python protocols/proto/generate.py

# Leaves .venv (remove it by hand to start over) and demo-run (it may be a federation you want to keep).
clean:
	rm -rf build dist bench/out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
