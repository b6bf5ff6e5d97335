# make train: set up and train the quickstart. make test: set up, lint, type-check and run every test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --disable-pip-version-check --no-compile
NATIVE := $(shell find kernels third_party -type f)

# The tests start Python dozens of times. Without bytecode each start compiles torch and lightning anew, which takes 10 s:
# packages are installed without it, so it must be written where they are imported, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

# CUDA kernels: AUTO, where a GPU is seen and for its architecture; ON, for all architectures; OFF, none.
MOE_CUDA ?= AUTO
export MOE_CUDA
PACKAGES := $(VENV)/.packages
DEVELOP  := $(VENV)/.packages-dev
READY    := $(VENV)/.ready-$(MOE_CUDA)

.PHONY: train test clean

train: $(READY)
	$(BIN)/python train.py fit --config configs/quickstart.yaml

test: $(READY) $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

$(PACKAGES): hashes.txt torch.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps -r hashes.txt
	$(PIP) -r torch.txt
	touch $@

$(DEVELOP): $(PACKAGES) hashes-dev.txt
	$(PIP) --require-hashes --no-deps -r hashes-dev.txt
	touch $@

$(READY): $(PACKAGES) pyproject.toml $(NATIVE)
	$(BIN)/python kernels/build_progress.py $(PIP) -v --no-build-isolation --no-deps -e .
	rm -f $(VENV)/.ready-*
	touch $@

clean:
	rm -rf $(VENV) build .cache runs lightning_logs
