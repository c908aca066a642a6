# Every target works on a fresh machine with Python >= 3.10 and make: the first use builds .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: demo test test-slow bench gpu lint clean

demo: $(VENV)/ready
	$(RUN) examples/char_lm.py

test: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q
	TRITON_INTERPRET=0 $(RUN) -m pytest -n 2 -q tests/test_contract_*.py tests/test_swap.py  # torch's path

test-slow: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q -m "slow and not gpu"

# The sweep on a CUDA device, the CPU path elsewhere; both against nn.LSTM.
bench: $(VENV)/ready
	$(RUN) -m bench.run

# On the machine's own Python, which has torch, triton, pytest and pytest-benchmark, and without a network: parity first,
# then the sweep in what is left of 8 minutes. Each has a limit: a kernel that hangs must not take the other along.
# DRY=1: every part on tiny shapes in Triton's interpreter, without a GPU. RESULTS=folder: instead of bench/results.
gpu: START := $(shell date +%s)
# All that is installed is a pointer to this tree, also where the system's packages are otherwise left alone.
gpu: export PIP_BREAK_SYSTEM_PACKAGES := 1
gpu: INSTALL := -m pip install -q --disable-pip-version-check --no-deps -e .
gpu:
	$(PYTHON) $(INSTALL) --no-build-isolation || $(PYTHON) $(INSTALL)
	@status=0; \
	timeout -k 10 240 $(PYTHON) -m pytest tests $(if $(DRY),--collect-only -qq,-m "gpu and not slow" -q) || status=$$?; \
	$(PYTHON) -m bench.run $(if $(DRY),--dry,--device cuda) $(if $(RESULTS),--results $(RESULTS)) \
		--until $$(($(START) + 455)) || status=$$?; \
	exit $$status

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,examples,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
