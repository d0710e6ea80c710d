# Everything is installed into .venv, at the versions in constraints.txt. PIP_ARGS is passed to pip unchanged.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PIP_ARGS ?=
PROFILE ?= fast
WORKERS ?= 2
LAB_ARGS ?=
REPRODUCE := SEEDS ONLY DATA ENGINE JOBS THREADS DEVICE GPUS HOURS HARDWARE SLURM DOWNLOAD UNTIL RUNS CHECKPOINTS DRY

BIN := .venv/bin
RUN := $(BIN)/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)
quoted = '$(subst ','\'',$1)'
NEEDS := pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test test-long lab bench reproduce twins lint clean clean-all

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '%-18s %s\n' "$$a" "$$b"; done

book: .venv/.has-book ## run every chapter in profile fast and render the book to book/_build/html
	$(RUN) book/build.py all --jobs $(WORKERS)

test: .venv/.has-test ## run the quick tests
	$(RUN) -m pytest -m "not long" -n $(WORKERS) --dist worksteal

test-long: .venv/.has-test .venv/.has-pipeline ## run the slower tests (chapters, rendering, training), then training again in bfloat16
	$(RUN) -m pytest -m long -n $(WORKERS) --dist loadfile --ignore=tests/browser
	$(RUN) -m pytest -m long tests/browser
	$(RUN) -m pytest -m "not long" --auto bfloat16 -n $(WORKERS) tests/training

lab: .venv/.has-book ## open the chapters in JupyterLab; options go in LAB_ARGS, as in LAB_ARGS="--port=9999"
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --notebook-dir=book --LabApp.app_settings_dir="$(CURDIR)/book/_lab" \
	  --LabApp.default_url=/lab/tree/intro.md $(LAB_ARGS)

bench: .venv/.has-test ## measure speed, pair by pair (about five minutes), and write data/benchmarks/<hardware>.json
	$(RUN) -m softshare bench

reproduce: .venv/.has-pipeline ## run all of a profile and build the book from it: PROFILE=fast, gpu, short or paper; DRY=1 lists it
	@# Only what stands on the command line of make: the environment may hold variables of these names.
	$(RUN) book/reproduce.py PROFILE=$(PROFILE) $(foreach name,$(REPRODUCE),$(if $(filter command,$(origin $(name))),$(call quoted,$(name)=$($(name)))))

twins: .venv/.has-book ## rewrite the notebooks for Colab (book/notebooks) and the README's badges
	$(RUN) book/build.py twins

lint: .venv/.has-dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove everything built; .venv and downloads stay
	rm -rf book/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find softshare tests book -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## remove .venv and downloads too
	rm -rf .venv data/cache

$(RUN):
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13: name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.has-book: $(NEEDS) | $(RUN)
	$(INSTALL) -e ".[book]"
	@# Registers this Python by its path, so that JupyterLab need not ask which kernel a page without front matter gets.
	$(RUN) -m ipykernel install --sys-prefix >/dev/null
	@touch $@

.venv/.has-test: $(NEEDS) .venv/.has-book | $(RUN)
	$(INSTALL) -e ".[book,test]"
	@touch $@

.venv/.has-pipeline: $(NEEDS) .venv/.has-book | $(RUN)
	$(INSTALL) -e ".[pipeline]"
	@touch $@

.venv/.has-dev: $(NEEDS) | $(RUN)
	$(INSTALL) -e ".[dev]"
	@touch $@
