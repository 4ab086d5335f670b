# make demo: train a sigmoid and a softmax transformer on real text, write a report.   make test: lint, types, tests.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-long lint docs clean

demo: .venv/.demo
	$(PY) -m flashsigmoid demo

test: lint
	$(PY) -m pytest

test-long: .venv/.test
	$(PY) -m pytest -m long

lint: .venv/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

docs: .venv/.docs
	$(PY) -m mkdocs build --strict

$(PY):
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f'flashsigmoid needs Python 3.11 or later, got {v[0]}.{v[1]} ({sys.executable}); set PYTHON=')"
	$(PYTHON) -m venv .venv

# a stamp per set of extras: installs once, and again only when pyproject.toml changes
.venv/.demo: pyproject.toml | $(PY)
	$(PY) -m pip install --progress-bar on -e ".[train,report]"
	@touch $@

.venv/.test: pyproject.toml | $(PY)
	$(PY) -m pip install -e ".[test]"
	@touch $@ .venv/.demo

.venv/.docs: pyproject.toml | $(PY)
	$(PY) -m pip install -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv build dist site
