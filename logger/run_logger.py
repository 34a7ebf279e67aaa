"""What a training run leaves behind: measurements, pictures, checkpoints, and what the terminal shows meanwhile."""

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from config import Config
from logger.files import replace_file, warn_on_error
from logger.images import image_grid, plot_curves, save_gif, save_png, to_uint8
from logger.metrics_log import Balance, Log, read_log
from logger.run_dir import RunDir

BAR = "{percentage:3.0f}% {n}/{total} [{remaining} left{postfix}]"  # a terminal of 80 columns shows what matters
BESIDE_BAR = {"images/s": "speed/images_per_second", "loss": "loss/total", "accuracy": "accuracy/train"}
BESIDE_BAR |= {"log p(real)": "log_density/real", "log p(sampled)": "log_density/sampled"}
MAX_WAITING = 4  # jobs of the writer; the end of an epoch brings as many: two checkpoints, samples, curves


class RunLogger:
    """A run's directory, log, progress bar, and the thread that writes its pictures and checkpoints.

    ``run`` is None in the processes that leave all that to the one of rank 0: there every method does nothing.
    """

    def __init__(self, run: RunDir | None, cfg: Config, step: int, total_steps: int, log_position: int):
        """Go on behind ``step`` and byte ``log_position`` of metrics.jsonl; 0 and 0 for a new run."""
        self.run, self.cfg, self.total_steps = run, cfg, total_steps
        self.clock: tuple[float, int] | None = None  # seconds and step at which the speed was last measured
        self.estimated = False  # whether it was said how long the run will take
        if run is not None:
            self.log = Log(run.path, not cfg.no_log, log_position, step)
            self.balance = Balance(read_log(self.log.path))
            self.bar = tqdm(total=total_steps, initial=step, bar_format=BAR)
            self.writer, self.jobs = ThreadPoolExecutor(max_workers=1), deque()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Wait until everything is written, unless Ctrl-C asks to stop at once."""
        if self.run is not None:
            with closing(self.run), closing(self.log), closing(self.bar):
                try:
                    if kind is None or issubclass(kind, Exception):
                        wait(self.jobs)
                    while kind is None and self.jobs:
                        self.jobs.popleft().result()
                finally:
                    self.writer.shutdown(wait=False, cancel_futures=True)

    def write(self, job: Callable, *args: Any) -> None:
        """Have the writer's thread do a job after all that it has to do; raises what an earlier job has raised.

        Jobs call no torch operation (``torch.save`` of CPU tensors is none): in a second thread it would start a second
        OpenMP team, after which the threads of both sleep between operations and a step on the CPU takes twice as long.
        """
        while self.jobs and (self.jobs[0].done() or len(self.jobs) == MAX_WAITING):  # a slow disk slows training down
            self.jobs.popleft().result()
        self.jobs.append(self.writer.submit(job, *args))

    def advance(self, step: int) -> None:
        """A step is done. The first one's time is compilation and warm-up, and does not count for the speed."""
        if self.run is not None:
            self.bar.update()
            self.clock = self.clock or (time.perf_counter(), step)

    def take_speed(self, step: int) -> float:
        """Images a second since the last call; NaN before the clock runs. Says once how long the rest will take."""
        if self.clock is None:
            return math.nan
        (since, first), self.clock = self.clock, (time.perf_counter(), step)
        speed = (step - first) * self.cfg.batch_size / (self.clock[0] - since)
        remaining = self.total_steps - step
        if not self.estimated and remaining:
            self.estimated = True
            duration = timedelta(seconds=round(remaining * self.cfg.batch_size / speed))
            self.bar.write(f"The remaining {remaining} steps will take about {duration} (hours:minutes:seconds).")
        return round(speed, 1)

    def log_values(self, step: int, values: dict[str, Any], found: dict[str, float], epoch: float) -> None:
        """Measurements into the log, numbers or how often each of K classes occurred; ``found`` is printed, too."""
        if self.run is not None:
            if found:
                printed = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                self.bar.write(f"step {step}, epoch {epoch:.4g}: {printed}")
            self.log.values(step, values | found | {"epoch": epoch})
            if shown := {name: values[key] for name, key in BESIDE_BAR.items() if key in values}:
                self.bar.set_postfix(shown, refresh=False)
            if warning := self.balance.add(step, values):
                self.bar.write(f"Warning: step {step}: {warning}.")
                self.log.event(step, "warning", warning)

    def log_recovery(self, step: int, back_to: int, change: str) -> None:
        """Training diverged at ``step`` and goes on after ``back_to``, with a change that is told in words."""
        if self.run is not None:
            message = f"diverged at step {step}; back to step {back_to} with {change}"
            self.bar.n, self.clock = back_to, (time.perf_counter(), back_to)
            self.bar.write(message)
            wait(self.jobs)  # of which one may use the writer of TensorBoard that is closed now
            self.log.recovery(step, back_to, message)
            self.balance = Balance(read_log(self.log.path))

    def save_samples(self, step: int, x: Tensor) -> None:
        """A grid of samples, float (N, C, H, W) in [-1, 1]."""
        if self.run is not None:
            path = self.run.path / "samples" / f"sampled_image_{step:08d}.png"
            self.write(self._picture, step, "samples", save_png, path, image_grid(to_uint8(x)))

    def save_gif(self, step: int, frames: Tensor, every: int) -> None:
        """A long chain, float (T, N, C, H, W) in [-1, 1], with ``every`` SGLD steps between its frames."""
        if self.run is not None:
            path = self.run.path / "sgld" / f"SGLD_process_demo_{step:08d}.gif"
            pictures = [image_grid(images, columns=4) for images in to_uint8(frames)]
            captions = [f"training step {step}, SGLD step {every * i}" for i in range(len(pictures))]
            self.write(self._picture, step, "SGLD_process_demo", save_gif, path, pictures, captions)

    def _picture(self, step: int, name: str, save: Callable[..., bytes], path: Path, *content: Any) -> None:
        with warn_on_error(f"{path.name} could not be written"):
            encoded = save(path, *content)
            if path.suffix == ".gif":  # the newest stands at the top of the run
                replace_file(self.run.path / f"{name}.gif", encoded)
            self.log.image(step, name, encoded)

    def draw_curves(self) -> None:
        """The newest curves of the log, as pictures."""
        if self.run is not None:
            self.write(plot_curves, self.run.path)

    def checkpoint(self, save: Callable[[Path, str, dict], None], name: str, content: dict[str, Any]) -> None:
        """Have ``save(folder, name, content)`` write a checkpoint, after all that was logged before."""
        if self.run is not None:
            self.write(save, self.run.path / "ckpt", name, content | {"log_position": self.log.flush()})

    def end(self, step: int, status: int) -> None:
        """Say what there is to look at, or how to go on, and once more what is wrong."""
        if self.run is None:
            return
        if status:
            print(f"Stopped after step {step}; --resume {self.run.path} goes on from there.")
        else:
            board = "" if self.cfg.no_log else f", or run: tensorboard --logdir {self.run.path.parent}"
            print(f"Done after {step} steps. Look at the pictures in {self.run.path}{board}")
        if self.balance.warning:
            print(f"Warning: {self.balance.warning} (last in balance at step {self.balance.balanced_at}).")
