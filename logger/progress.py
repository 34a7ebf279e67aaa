"""What the terminal says before a run begins: on what it runs, what it trains, how much room it needs."""

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acceleration import CompiledOrEager
from sgld import Sampler
from utils import UserError, device_name


def compiled(forward: Callable, sampler: Sampler | None) -> str:
    """What of a step runs compiled, in words."""
    parts = {"network": forward, "chains": sampler.engine.step if sampler else None}
    return " and ".join(k for k, part in parts.items() if isinstance(part, CompiledOrEager) and part.works) or "nothing"


def announce(trainer, run: Path, ran: dict[str, Any], before: dict[str, Any]) -> None:
    """Print what a Trainer is about to do, and how; ``before`` is as ``ran``, of the run's part before a resume."""
    cfg, images = trainer.cfg, trainer.data
    parameters = sum(p.numel() for p in trainer.model.parameters())
    counts = ", ".join(f"{len(getattr(images, part))} {part}" for part in ("train", "valid", "test"))
    after = f", continuing after step {trainer.step}" if trainer.step else ""
    if cfg.labels_per_class:
        counts += f"; {len(trainer.batches.split)} training images have a label"
    processes = f"{ran['processes']} processes, " if ran["processes"] > 1 else ""
    lines = {
        "run": run,
        "device": f"{processes}{device_name(trainer.device)}; {ran['precision']}, compiled: {ran['compiled']}",
        "network": f"{trainer.model.name}, {parameters:,} parameters; recipe {cfg.recipe}",
        "data": f"{cfg.dataset} {'x'.join(map(str, images.shape))}: {counts}",
        "steps": f"{trainer.total_steps}, {trainer.steps_per_epoch} an epoch{after}",
        "memory": f"{room(trainer)['memory'] / 1e6:,.0f} MB for weights, replay buffer and earlier states of them",
        "disk": f"{room(trainer)['disk'] / 1e6:,.0f} MB for checkpoints",
    }
    if before.get("precision", ran["precision"]) != ran["precision"]:
        lines["note"] = f"the run computed in {before['precision']} before: it goes on with other rounding errors"
    if trainer.device.type == "cpu" and parameters > 1e7:
        lines["speed"] = "a step of so large a network can take minutes on a CPU; README.md names runs for CPUs"
    if cfg.warmup_steps >= trainer.total_steps:
        lines["rate"] = f"all steps are warm-up: give --warmup_steps below {trainer.total_steps}"
    for name, text in lines.items():
        print(f"{name:8} {text}", flush=True)


def room(trainer) -> dict[str, int]:
    """Bytes that a run takes of the host's memory and of the disk.

    memory: two states to go back to, the one that is written, on a CPU the present one. disk: three full checkpoints of
    all processes: the newest, the one before, and the next while it is written; and the best weights.
    """
    cfg, n_local = trainer.cfg, int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
    model, ema = sum(p.nbytes for p in trainer.model.parameters()), bool(cfg.ema)
    weights = model * (2 + (cfg.optimizer == "adam") + ema)  # with their moments in the optimizer, and their average
    buffer = 4 * cfg.buffer_size * math.prod(trainer.data.shape) if cfg.draws_samples else 0
    best = model * (1 + ema) * (1 + bool(cfg.quality_every))  # best.pt and best_quality.pt
    in_memory = n_local * (3 + (trainer.device.type == "cpu")) * (weights + buffer // trainer.world.size)
    return {"memory": in_memory, "disk": 3 * (weights + buffer) + best}


def check_memory(trainer) -> None:
    """Raise UserError if the host has too little memory for a run, of which its replay buffer has nothing yet."""
    memory = Path("/proc/meminfo")  # of Linux
    found = re.search(r"MemAvailable: *(\d+) kB", memory.read_text()) if memory.exists() else None
    needed, free = room(trainer)["memory"], 1024 * int(found[1]) if found else math.inf
    if needed > free:
        found = f"the run needs {needed / 1e6:,.0f} MB of memory and {free / 1e6:,.0f} MB are free"
        raise UserError(f"{found}: end other programs, or give a smaller --image_size, --buffer_size or --width")


def check_room(trainer) -> None:
    """Raise UserError if the disk of ``--logdir``, or of the folder where it is to be made, is too small for a run."""
    logdir = Path(trainer.cfg.logdir)
    there = next(folder for folder in (logdir, *logdir.parents) if os.path.isdir(folder))
    needed, free = room(trainer)["disk"], shutil.disk_usage(there).free
    if needed > free:
        found = f"checkpoints need {needed / 1e6:,.0f} MB and {there} has {free / 1e6:,.0f} MB free"
        raise UserError(f"{found}: free some space, or give another --logdir, or a smaller --buffer_size or --width")
