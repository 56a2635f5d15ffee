# `make` alone prints what there is. Everything happens in .venv, which is made on first use.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_EMBEDDED := $(VENV)/.installed-embedded
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

##@ Use

.PHONY: help
help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: quickstart
quickstart: $(INSTALLED) ## Install, then align an embedded model: a few minutes on two CPU cores
	$(VENV)/bin/diffalign align quickstart $(ARGS)

.PHONY: label-demo
label-demo: $(INSTALLED) ## Install, then serve a study to try the labelling app, with two accounts
	@$(PY) -m apps.label.demo $(ARGS)

.PHONY: install
install: $(INSTALLED) ## Make .venv and install everything into it

# The stamp is written last, so an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
		echo "No program '$(PYTHON)' here. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "diffalign needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." >&2; \
		echo "Name a newer one: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "Installing into $(VENV): a few minutes and about 7 GB, once."
	@"$(PYTHON)" -m venv $(VENV) || { \
		echo "'$(PYTHON)' cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(INSTALLED_EMBEDDED): $(INSTALLED)
	$(PIP_INSTALL) -e '.[dev,embedded]'
	@touch $@

##@ Develop

.PHONY: test
test: $(INSTALLED) ## Run the tests (choose some: make test ARGS='-k credit')
	@$(PY) -m pytest $(ARGS)

.PHONY: test-slow
test-slow: $(INSTALLED) ## Run the tests that take long
	@$(PY) -m pytest -m "slow and not gpu" $(ARGS)

.PHONY: test-gpu
test-gpu: $(INSTALLED) ## Run the tests that need an accelerator
	@$(PY) -m pytest -m gpu $(ARGS)

# One after the other, also under -j: what fails fastest comes first, and the last lines are the tests'.
.PHONY: check
check: $(INSTALLED) ## Check everything: format, lint, types, floors, docs, tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(PY) -m pytest tests/test_floors.py tests/test_docs_fresh.py
	@$(MAKE) --no-print-directory site
	@$(MAKE) --no-print-directory test

.PHONY: lint
lint: $(INSTALLED) ## Check format and lint
	@$(PY) -m ruff format --check . && $(PY) -m ruff check .

.PHONY: types
types: $(INSTALLED) ## Check types
	@$(PY) -m mypy

.PHONY: format
format: $(INSTALLED) ## Format the code and mend what lint can mend
	@$(PY) -m ruff check --fix-only . && $(PY) -m ruff format .

.PHONY: docs
docs: $(INSTALLED) ## Write docs/cli.md and docs/configuration.md, and build the documentation into site/
	@$(PY) docs/make_cli.py
	@$(PY) docs/make_configuration.py
	@$(MAKE) --no-print-directory site

.PHONY: site
site: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

.PHONY: bench
bench: $(INSTALLED) ## Repeat the comparisons with TRL's DDPO, AlignProp and GRPO
	$(PY) -m benchmarks.trl_ddpo $(ARGS)
	$(PY) -m benchmarks.trl_alignprop $(ARGS)
	$(PY) -m benchmarks.trl_grpo $(GRPO_ARGS)

.PHONY: bench-level
bench-level: $(INSTALLED) ## Repeat the race with TRL to an accuracy: about half an hour
	$(PY) -m benchmarks.trl_level $(ARGS)

.PHONY: bench-methods
bench-methods: $(INSTALLED) ## Compare the methods on one task and budget: about three quarters of an hour
	$(PY) -m benchmarks.methods $(ARGS)

.PHONY: bench-clinician
bench-clinician: $(INSTALLED) ## Follow the clinician reward with and without its lower bound: about three quarters of an hour
	$(PY) -m benchmarks.clinician $(ARGS)

.PHONY: bench-loop
bench-loop: $(INSTALLED) ## Close the loop from a run to labels to a better model: about a quarter of an hour
	$(PY) -m benchmarks.closed_loop $(ARGS)

.PHONY: bench-frontier
bench-frontier: $(INSTALLED) ## Gold reward against KL for DPO, PPO, GRPO and best-of-n: about a quarter of an hour
	$(PY) -m benchmarks.frontier $(ARGS)

.PHONY: bench-time
bench-time: $(INSTALLED) ## How soon each method is better, in images, denoiser calls and seconds: about two hours
	$(PY) -m benchmarks.time_to_reward $(ARGS)

.PHONY: bench-profile
bench-profile: $(INSTALLED) ## Where an iteration spends its time, and what would make it cheaper
	$(PY) -m benchmarks.profile $(ARGS)

.PHONY: bench-sizes
bench-sizes: $(INSTALLED) ## An iteration at the sizes that people use, with random weights: about half an hour
	$(PY) -m benchmarks.sizes $(ARGS)

.PHONY: bench-grpo
bench-grpo: $(INSTALLED) ## Repeat the comparison with TRL's GRPO
	$(PY) -m benchmarks.trl_grpo $(ARGS)

##@ Rebuild

# What the trainings are given beside their defaults, and where they write; `make embedded-try` gives other values.
BUILD := build
TRY := build/embedded-try
AUTOENCODER_ARGS :=
DENOISER_ARGS :=
TABLE_ARGS :=
CLIP_ARGS := --steps 1000
CHECKER_ARGS :=
FINDINGS_LM_ARGS :=

EMBEDDED := embedded-data embedded-emoji embedded-brain-mr embedded-table embedded-clip embedded-checker embedded-findings-lm

.PHONY: embedded
embedded: $(EMBEDDED) ## Train the embedded models anew into build/ (hours)

.PHONY: embedded-try
embedded-try: ## The same with a few steps each, into build/embedded-try: whether every script runs (minutes)
	rm -rf $(TRY)
	$(MAKE) --no-print-directory embedded BUILD=$(TRY) \
		AUTOENCODER_ARGS="--minutes 0.1 --scenes 300" \
		DENOISER_ARGS="--reading 20 --steps 20 --scenes 300" \
		TABLE_ARGS="--steps 4 --regression 4 --scenes 300" \
		CLIP_ARGS="--steps 3 --emoji 300 --brain-mr 300" \
		CHECKER_ARGS="--scenes 256 --epochs 2" \
		FINDINGS_LM_ARGS="--steps 20 --texts 1000"

.PHONY: embedded-data
embedded-data: $(INSTALLED_EMBEDDED)
	$(PY) -m diffalign.worlds.build_mni --out $(BUILD)/mni-icbm152/volumes.npz

# The stamp keeps a second go from training the autoencoder again: the denoiser could not continue on other latents.
AUTOENCODERS := $(BUILD)/autoencoder-emoji/.trained $(BUILD)/autoencoder-brain-mr/.trained
$(AUTOENCODERS): $(BUILD)/autoencoder-%/.trained: | $(INSTALLED)
	$(PY) -m pipelines.embedded.autoencoder $* --out $(@D) $(AUTOENCODER_ARGS)
	@touch $@

.PHONY: embedded-emoji embedded-brain-mr
embedded-emoji embedded-brain-mr: embedded-%: $(BUILD)/autoencoder-%/.trained
	$(PY) -m pipelines.embedded.denoiser $* --autoencoder $(<D) --work $(BUILD)/work --out $(BUILD)/$* $(DENOISER_ARGS)

.PHONY: embedded-table
embedded-table: embedded-brain-mr
	$(PY) -m pipelines.embedded.table_encoder --model $(BUILD)/brain-mr --work $(BUILD)/work $(TABLE_ARGS)

.PHONY: embedded-clip
embedded-clip: $(INSTALLED)
	$(PY) -m rewards.train_clip --out $(BUILD)/clip $(CLIP_ARGS)

.PHONY: embedded-checker
embedded-checker: $(INSTALLED)
	$(PY) -m rewards.train_brain_mr_checker --out $(BUILD)/brain-mr-checker $(CHECKER_ARGS)

.PHONY: embedded-findings-lm
embedded-findings-lm: $(INSTALLED)
	$(PY) -m pipelines.embedded.findings_lm --work $(BUILD)/work --out $(BUILD)/findings-lm $(FINDINGS_LM_ARGS)

# Versions come from a fresh environment. What torch itself pins for one platform, and local builds, are left out.
.PHONY: lock
lock: ## Write constraints.txt anew from the newest versions
	rm -rf build/lock
	"$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install --disable-pip-version-check -e '.[dev,embedded,memory]'
	build/lock/bin/python -m pip check
	{ echo "# Versions that are tested together, written by \`make lock\`. Used as: pip install -c constraints.txt -e ."; \
		build/lock/bin/python -m pip list --disable-pip-version-check --format=freeze --exclude-editable --exclude pip \
		| grep -Eiv '^(cuda-|nvidia-|triton=)' | sed 's/+[^+]*$$//' | LC_ALL=C sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock

.PHONY: clean
clean: ## Remove the environment, caches and built things; keep runs/
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
