# Every target works on a fresh machine with Python >= 3.10 and make: the first use builds .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/ready
	$(RUN) examples/char_lm.py

test: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q

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
