PYTHON ?= python3
BIN = .venv/bin
DATA_DIR ?= data

.PHONY: train test eval clean

train: .venv/installed  ## a JEM on the 8x8 digits, in about two minutes on two CPU cores
	$(BIN)/python benchmarks/reproduce.py digits

test: .venv/installed  ## ruff and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

eval: .venv/installed  ## every part of --mode test, shortened, on the newest run of make train
	$(BIN)/python benchmarks/reproduce.py digits --test --data_dir $(DATA_DIR)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv
