# `make demo` converts a real checkpoint; `make test` runs the tests. Each makes .venv if it is not there, installs
# what it needs with pip, once for each state of pyproject.toml, and runs.
#
#   PYTHON=python3.12    which Python makes .venv (3.10 to 3.13; default: the first one found)
#   VENV=.venv           where
#   TORCH='torch==2.12'  pip's arguments for installing torch (default: see the install rule)
#   ARGS='--help'        passed on to `mohawk demo` or to pytest

VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
TORCH_RANGE = torch>=2.11,<2.14

.PHONY: help demo test lint clean

help:
	@echo 'make demo   convert SmolLM2-135M into a hybrid of attention and Mamba-2 (about 15 minutes on 2 cores)'
	@echo 'make test   run the tests'
	@echo 'make lint   run ruff'
	@echo 'make clean  remove $(VENV) and build leftovers'

demo: $(VENV)/.installed-convert
	$(BIN)/python -m mohawk demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info

# The candidates are run, not only looked up: version managers leave names on the path that start nothing.
$(BIN)/python:
	@for python in $(PYTHON) $(if $(PYTHON),,python3 python3.13 python3.12 python3.11 python3.10 python); do \
	  if $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then \
	    echo "making $(VENV) with $$python ($$($$python --version))"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: $(if $(PYTHON),$(PYTHON) is not,found no) Python 3.10 to 3.13; name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# torch first. With an NVIDIA GPU, or off Linux, pip's own choice is right. On Linux without one it would bring
# gigabytes of CUDA libraries, so take a CPU build: from pip's indexes and find-links where they have one, else
# through uv, which knows where PyTorch keeps its builds (and picks one for an AMD GPU if there is one).
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@if [ -n "$(TORCH)" ]; then \
	  $(BIN)/python -m pip install $(TORCH); \
	elif [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install '$(TORCH_RANGE)'; \
	elif $(BIN)/python -m pip show --quiet torch 2>/dev/null; then \
	  :; \
	elif $(BIN)/python -m pip install --quiet 'torch==2.13.0+cpu' 2>/dev/null; then \
	  echo 'no NVIDIA GPU: installed the CPU build of torch'; \
	else \
	  echo 'no NVIDIA GPU, and pip sees no CPU build of torch: asking uv for one'; \
	  $(BIN)/python -m pip install --quiet uv && \
	  $(BIN)/python -m uv pip install --python $(BIN)/python --torch-backend auto '$(TORCH_RANGE)'; \
	fi || { \
	  echo "error: torch could not be installed. Name a build yourself: make TORCH='torch==2.13.0 --index-url URL'" >&2; \
	  exit 1; \
	}
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
