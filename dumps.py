"""Pictures of a run's samples as files and in TensorBoard; the writer's thread calls these."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from storage.log import Log
from storage.pictures import save_gif, save_png
from storage.writer import disk_errors, replace_file
from utils import UserError


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
def write_film(run: Path, log: Log, step: int, pictures: Sequence[np.ndarray], every: int) -> None:
    """A long chain, a picture (H, W, 3) each ``every`` SGLD steps; the newest is found at the top of the run."""
    captions = [f"training step {step}, SGLD step {every * i}" for i in range(len(pictures))]
    gif = save_gif(run / "sgld" / f"SGLD_process_demo_{step:08d}.gif", pictures, captions)
    with disk_errors(run):
        replace_file(run / "SGLD_process_demo.gif", gif)
    log.encoded_image(step, "SGLD_process_demo", gif, 1, 1)
