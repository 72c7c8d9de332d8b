# make train [EXPERIMENT=classifier] [ARGS="--epochs=3"]    train
# make test                                                 run every check and test
#
# Both set up .venv when it is missing or out of date, and start at once when it is not.

EXPERIMENT ?= classifier
ARGS ?=
JOBS ?= 2
PYTHON ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed

.PHONY: train test lint types format constraints clean

train: $(STAMP)
	$(PY) -m experiments.$(EXPERIMENT) $(ARGS)

# Cheapest first.
test: $(STAMP) lint types
	$(PY) -m pytest -q tests/test_architecture.py
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal --durations=15 $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: $(STAMP) lint
	$(PY) -m mypy $(wildcard tfloop experiments)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The stamp is taken away first and written last. A .venv that has one was once complete, and is
# brought up to date; one that has none is what an interrupted installation left, and is made anew.
$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	if [ -e $@ ]; then \
	    echo "Bringing $(VENV) up to date."; \
	    rm $@; \
	else \
	    for python in "$(PYTHON)" python3.11 python3.12 python3.13 python3 python none; do \
	        if [ -n "$$python" ] && "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then break; fi; \
	    done; \
	    if [ "$$python" = none ]; then \
	        echo "TensorFlow 2.21 needs Python 3.11, 3.12 or 3.13 with its venv module, and none was found." >&2; \
	        echo "Install one, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    echo "Setting up $(VENV) with $$("$$python" --version), once. This takes a minute or two."; \
	    "$$python" -m venv --clear $(VENV); \
	fi; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'; \
	touch $@

# Writes down what is installed, after a deliberate upgrade.
constraints: $(STAMP)
	{ sed -n 1p constraints.txt; $(PY) -m pip freeze --exclude-editable; } > constraints.new
	mv constraints.new constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
