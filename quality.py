"""How good samples are: Inception scores, distances in a classifier's features, nearest training images.

Images are uint8 (N, C, H, W).
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from tqdm import tqdm

from data import fitting, to_float
from errors import UserError
from models import JEM, sampling_copy
from sample import STEPS
from sgld import SGLD, uniform_images
from utils import image_grid, pick_dtype, to_uint8

if TYPE_CHECKING:
    from evaluate import Subject
    from report import Section

BATCH = 250  # images of 3x32x32


def fresh_samples(sgld: SGLD, n: int, shape: tuple[int, int, int], steps: int, sgld_lr: float, sgld_std: float,
                  generator: Generator) -> Tensor:
    """The ends of n chains of ``steps`` SGLD steps from uniform noise."""
    parts, batch = [], min(n, fitting(BATCH, shape))
    for start in tqdm(range(0, n, batch), desc="samples from noise", unit="batch", leave=False):
        # Always whole batches: a chain's CUDA graph has a fixed shape.
        x = sgld(uniform_images(batch, shape, generator), steps, sgld_lr, sgld_std, generator).x
        parts.append(to_uint8(x[: n - start]))
    return torch.cat(parts)


def most_confident(logits: Tensor, share: float = 0.9) -> Tensor:
    """Indices of the ``share`` most confident images of each predicted class; logits: (N, K)."""
    confidence, classes = logits.softmax(1).max(1)
    kept = []
    for k in classes.unique():
        members = (classes == k).nonzero().flatten()
        order = confidence[members].argsort(descending=True, stable=True)
        kept.append(members[order[: max(1, round(share * len(members)))]])
    return torch.cat(kept)


class Features(nn.Module):
    """A JEM's features (N, D) of uint8 images, as torchmetrics wants a feature network."""

    def __init__(self, model: JEM):
        super().__init__()
        self.model, self.num_features = model, model.f.n_features

    def forward(self, images: Tensor) -> Tensor:
        return self.model.f(to_float(images)).float()


def frechet_distance(feature: nn.Module | int, real: Tensor) -> Callable[[Tensor], float]:
    """The Fréchet distance of images to ``real`` as a function of those images.

    ``feature``: a module from uint8 images to (N, D), or 2048 for Inception's pool layer.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature, reset_real_features=False).to(real.device)
    feed(lambda batch: metric.update(batch, real=True), real, "features of training images")

    def distance(images: Tensor) -> float:
        metric.reset()
        feed(lambda batch: metric.update(batch, real=False), images, "features of samples")
        return metric.compute().item()

    return distance


@dataclass(frozen=True)
class InceptionScores:
    """FID; IS, mean and standard deviation over 10 splits; KID, mean and standard deviation over 100 subsets."""

    fid: float
    inception_score: tuple[float, float]
    kid: tuple[float, float]


def inception_scorer(real: Tensor, pool: nn.Module | int = 2048,
                     logits: nn.Module | str = "logits_unbiased") -> Callable[[Tensor], InceptionScores]:
    """FID (Heusel et al. 2017), IS (Salimans et al. 2016) and KID (Binkowski et al. 2018) against ``real``.

    The default networks are torch-fidelity's Inception-v3 with the original TensorFlow weights, downloaded once.
    Raises UserError where they cannot be had.
    """
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress of a download that fails
            inception = InceptionScore(logits).to(real.device)
    except OSError as error:  # urllib's errors are OSErrors
        raise UserError(inception_help(error)) from None
    real = as_rgb(real)
    fid = frechet_distance(pool, real)
    kid = KernelInceptionDistance(pool, reset_real_features=False).to(real.device)
    feed(lambda batch: kid.update(batch, real=True), real, "KID of training images")

    def scores(images: Tensor) -> InceptionScores:
        images = as_rgb(images)
        inception.reset()
        kid.reset()
        kid.subset_size = min(1000, len(images) - 1, len(real) - 1)
        feed(inception.update, images, "IS")
        feed(lambda batch: kid.update(batch, real=False), images, "KID of samples")
        return InceptionScores(fid(images), *(tuple(v.item() for v in metric.compute()) for metric in (inception, kid)))

    return scores


def inception_help(error: Exception) -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return (f"the Inception weights are not here and cannot be downloaded ({error}): put the file {URL_INCEPTION_V3} "
            f"into {torch.hub.get_dir()}/checkpoints")


def feed(update: Callable[[Tensor], None], images: Tensor, title: str) -> None:
    with torch.no_grad():
        for batch in tqdm(images.split(fitting(BATCH, images.shape[1:])), desc=title, unit="batch", leave=False):
            update(batch)


def logits_of(model: JEM, images: Tensor) -> Tensor:
    return over_batches(lambda batch: model(to_float(batch)), images)


@torch.no_grad()
def over_batches(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in images.split(fitting(BATCH, images.shape[1:]))])


def as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def nearest(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) to each point's nearest reference, and that one's index; (N, ...), (M, ...)."""
    found = []
    references = references.flatten(1)
    for batch in points.flatten(1).split(100):  # a distance matrix of 100 x 50,000
        found.append(torch.cdist(batch.float(), references.float(), compute_mode="donot_use_mm_for_euclid_dist").min(1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


# ---------------------------------------------------------------------------------------------- the metric


def measure(subject: "Subject", section: "Section") -> None:
    """Scores and pictures of an ``evaluate.Subject``'s samples, from noise and from the replay buffer."""
    cfg, model = subject.cfg, subject.model
    sampler = sampling_copy(model, pick_dtype(cfg.precision, subject.device))
    steps = STEPS if cfg.n_sample_steps is None else cfg.n_sample_steps
    n = cfg.n_samples or min(10_000, cfg.max_images or 10_000)
    fresh = fresh_samples(SGLD(sampler.log_density), n, subject.data.shape, steps, cfg.sgld_lr, cfg.sgld_std,
                          subject.rng())
    sets = {"from noise": (fresh, f"chains of {steps} SGLD steps from uniform noise, step size {cfg.sgld_lr:g}, noise "
                           f"{cfg.sgld_std:g}, unfiltered")}
    if subject.buffer is None:
        section.skip("samples of the replay buffer", "the checkpoint has none; train with --mode energy_train")
    else:
        held = to_uint8(subject.buffer[subject.buffer.isfinite().all(dim=(1, 2, 3))])[:n]
        sets["buffer"] = (held, "replay buffer, unfiltered")
        kept = most_confident(logits_of(model, held)).sort().values
        sets["buffer, filtered"] = (held[kept], "replay buffer, the 90 % most confident of each predicted class (the "
                                    "protocol of SADA-JEM: not comparable with unfiltered numbers)")
    train = subject.some(subject.data.train)

    try:
        add_inception_scores(section, sets, train.images)
    except UserError as error:
        section.skip("FID, IS, KID", str(error))
    judge = subject.judge
    if judge:
        test = subject.some(subject.data.test).images
        add_judgement(section, sets, train.images, test, model, judge, cfg.feature_ckpt)
    else:
        section.skip("Fréchet distance in a classifier's features", "no --feature_ckpt names one")

    for name, (images, protocol) in list(sets.items())[:2]:
        section.picture(f"samples_{name.replace(' ', '_')}", f"Samples: {protocol}", image_grid(images[:100], 10))
        add_nearest(section, name, images, protocol, subject, Features(judge or model))


def add_inception_scores(section: "Section", sets: dict[str, tuple[Tensor, str]], real: Tensor) -> None:
    scorer = inception_scorer(real)
    for name, (images, protocol) in sets.items():
        if len(images) < 20:
            section.skip(f"FID, IS, KID of {name}", f"{len(images)} images are too few")
            continue
        scores, n = scorer(images), len(images)
        against = f"{protocol}; Inception-v3 of torch-fidelity, against {len(real)} training images"
        table = "Inception scores"
        section.add(table, scores.fid, n, against, at=(name, "FID"))
        for key, (mean, std) in {"IS": scores.inception_score, "KID": scores.kid}.items():
            section.add(table, mean, n, against, at=(name, key))
            section.add(table, std, n, against, at=(name, f"{key}, standard deviation"))


def add_judgement(section: "Section", sets: dict[str, tuple[Tensor, str]], real: Tensor, test: Tensor, model: JEM,
                  judge: JEM, place: str) -> None:
    """Fréchet distances in the judge's features, with that of test images as the best to hope for, and accuracy."""
    table = "in a classifier's features"
    distance, features = frechet_distance(Features(judge), real), f"features of {place}, {len(real)} training images"
    section.add(table, distance(test), len(test), f"test images; {features}", at=("test images", "Fréchet distance"))
    for name, (images, protocol) in sets.items():
        if len(images) < 2:
            section.skip(f"Fréchet distance of {name}", f"{len(images)} image has no covariance")
        else:
            section.add(table, distance(images), len(images), f"{protocol}; {features}", at=(name, "Fréchet distance"))
        agree = logits_of(judge, images).argmax(1) == logits_of(model, images).argmax(1)
        section.mean(table, agree, f"{protocol}; share of the samples that {place} puts into the class that the model "
                     "itself puts them into", (name, "accuracy"))


def add_nearest(section: "Section", name: str, images: Tensor, protocol: str, subject: "Subject",
                features: Features) -> None:
    """How far samples lie from the nearest training image, beside how far test images do; ten of them in a picture."""
    train, test = subject.some(subject.data.train).images, subject.some(subject.data.test, 1000).images
    table, pixels = "L2 distance to the nearest training image", f"pixels in [-1, 1], {len(train)} training images"
    by_pixels, index = nearest(to_float(images[:1000]), to_float(train))
    section.mean(table, by_pixels, f"{protocol}, at most 1,000; {pixels}", (name, "mean"))
    section.mean(table, nearest(to_float(test), to_float(train))[0], f"test images, at most 1,000; {pixels}",
                 ("test images", "mean"))
    shown = images[:10]
    by_features, like = nearest(over_batches(features, shown), over_batches(features, train))
    rows = {"sample": (shown, None), "nearest in pixels": (train[index[:10]], by_pixels),
            "nearest in features": (train[like], by_features)}
    section.picture(f"nearest_{name.replace(' ', '_')}", f"Samples ({name}) and the training image nearest to "
                    "each, with its L2 distance", nearest_figure(rows))


def nearest_figure(rows: dict[str, tuple[Tensor, Tensor | None]]) -> Figure:
    """A titled row of images, uint8 (N, C, H, W), with a number (N,) below each where there is one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    columns = max(len(images) for images, _ in rows.values())
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for (title, (images, numbers)), line in zip(rows.items(), panels, strict=True):
        line[0].set_ylabel(title.replace(" in ", "\nin "), rotation=0, ha="right", va="center")
        for i, axes in enumerate(line):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if i < len(images):
                axes.imshow(image_grid(images[i : i + 1], padding=0))
                axes.set_xlabel("" if numbers is None else f"{numbers[i].item():.3g}", fontsize=8)
    return figure
