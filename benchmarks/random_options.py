"""Train with random sets of options, to find those with which the program fails or does not resume exactly.

    python benchmarks/random_options.py --runs 100           # some minutes on one core
    python benchmarks/random_options.py --runs 100 --seed 2  # other sets

Each run takes a recipe and up to nine further options, trains on the digits for a few steps, and trains again, stopped
by SIGTERM after a random step and resumed: checkpoint, log and pictures have to be equal bit for bit. A set of options
that is refused has to leave no run directory. The script prints every fault with its options, then how many runs ended
with each exit status; its own is 1 if there was a fault.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main
import trainer
from checkpoints.files import load_checkpoint
from config.recipes import RECIPES
from logger import run_logger
from logger.metrics_log import read_log

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
VALUES = {  # option: values to choose from
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
    "p_y_x_weight": "0 0.5",
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
    "n_valid": "0 50",
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


def call(arguments: list[str], stop_after: int | None = None) -> tuple[int | None, str]:
    """The exit status of one command line, None for a traceback, and what it wrote to stderr."""
    step_of_training = trainer.Trainer.training_step

    def step(self: trainer.Trainer) -> torch.Tensor | None:
        samples = step_of_training(self)
        if self.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return samples

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as errors:
        with patch.object(trainer.Trainer, "training_step", step):
            try:
                return main.main(arguments), errors.getvalue()
            except Exception:
                return None, traceback.format_exc()


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return repr(one) == repr(two)  # nan is equal to nan


def differences(one: Path, two: Path) -> list[str]:
    """Which parts of two run directories are not the same."""
    states = [load_checkpoint(run / "ckpt" / "last.pt")["state"] for run in (one, two)]
    found = [f"{name} in last.pt" for name in states[0] if not same(states[0][name], states[1].get(name))]
    logs = [read_log(run / "metrics.jsonl") for run in (one, two)]
    logs = [[{k: v for k, v in line.items() if not k.startswith("speed/")} for line in log] for log in logs]
    found += [] if same(*logs) else ["metrics.jsonl"]
    for folder in ("samples", "sgld"):
        ours, theirs = ({file.name: file.read_bytes() for file in (run / folder).glob("*")} for run in (one, two))
        found += [] if ours == theirs else [folder]
    return found


def fault(options: list[str], stop_after: int, folder: Path) -> tuple[int | None, str]:
    """The exit status of a training, and what is wrong with it, or an empty text."""
    whole, stopped = folder / "whole", folder / "stopped"
    status, errors = call([*options, "--logdir", str(whole)])
    if status == 2:
        return status, "refused, but left a run directory" if whole.exists() and any(whole.iterdir()) else ""
    if status == 1:  # it diverged for good, and said so
        return status, ""
    if status is None:
        return status, errors
    found, errors = call([*options, "--logdir", str(stopped)], stop_after)
    if found != 143:
        return status, f"SIGTERM after step {stop_after}: exit status {found}\n{errors}"
    (run,) = stopped.iterdir()
    found, errors = call(["--resume", str(run)])
    if found != 0:
        return status, f"resumed after step {stop_after}: exit status {found}\n{errors}"
    other = differences(next(whole.iterdir()), run)
    return status, f"resumed after step {stop_after}, not the same: {', '.join(other)}" if other else ""


def run_all() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="sets of options (100)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice (1)")
    args = parser.parse_args()
    chooser, statuses, n_faults = random.Random(args.seed), Counter(), 0
    trainer.MIN_EPOCH = 1  # short epochs end with an evaluation and a checkpoint, too
    run_logger.plot_curves = lambda run: None  # two pictures at each of them take longer than all else
    with tempfile.TemporaryDirectory() as folder:
        recipes = [name for name in RECIPES if name != "oe-jem"]  # which needs a trained network
        for i in range(args.runs):
            options = options_of(chooser.choice(recipes), chooser)
            status, wrong = fault(options, chooser.randint(1, STEPS - 1), Path(folder, str(i)))
            statuses[status] += 1
            if wrong:
                n_faults += 1
                print(f"{' '.join(options)}\n  {wrong}", flush=True)
    print(f"{n_faults} faults; exit statuses: {dict(statuses)}")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(run_all())
