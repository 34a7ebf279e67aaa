"""--mode sample --counterfactual: images changed a little, so that the model sees another class in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import distributed
import utils
from checkpoints.load import frozen, load_data, origin
from config import Config
from data import Split
from generation.output import write_result
from logger.images import captioned, image_grid, save_png, to_uint8
from logger.run_dir import RunDir
from models import JEM
from models.predict import predict
from pgd import pgd
from utils import UserError

DEFAULT_EPS = 2.5  # L2 on images in [0, 1]
N_IMAGES = 10  # unless --n_samples says another number
SHOWN_IMAGES, SHOWN_CLASSES = 20, 20  # rows, and columns of all classes, in a picture


class Change(NamedTuple):
    """N changes: M images, each changed to all of the targets in turn."""

    original: Split  # each image as often as it has targets
    target: Tensor  # int64 (N,), the classes that were aimed at
    x: Tensor  # float32 (N, C, H, W) in [-1, 1], after the change
    before: Tensor  # logits float32 (N, K) of the originals
    after: Tensor  # logits float32 (N, K) of x


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Do what ``--counterfactual`` asks of a checkpoint, the ``content`` of ``path``; returns the exit status.

    The network is that of evaluation: in float32, batch normalisation with its running statistics. Raises UserError
    for input that does not fit, before anything is written.
    """
    if not Config.from_dict(content["config"], str(path)).classifies:
        raise UserError(f"{path} was trained without labels: --counterfactual needs a model that classifies")
    class_names = content["data"]["class_names"]
    targets = target_classes(cfg.counterfactual, class_names)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    model = frozen(cfg, path, content, device)
    images, kind = load_data(cfg, path, content, device).test, f"test images of {cfg.dataset}"
    if len(targets) == 1:
        images, kind = images[images.labels != targets[0]], f"{kind} of other classes than {cfg.counterfactual}"
    images = data.evenly_spaced(images, cfg.n_samples or N_IMAGES, kind).to(device)
    eps = cfg.counterfactual_eps or DEFAULT_EPS
    settings = {
        **origin(path, content),
        "precision": "float32",
        "start": "test images",
        "target": "log p(x, y)",
        "counterfactual": cfg.counterfactual,
        "counterfactual_eps": eps,
        "steps": cfg.fresh_steps,
        "batch_size": cfg.batch_size,
    }

    directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    change = changed(model, images, targets, eps, cfg.fresh_steps, cfg.batch_size)
    if distributed.current_world().rank:
        return 0
    save_png(directory.path / "counterfactual.png", change_picture(change, len(targets), class_names))
    print(summary(change, settings))
    arrays = {
        "x": change.x,
        "labels": change.target,
        "logits": change.after,
        "originals": change.original.images.permute(0, 2, 3, 1),  # uint8 (N, H, W, C)
        "original_labels": change.original.labels,
        "probabilities_start": change.before.softmax(1),  # p(y|x) before, float32 (N, K)
        "probabilities": change.after.softmax(1),
    }
    write_result(directory, "counterfactual", arrays, settings, cfg, device)
    return 0


def target_classes(asked: str, class_names: Sequence[str]) -> list[int]:
    """The classes that ``--counterfactual`` names: all, or one by its name or else its number from 0 on."""
    if asked == "all":
        return list(range(len(class_names)))
    if asked in class_names:
        return [class_names.index(asked)]
    if asked in map(str, range(len(class_names))):
        return [int(asked)]
    known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise UserError(
        f"--counterfactual takes all, the name of a class ({known}) or a number from 0 to {len(class_names) - 1}, "
        f"not {asked!r}"
    )


def changed(model: JEM, images: Split, targets: list[int], eps: float, steps: int, batch_size: int) -> Change:
    """The images moved to each of the classes ``targets``, image by image, at most by L2 ``eps`` on the [0, 1] scale.

    Projected gradient ascent on log p(x, y), whose gradient in x is that of log p(x|y), as in DAT (Yin et al., ICLR
    2026). RATIO (Augustin et al., ECCV 2020), from which this use of the attack comes, climbs p(y|x); that makes the
    classifier sure, but asks for nothing that the images of the class have in common.
    """
    device = images.labels.device
    original = images[torch.arange(len(images), device=device).repeat_interleave(len(targets))]
    target = torch.tensor(targets, device=device).repeat(len(images))

    def move(batch: Tensor) -> Tensor:
        start, y = data.to_float(original.images[batch]), target[batch]
        return pgd(lambda x: model.log_density(x, y).sum(), start, 2 * eps, "L2", steps)

    batches = torch.arange(len(target), device=device).split(batch_size)
    x = torch.cat(distributed.sharded_map(batches, move, device, title="counterfactuals"))
    return Change(original, target, x, predict(model, original.images), predict(model, x))


def change_picture(change: Change, n_targets: int, class_names: Sequence[str]) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8, a row for each image: before, and after the change to each class.

    With a single class also the difference; grey is no change, and the largest change of an image has full contrast.
    Above each image stand the probability of the class that the model sees in it, and that class.
    """
    rows = []
    for first in range(0, min(len(change.target), SHOWN_IMAGES * n_targets), n_targets):
        row = slice(first, first + min(n_targets, SHOWN_CLASSES))
        before, x = change.original.images[first : first + 1].cpu(), change.x[row].cpu()
        p, y = torch.cat([change.before[first : first + 1], change.after[row]]).softmax(1).max(1)
        images, captions = [before, to_uint8(x)], [f"{v:.2f}: {class_names[k]}" for v, k in zip(p, y, strict=True)]
        if n_targets == 1:
            difference = x - data.to_float(before)
            images.append(to_uint8(difference / difference.abs().max().clamp(min=1e-12)))
            captions.append("")
        grid = image_grid(torch.cat(images), len(captions), tile=96)
        rows.append(captioned(grid, columns=captions))
    headings = ["before", *(f"→ {class_names[y]}" for y in change.target[: min(n_targets, SHOWN_CLASSES)])]
    return captioned(np.concatenate(rows), columns=headings + ["difference"] * (n_targets == 1))


def summary(change: Change, settings: dict[str, Any]) -> str:
    """How many images the classifier puts into the class aimed at, in one line; an image's own class does not count."""
    other = change.original.labels != change.target
    target, n = change.target[other], int(other.sum())
    counts, means = [], []
    for logits in (change.before[other], change.after[other]):
        counts.append(int((logits.argmax(1) == target).sum()))
        means.append(f"{logits.softmax(1).gather(1, target[:, None]).mean():.3f}")
    return (
        f"{n} changes to another class, {settings['steps']} steps on log p(x, y), at most L2 "
        f"{settings['counterfactual_eps']:g} ([0, 1] scale): the classifier sees that class in {counts[0]} images "
        f"before and {counts[1]} after, mean p(y|x) {means[0]} -> {means[1]}"
    )
