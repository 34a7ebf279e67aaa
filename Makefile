PYTHON ?= python3
BIN = .venv/bin
DATA_DIR ?= data
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: train test eval demo clean

train: .venv/train  ## a JEM on the 8x8 digits, in one to three minutes on two CPU cores
	$(BIN)/python benchmarks/reproduce.py digits

test: .venv/dev  ## ruff and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

eval: .venv/train .venv/eval  ## every part of --mode test, shortened, on the newest run of make train
	$(BIN)/python benchmarks/reproduce.py digits --test --data_dir $(DATA_DIR)

demo: .venv/train  ## ten samples of each class of CIFAR-10 in half a minute, by the network that comes with the repository
	$(BIN)/python main.py --mode sample --class_cond --load_ckpt assets/cifar10_cpu_robust_oe.safetensors --note demo

# A stamp that is older than its requirements has them installed again.
.venv/train: requirements.txt | .venv/bin/pip
	$(INSTALL) -r requirements.txt
	touch $@

.venv/eval: requirements-eval.txt | .venv/bin/pip
	$(INSTALL) -r requirements-eval.txt
	touch $@

.venv/dev: requirements.txt requirements-eval.txt requirements-dev.txt | .venv/bin/pip
	$(INSTALL) -r requirements-dev.txt
	touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is too old: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv

# With PYTHON=... given, an environment of another version is made anew.
VERSION = -c 'import sys; print(sys.version_info[:2])'
ifneq ($(origin PYTHON),file)
ifneq ($(if $(wildcard $(BIN)/python),$(shell $(BIN)/python $(VERSION))),$(shell $(PYTHON) $(VERSION)))
.PHONY: .venv/bin/pip .venv/train .venv/eval .venv/dev
endif
endif

clean:
	rm -rf .venv
