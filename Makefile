# Each target does all it needs, from a fresh clone with nothing but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[test,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/bayesnn demo

# One process for each core: every test computes on one thread.
test: $(INSTALLED)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

# mypy and import-linter don't see that the three folders are one package, so they get an installed copy.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build .lint
	$(BIN)/pip install -q -c constraints.txt --no-deps --no-build-isolation --target .lint .
	rm -rf build
	cd .lint && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p bayesnn
	cd .lint && ../$(BIN)/lint-imports --config ../pyproject.toml --cache-dir ../.import_linter_cache

clean:
	rm -rf .venv .lint build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find bayesnn inference processes tests -name __pycache__ -type d -prune -exec rm -rf {} +
