"""Out-of-distribution detection: scores, sets to hold them against, and how well they tell them apart."""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional

import data
import distributed
import image_folder
from chain_init import shuffled_patches
from config import Config
from evaluation.inputs import GRADIENT_BATCH, EvalInputs
from evaluation.report import Section, bootstrap
from losses import auroc
from models import JEM, log_density
from models.predict import images_per_batch, predict
from pgd import pgd
from utils import UserError, printable

CHANGED = ("shuffled", "patches", "blurred", "inverted")  # test images, in their order
BUILT_IN = ("interp", "noise", "constant", *CHANGED)
NAMED = tuple(name for name in data.DATASETS if name != "folder")
MOVED, MOVE_STEPS = 500, 20  # images of a set, at most, and steps, of worst-case detection


def measure(inputs: EvalInputs, section: Section) -> None:
    """Each score against each set of ``--ood_datasets``, and their histograms."""
    test = inputs.subset(inputs.data.test)
    inside = scores(inputs.model, inputs.with_noise(test.images))
    if not inputs.classifies:
        del inside["max softmax"], inside["max logit"]
    drawn = {score: [("test images", values)] for score, values in inside.items()}  # a set can have this name, too
    for name in set_names(inputs.cfg):
        section.attempt(name, partial(add_set, inputs, section, name, test.images, drawn))
    for score, sets in drawn.items():
        file_name = re.sub(r"\W+", "_", f"ood {score}").strip("_")
        section.picture(file_name, f"{score} of test images against other images", histograms(sets, score))


def add_set(inputs: EvalInputs, section: Section, name: str, test: Tensor, drawn: dict[str, list]) -> None:
    """The set ``name`` against test images (N, C, H, W), the first in ``drawn``; the scores of the set are added."""
    images = distributed.rank0_first(lambda: foreign_images(name, test, inputs))
    if name not in BUILT_IN:
        check_not_test_images(name, images, inputs.data.test.images, section)
    outside = scores(inputs.model, inputs.with_noise(images))
    for score, sets in drawn.items():
        add_detection(section, (name, score), sets[0][1], outside[score], inputs.noise_protocol)
        sets.append((name, outside[score]))
    moved = moved_towards_data(inputs.model, images[:MOVED])
    area = auroc(drawn["log p(x)"][0][1], log_density(predict(inputs.model, moved)))
    protocol = f"{len(test)} test images, {inputs.noise_protocol}, against {len(moved)} others, each moved up "
    protocol += f"log p(x) by at most L2 1 ([0, 1] scale), {MOVE_STEPS} steps of projected gradient ascent"
    section.add("AUROC, worst case", area, len(test) + len(moved), protocol, at=(name, "log p(x)"))


def add_detection(section: Section, at: tuple[str, str], inside: Tensor, outside: Tensor, noise: str) -> None:
    """How well a score, (N,) and (M,), tells test images from others; ``at``: the set's and the score's name."""
    from sklearn.metrics import average_precision_score, roc_curve  # slow to import

    is_test = np.repeat([1, 0], [len(inside), len(outside)])
    score = torch.cat([inside, outside]).cpu().numpy()
    n, (fpr, tpr, _) = len(score), roc_curve(is_test, score, drop_intermediate=False)
    protocol = f"{len(inside)} test images (positives, to score higher) against {len(outside)} others; {noise}"
    statistic, groups = auroc, [inside, outside]
    if at[0] in CHANGED:  # an image is drawn together with what became of it
        statistic, groups = lambda pairs: auroc(*pairs.T.contiguous()), [torch.stack(groups, 1)]
    section.add("AUROC", auroc(inside, outside), n, protocol, bootstrap(statistic, *groups, replicates=200), at)
    section.add("AUPR", average_precision_score(is_test, score), n, protocol, at=at)
    section.add("FPR at 95 % true positives", fpr[tpr >= 0.95].min(), n, protocol, at=at)


def set_names(cfg: Config) -> list[str]:
    """The sets of ``--ood_datasets``; auto: those that need no files, and with CIFAR-10 those of the JEM paper.

    Raises UserError for the first name that means nothing.
    """
    if cfg.ood_datasets == "auto":
        return [*BUILT_IN, *{"cifar10": ["digits", "svhn", "cifar100"], "digits": []}.get(cfg.dataset, ["digits"])]
    if os.path.isdir(os.path.expanduser(cfg.ood_datasets)):  # its name may hold a comma
        return [cfg.ood_datasets]
    names = list(dict.fromkeys(name.strip() for name in cfg.ood_datasets.split(",")))  # each once
    for name in names:
        if name not in (*BUILT_IN, *NAMED) and not os.path.isdir(os.path.expanduser(name)):
            raise UserError(f"--ood_datasets: {name!r} is neither a folder nor one of {', '.join((*BUILT_IN, *NAMED))}")
    return names


def check_not_test_images(name: str, images: Tensor, test: Tensor, section: Section) -> None:
    """Raise UserError if most images, uint8 (N, C, H, W), are test images (M, C, H, W), pixel by pixel; note any."""
    known = {image.tobytes() for image in test.cpu().numpy()}
    shared = sum(image.tobytes() in known for image in images.cpu().numpy())
    if shared > len(images) / 2:
        raise UserError(f"{shared} of its {len(images)} images are test images: it is not out of distribution")
    if shared:
        section.note(f"**{name}**: {shared} of its {len(images)} images are test images, too, and lower the numbers.")


def foreign_images(name: str, test: Tensor, inputs: EvalInputs) -> Tensor:
    """At most as many images as ``test`` has, uint8 in its shape (N, C, H, W), from the set ``name``.

    That is a data set; a folder, of which it takes the test part, or all images if it has no parts; or one of
    ``BUILT_IN``, random images or test images changed. Raises UserError if a set cannot be read.
    """
    rng, (n, c, h, w), folder = inputs.rng(), test.shape, inputs.cfg.data_dir
    draw = {"generator": rng, "device": inputs.device}
    match name:
        case "interp":  # the mean of two different test images
            order = torch.randperm(n, **draw)
            return ((test[order].short() + test[order.roll(1)].short()) // 2).byte()
        case "noise":  # uniform
            return torch.randint(256, test.shape, dtype=torch.uint8, **draw)
        case "constant":  # one colour an image
            return torch.randint(256, (n, c, 1, 1), dtype=torch.uint8, **draw).expand(test.shape)
        case "shuffled":  # the pixels in another order for each image
            order = torch.rand(n, 1, h * w, **draw).argsort(2)
            return test.flatten(2).gather(2, order.expand(n, c, -1)).view(test.shape)
        case "patches":  # the same with patches of 8x8, or a quarter of a small image
            return shuffled_patches(test, max(2, min(h, w) // 8), rng)
        case "blurred":  # by a Gaussian of 2 pixels
            return functional.gaussian_blur(test, [9, 9], [2.0, 2.0])
        case "inverted":
            return 255 - test
        case _ if name in NAMED:
            if inputs.cfg.dataset == "folder" and name != "digits":  # no download into images, as one class more
                folder = os.path.abspath(Config.data_dir)
                if Path(folder).is_relative_to(inputs.cfg.data_dir):
                    raise UserError(f"it would be downloaded into your images in {folder}: move them elsewhere")
            others = data.load(name, folder, device=inputs.device).test.images
        case _:
            others = image_folder.read_test_part(Path(name).expanduser(), image_size=max(h, w))
    return converted(inputs.subset(others, n), (c, h, w))


def converted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 images (N, C', H', W') in another shape (C, H, W): colours to luma or grey to RGB, antialiased bilinear."""
    return functional.resize(image_folder.grey_or_rgb(images, shape[0]), shape[1:], antialias=True)


def scores(model: JEM, x: Tensor) -> dict[str, Tensor]:
    """Each (N,), higher for images that look more like the training set: x (N, C, H, W), uint8 or in [-1, 1].

    The last is the approximate mass of the JEM paper (section 5.3.3).
    """

    def logits_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        x = data.to_float(x).detach().requires_grad_()
        logits = model(x)
        (grad,) = torch.autograd.grad(log_density(logits).sum(), x)
        return logits.detach(), grad.flatten(1).norm(dim=1)

    batches = x.split(images_per_batch(GRADIENT_BATCH, x.shape[1:]))
    parts = distributed.sharded_map(batches, logits_and_slope, x.device, title="scores")
    logits, slope = (torch.cat(part) for part in zip(*parts, strict=True))  # (N, K), (N,)
    return {
        "log p(x)": log_density(logits),
        "max softmax": logits.double().softmax(1).amax(1),  # in float32 many are exactly 1
        "max logit": logits.amax(1),
        "-|grad log p(x)|": -slope,
    }


def moved_towards_data(model: JEM, images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W), moved where log p(x) is largest nearby, as RATIO and DAT report: float, in [-1, 1]."""
    climb = partial(pgd, lambda x: model.log_density(x).sum(), radius=2.0, norm="L2", steps=MOVE_STEPS)
    batches = data.to_float(images).split(images_per_batch(GRADIENT_BATCH, images.shape[1:]))
    return torch.cat(distributed.sharded_map(batches, climb, images.device))


def histograms(scores: list[tuple[str, Tensor]], label: str) -> Figure:
    """Shares of the images at each score; the first set is filled and, with its width on both sides, sets the range."""
    sets = [values.double().cpu().numpy() for _, values in scores]
    low, high = np.quantile(sets[0], [0.005, 0.995])
    everything = np.concatenate(sets)
    low, high = max(everything.min(), 2 * low - high), min(everything.max(), 2 * high - low)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, values in enumerate(sets):
        style = {"histtype": "step", "linewidth": 1.5} if i else {"color": "lightgray"}
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values.clip(low, high), 50, range=(low, high), weights=weights, label=str(i), **style)
    axes.set(xlabel=f"{label} (the end bins hold all that lies beyond)", ylabel="share of images (log)")
    axes.set(yscale="log", ylim=(5e-4, 1.5))
    for text in axes.legend().get_texts():  # given as labels, names that begin with "_" would be left out
        text.set(text=printable(scores[int(text.get_text())][0], "utf-8"), parse_math=False)
    return figure
