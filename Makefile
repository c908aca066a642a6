# Every target works on a fresh machine with Python >= 3.10 and make: the first use builds .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: demo long-memory test test-slow bench gpu gpu-check lint clean

demo: $(VENV)/ready
	$(RUN) examples/char_lm.py

long-memory: $(VENV)/ready
	$(RUN) examples/long_memory.py

test: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q
	TRITON_INTERPRET=0 $(RUN) -m pytest -n 2 -q tests/test_contract_*.py tests/test_swap.py tests/test_sequences.py tests/test_one_step.py tests/test_trace.py  # torch's path

test-slow: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q -m "slow and not gpu"

# The sweep on a CUDA device, the CPU path elsewhere; both against nn.LSTM.
bench: $(VENV)/ready
	$(RUN) -m bench.run

# On the machine's own Python, which has torch, triton, pytest and pytest-benchmark, and without a network, in under 9
# minutes: parity, the terms of the design, tiles around the plans' own, and the sweep against nn.LSTM. Each has a limit:
# a kernel that hangs must not take the others along. What is measured stays, and the same command goes on.
# PART=name: only that part, with all the time. DRY=1: every part on tiny sizes in Triton's interpreter, without a GPU.
# RESULTS=folder: instead of bench/results.
PART     := parity micro tune sweep
UNTIL     = $(if $(word 2,$(PART)),$(1),525)
MEASURE   = $(if $(DRY),--dry) $(if $(RESULTS),--results $(RESULTS)) --until $$(($(START) + $(call UNTIL,$(1))))
gpu: START := $(shell date +%s)
gpu gpu-check: export PIP_BREAK_SYSTEM_PACKAGES := 1
gpu gpu-check: INSTALL := -m pip install -q --disable-pip-version-check --no-deps -e .
gpu:
	$(PYTHON) $(INSTALL) --no-build-isolation || $(PYTHON) $(INSTALL)
	@status=0; for part in $(PART); do echo "== $$part"; case $$part in \
		parity) timeout -k 10 $(call UNTIL,210) $(PYTHON) -m pytest -q \
			$(if $(DRY),tests/test_recurrence.py,tests -m "gpu and not slow") ;; \
		micro) $(PYTHON) -m bench.lab exchange broadcast launch matrix $(call MEASURE,270) ;; \
		tune) $(PYTHON) -m bench.lab tune $(call MEASURE,340) ;; \
		sweep) $(PYTHON) -m bench.run $(if $(DRY),,--device cuda) $(call MEASURE,525) ;; \
		*) echo "no part $$part; there are parity, micro, tune and sweep"; false ;; \
	esac || status=$$?; done; exit $$status

# On a CUDA machine: every parity test on the device, real concurrency, and NVIDIA's checkers on small grid-mode runs.
# Each has a limit; a grid that hangs reports who waits for whom.
SANITIZE = timeout 100 compute-sanitizer --error-exitcode 9 --tool
SMALL    = -m pytest -q -m gpu tests/test_kernels.py -k "test_grid and 130"
gpu-check: export FUSED_LSTM_DEBUG := 1
gpu-check:
	$(PYTHON) $(INSTALL) --no-build-isolation || $(PYTHON) $(INSTALL)
	@status=0; \
	timeout -k 10 300 $(PYTHON) -m pytest tests -q -m "gpu and not slow" || status=$$?; \
	if command -v compute-sanitizer > /dev/null; then \
		$(SANITIZE) memcheck $(PYTHON) $(SMALL) || status=$$?; \
		$(SANITIZE) racecheck $(PYTHON) $(SMALL) || status=$$?; \
	else echo "compute-sanitizer is not installed: memcheck and racecheck were not run"; status=1; fi; \
	exit $$status

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,libraries,examples,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
