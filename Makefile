# Needs Python ≥ 3.10, make and a network. Everything else is installed in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tools that start other tools, such as Composer's launcher, must find those of this environment first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore
# Otherwise pyright asks PyPI for a newer version at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# The tests run in two processes on small tensors, where more threads would only wait for each other.
test fuzz chaos upstream: export OMP_NUM_THREADS = 1

.PHONY: quickstart figures test fuzz check chaos upstream clean

quickstart: $(VENV)/ready
	llmfoundry-wesar data data/stdlib --source stdlib --vocab-size 4096 --sequence-length 256 --val-fraction 0.03
	llmfoundry train yamls/quickstart.yaml variables.method=small_init
	llmfoundry train yamls/quickstart.yaml variables.method=wesar
	llmfoundry-wesar plot runs/quickstart-small_init runs/quickstart-wesar --table --out runs/quickstart.png

# Make results/verdicts.md and the pictures of README and docs from the committed runs.
figures: $(VENV)/ready
	python -m results report
	llmfoundry-wesar plot results/quickstart.csv --out results/quickstart.png

test: $(VENV)/ready $(VENV)/transformers5
	pytest -n 2

# The property-based tests with FUZZ times as many examples as `make test` draws, and new ones each time.
FUZZ ?= 20
fuzz: $(VENV)/ready
	FUZZ=$(FUZZ) pytest tests/fuzz tests/test_command_line.py

# What CI runs.
check: $(VENV)/ready
	ruff check .
	ruff format --check .
	pyright
	$(MAKE) test

# Kill the tools and the trainer at random moments; see docs/reliability.md.
chaos: $(VENV)/ready
	python -m tests.chaos --times 50

# Run llm-foundry's own tests with this package and without it.
upstream: $(VENV)/ready
	test -d .upstream || git clone --quiet --depth 1 --branch v0.22.0 https://github.com/mosaicml/llm-foundry .upstream
	python -m tests.upstream .upstream

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	rm -rf *.egg-info  # one of an earlier version would hide entry points
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The export tests load exported models with a current transformers, which foundry's pin keeps out of .venv.
$(VENV)/transformers5: tests/requirements-transformers5.txt | $(VENV)/ready
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ --requirement $<
	touch $@

clean:
	rm -rf $(VENV) build data/stdlib runs *.egg-info
