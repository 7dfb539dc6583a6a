# Everything happens in a virtual environment of its own, .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test guides accelerator lint docs dist clean

demo: .venv/demo
	$(BIN)/python benchmarks/photographs.py

# As many tests at once as there are cores.
test: .venv/dev
	$(BIN)/python -m pytest -n auto

# Those that need transformers, peft, Lightning and timm, which `test` skips.
guides: .venv/dev .venv/guides
	$(BIN)/python -m pytest -n auto -m libraries tests/test_guides.py

accelerator: .venv/dev
	SIMULATED_ACCELERATOR=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/test_accelerator.py
	rm -rf build/gpu
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -W ignore -m benchmarks.gpu --device cpu --small --out build/gpu

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

dist: .venv/dist
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --toplevel captum_idexpo dist/*.whl

# One stamp file an extra: a changed pyproject.toml installs again.
.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist demo docs/_build docs/auto_tutorials
