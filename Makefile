# Each command does all the set-up on a fresh machine:
#   make celegans   the main job: identify neurons of C. elegans, about five minutes on two cores after installation
#   make test       the tests
#   make docs       the site, in build/docs; runs the tutorials (minutes, and again when code has changed), or
#                   make docs PYRO_GS_TUTORIAL_SIZE=quick
#   make docs-browser   the site, then every page of it in headless Chromium, wide and narrow, light and dark
# Beside them: make sorting, jigsaw, assemble (Sinkhorn networks), celegans-seeds (the guide over five seeds with 90 s each),
# celegans-table1, celegans-table2 and celegans-sweeps (hours; all go on where they were), lint, types, bench, soak
# (two hours: hostile input, memory, cold temperatures), matrix (nox: interpreters and versions of what we depend on).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CELEGANS ?=
SWEEP ?= --jobs 2
# both cores, a file of tests at a time
PYTEST ?= -n 2 --dist loadfile --durations 5

.PHONY: celegans sorting jigsaw assemble celegans-seeds celegans-table1 celegans-table2 celegans-sweeps test docs docs-browser lint types bench soak matrix clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tutorials,nwb,dev,docs]'
	touch $@

celegans: $(VENV)/.installed
	$(BIN)/python -m tutorials.celegans --out results/celegans $(CELEGANS)

sorting jigsaw assemble: $(VENV)/.installed
	$(BIN)/python -m tutorials.$@ --jobs 2 --out results/$@

celegans-seeds: $(VENV)/.installed
	$(BIN)/python -m tutorials.celegans.seeds --methods gumbel-sinkhorn --out results/celegans-seeds $(CELEGANS)

celegans-table1 celegans-table2: celegans-%: $(VENV)/.installed
	$(BIN)/python -m tutorials.celegans.sweep $* --out results/celegans-sweep $(SWEEP)
	$(BIN)/python -m tutorials.celegans.tables results/celegans-sweep

celegans-sweeps: $(VENV)/.installed
	$(BIN)/python -m tutorials.celegans.sweep protocol worms length noise unseen dropped added all objectives \
		--out results/celegans-sweep $(SWEEP)
	$(BIN)/python -m tutorials.celegans.tables results/celegans-sweep

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST)

docs: $(VENV)/.installed
	$(BIN)/sphinx-build --write-all --fail-on-warning --keep-going -c docs . build/docs

docs-browser: docs
	$(BIN)/python docs/browse.py build/docs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/sinkhorn.py --resume
	$(BIN)/python benchmarks/matching.py
	$(BIN)/python benchmarks/log_prob.py
	$(BIN)/python benchmarks/promise.py
	$(BIN)/python benchmarks/permanent.py
	$(BIN)/python benchmarks/matching_law.py
	PYTHONPATH=. $(BIN)/python benchmarks/mcmc.py
	$(BIN)/python benchmarks/matching_posterior.py
	$(BIN)/python benchmarks/informed.py
	$(BIN)/python benchmarks/guide_proposal.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/temperature_check.py
	$(BIN)/python benchmarks/sparse.py
	PYTHONPATH=. $(BIN)/python benchmarks/scale.py

# long runs: hostile inputs by the thousand, then memory, drift and cold temperatures
soak: $(VENV)/.installed
	$(BIN)/python -m pytest tests/hostile --hostile 1000 --timeout 0 -n 2 --dist worksteal
	$(BIN)/python benchmarks/soak.py --jobs 2

matrix: $(VENV)/.installed
	$(BIN)/nox

clean:
	rm -rf $(VENV) results build .pytest_cache .mypy_cache .ruff_cache
