# A virtual environment is made on first use. PYTHON, VENV and MODEL_DIR can be set on the line.
PYTHON ?= python3
VENV ?= .venv
MODEL_DIR ?= runs/quickstart
RUN = $(VENV)/bin/python

.PHONY: quickstart test chaos cluster results lint bench clean

# Trains a digits classifier on two replicas; run it again and it goes on where it was.
# On two CPU devices, also where there is a GPU.
quickstart: $(VENV)/.installed
	CUDA_VISIBLE_DEVICES=-1 $(RUN) -m trainer --gin_file=runs/digits.gin --model_dir=$(MODEL_DIR) \
	  --mode=train_and_evaluate --gin.strategy.devices_per_worker=2

# Two files of tests at a time: what they wait for is mostly TensorFlow's start.
TWO = -n 2 --dist loadfile

# The fast tests, some minutes.
test: $(VENV)/.installed-dev
	$(RUN) -m pytest $(TWO) -m 'not slow and not chaos and not cluster and not results'

# Several real processes, and faults injected into them.
chaos: $(VENV)/.installed-dev
	$(RUN) -m pytest $(TWO) -m '(slow or chaos) and not cluster and not results'

# Real schedulers and simulated hosts: needs root, and what tests/cluster/install installs. Files of
# tests that run side by side have different names and networks.
cluster: $(VENV)/.installed-cluster
	$(RUN) -m pytest $(TWO) -m cluster --no-loadscope-reorder

# What the documentation states that runs come to, each trained to its end: hours. Those on MNIST are
# skipped unless PHALANX_MNIST_DIR names its directory.
results: $(VENV)/.installed-dev
	$(RUN) -m pytest -m results

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed-dev
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(RUN) $$file; done

# Leaves runs/ alone.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-cluster: setup.py pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[dev,ray]'
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-dev: setup.py pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
