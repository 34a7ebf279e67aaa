"""What a training run leaves behind: measurements, pictures, checkpoints, and what the terminal shows meanwhile."""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from config import Config
from logger.files import Writer, disk_errors, replace_file
from logger.images import image_grid, plot_curves, save_gif, save_png, to_uint8
from logger.metrics_log import Log
from logger.progress import Progress, evaluation_line, summary
from logger.run_dir import RunDir
from utils import UserError


class RunLogger:
    """A run's directory, log, progress bar, and the thread that writes its pictures and checkpoints."""

    def __new__(cls, run: RunDir | None, *_) -> "RunLogger | NoRunLogger":
        return NoRunLogger() if run is None else object.__new__(cls)

    def __init__(self, run: RunDir | None, cfg: Config, step: int, total_steps: int, log_position: int):
        """Go on behind ``step`` and byte ``log_position`` of metrics.jsonl; 0 and 0 for a new run."""
        self.run, self.tensorboard = run, not cfg.no_log
        self.log = Log(run.path, self.tensorboard, log_position, step)
        self.progress = Progress(step, total_steps, cfg.batch_size)
        # What the loop tells the terminal, and the log's lines.
        self.advance, self.start_clock = self.progress.advance, self.progress.start_clock
        self.speed, self.show, self.line = self.progress.speed, self.progress.show, self.progress.write
        self.values, self.hyperparameters = self.log.values, self.log.hyperparameters

    def __enter__(self) -> "RunLogger":
        with ExitStack() as stack:
            stack.enter_context(self.run)
            stack.enter_context(closing(self.log))
            self.writer = stack.enter_context(Writer())
            stack.enter_context(self.progress)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def samples(self, step: int, x: Tensor) -> None:
        """A grid of samples, float (N, C, H, W) in [-1, 1]."""
        self.writer.submit(write_samples, self.run.path, self.log, step, image_grid(to_uint8(x).cpu()))

    def gif(self, step: int, frames: Tensor, every: int) -> None:
        """A long chain, float (T, N, C, H, W), with ``every`` SGLD steps between its frames."""
        pictures = [image_grid(images, columns=4) for images in to_uint8(frames).cpu()]
        self.writer.submit(write_gif, self.run.path, self.log, step, pictures, every)

    def curves(self) -> None:
        self.writer.submit(plot_curves, self.run.path)

    def checkpoint(self, save: Callable[..., None], name: str, content: dict[str, Any]) -> None:
        """Have a checkpoint written by the writer's thread with ``save``, after all that was recorded before."""
        self.writer.submit(self.write_checkpoint, save, name, content | {"log_position": self.log.position()})

    def write_checkpoint(self, save: Callable[..., None], name: str, content: dict[str, Any]) -> None:
        self.log.flush()
        save(self.run.path / "ckpt", name, content, "previous.pt" if name == "last.pt" else None)

    def recovery(self, step: int, back_to: int, change: str) -> None:
        """Training diverged at ``step`` and goes on after ``back_to``, with a change that is told in words."""
        message = f"diverged at step {step}; back to step {back_to} with {change}"
        self.progress.go_back(back_to)
        self.line(message)
        self.log.recovery(step, back_to, message)

    def evaluated(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self.line(evaluation_line(step, epoch, values))

    def end(self, step: int, status: int) -> None:
        """Say what there is to look at, or how to go on."""
        if status == 0:
            summary(self.run.path, step, self.tensorboard)
        else:
            print(f"Stopped after step {step}; --resume {self.run.path} goes on from there.")


class NoRunLogger:
    """In place of a ``RunLogger`` where another process writes: whatever it is told, it does nothing."""

    def __enter__(self) -> "NoRunLogger":
        return self

    def __exit__(self, *_) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def by_product(write: Callable[..., None]) -> Callable[..., None]:
    """What cannot be written is a warning: training is worth more than its pictures."""

    @functools.wraps(write)
    def warning(*args):
        try:
            write(*args)
        except (UserError, OSError) as error:
            print(f"Warning: {error}", file=sys.stderr)

    return warning


@by_product
def write_samples(run: Path, log: Log, step: int, picture: np.ndarray) -> None:
    """A grid of samples (H, W, 3)."""
    png = save_png(run / "samples" / f"sampled_image_{step:08d}.png", picture)
    log.encoded_image(step, "samples", png, *picture.shape[:2])


@by_product
def write_gif(run: Path, log: Log, step: int, pictures: Sequence[np.ndarray], every: int) -> None:
    """A long chain, a picture (H, W, 3) each ``every`` SGLD steps; the newest is found at the top of the run."""
    captions = [f"training step {step}, SGLD step {every * i}" for i in range(len(pictures))]
    gif = save_gif(run / "sgld" / f"SGLD_process_demo_{step:08d}.gif", pictures, captions)
    with disk_errors(run):
        replace_file(run / "SGLD_process_demo.gif", gif)
    log.encoded_image(step, "SGLD_process_demo", gif, 1, 1)
