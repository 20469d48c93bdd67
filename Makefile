# Needs Python ≥ 3.10, make and a network; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The packages of the environment go first where a tool starts another one, as Composer's launcher does.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore
# Otherwise pyright asks PyPI at every run whether there is a newer version.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# The tests have two processes, and tensors so small that threads would only wait for one another.
test: export OMP_NUM_THREADS = 1

.PHONY: quickstart figures test check clean

quickstart: $(VENV)/ready
	llmfoundry-wesar data data/stdlib --source stdlib --vocab-size 4096 --sequence-length 256 --val-fraction 0.03
	llmfoundry train yamls/quickstart.yaml variables.method=small_init
	llmfoundry train yamls/quickstart.yaml variables.method=wesar
	llmfoundry-wesar plot runs/quickstart-small_init runs/quickstart-wesar --table --out runs/quickstart.png

# The pictures of README and docs, and results/verdicts.md, from the committed runs.
figures: $(VENV)/ready
	python -m results report
	llmfoundry-wesar plot results/quickstart.csv --out results/quickstart.png

test: $(VENV)/ready $(VENV)/transformers5
	pytest -n 2

# What CI runs.
check: $(VENV)/ready
	ruff check .
	ruff format --check .
	pyright
	$(MAKE) test

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The export tests load what they export with a current transformers, which foundry keeps out of the environment.
$(VENV)/transformers5: tests/requirements-transformers5.txt | $(VENV)/ready
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ --requirement $<
	touch $@

clean:
	rm -rf $(VENV) build data/stdlib runs *.egg-info
