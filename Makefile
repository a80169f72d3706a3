VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHONS := python3 python3.13 python3.12 python3.11
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in $(PYTHONS); do $$p $(IS_NEW_ENOUGH) && echo $$p && break; done)

.PHONY: help demo test soak fuzz check bench format site leaderboard screenshots clean
help:
	@echo "make demo     set up, pretrain and probe CropMAE on embedded images, render the report (minutes)"
	@echo "make test     set up and run all tests"
	@echo "make soak     kill runs, updates and reports at 200 random moments, and see that nothing is lost"
	@echo "make fuzz     feed 2,400 broken or hostile inputs to everything that reads, and see that each is stood"
	@echo "make check    set up and look at lint, formatting and types"
	@echo "make bench    time ours beside what you would use instead, for the report's speed page"
	@echo "make format   mend what lint and formatting can mend"
	@echo "make site     render the report from the records in results/"
	@echo "make leaderboard   do the runs of results/sweeps/cifar10.toml that are left, and render the report"
	@echo "make screenshots   render it and take its pictures for docs/ (needs Chromium)"
	@echo "make clean    remove the environment and everything rendered"

$(READY): pyproject.toml constraints.txt
	@rm -f $@
	@test -n "$(PYTHON)" && $(PYTHON) $(IS_NEW_ENOUGH) || { \
	  echo "error: mimbench needs Python 3.11 or newer: install one, or say where it is: make PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version). torch is large: the first time takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	@touch $@

# One thread: on matrices as small as the demo's, several spend their time waiting for each other.
demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/mimbench run --method cropmae --protocol linear
	$(BIN)/mimbench report

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

fuzz: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz --inputs 2400

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread by default: beside other work, two make some contenders several times slower.
bench: $(READY)
	@for script in benchmark/speed/*.py; do $(BIN)/python $$script || exit 1; done

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(READY)
	$(BIN)/mimbench report

# All that is published, from nothing but the code: what is recorded is not done again.
leaderboard: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/mimbench sweep results/sweeps/cifar10.toml
	$(BIN)/mimbench report

screenshots: $(READY)
	$(BIN)/python tests/screenshots.py

clean:
	rm -rf $(VENV) site/_build
