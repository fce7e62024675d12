# The few commands. Everything lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo text-demo install dev test lint mypy pytest clean

demo: install  ## learn to add, then add
	$(PY) -m tidal.train --recipe addition --out runs/addition
	$(PY) -m tidal.infer --checkpoint runs/addition --prompt "54663 + 132 ="

# About ten minutes on two cores; the learning rate is planned over the steps.
TEXT_STEPS ?= 1000

text-demo: install  ## learn to write as the King James Bible does
	$(PY) -m tidal.corpora kjv --out corpora/kjv
	$(PY) -m tidal.train --recipe text --data corpora/kjv/train --out runs/text-demo --max-steps $(TEXT_STEPS)
	$(PY) -m tidal.evaluate bits-per-byte --checkpoint runs/text-demo --data corpora/kjv/held-out --context 512
	$(PY) -m tidal.infer --checkpoint runs/text-demo --prompt "And it came to pass" "The king said"

install: $(VENV)/core  ## the package alone
dev: $(VENV)/dev  ## and what tests, lint and pictures need

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Tidal and PyTorch (about a minute) …"
	$(PIP) -e .
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Tidal, PyTorch and the tools for tests (about a minute) …"
	$(PIP) -e ".[dev]"
	touch $(VENV)/core $@

test: dev  ## lint, types and all tests
	$(PY) -m ruff check .
	$(MAKE) --no-print-directory -j 2 pytest mypy

lint: dev
	$(PY) -m ruff check .
	$(PY) -m mypy

mypy: dev
	$(PY) -m mypy

pytest: dev
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
