# Every target sets up what it needs in .venv first; the stamp file says that it is up to date.
# Override with e.g. `make test PYTHON=python3.12` or `make test VENV=/path/to/venv`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers; a file's tests stay together, so that what they compile is compiled once, and long files come first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
MATRIX_ARGS ?=
DEMO_OUTPUT ?= demo_output
BENCH_OUTPUT ?= benchmarks/results

.DEFAULT_GOAL := help
.PHONY: help setup browser demo test lint format test-gpu sanitize soak test-numerics test-matrix test-hosts bench clean

help:
	@echo "make demo      build engines for the shipped tiny VAE, reload them in a new process, run a photo and a pipeline"
	@echo "make test      lint, then all tests that this machine can run"
	@echo "make soak      the attacks of docs/reliability.md for longer: SOAK_SECONDS (120) each"
	@echo "make browser   find a Chromium for the tests of HTML pages, or install one"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite the layout"
	@echo "make test-gpu  only the tests that need a CUDA GPU"
	@echo "make sanitize  a small decode and encode under compute-sanitizer (memcheck, racecheck); needs a CUDA GPU"
	@echo "make test-numerics  the numeric tests with fewer vector instructions and with two threads, as on other machines"
	@echo "make test-matrix  the pipeline tests against three diffusers releases, each in an environment of its own"
	@echo "make test-hosts  other programs' own modules: DiffSynth's, and with COMFYUI=/path/to/ComfyUI that program's engine"
	@echo "make bench     benchmark a full-size VAE with random weights; writes JSON, Markdown and PNG"
	@echo "make clean     remove the virtual environment, caches and demo output"

setup: $(STAMP)

# The constraints pin torch: a range would let pip take the newest release with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/qwen-vae-accel demo --output $(DEMO_OUTPUT)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# For the tests of HTML pages. Never fails: where no browser can be had, those tests say what to install.
browser: $(STAMP)
	$(BIN)/python -m tests.browser

test: lint browser
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Races, signals and loads, each for SOAK_SECONDS; -s shows what was counted.
SOAK_SECONDS ?= 120
soak: $(STAMP)
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -s tests/test_attacks.py "tests/test_inductor.py::test_loads_of_the_same_package_take_nothing_more"

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
sanitize: $(STAMP)
	$(SANITIZE) --tool memcheck $(BIN)/python -m tests.kernels.sanitize
	$(SANITIZE) --tool racecheck $(BIN)/python -m tests.kernels.sanitize

test-numerics: $(STAMP)
	$(BIN)/python -m tests.numeric $(PYTEST_ARGS)

test-matrix: $(STAMP)
	$(BIN)/python tests/pipelines/matrix.py $(MATRIX_ARGS)

# ComfyUI is on no package index: COMFYUI names a checkout. Without their dependencies, which would bring another torch.
COMFYUI ?=
HOSTS := .venv-hosts
HOSTS_NEED := einops torchsde scipy psutil pyyaml sentencepiece aiohttp yarl av alembic SQLAlchemy 'pydantic~=2.0' 'pydantic-settings~=2.0'
test-hosts:
	test -x $(HOSTS)/bin/python || $(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[pipelines]' \
		pytest pytest-timeout hypothesis $(HOSTS_NEED)
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps diffsynth==2.1.12
	COMFYUI=$(COMFYUI) $(HOSTS)/bin/python -m pytest tests/comfyui tests/test_diffsynth.py

bench: $(STAMP)
	$(BIN)/qwen-vae-accel bench --output $(BENCH_OUTPUT)

clean:
	rm -rf $(VENV) .venv-matrix .venv-hosts $(DEMO_OUTPUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find qwen_vae_accel tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
