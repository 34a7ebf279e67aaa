"""--mode sample --counterfactual: test images changed a little, so that the model sees another class in them."""

from collections.abc import Sequence
from dataclasses import asdict
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
from logger.files import save_arrays
from logger.images import captioned, image_grid, save_each, save_png, to_uint8
from logger.run_dir import RunDir
from models import JEM, log_density
from models.predict import predict
from pgd import pgd
from utils import UserError

RADIUS = 2.5  # L2 on images in [0, 1]
IMAGES = 10  # test images
ROWS, CLASSES = 20, 20  # images, and columns of all classes, in a picture
TILE = 96  # pixels of an image's side in a picture, about, so that the name of a class fits above


class Change(NamedTuple):
    """Test images, and what they were changed to."""

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
    test = starting_images(load_data(cfg, path, content, device).test, targets, cfg)
    radius, steps = cfg.counterfactual_eps or RADIUS, cfg.fresh_steps
    settings = {
        **origin(path, content),
        "precision": "float32",
        "start": "test images",
        "target": "log p(x, y)",
        "counterfactual": cfg.counterfactual,
        "counterfactual_eps": radius,
        "steps": steps,
        "batch_size": cfg.batch_size,
    }

    directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    change = changed(model, test, targets, radius, steps, cfg.batch_size)
    if distributed.current_world().rank:
        return 0
    directory.write_config(asdict(cfg), utils.environment(device))
    save_png(directory.path / "counterfactual.png", picture(change, len(targets), class_names))
    save_archive(directory.path / "counterfactual.npz", change, settings)
    if cfg.save_images:
        save_each(directory.path / "samples", "counterfactual", to_uint8(change.x))
    print(summary(change, settings))
    print(f"Done. Look at {utils.printable(directory.path)}")
    return 0


# ---------------------------------------------------------------------------------------------- what is asked for


def target_classes(asked: str, class_names: Sequence[str]) -> list[int]:
    """The classes that ``--counterfactual`` names: all, or one by its name or else its number from 0 on."""
    if asked == "all":
        return list(range(len(class_names)))
    if asked in class_names:
        return [class_names.index(asked)]
    if asked.isdecimal() and len(asked) < 10 and int(asked) < len(class_names):
        return [int(asked)]
    known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise UserError(
        f"--counterfactual takes all, the name of a class ({known}) or a number from 0 to {len(class_names) - 1}, "
        f"not {asked!r}"
    )


def starting_images(test: Split, targets: list[int], cfg: Config) -> Split:
    """``--n_samples`` test images, evenly spaced; for a single target, of the other classes."""
    kind = f"test images of {cfg.dataset}"
    if len(targets) == 1:
        test, kind = test[test.labels != targets[0]], f"{kind} of other classes than {cfg.counterfactual}"
    return data.evenly_spaced(test, cfg.n_samples or IMAGES, kind)


# ---------------------------------------------------------------------------------------------- the change


def changed(model: JEM, test: Split, targets: list[int], radius: float, steps: int, batch_size: int) -> Change:
    """M images moved to each of the classes ``targets``, (N = M * targets), image by image; see ``moved``."""
    original = test[torch.arange(len(test), device=test.labels.device).repeat_interleave(len(targets))]
    target = torch.tensor(targets, device=test.labels.device).repeat(len(test))
    batches = list(zip(original.images.split(batch_size), target.split(batch_size), strict=True))

    def work(batch: tuple[Tensor, Tensor]) -> Tensor:
        return moved(model, data.to_float(batch[0]), batch[1], radius, steps)

    x = torch.cat(distributed.sharded_map(batches, work, target.device, title="counterfactuals"))
    return Change(original, target, x, predict(model, original.images), predict(model, x))


def moved(model: JEM, x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """The counterfactuals of images: near each, where log p(x, y) of another class is large.

    Projected gradient ascent on log p(x, y), whose gradient in x is that of log p(x|y), as in DAT (Yin et al., ICLR
    2026). RATIO (Augustin et al., ECCV 2020), from which this use of the attack comes, climbs p(y|x); that makes the
    classifier sure, but asks for nothing that the images of the class have in common.

    Args:
        x: float32 (N, C, H, W) in [-1, 1]; y: int64 (N,), the classes aimed at.
        radius: how far an image may move, L2, on the [0, 1] scale.
    """
    return pgd(lambda x: model.log_density(x, y).sum(), x, 2 * radius, "L2", steps)


# ------------------------------------------------------------------------------------------ what is written


def picture(change: Change, n_targets: int, class_names: Sequence[str]) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8, a row for each test image: before, and after the change to each class.

    With a single class also the difference; grey is no change, and the largest change of an image has full contrast.
    Above each image stand the class that the model sees in it and the probability of that class.
    """
    rows = [part.unflatten(0, (-1, n_targets)).cpu() for part in (change.original.images, *change[2:])]
    shown, x, before, after = (part[:ROWS, :CLASSES] for part in rows)
    images, logits = torch.cat([shown[:, :1], to_uint8(x)], 1), torch.cat([before[:, :1], after], 1)
    headings = ["before", *(f"→ {class_names[y]}" for y in change.target[:n_targets][:CLASSES])]
    if n_targets == 1:
        difference = x - data.to_float(shown)
        largest = difference.abs().flatten(1).amax(1).clamp(min=1e-12)
        images = torch.cat([images, to_uint8(difference / largest[:, None, None, None, None])], 1)
        headings.append("difference")
    strips = [strip(*row, class_names) for row in zip(images, logits, strict=True)]
    return captioned(np.concatenate(strips), columns=headings)


def strip(images: Tensor, logits: Tensor, class_names: Sequence[str]) -> np.ndarray:
    """Images uint8 (S, C, H, W) side by side; above the first of them what the model sees, by logits (up to S, K)."""
    p, y = logits.softmax(1).max(1)
    rest = [""] * (len(images) - len(logits))
    grid = captioned(image_grid(images, len(images), TILE), columns=[*(f"p = {v:.2f}" for v in p), *rest])
    return captioned(grid, columns=[*(class_names[k] for k in y), *rest])


def save_archive(path: Path, change: Change, settings: dict[str, Any]) -> None:
    """Write the changed images and how they came about as a NumPy archive; with all classes, image by image.

    images, originals: uint8 (N, H, W, C), after and before; x: float32 (N, C, H, W) in [-1, 1], after, unrounded;
    labels, original_labels: int64 (N,), the classes aimed at and the images' own; log_p_x, log_p_x_y: float32 (N,),
    unnormalised log-densities of x alone and with the class aimed at (nats); probabilities_start, probabilities:
    float32 (N, K), p(y|x) before and after; settings: JSON text. Equal changes give equal bytes.
    """
    arrays = {
        "images": to_uint8(change.x).permute(0, 2, 3, 1),
        "originals": change.original.images.permute(0, 2, 3, 1),
        "x": change.x,
        "labels": change.target,
        "original_labels": change.original.labels,
        "log_p_x": log_density(change.after),
        "log_p_x_y": log_density(change.after, change.target),
        "probabilities_start": change.before.softmax(1),
        "probabilities": change.after.softmax(1),
    }
    save_arrays(path, arrays, settings)


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
