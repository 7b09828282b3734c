PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A version of Transformers to test with, as TRANSFORMERS=5.14.0 for the oldest that works; without it the newest.
TRANSFORMERS ?=
READY := $(VENV)/.ready$(TRANSFORMERS)

.PHONY: demo test quick soak style quality docs
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python examples/squad/demo/run_demo.py

# One thread per worker (tests/conftest.py), so two workers fill two cores.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# One test of every contract, in less than ninety seconds on two cores.
quick: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick $$(sed -n 's/::.*//p' tests/quick.txt | sort -u) $(ARGS)

# Fifty runs killed, at any moment and in the middle of what they write, and resumed; some minutes.
soak: $(READY)
	$(BIN)/python tests/helpers/soak.py $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is written last: a set-up that was interrupted is done again. A half-made environment has no working pip
# and is cleared. torch goes first and pinned, so that a CPU build, where pip is offered one, is the one taken.
$(READY): pyproject.toml Makefile
	rm -f $(VENV)/.ready*
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[docs,examples,test]" transformers$(addprefix ==,$(TRANSFORMERS))
	touch $@
