# `make` lists the targets. Everything runs in .venv, which the first one that needs it makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Each marks that what is named above its rule is installed.
REQUIREMENTS := $(VENV)/.requirements
PROJECT := $(VENV)/.project

.DEFAULT_GOAL := help
.PHONY: env quickstart prepare-cityscapes test test-matrix mutants wheelhouse lint format clean help FORCE

env: $(PROJECT)  ## make .venv, the reference environment (5.5 GB, 2 minutes); PYTHON=... picks its Python

quickstart: $(PROJECT)  ## train, evaluate and draw on a small made-up dataset
	$(BIN)/python tools/quickstart.py

prepare-cityscapes: $(PROJECT)  ## make the panoptic annotations of Cityscapes (see datasets/README.md)
	$(BIN)/python datasets/prepare_cityscapes.py

test: $(PROJECT)  ## run the tests
	$(BIN)/python -m pytest

test-matrix:  ## run the tests on each supported Python that is here, in .venv-3.10 to .venv-3.14
	@table=; for version in 3.10 3.11 3.12 3.13 3.14; do \
		if ! python$$version -c '' 2>/dev/null; then result='not here: skipped'; \
		elif $(MAKE) env test PYTHON=python$$version VENV=.venv-$$version; then result=passed; \
		else result=FAILED; fi; \
		table="$$table\nPython $$version  $$result"; \
	done; \
	printf "$$table\n"; \
	case "$$table" in *FAILED*) exit 1;; *passed*) ;; *) exit 1;; esac

mutants: $(PROJECT)  ## make small wrong changes, and list those that no test sees (an hour)
	$(BIN)/python tools/mutants.py

wheelhouse: $(PROJECT)  ## collect wheels for a machine with PyTorch and no network (docs/PERFORMANCE.md)
	$(BIN)/python tools/wheelhouse.py wheelhouse $(if $(FOR),--python $(FOR)) $(if $(HAVE),--have $(HAVE))

lint: $(PROJECT)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(PROJECT)  ## mend what lint complains of, where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete .venv, builds and caches; output/ and datasets/ stay
	rm -rf $(VENV) .venv-3.* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help:
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))

# An environment whose Python does not start, is not one of these or has no pip is made anew.
ifneq ($(shell $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null && echo good),good)
$(REQUIREMENTS): FORCE
endif

$(REQUIREMENTS): requirements.txt
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo >&2 \
		"make: Python 3.10 to 3.14 is needed, and $(PYTHON) is none of them: try make env PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
		"make: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@{ $(BIN)/python -c '$(SUPPORTED)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || \
		{ rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(pip|setuptools|wheel)==' requirements.txt)
	$(BIN)/python -m pip install --quiet --no-build-isolation --requirement requirements.txt
	@touch $@

$(PROJECT): $(REQUIREMENTS) setup.py pyproject.toml tools/install_detectron2.py
	$(BIN)/python tools/install_detectron2.py
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
