# Every target works on a fresh machine with Python >= 3.10 and make: the first use builds .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

# What runs on torch's path, too.
ON_TORCH := $(addprefix tests/test_, contract_*.py swap.py sequences.py one_step.py trace.py graphs.py transforms.py mask.py \
	distributed.py libraries.py module_info.py recurrent.py session.py quantized.py)

# With which a part of the tests runs, beside the pinned ones, and what runs with each.
NEWEST := 3.9.0
WITH_NEWEST := tests/test_kernels.py tests/test_parity.py tests/test_recurrent_kernels.py
VERSIONS := 2.11.0+3.6.0 2.13.0+3.7.1 2.14.1+$(NEWEST)
ON_TORCH_CORE := $(addprefix tests/test_, parity.py contract_*.py graphs.py transforms.py swap.py)
CORE := $(ON_TORCH_CORE) $(addprefix tests/test_, kernels.py recurrent_kernels.py compile.py)
EXPORTS := onnx onnxscript onnxruntime

.PHONY: demo long-memory search-space test test-versions test-slow bench gpu gpu-ahead lint clean

demo: $(VENV)/ready
	$(RUN) examples/char_lm.py

long-memory: $(VENV)/ready
	$(RUN) examples/long_memory.py

search-space: $(VENV)/ready
	$(RUN) examples/search_space.py

test: $(VENV)/ready $(VENV)/newest
	$(RUN) -m pytest -n 2 -q
	$(RUN) -m pytest -p tests.without_triton -n 2 -q $(ON_TORCH)
	PYTHONPATH=$(VENV)/newest $(RUN) -m pytest -n 2 -q $(WITH_NEWEST)

# torch and Triton, from the oldest to the newest, each pair in a venv of its own: gigabytes, where torch is for CUDA.
test-versions: $(VERSIONS:%=test-with-%)

test-with-%:
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install -q --disable-pip-version-check torch==$(firstword $(subst +, ,$*)) -e '.[test]' $(EXPORTS)
	build/$*/bin/python -m pip install -q --disable-pip-version-check --no-deps triton==$(lastword $(subst +, ,$*))
	build/$*/bin/python -m pytest -n 2 -q $(CORE)
	build/$*/bin/python -m pytest -p tests.without_triton -n 2 -q $(ON_TORCH_CORE)

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

$(VENV)/newest: $(VENV)/ready
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $@ triton==$(NEWEST)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fused_lstm/kernels
