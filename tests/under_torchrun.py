"""What tests/test_processes.py has torchrun start: ``steps FOLDER``, or ``dies FOLDER`` and options."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import data
import distributed
import main
import trainer
from config import Config
from evaluation import robustness
from evaluation.report import Section

COMMON = {"dataset": "digits", "gpu": "cpu", "depth": 10, "width": 1, "precision": "fp32", "batch_size": 20}
COMMON |= {"n_valid": 100, "buffer_size": 60, "sgld_step": 2, "warmup_steps": 0, "max_steps": 50, "lr": 1e-2}
BATCH_NORM = {"norm": "batch", "optimizer": "sgd", "p_x_batch_size": 10, "mean_energy_l2": 0.5, "ema": 0.9}
CONFIGS = {
    "plain": {"sigma": 0.03, "energy_l2": 0.1},
    "separate": BATCH_NORM | {"separate_energy": True, "start": "gaussian", "p_x_no_augment": True},
    "synced": BATCH_NORM | {"sync_batch_norm": True, "class_cond": True, "buffer_size": 80, "p_x_batch_size": 30},
    "running": BATCH_NORM | {"norm_statistics": "running", "outlier_weight": 1.0, "outlier_eps": 0.0},
    "sam": {"norm": "batch", "optimizer": "sgd", "sam_rho": 2.0, "sam_adaptive": True, "start": "class_gaussian"},
}
MEASURE = "--mode test --gpu cpu --eval classification,robustness,quality --attacks pgd --max_images 110 "
MEASURE = [*(MEASURE + "--n_samples 300 --n_sample_steps 2").split(), "--load_ckpt"]


def run_of(name: str, images: data.ImageData, world: distributed.World = data.ALONE) -> trainer.Trainer:
    return trainer.Trainer(Config(**(COMMON | CONFIGS[name])), images, torch.device("cpu"), world)


def tensors(run: trainer.Trainer) -> dict[str, torch.Tensor]:
    """Whatever a run's steps change."""
    parts = {"model": run.model, "ema": run.ema}
    named = {f"{part}.{k}": v for part, module in parts.items() if module for k, v in module.state_dict().items()}
    return named | {"buffer": run.sampler.buffer.images, "age": run.sampler.buffer.age}


def gradient(run: trainer.Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def statistics(run: trainer.Trainer) -> torch.Tensor:
    running = [value.flatten() for name, value in run.model.state_dict().items() if "running_" in name]
    return torch.cat([torch.zeros(1), *running])


def train(run: trainer.Trainer, n_steps: int = 3) -> dict[str, torch.Tensor]:
    """Some steps; what the first one saw, its gradient, and what all have made."""
    seen, backward = {}, run.loss_and_gradient

    def recorded(batch, update_statistics=True):
        parts = backward(batch, update_statistics)
        seen.setdefault("inputs", batch)
        seen.setdefault("gradient", gradient(run))
        seen.setdefault("statistics", statistics(run))
        return parts

    run.loss_and_gradient = recorded
    for _ in range(n_steps):
        run.step += 1
        run.training_step()
    return seen | tensors(run)


def divided_work() -> list:
    """What comes of items, what the next number of their generator is, and of what one process alone fails."""
    rng = torch.Generator().manual_seed(1)
    results = distributed.sharded_map(range(5), lambda i: (i, i + torch.rand(2, generator=rng)), "cpu", rng)
    try:
        distributed.sharded_map(range(2), lambda i: int(["1", "ten"][i]), "cpu")
    except Exception as error:
        return [results, torch.rand((), generator=rng), type(error).__name__, str(error)]


def attempts() -> list:
    """What is absent where one process alone fails between two parts of a metric, and what comes of work after it."""
    section = Section("metric", Path())

    def metric() -> None:
        if distributed.current_world().rank == 1:
            raise ValueError("a")
        section.attempt("part", lambda: None)

    section.attempt("metric", metric)
    return [section.absent, distributed.sharded_map(range(3), str, "cpu")]


def steps(options: list[str]) -> None:
    """Each process writes what its runs did to FOLDER/<rank>.pt."""
    (folder,) = options
    distributed.connect()
    images, world = data.load("digits", n_valid=COMMON["n_valid"]), distributed.current_world()
    done = {name: train(run_of(name, images, world)) for name in CONFIGS} | {
        "divided": divided_work(),
        "attempts": attempts(),
    }
    done["refused"] = main.main(["--dataset", "digits", "--gpu", "cpu", "--batch_size", "15", "--logdir", folder])
    torch.save(done, Path(folder) / f"{world.rank}.pt")
    torch.distributed.destroy_process_group()


def dies(options: list[str]) -> int:
    """A run, whose process of rank 1 is killed in step 15 unless torchrun has started it anew; then its measurement."""
    folder, *options = options
    training_step = trainer.Trainer.training_step
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def deadly(self):
        if self.step == 15 and distributed.current_world().rank == 1 and first_attempt:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self)

    trainer.Trainer.training_step = deadly
    shorten_attacks()
    status = main.main([*options, "--logdir", folder])
    (run,) = Path(folder).iterdir()
    return status or main.main([*MEASURE, str(run), "--feature_ckpt", str(run)])


def shorten_attacks(set_value: Callable = setattr) -> None:
    for name, value in {"PGD_STEPS": 3, "RESTARTS": 2}.items():
        set_value(robustness, name, value)


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    sys.exit({"steps": steps, "dies": dies}[task](rest))
