# `make demo` converts a real checkpoint; `make test` runs the tests. Each makes .venv if it is not there, installs
# the versions that constraints.txt names with pip, once for each state of it and of pyproject.toml, and runs.
#
#   PYTHON=python3.12    which Python makes .venv (3.10 to 3.14; default: the first one found)
#   VENV=.venv           where
#   TORCH='torch==2.12'  pip's arguments for installing torch (default: see the install rule)
#   ARGS='--help'        passed on to `mohawk demo` or to pytest
#
# `make lowest`, `make highest` and `make newest` run the same tests with other versions: what pyproject.toml allows at
# its lowest, at its highest, and without its upper bounds. Each has an environment of its own.

VENV ?= .venv
ARGS ?=
CONSTRAINTS = constraints.txt
# Set by `make newest`: the declared packages without upper bounds
UNCAPPED =
PYTHONS = python3 python3.14 python3.13 python3.12 python3.11 python3.10 python
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip

# torch as the constraints have it, else in the range that pyproject.toml declares, or any
TORCH_TESTED = 2.13.0
TORCH_PIN = $(if $(CONSTRAINTS),$(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS)))
TORCH_RANGE = $(if $(UNCAPPED),torch,$(shell sed -n 's/^ *"\(torch>=[^"]*\)",$$/\1/p' pyproject.toml))
UPGRADE = $(if $(CONSTRAINTS),,--upgrade)
# Compiled on NVIDIA GPUs (the extra `cuda`); without one their Python and Triton is what the tests compare with
KERNELS = mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
NOT_COMPILED = MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
  CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE

.PHONY: help demo test lowest highest newest constraints docs lint clean

help:
	@echo 'make demo         convert SmolLM2-135M into a hybrid of attention and Mamba-2 (about 15 minutes on 2 cores)'
	@echo 'make test         run the tests, with the versions in constraints.txt'
	@echo 'make lowest       run them in .venv-lowest, with the lowest versions that pyproject.toml allows'
	@echo 'make highest      run them in .venv-highest, with the highest it allows'
	@echo 'make newest       run them in .venv-newest, with the newest there are, and print what moved'
	@echo 'make constraints  write constraints.txt and constraints-lowest.txt anew from pyproject.toml'
	@echo 'make docs         build docs/ into docs/_build/html'
	@echo 'make lint         check style, format and types'
	@echo 'make clean        remove $(VENV) and build leftovers'

demo: $(VENV)/.installed-convert
	$(BIN)/python -m mohawk demo $(ARGS)

# One worker a core, each with one thread, since most tests are too small for several; a file's tests stay together, as
# they share what they make first. Examples that hypothesis draws are the same each time, so that a change is judged by
# what it changes; ARGS=--hypothesis-seed=1 draws others.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile \
	  --hypothesis-seed=0 $(ARGS)

# Old packages have wheels for old Pythons.
lowest:
	@$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt \
	  PYTHONS='python3.10 python3.11 python3.12 python3 python'

highest:
	@rm -f .venv-highest/.installed-test
	@$(MAKE) test VENV=.venv-highest CONSTRAINTS=

newest:
	@rm -f .venv-newest/.installed-test
	@$(MAKE) test VENV=.venv-newest CONSTRAINTS= UNCAPPED=yes; passed=$$?; \
	echo; .venv-newest/bin/python .ci/versions.py moved constraints.txt; exit $$passed

# The generated pages are written anew first.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/pyrefly check --min-severity error --python-interpreter-path $(BIN)/python

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info

# What the tests need, resolved for every supported Python and platform at once. torch is the newest that has a CPU
# build wherever one is looked for, and brings its GPU libraries in the versions that it was built with.
constraints: | $(BIN)/python
	$(PIP) install --quiet uv packaging 'tomli; python_version < "3.11"'
	echo 'torch==$(TORCH_TESTED)' > $(VENV)/torch.txt
	$(BIN)/python -m uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
	  --constraint $(VENV)/torch.txt --extra test pyproject.toml > $(VENV)/resolved.txt
	{ echo '# The versions that are tested: `make constraints` writes this file.'; \
	  grep -vE '^(nvidia|cuda)-' $(VENV)/resolved.txt; \
	  printf '%s\n' $(KERNELS); } > constraints.txt
	{ echo '# The lower bound of every package in pyproject.toml: `make constraints` writes this file.'; \
	  $(BIN)/python .ci/versions.py lowest; } > constraints-lowest.txt

# The candidates are run, not only looked up: version managers leave names on the path that start nothing.
$(BIN)/python:
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	  if $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then \
	    echo "making $(VENV) with $$python ($$($$python --version))"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: $(if $(PYTHON),$(PYTHON) is not,found no) Python 3.10 to 3.14; name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# torch first. With an NVIDIA GPU, or off Linux, pip's own choice is right. On Linux without one it would bring
# gigabytes of CUDA libraries, so take a CPU build: from pip's indexes and find-links where they have one, else
# through uv, which knows where PyTorch keeps its builds (and picks one for an AMD GPU if there is one); where neither
# finds any, those gigabytes after all, since they run on a CPU too. Then the rest, beside the torch that is there: one
# that was asked for, and the triton it brings, stand above the constraints.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) Makefile | $(BIN)/python
	@if [ -n "$(TORCH)" ]; then \
	  $(PIP) install $(TORCH); \
	elif [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	  $(PIP) install $(UPGRADE) '$(or $(TORCH_PIN),$(TORCH_RANGE))'; \
	elif [ -n "$(TORCH_PIN)" ] && $(PIP) install --quiet '$(TORCH_PIN)+cpu' 2>/dev/null; then \
	  echo 'no NVIDIA GPU: $(TORCH_PIN), the CPU build'; \
	else \
	  echo 'no NVIDIA GPU, and pip sees no CPU build of torch: asking uv for one'; \
	  $(PIP) install --quiet uv && $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --torch-backend auto \
	    $(UPGRADE) '$(or $(TORCH_PIN),$(TORCH_RANGE))' || { \
	    echo 'uv sees none either: installing a CUDA build, several gigabytes'; \
	    $(PIP) install $(UPGRADE) '$(or $(TORCH_PIN),$(TORCH_RANGE))'; \
	  }; \
	fi || { \
	  echo "error: torch could not be installed. Name a build yourself: make TORCH='torch==$(TORCH_TESTED) --index-url URL'" >&2; \
	  exit 1; \
	}
	@{ $(if $(CONSTRAINTS),grep -vE '^(torch$(if $(TORCH),|triton))==' $(CONSTRAINTS);) \
	  $(PIP) list --format freeze | grep '^torch=='; } > $(VENV)/constraints.txt
	$(if $(UNCAPPED),$(PIP) install --quiet packaging 'tomli; python_version < "3.11"')
	$(if $(UNCAPPED),$(BIN)/python .ci/versions.py uncapped > $(VENV)/uncapped.txt)
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt $(if $(UPGRADE),--upgrade --upgrade-strategy eager) \
	  $(if $(UNCAPPED),--requirement $(VENV)/uncapped.txt,--editable '.[$*]')
	$(if $(UNCAPPED),$(PIP) install --quiet --no-deps --editable .)
	@if [ $* = test ] && [ "$$(uname -s)" = Linux ] && \
	  $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then \
	  echo 'no GPU: installing $(KERNELS) without compiled parts, to compare with'; \
	  $(NOT_COMPILED) $(PIP) install --quiet --no-cache-dir --no-deps --no-build-isolation \
	    --no-binary mamba-ssm,causal-conv1d $(if $(UNCAPPED),--upgrade mamba-ssm causal-conv1d,$(KERNELS)); \
	fi
	@touch $@
