"""--mode score: the class, p(y|x) and log p(x) of a user's own pictures, and which of them the model finds unlikely."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import image_folder
import utils
from checkpoints.load import frozen, load_data
from config import Config
from logger.files import replace_file
from logger.images import captioned, image_grid, save_png
from logger.run_dir import RunDir
from models import JEM, log_density
from models.predict import predict
from utils import UserError, printable

LOW = 0.05  # the quantile of the training images' log p(x) below which an image counts as unlikely
TRAINING_IMAGES = 5000  # whose log p(x) are computed, at most
COLUMNS, SHOWN = 10, 50  # of the contact sheet: images in a row; least likely and most likely ones


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Write scores.csv and scores.png for ``--images``, with the checkpoint ``content`` of ``path``; returns 0.

    The network is that of evaluation: in float32, batch normalisation with its running statistics. Raises UserError
    for input that does not fit, before anything is written.
    """
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    names, images = image_folder.read_pictures(Path(cfg.images), content["data"]["shape"])
    model = frozen(cfg, path, content, device)
    logits = predict(model, images.to(device)).cpu()
    low, why_not = low_log_density(model, cfg, path, content)
    log_p = log_density(logits)
    classes = content["data"]["class_names"]
    if not Config.from_dict(content["config"], str(path)).classifies:
        classes = [""] * len(classes)  # without labels in training they mean nothing

    directory = RunDir.create(cfg.logdir, cfg.mode, cfg.note)
    replace_file(directory.path / "scores.csv", table(names, classes, logits, low).encode())
    save_png(directory.path / "scores.png", contact_sheet(images, logits, classes))
    directory.write_config(asdict(cfg), utils.environment(device), low_log_density=low)
    text = f"{len(names)} pictures, log p(x) {log_p.min():.2f} to {log_p.max():.2f} (unnormalised, nats)"
    if low is None:
        print(f"{text}; the column unlikely is empty: {why_not}")
    else:
        print(f"{text}; {(log_p < low).sum()} are below {low:.2f}, as {LOW:.0%} of the training images are")
    print(f"Look at {printable(directory.path / 'scores.csv')} and scores.png.")
    return 0


def low_log_density(model: JEM, cfg: Config, path: Path, content: dict[str, Any]) -> tuple[float | None, str]:
    """The log p(x) below which ``LOW`` of the training images lie, from the file or those images; or None and why."""
    if content.get("low_log_density") is not None:
        return content["low_log_density"], ""
    try:
        images = load_data(cfg, path, content, model.class_output.weight.device)
    except UserError as error:
        return None, f"it needs the training images ({error})"
    if images.description["digest"] != content["data"].get("digest"):
        return None, f"the images of {cfg.dataset} are not those that {path} was trained on"
    return low_quantile(model, images.train.images), ""


def low_quantile(model: JEM, images: Tensor) -> float:
    """The ``LOW`` quantile of log p(x) over training images, uint8 (N, C, H, W) in random order, as they are."""
    log_p = log_density(predict(model, images[:TRAINING_IMAGES].to(model.class_output.weight.device)))
    return log_p.quantile(LOW).item()


def table(names: list[str], classes: list[str], logits: Tensor, low: float | None) -> str:
    """The CSV: a line for each picture, in the order of their names; names with signs that cannot be shown escaped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "p(y|x)", "log p(x)", "unlikely"])
    p, y = logits.softmax(1).max(1)
    rows = zip(names, y.tolist(), p.tolist(), log_density(logits).tolist(), strict=True)
    for name, k, p_y, log_p in rows:
        unlikely = "" if low is None else "yes" if log_p < low else "no"
        of_class = [classes[k], f"{p_y:.6f}"] if classes[k] else ["", ""]
        writer.writerow([printable(name, "utf-8"), *of_class, f"{log_p:.4f}", unlikely])
    return text.getvalue()


def contact_sheet(images: Tensor, logits: Tensor, classes: list[str]) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8: images sorted by log p(x), above each its log p(x) and class.

    images: uint8 (N, C, H, W), logits: (N, K). Of more than 2 * ``SHOWN`` images, the least and the most likely.
    """
    log_p, y = log_density(logits), logits.argmax(1)
    order = log_p.argsort()
    if len(order) > 2 * SHOWN:
        order = torch.cat([order[:SHOWN], order[-SHOWN:]])
    columns = min(COLUMNS, len(order))
    captions, strips = [f"{log_p[i]:.1f} {classes[y[i]]}" for i in order], []
    for first in range(0, len(order), columns):
        row, names = images[order[first : first + columns]], captions[first : first + columns]
        blank = columns - len(row)
        row = torch.cat([row, torch.full((blank, *row.shape[1:]), 255, dtype=torch.uint8)])
        strips.append(captioned(image_grid(row, columns, tile=96), columns=names + [""] * blank))
    names = [""] * (len(strips) - 1) + ["most likely"]
    names[0] = "least likely" if len(strips) > 1 else "least likely first"
    return captioned(np.concatenate(strips), rows=names)
