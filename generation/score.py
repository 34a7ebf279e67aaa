"""--mode score: the class, p(y|x) and log p(x) of a user's own pictures, and which of them the model finds unlikely."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import image_folder
import utils
from checkpoints.load import Trained
from generation.trained_run import TrainedRun
from logger.files import replace_file
from logger.images import captioned, image_grid, save_png
from logger.run_dir import RunDir
from models import log_density
from utils import UserError, printable

LOW = 0.05  # at most so many of the training images have a log p(x) below that of an unlikely picture
TRAINING_IMAGES = 5000  # whose log p(x) are computed, at most
COLUMNS, SHOWN = 10, 50  # of the contact sheet: images in a row; least likely and most likely ones


def run(checkpoint: Trained) -> int:
    """Score ``--images`` with a checkpoint; returns 0.

    The network is that of evaluation: float32, running statistics. Bad input is a UserError before all writing.
    """
    trained, cfg = TrainedRun(checkpoint), checkpoint.cfg
    names, images = image_folder.read_pictures(Path(cfg.images), trained.shape)
    logits = trained.logits(images)
    log_p = log_density(logits)
    classes = trained.class_names if trained.classifies else ("",) * logits.shape[1]  # without labels they mean nothing
    summary = f"pictures: {len(names)}, log p(x) {log_p.min():.2f} to {log_p.max():.2f} (unnormalised, nats)"
    try:
        low = low_log_density(trained)
        summary += f"; {(log_p < low).sum()} are below {low:.2f}, as {LOW:.0%} of the training images are"
    except UserError as error:
        low = None
        summary += f"; the column unlikely is empty, because it needs the training images: {error}"

    directory = RunDir.create(cfg.logdir, cfg.mode, cfg.note)
    replace_file(directory.path / "scores.csv", table(names, classes, logits, low).encode())
    save_png(directory.path / "scores.png", contact_sheet(images, logits, classes))
    directory.write_config(cfg, utils.environment(trained.device), low_log_density=low)
    print(f"{summary}\nLook at {printable(directory.path / 'scores.csv')} and scores.png.")
    return 0


def low_log_density(run: TrainedRun) -> float:
    """The ``LOW`` quantile of the training images' log p(x): from the file, or from the images, a UserError without."""
    if run.low_log_density is not None:
        return run.low_log_density
    images = run.images
    if images.description["digest"] != run.content["data"].get("digest"):
        raise UserError(f"those of {run.cfg.dataset} are others")
    return run.log_density(images.train.images[:TRAINING_IMAGES]).quantile(LOW).item()  # they are in random order


def table(names: list[str], classes: Sequence[str], logits: Tensor, low: float | None) -> str:
    """The CSV: a line for each picture, in the order of their names; what no letter can show in them is escaped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "p(y|x)", "log p(x)", "unlikely"])
    p, y = logits.softmax(1).max(1)
    for name, k, p_y, log_p in zip(names, y.tolist(), p.tolist(), log_density(logits).tolist(), strict=True):
        unlikely = "" if low is None else "yes" if log_p < low else "no"
        sure = f"{p_y:.6f}" if classes[k] else ""
        writer.writerow([printable(name, "utf-8"), printable(classes[k], "utf-8"), sure, f"{log_p:.4f}", unlikely])
    return text.getvalue()


def contact_sheet(images: Tensor, logits: Tensor, classes: Sequence[str]) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8: images sorted by log p(x), above each its log p(x) and class.

    images: uint8 (N, C, H, W), logits: (N, K). Of more than 2 * ``SHOWN`` images, the least and the most likely.
    """
    log_p, y, strips = log_density(logits), logits.argmax(1), []
    order = log_p.argsort()
    if len(order) > 2 * SHOWN:
        order = torch.cat([order[:SHOWN], order[-SHOWN:]])
    columns = min(COLUMNS, len(order))
    for row in order.split(columns):
        blank = torch.full((columns - len(row), *images.shape[1:]), 255, dtype=torch.uint8)
        captions = [f"{log_p[i]:.1f} {classes[y[i]]}" for i in row] + [""] * len(blank)
        strips.append(captioned(image_grid(torch.cat([images[row], blank]), columns, tile=96), columns=captions))
    rows = ["least likely", *[""] * (len(strips) - 2), "most likely"] if len(strips) > 1 else ["least likely first"]
    return captioned(np.concatenate(strips), rows=rows)
