PYTHON ?= python3
BIN = .venv/bin
DIGITS = --dataset digits --depth 10 --width 2 --lr 1e-3 --warmup_steps 100 --batch_size 64 --buffer_size 2000 \
         --max_steps 801 --eval_every 5 --gif_every 300

.PHONY: train test eval clean

train: .venv/installed  ## a JEM on the 8x8 digits, in about three minutes on two CPU cores
	$(BIN)/python main.py --mode energy_train $(DIGITS) --note digits

test: .venv/installed  ## ruff and all tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

DATA_DIR ?= data

eval: .venv/installed  ## every part of --mode test, shortened, on the newest run of make train
	$(BIN)/python main.py --mode test --load_ckpt $$(ls -d runs/*_energy_train_digits | tail -n 1) --data_dir $(DATA_DIR) \
		--ood_datasets noise,constant,interp,shuffled,fashion_mnist --max_images 200 --refine_steps 3 --n_samples 500

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv
