"""--mode sample --counterfactual: images changed a little, so that the model sees another class in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import distributed
from checkpoints.load import frozen, given_images, origin
from config import Config
from generation.chains import ChainResult, write_result
from logger.images import captioned, image_grid, save_png, to_uint8
from logger.run_dir import RunDir
from models import JEM
from models.predict import predict
from pgd import pgd
from utils import UserError, tree_to

DEFAULT_EPS = 2.5  # L2 on images in [0, 1]
N_IMAGES = 10  # unless --n_samples says another number
SHOWN_IMAGES, SHOWN_CLASSES = 20, 20  # rows, and columns of all classes, in a picture


def run(cfg: Config, path: Path, content: dict[str, Any], device: torch.device) -> None:
    """Do what ``--counterfactual`` asks of a checkpoint, the ``content`` of ``path``.

    The network is that of evaluation: in float32, batch normalisation with its running statistics. Raises UserError
    for input that does not fit, before anything is written.
    """
    class_names = content["data"]["class_names"]
    targets = target_classes(cfg.counterfactual, class_names)
    model = frozen(cfg, path, content, device)
    images, kind = given_images(model, cfg, path, content)
    if len(targets) == 1 and not cfg.images:
        images, kind = images[images.labels != targets[0]], f"{kind} of other classes than {cfg.counterfactual}"
    images = data.evenly_spaced(images, cfg.n_samples or (len(images) if cfg.images else N_IMAGES), kind)
    original = images[torch.arange(len(images), device=device).repeat_interleave(len(targets))]
    target = torch.tensor(targets, device=device).repeat(len(images))
    eps = cfg.counterfactual_eps or DEFAULT_EPS
    settings = {
        **origin(path, content),
        "precision": "float32",
        "start": kind,
        "target": "log p(x, y)",
        "counterfactual": cfg.counterfactual,
        "counterfactual_eps": eps,
        "steps": cfg.fresh_steps,
        "batch_size": cfg.batch_size,
    }

    directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    result = changed(model, original.images, target, eps, cfg.fresh_steps, cfg.batch_size)
    if distributed.current_world().rank:
        return
    save_png(directory.path / "counterfactual.png", change_picture(result, len(targets), class_names))
    print(summary(result, original.labels.cpu(), settings))
    further = {
        "originals": original.images.permute(0, 2, 3, 1),  # uint8 (N, H, W, C)
        "original_labels": original.labels,
        "probabilities_start": result.logits_start.softmax(1),  # p(y|x) before, float32 (N, K)
        "probabilities": result.logits.softmax(1),
    }
    write_result(directory, "counterfactual", result, further, settings, cfg, device)


def target_classes(asked: str, class_names: Sequence[str]) -> list[int]:
    """The classes that ``--counterfactual`` names: all, or one by its name or else its number from 0 on."""
    numbers = {str(k): k for k in range(len(class_names))}
    classes = numbers | {name: k for k, name in enumerate(class_names)}
    if asked == "all":
        return list(numbers.values())
    if asked in classes:
        return [classes[asked]]
    known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise UserError(
        f"--counterfactual takes all, the name of a class ({known}) or a number from 0 to {len(class_names) - 1}, "
        f"not {asked!r}"
    )


def changed(model: JEM, original: Tensor, target: Tensor, eps: float, steps: int, batch_size: int) -> ChainResult:
    """Images, uint8 (N, C, H, W), moved to classes ``target`` (N,), at most by L2 ``eps`` on the [0, 1] scale.

    Projected gradient ascent on log p(x, y), whose gradient in x is that of log p(x|y), as in DAT (Yin et al., ICLR
    2026). RATIO (Augustin et al., ECCV 2020), from which this use of the attack comes, climbs p(y|x); that makes the
    classifier sure, but asks for nothing that the images of the class have in common.
    """

    def move(batch: Tensor) -> Tensor:
        start, y = data.to_float(original[batch]), target[batch]
        return pgd(lambda x: model.log_density(x, y).sum(), start, 2 * eps, "L2", steps)

    batches = torch.arange(len(target), device=target.device).split(batch_size)
    x = torch.cat(distributed.sharded_map(batches, move, target.device, title="counterfactuals"))
    result = ChainResult(data.to_float(original), x, predict(model, original), predict(model, x), target)
    return tree_to(result, torch.device("cpu"))


def change_picture(result: ChainResult, n_targets: int, class_names: Sequence[str]) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8, a row for each image: before, and after the change to each class.

    With a single class also the difference; grey is no change, and the largest change of an image has full contrast.
    Above each image stand the probability of the class that the model sees in it, and that class.
    """
    rows, columns = [], min(n_targets, SHOWN_CLASSES)
    for first in range(0, min(len(result.x), SHOWN_IMAGES * n_targets), n_targets):
        row = slice(first, first + columns)
        images = torch.cat([result.start[first, None], result.x[row]])
        p, y = torch.cat([result.logits_start[first, None], result.logits[row]]).softmax(1).max(1)
        captions = [f"{v:.2f}: {class_names[k]}" for v, k in zip(p, y, strict=True)]
        if n_targets == 1:
            difference = images[1:] - images[:1]
            images = torch.cat([images, difference / difference.abs().max().clamp(min=1e-12)])
            captions.append("")
        rows.append(captioned(image_grid(to_uint8(images), len(captions), tile=96), columns=captions))
    headings = ["before", *(f"→ {class_names[y]}" for y in result.labels[:columns])]
    return captioned(np.concatenate(rows), columns=headings + ["difference"] * (n_targets == 1))


def summary(result: ChainResult, original_labels: Tensor, settings: dict[str, Any]) -> str:
    """How many images the classifier puts into the class aimed at, in one line; an image's own class does not count."""
    other = original_labels != result.labels
    target = result.labels[other]
    logits = torch.stack([result.logits_start, result.logits])[:, other]  # (2, n, K)
    before, after = (logits.argmax(2) == target).sum(1)
    p_before, p_after = logits.softmax(2)[:, range(len(target)), target].mean(1)
    return (
        f"{len(target)} changes to another class, {settings['steps']} steps on log p(x, y), at most L2 "
        f"{settings['counterfactual_eps']:g} ([0, 1] scale): the classifier sees that class in {before} images "
        f"before and {after} after, mean p(y|x) {p_before:.3f} -> {p_after:.3f}"
    )
