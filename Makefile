# make demo: train a splat model and its softmax twin on text that every Python has, and compare them.
# make test: what CI runs.
# make gpu: on a machine with a GPU, without a build or a network: kernel checks, speed, quality, in under 9 minutes.
#   Pieces, each of which goes on where it stopped: make gpu-check (2 minutes), gpu-speed (8.5), gpu-quality (8.5).
#   GPU="--minutes 5 --results FOLDER --wikitext TRAIN HELDOUT" is passed on. Without a GPU it is a dry run on the CPU.
# make speed: the table of speed on this machine, 9 minutes, and docs/speed.md made of it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# no environment is made for it: what is there has to do
THIS_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU ?=
PIECES := gpu-check gpu-speed gpu-quality

.PHONY: demo test lint bench speed gpu $(PIECES) clean

demo: $(INSTALLED)
	$(BIN)/splatflow demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/splatflow bench

speed: $(INSTALLED)
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.speed report

gpu:
	PYTHONPATH=src $(THIS_PYTHON) -m benchmarks.gpu $(GPU)

gpu-check: GPU += --minutes 2
$(PIECES):
	PYTHONPATH=src $(THIS_PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(GPU)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e '.[hf,viz,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
