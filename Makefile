# Everything a fresh machine needs: `make demo` and `make test` set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
OURS := $(VENV)/.made-by-make
INSTALLING := $(VENV)/.installing
READY := $(VENV)/.ready
# Compiled at first use, which each of the tests' workers would do for itself. What they import is compiled with them;
# all of torch, as pip does it, takes a minute.
LOOPS := import mxfp4ref.sm90.gemm.cpu_loops, mxfp4ref.sm90.gemm.fp8_loops, mxfp4ref.formats.mxfp4_loops
OTHERS := import mxfp4ref.sm90.elementwise_loops, mxfp4ref.formats.layout_loops, mxfp4ref.defects.variants.gemm_loops

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
	@echo "Installing mxfp4ref[$(EXTRAS)] into $(VENV); torch is large, this takes a minute or more ..."
	@if test -e $(INSTALLING); then echo "The last installation was interrupted: all of it is installed again"; fi
	@again=$$(test ! -e $(INSTALLING) || echo --ignore-installed); touch $(INSTALLING); \
	$(BIN)/python -m pip install $$again --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]' && rm $(INSTALLING)
	@echo "Compiling its loops for this CPU ..."
	@export PYTHONDONTWRITEBYTECODE=; $(BIN)/python -c '$(LOOPS)' & $(BIN)/python -c '$(OTHERS)'; wait
	@touch $@

clean:
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
