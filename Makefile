# Sets up .venv on first use and runs the project in it. `make help` lists the targets.
# Works with GNU make 3.81 (macOS) and later.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := -qq --no-input --disable-pip-version-check
PIP := $(BIN)/python -m pip $(PIP_FLAGS)
SYSTEM := $(shell uname -s)

# pip compiling every installed file takes a minute of processor time; compiling those in use takes seconds. So
# `--no-compile`, and the first import compiles and keeps them, even where the caller's environment says not to.
export PYTHONDONTWRITEBYTECODE :=

# MLX's Linux wheel links a reference BLAS, forty times slower than OpenBLAS. BLIS goes before it where it is installed:
# its products with few rows (decoding) take less time; OpenBLAS keeps LAPACK. The paths are looked up when
# a recipe starts, since `openblas` may just have installed them; there are none on macOS, and nothing is preloaded.
BLAS_PACKAGES := libopenblas0-pthread libblis4-openmp
LIBRARIES = /usr/lib/$$(uname -m)-linux-gnu
BLAS = $(shell ls $(LIBRARIES)/blis-openmp/libblis.so.4 $(LIBRARIES)/openblas-pthread/libopenblas.so.0 2>/dev/null)
OPENBLAS = $(filter %/libopenblas.so.0,$(BLAS))
BLIS = $(filter %/libblis.so.4,$(BLAS))
# Debian 12's OpenBLAS takes Intel processors newer than itself for one of 2004, five times slower: name the kernels
# that the processor's flags allow, unless the caller did.
CORETYPE = $(shell if test -n "$$OPENBLAS_CORETYPE"; then echo "$$OPENBLAS_CORETYPE"; \
	elif grep -qsw avx512f /proc/cpuinfo; then echo SKYLAKEX; elif grep -qsw avx2 /proc/cpuinfo; then echo HASWELL; fi)
SPACE := $(subst ,, )
RUN = $(if $(OPENBLAS),$(if $(CORETYPE),OPENBLAS_CORETYPE="$(CORETYPE)") \
	$(if $(BLIS),BLIS_NUM_THREADS="$${BLIS_NUM_THREADS:-$$(nproc)}") \
	LD_PRELOAD="$(subst $(SPACE),:,$(strip $(BLIS) $(OPENBLAS)))$${LD_PRELOAD:+:$$LD_PRELOAD}")

# Two test files at a time, each with one thread: the matrices of tests are too small for two.
RUN_TESTS = $(RUN) OPENBLAS_NUM_THREADS=1 BLIS_NUM_THREADS=1 OMP_NUM_THREADS=1

SOURCES := $(shell find mlx_rsgwm converters cli bench -name "*.py" -o -name "*.yaml" -o -name "*.html" -o -name py.typed)

.PHONY: demo test slow faults clients soak coverage lint format wheel-check openblas clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo openblas  ## set up everything, then data, pool, merge, evaluation and PEFT export in runs/demo
	$(RUN) $(BIN)/rsgwm demo --out runs/demo

test: $(VENV)/.test openblas  ## set up everything and run the tests
	RSGWM_ALL_PEERS=1 $(RUN_TESTS) $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# RSGWM_SHARE=20 feeds commands every twentieth of what there is to be fed.
slow: $(VENV)/.test openblas  ## run the long proofs; counts in docs/reliability.md what was fed
	RSGWM_FED=docs/fed.json $(RUN) $(BIN)/python -m pytest -m slow; tried=$$?; \
		$(BIN)/python -m tests.outside.fed; exit $$tried

# RSGWM_MOST_EVENTS=24 kills each command at so many events only, and sends signals at so many if those are fewer than 8.
faults: $(VENV)/.test openblas  ## kill every command at every event, fill its disk, race it; writes docs/reliability.md
	RSGWM_TALLY=docs/reliability.json $(RUN_TESTS) $(BIN)/python -m pytest -m slow tests/faults; tried=$$?; \
		$(BIN)/python tests/faults/tally.py; exit $$tried
	$(RUN) $(BIN)/python -m pytest -m slow tests/malformed

clients: $(VENV)/.test openblas  ## ask a server by clients that others wrote, from PyPI and npm, in environments of their own
	RSGWM_CLIENTS=1 $(RUN_TESTS) $(BIN)/python -m pytest tests/serving/test_clients.py

MINUTES ?= 30
soak: $(VENV)/.test openblas  ## mixed load on a server for MINUTES, 30 by default: no request lost, memory flat
	RSGWM_SOAK_MINUTES=$(MINUTES) $(RUN_TESTS) $(BIN)/python -m pytest -s tests/serving/test_soak.py

coverage: $(VENV)/.test openblas  ## run the tests and say which lines they reach; below 90 % fails
	RSGWM_ALL_PEERS=1 $(RUN_TESTS) $(BIN)/python -m coverage run -m pytest -m "not slow"
	$(BIN)/python -m coverage report --skip-covered

lint: $(VENV)/.test $(VENV)/.wheel  ## ruff, and mypy against an installed copy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(VENV)/copy
	$(PIP) install --no-compile --no-deps --target $(VENV)/copy dist/*.whl
	cd $(VENV)/copy && MYPYPATH=. ../bin/mypy --config-file ../../pyproject.toml -p mlx_rsgwm

format: $(VENV)/.test  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A wheel that misses a folder only shows outside the repository, with nothing else installed; so does an sdist whose
# wheel is another one than the repository's.
wheel-check: $(VENV)/.wheel openblas  ## install the wheel in a fresh environment, run it elsewhere, compare the sdist's
	rm -rf $(VENV)/fresh
	$(BIN)/python -m venv $(VENV)/fresh
	$(VENV)/fresh/bin/python -m pip $(PIP_FLAGS) install --no-compile dist/*.whl
	cd / && "$(CURDIR)/$(VENV)/fresh/bin/rsgwm" --help
	cd / && "$(CURDIR)/$(VENV)/fresh/bin/rsgwm" --version
	cd / && $(RUN) "$(CURDIR)/$(VENV)/fresh/bin/rsgwm" doctor
	$(PIP) wheel --no-deps --wheel-dir $(VENV)/fresh/from-sdist dist/*.tar.gz
	$(BIN)/python -c 'import sys, zipfile; a, b = (sorted(zipfile.ZipFile(f).namelist()) for f in sys.argv[1:]); \
		sys.exit(a != b and f"the wheel of the sdist differs: {sorted(set(a) ^ set(b))}")' \
		dist/*.whl $(VENV)/fresh/from-sdist/*.whl
	rm -rf $(VENV)/fresh

clean:  ## remove the environment, builds and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found; run make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# On Linux the newest torch brings gigabytes of GPU libraries. An exact version lets pip take the CPU build of it
# (2.13.0+cpu) where a configured index or --find-links offers one; elsewhere it takes PyPI's build of that release.
$(VENV)/.torch: | $(BIN)/python
ifeq ($(SYSTEM),Linux)
	$(PIP) install --no-compile torch==2.13.0
endif
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) install --no-compile --editable '.[torch]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) install --no-compile --editable '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.wheel: pyproject.toml README.md LICENSE $(SOURCES) | $(VENV)/.test
	rm -rf build dist
	@$(BIN)/python -m build --outdir dist . >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@touch $@

openblas:
ifeq ($(SYSTEM),Linux)
	@test -n "$(OPENBLAS)" -a -n "$(BLIS)" || { \
		sudo="env DEBIAN_FRONTEND=noninteractive"; test "$$(id -u)" = 0 || sudo="sudo -n $$sudo"; \
		command -v apt-get >/dev/null && \
		{ $$sudo apt-get install -y $(BLAS_PACKAGES) || \
			{ $$sudo apt-get update && $$sudo apt-get install -y $(BLAS_PACKAGES); }; } </dev/null >/dev/null 2>&1 || \
		test -n "$(OPENBLAS)" || \
		echo "slow matrix products ahead: OpenBLAS is missing; run: apt-get install $(BLAS_PACKAGES)"; }
endif
