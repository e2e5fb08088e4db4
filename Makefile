# Everything a checkout needs, from Python (3.11 or later) and make alone. `make help` lists the targets.

PYTHON ?= python3
# Installed first and by version, so that nothing installed after it replaces it. Another build: make test TORCH='...'
TORCH ?= torch==2.13.0
PROMPT ?= a red cube on top of a blue sphere
PYTEST_ARGS ?=
# Test processes. Two fit the memory of any machine that the tests fit.
WORKERS ?= 2

BIN := .venv/bin
CORE := .venv/.core
STAMP := .venv/.installed
CLUSTER := .venv/.cluster
# Where `make scenes` works. Each stage resumes where it was interrupted.
SCENES ?= runs/scenes
# pip compiles nothing, and Python what it imports: installing takes less than half of the time.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-input
export PROMPT

.PHONY: help demo test test-long test-api test-browser test-cluster lint types format docs scenes
.DELETE_ON_ERROR:

help:
	@echo "make demo    generate an image with the bundled model in out/   (PROMPT='...' for another one)"
	@echo "make test    the default test run, under ten minutes           (PYTEST_ARGS='tests/nn -x' for some)"
	@echo "make test-long       tests that take long: compilers, programs of their own, many images, both libraries"
	@echo "make test-browser    the page in a real browser, under five minutes"
	@echo "make test-api        the server's interface under random requests, with Schemathesis, which it installs"
	@echo "make test-cluster    tests with several processes, and with Ray, which it installs"
	@echo "make lint    ruff: rules and formatting"
	@echo "make types   mypy, strict"
	@echo "make format  let ruff rewrite what it can"
	@echo "make docs    the documentation as a site, in out/docs"
	@echo "make scenes  train the bundled model in runs/scenes (hours)"
	@echo "Each of them first builds .venv if it is missing or older than pyproject.toml."

demo: $(CORE)
	@mkdir -p out
	$(BIN)/impasto generate "$$PROMPT" --output out/demo.png --seed 7 --steps 40 --guidance-scale 3 --overwrite
	@echo "The image is $(CURDIR)/out/demo.png"

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m 'long and not (slow or gpu or browser or cluster)' --numprocesses $(WORKERS) $(PYTEST_ARGS)

# The page in a real browser: Debian's, if none is there and this user may install it.
HAS_BROWSER = (test -x "$$IMPASTO_BROWSER" || command -v chromium || command -v google-chrome) >/dev/null
test-browser: $(STAMP)
	@$(PIP) --editable '.[test-browser]'
	@$(HAS_BROWSER) || test "$$(id -u)" != 0 || \
	(apt-get -o Acquire::Retries=3 update -qq && \
	apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends chromium)
	@$(HAS_BROWSER) || \
	(echo "Install chromium, or set IMPASTO_BROWSER to the path of a browser that is built on it." >&2; exit 1)
	$(BIN)/python -m pytest -m browser tests/browser $(PYTEST_ARGS)

test-api: $(STAMP)
	@$(PIP) --editable '.[test-api]'
	$(BIN)/python scripts/check_api.py --examples 50

test-cluster: $(CLUSTER)
	$(BIN)/python -m pytest -m cluster $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP)
	$(BIN)/python -m sphinx -c docs --fail-on-warning --keep-going --quiet . out/docs
	@echo "The site is $(CURDIR)/out/docs/index.html"

TRAIN = $(BIN)/impasto train $(1) --output $(SCENES)/$(2) --resume
FROM = --set models.$(1).start_from=$(SCENES)/$(2)
# Scenes are rendered and encoded once; what is there is not made again.
ENCODE = $(BIN)/impasto cache $(1) $(SCENES)/latents-$(1) --latents-only --dtype float16
LATENTS = --set 'data.sources.0={kind: cache, path: $(SCENES)/latents-$(1)}'
CONTINUE = --set models.pipeline=$(SCENES)/$(1)/result $(call FROM,transformer,$(1)/result)
PREVIOUS = $(call CONTINUE,$(1)) $(call FROM,text_encoder,$(1)/result)

# A file of each finished stage, so that the next `make scenes` skips it.
$(SCENES)/vae/config.json: | $(STAMP)
	$(call TRAIN,scenes-autoencoder,autoencoder)
	$(BIN)/python scripts/finish_scenes_autoencoder.py $(SCENES)/autoencoder/result $(SCENES)/vae --records $(SCENES)/records

$(SCENES)/text-encoder/result/text_encoder/config.json: | $(STAMP)
	$(call TRAIN,scenes-text-encoder,text-encoder)

$(SCENES)/128/result/model_index.json: $(SCENES)/vae/config.json $(SCENES)/text-encoder/result/text_encoder/config.json
	$(call ENCODE,scenes-128) $(call FROM,vae,vae)
	$(call TRAIN,scenes-128,128) $(call FROM,vae,vae) $(call FROM,text_encoder,text-encoder/result) $(call LATENTS,scenes-128)

$(SCENES)/256/result/model_index.json: $(SCENES)/128/result/model_index.json
	$(call ENCODE,scenes-256) $(call PREVIOUS,128)
	$(call TRAIN,scenes-256,256) $(call PREVIOUS,128) $(call LATENTS,scenes-256)

$(SCENES)/multiaspect/result/model_index.json: $(SCENES)/256/result/model_index.json
	$(call ENCODE,scenes-multiaspect) $(call PREVIOUS,256)
	$(call TRAIN,scenes-multiaspect,multiaspect) $(call PREVIOUS,256) $(call LATENTS,scenes-multiaspect)

$(SCENES)/edges/result/model_index.json: $(SCENES)/multiaspect/result/model_index.json
	$(call ENCODE,scenes-edges) $(call CONTINUE,multiaspect)
	$(call TRAIN,scenes-edges,edges) $(call CONTINUE,multiaspect) $(call LATENTS,scenes-edges)

$(SCENES)/details/result/model_index.json: $(SCENES)/edges/result/model_index.json
	$(call ENCODE,scenes-details) $(call CONTINUE,edges)
	$(call TRAIN,scenes-details,details) $(call CONTINUE,edges) $(call LATENTS,scenes-details)

$(SCENES)/finish/result/model_index.json: $(SCENES)/details/result/model_index.json
	$(call TRAIN,scenes-finish,finish) $(call CONTINUE,details) $(call LATENTS,scenes-details)

$(SCENES)/lcm/result: $(SCENES)/finish/result/model_index.json
	$(call ENCODE,scenes-lcm) --set models.pipeline=$(SCENES)/finish/result
	$(call TRAIN,scenes-lcm,lcm) --set models.pipeline=$(SCENES)/finish/result $(call LATENTS,scenes-lcm)

scenes: $(SCENES)/lcm/result
	@echo "The model is $(CURDIR)/$(SCENES)/finish/result"

# Stamps are written last: a set-up that was interrupted is taken up again.
$(STAMP): $(CORE)
	@echo "Adding to .venv what tests, training and checks need."
	@$(PIP) --editable '.[test]'
	@touch $@

$(CLUSTER): $(STAMP)
	@echo "Adding to .venv what tests of clusters need."
	@$(PIP) --editable '.[test-cluster]'
	@touch $@

$(CORE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Impasto needs Python 3.11 or later; \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	@echo "Setting up .venv: PyTorch and what Impasto needs. The first time, this takes some minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(PIP) --editable .
	@touch $@
