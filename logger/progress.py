"""What the terminal says before a run begins: on what it runs, what it trains, how much room it needs."""

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
    chosen = [name for name, part in parts.items() if isinstance(part, CompiledOrEager) and part.works]
    return " and ".join(chosen) or "nothing"


def announce(trainer, run: Path, ran: dict[str, Any]) -> None:
    """Print what a Trainer is about to do."""
    cfg, images = trainer.cfg, trainer.data
    parameters = sum(p.numel() for p in trainer.model.parameters())
    counts = ", ".join(f"{len(getattr(images, part))} {part}" for part in ("train", "valid", "test"))
    steps = f"{trainer.total_steps}, {trainer.steps_per_epoch} an epoch"
    if trainer.step:
        steps += f", continuing after step {trainer.step}"
    if cfg.labels_per_class:
        counts += f"; {len(trainer.batches.split)} training images have a label"
    processes = f"{ran['processes']} processes, " if ran["processes"] > 1 else ""
    lines = {
        "run": run,
        "device": f"{processes}{device_name(trainer.device)}; {ran['precision']}, compiled: {ran['compiled']}",
        "network": f"{trainer.model.name}, {parameters:,} parameters; recipe {cfg.recipe}",
        "data": f"{cfg.dataset} {'x'.join(map(str, images.shape))}: {counts}",
        "steps": steps,
        "disk": f"{room_for_checkpoints(trainer) / 1e6:,.0f} MB for checkpoints",
    }
    if len(trainer.cycle_ends) > 1 and cfg.schedule == "cosine":
        start = trainer.cycle_ends[-2]
        lines["rate"] = f"the run was made longer: from step {start} the learning rate rises to its peak again"
    for name, text in lines.items():
        print(f"{name:8} {text}", flush=True)


def room_for_checkpoints(trainer) -> int:
    """Bytes of three full checkpoints: the newest, the one before, and the next while it is written."""
    cfg = trainer.cfg
    copies = 2 + (cfg.optimizer == "adam") + bool(cfg.ema)  # the weights, their moments in the optimizer, their average
    size = copies * sum(p.nbytes for p in trainer.model.parameters())
    if trainer.sampler is not None:
        size += trainer.world.size * trainer.sampler.buffer.images.nbytes
    return 3 * size


def check_room(trainer, logdir: Path) -> None:
    """Raise UserError if the disk of ``logdir``, or of the folder in which it is to be made, is too small for a run."""
    there = next(folder for folder in (logdir, *logdir.parents) if folder.is_dir())
    needed, free = room_for_checkpoints(trainer), shutil.disk_usage(there).free
    if needed > free:
        found = f"checkpoints need {needed / 1e6:,.0f} MB and {there} has {free / 1e6:,.0f} MB free"
        raise UserError(f"{found}: free some space, or give another --logdir, or a smaller --buffer_size or --width")
