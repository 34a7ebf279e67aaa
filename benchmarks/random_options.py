"""Train with random sets of options, to find those with which the program fails or does not resume exactly.

    python benchmarks/random_options.py --runs 100           # some minutes on one core
    python benchmarks/random_options.py --runs 100 --seed 2  # other sets

Each run takes a recipe and up to nine further options, trains on the digits for a few steps, and trains again, stopped
by SIGTERM after a random step and resumed: checkpoints, log and pictures have to be equal bit for bit. A set of options
that is refused has to leave no run directory. The script prints every fault with its options, then how many runs ended
with each exit status; its own is 1 if there was a fault.
"""

import argparse
import random
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from small_runs import assert_same_run, short_epochs, signal_at_step

import main
from config.recipes import RECIPES

STEPS = 7
FIRST = f"--gpu cpu --dataset digits --depth 10 --width 1 --batch_size 20 --buffer_size 60 --max_steps {STEPS}".split()
FIRST += "--lr 1e-3 --warmup_steps 2 --gif_every 1000 --n_valid 100 --backbone jem --p_x_batch_size 20".split()
SCHEDULE = {"decay_epochs": "1"}
AFTER = {  # what a recipe needs to be as short as the others
    "jem++": SCHEDULE,
    "m-jem": SCHEDULE,
    "sada-jem": SCHEDULE,
    "dat": SCHEDULE | {"adversarial_steps": "1", "sgld_step_max": "5"},
}
VALUES = {  # option: values to choose from, with which a run has labels and a best.pt
    "mode": "energy_train baseline_train",
    "norm": "none batch instance layer group",
    "norm_statistics": "batch running",
    "separate_energy": "True False",
    "activation": "relu silu leaky_relu",
    "stages": "3 4",
    "dropout_rate": "0.2",
    "sync_batch_norm": "True",
    "lr": "1e-3 1e-2",
    "batch_size": "16 20 33",
    "optimizer": "adam sgd momentum",
    "weight_decay": "1e-3",
    "schedule": "step cosine",
    "decay_epochs": "1 1,2",
    "sam_rho": "0.05",
    "sam_adaptive": "True",
    "grad_clip": "1",
    "ema": "0.5 0.9",
    "reinit_freq": "0 0.5 1",
    "sgld_step": "0 1 3",
    "sgld_std": "0 0.05",
    "sgld_grad_clamp": "1 off",
    "sgld_clamp": "True False",
    "sgld_normalize": "True",
    "sgld_step_max": "4 6",
    "sgld_step_auroc": "0 0.5",
    "start": "uniform gaussian class_gaussian smooth shapes patches mixed gaussian:0.5,uniform:0.5",
    "class_cond": "True",
    "buffer_size": "40 64 200",
    "p_x_weight": "0 0.3 1",
    "p_y_x_weight": "0.5",
    "p_x_y_weight": "0.3 1",
    "generative": "logistic difference",
    "adversarial_eps": "0.3",
    "adversarial_norm": "L2 Linf",
    "energy_l2": "0.1",
    "mean_energy_l2": "0.1",
    "mean_energy_form": "means real_squares",
    "p_x_batch_size": "8 16 30",
    "p_x_no_augment": "True",
    "outlier_weight": "0.5",
    "outlier_images": "smooth mixed class_gaussian shapes:0.5,patches:0.5",
    "outlier_eps": "0 1",
    "augment": "auto crop",
    "sigma": "0 0.1",
    "labels_per_class": "2 5",
    "n_valid": "50 100",
    "diverge_threshold": "0.5 1e4",
    "precision": "fp32 bf16",
    "sample_every": "2",
    "gif_every": "3",
    "ckpt_every": "2 3",
    "no_log": "True",
}


def options_of(recipe: str, chooser: random.Random) -> list[str]:
    names = chooser.sample(sorted(VALUES), chooser.randint(1, 9))
    chosen = AFTER.get(recipe, {}) | {name: chooser.choice(VALUES[name].split()) for name in names}
    return [*FIRST, "--recipe", recipe, *(word for name, value in chosen.items() for word in (f"--{name}", value))]


def call(*arguments: object) -> tuple[int, str]:
    """The exit status of one command line, and what it wrote to stderr."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as errors:
        return main.main([*map(str, arguments)]), errors.getvalue()


def check(options: list[str], stop_after: int, folder: Path) -> int:
    """The exit status of a training. Raises AssertionError or what the program raised where something is wrong."""
    whole, stopped = folder / "whole", folder / "stopped"
    status, _ = call(*options, "--logdir", whole)
    if status == 2:
        assert not any(folder.glob("whole/*")), "refused, but left a run directory"
    if status != 0:  # refused, or diverged for good
        return status
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(patch, stop_after)
        found, errors = call(*options, "--logdir", stopped)
    assert found == 143, errors
    (run,) = stopped.iterdir()
    found, errors = call("--resume", run)
    assert found == 0, errors
    assert_same_run(next(whole.iterdir()), run)
    return status


def run_all() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="sets of options (100)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice (1)")
    args = parser.parse_args()
    chooser, statuses, n_faults = random.Random(args.seed), Counter(), 0
    recipes = [name for name in RECIPES if name != "oe-jem"]  # which needs a trained network
    with tempfile.TemporaryDirectory() as folder, short_epochs():
        for i in range(args.runs):
            options, stop_after = options_of(chooser.choice(recipes), chooser), chooser.randint(1, STEPS - 1)
            try:
                statuses[check(options, stop_after, Path(folder, str(i)))] += 1
            except Exception:
                n_faults += 1
                print(f"{' '.join(options)}\n  stopped after step {stop_after}\n{traceback.format_exc()}", flush=True)
    print(f"{n_faults} faults; exit statuses: {dict(statuses)}")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(run_all())
