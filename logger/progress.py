"""What the terminal shows of a run."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acceleration import CompiledOrEager
from sgld import Sampler
from utils import device_name

BAR = "{percentage:3.0f}% {n}/{total} [{remaining} left{postfix}]"  # a terminal of 80 columns shows what matters
LONG = 48  # hours from which on a hint says what is faster
BESIDE_BAR = {
    "loss": "loss/total",
    "accuracy": "accuracy/train",
    "log p(real)": "log_density/real",
    "log p(sampled)": "log_density/sampled",
}
OUTPUTS = (
    "samples",
    "SGLD_process_demo.gif",
    "test_accuracy.png",
    "loss.png",
    "metrics.jsonl",
    "ckpt/best.pt",
    "ckpt/last.pt",
)


def bar_interval() -> float:
    """Seconds between two states of a bar: a cluster's log file wants fewer of them than a terminal."""
    return 0.1 if sys.stderr.isatty() else 10


class Progress:
    """A bar with the speed, and how long the rest will take."""

    def __init__(self, step: int, total_steps: int, batch_size: int):
        self.bar = tqdm(total=total_steps, initial=step, bar_format=BAR, mininterval=bar_interval())
        self.total_steps, self.batch_size = total_steps, batch_size
        self.clock: tuple[float, int] | None = None  # when and at which step the speed was last measured
        self.estimated = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(self) -> None:
        self.bar.update()

    def start_clock(self, step: int) -> None:
        """The first step's time is compilation and warm-up, and does not count."""
        if self.clock is None:
            self.clock = (time.perf_counter(), step)

    def speed(self, step: int) -> float:
        """Images a second since the last call; NaN before the clock runs. Says once how long the rest will take."""
        if self.clock is None:
            return math.nan
        now, (then, before) = time.perf_counter(), self.clock
        self.clock = (now, step)
        speed = (step - before) * self.batch_size / (now - then)
        if not self.estimated and step < self.total_steps:
            self.estimated = True
            self._estimate(self.total_steps - step, speed)
        return speed

    def _estimate(self, steps: int, speed: float) -> None:
        hours = steps * self.batch_size / speed / 3600
        duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        hint = "; a smaller --width, --depth, --batch_size or --max_steps is faster" if hours > LONG else ""
        self.write(f"The remaining {steps} steps will take about {duration}{hint}.")

    def show(self, speed: float, values: dict[str, float]) -> None:
        """Some of the log's numbers behind the bar, when it is drawn next."""
        shown = {name: f"{values[key]:.3g}" for name, key in BESIDE_BAR.items() if key in values}
        self.bar.set_postfix({"images/s": f"{speed:.0f}"} | shown, refresh=False)

    def go_back(self, step: int) -> None:
        self.bar.n, self.clock = step, (time.perf_counter(), step)
        self.bar.refresh()

    def write(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line)


def compiled(forward: Callable, sampler: Sampler | None) -> str:
    """What of a step runs compiled, in words."""
    parts = {"network": forward, "chains": sampler.engine.step if sampler else None}
    chosen = [name for name, part in parts.items() if isinstance(part, CompiledOrEager) and part.works]
    return " and ".join(chosen) or "nothing"


def announce(trainer, run: Path, ran: dict[str, Any]) -> None:
    """Print what a Trainer is about to do."""
    cfg, images, step = trainer.cfg, trainer.data, trainer.step
    parameters = sum(p.numel() for p in trainer.model.parameters())
    counts = ", ".join(f"{len(getattr(images, part))} {part}" for part in ("train", "valid", "test"))
    lines = {
        "run": run,
        "device": device_name(trainer.device) + (f", {ran['processes']} processes" if ran["processes"] > 1 else ""),
        "precision": f"{ran['precision']}, compiled: {ran['compiled']}",
        "recipe": cfg.recipe,
        "network": f"{trainer.model.name}, {parameters:,} parameters",
        "data": f"{cfg.dataset} {'x'.join(map(str, images.shape))}: {counts}",
        "steps": f"{trainer.total_steps}, {trainer.steps_per_epoch} an epoch",
    }
    if step:
        lines["continuing"] = f"after step {step}"
    if cfg.labels_per_class:
        lines["labels"] = f"{len(trainer.batches.split)} of {len(images.train)} training images have one"
    if len(trainer.cycle_ends) > 1 and cfg.schedule == "cosine":
        start = trainer.cycle_ends[-2]
        lines["rate"] = f"the run was made longer: from step {start} the learning rate rises to its peak again"
    if cfg.warmup_steps >= trainer.total_steps:
        lines["note"] = f"--warmup_steps {cfg.warmup_steps} lasts longer than the run"
    for name, text in lines.items():
        print(f"{name:10} {text}", flush=True)


def evaluation_line(step: int, epoch: float, values: dict[str, float]) -> str:
    """What an evaluation has found, accuracies and distances of samples."""
    parts = []
    for name, value in values.items():
        group, what = name.split("/")
        accuracy = f"{what} accuracy {100 * value:.2f} %"
        distance = f"Fréchet distance of {what.replace('_', ' ')} {value:.4g}"
        parts.append(accuracy if group == "accuracy" else distance)
    return f"step {step}, epoch {epoch:.4g}: {', '.join(parts)}"


def summary(run: Path, step: int, tensorboard: bool) -> None:
    print(f"Done after {step} steps. Look at")
    for name in OUTPUTS:
        if (run / name).exists():
            print(f"  {run / name}")
    if tensorboard:
        print(f"or run: tensorboard --logdir {run.parent}")
