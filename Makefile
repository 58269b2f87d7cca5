# Everything a fresh machine needs: `make demo` and `make test` set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
OURS := $(VENV)/.made-by-make
INSTALLING := $(VENV)/.installing
READY := $(VENV)/.ready

.PHONY: demo test check format clean

demo: $(DEMO)
	@$(BIN)/python tools/demo.py

# Rewriting all asserts takes longer than many tests: what Python compiles is kept, whatever the shell says of it.
test: export PYTHONDONTWRITEBYTECODE :=
test: export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/bytecode
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One that an interrupted make left half made is made anew, and one that something else made is left alone.
define NEW_VENV
{ if test -e $(VENV) || test -L $(VENV); then \
    if ! test -e $(OURS); then echo "$(VENV) has no working pip, and make did not make it: repair it or move it away"; exit 1; fi; \
    echo "$(VENV) is half made, as an interrupted make leaves it: it is made anew"; rm -rf $(VENV); \
  fi; mkdir $(VENV) && touch $(OURS) && $(PYTHON) -m venv $(VENV); }
endef

# What the package itself needs, and what tests need beyond (Triton alone is 1 GB).
$(DEMO): EXTRAS := report,test
$(READY): EXTRAS := dev
$(DEMO) $(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(NEW_VENV)
	@if test -e $(INSTALLING); then echo "The last installation was interrupted: all of it is installed again"; fi
	@again=$$(test ! -e $(INSTALLING) || echo --ignore-installed); touch $(INSTALLING); \
	$(BIN)/python tools/install.py $(EXTRAS) $$again && rm $(INSTALLING)
	@touch $@

clean:
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
