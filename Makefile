# Every target works on a fresh machine with Python >= 3.10 and make: the first use builds .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

# What runs on torch's path, too.
ON_TORCH := $(addprefix tests/test_, contract_*.py swap.py sequences.py one_step.py trace.py graphs.py transforms.py mask.py \
	distributed.py libraries.py module_info.py)

.PHONY: demo long-memory test test-slow bench gpu gpu-ahead lint clean

demo: $(VENV)/ready
	$(RUN) examples/char_lm.py

long-memory: $(VENV)/ready
	$(RUN) examples/long_memory.py

test: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q
	$(RUN) -m pytest -p tests.without_triton -n 2 -q $(ON_TORCH)

test-slow: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q -m "slow and not gpu"

# The sweep on a CUDA device, the CPU path elsewhere; both against nn.LSTM.
bench: $(VENV)/ready
	$(RUN) -m bench.run

# On the machine's own Python, which has torch, Triton and pytest, and without a network: all parts of bench/gpu.py, and a
# page of what they found. MINUTES=9 cuts off the end, PART="parity sweep" runs these alone, RESULTS=folder stands for
# bench/results, DRY=1 takes tiny sizes in Triton's interpreter, without a GPU.
gpu:
	$(PYTHON) -m bench.gpu $(PART) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(RESULTS),--results $(RESULTS)) \
		$(if $(DRY),--dry)

# Compiles the kernels of those parts, without a GPU: make gpu then finds them.
gpu-ahead:
	$(PYTHON) -c "from bench.gpu import link; link()"
	$(PYTHON) -m bench.ahead

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,libraries,examples,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fused_lstm/kernels
