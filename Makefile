# make train: set up and train the quickstart. make test: set up, lint, type-check and run every test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --disable-pip-version-check --no-compile
READY  := $(VENV)/.ready
NATIVE := $(shell find kernels -type f)

.PHONY: train test clean

train: $(READY)
	$(BIN)/python train.py fit --config configs/quickstart.yaml

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

$(READY): pyproject.toml hashes.txt torch.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps -r hashes.txt
	$(PIP) -r torch.txt
	$(PIP) --no-build-isolation --no-deps -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build .cache runs lightning_logs
