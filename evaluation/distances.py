"""How far images lie from real ones in a network's features: Inception's, or a classifier's.

Images are uint8 (N, C, H, W).
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import to_float
from models import JEM
from models.predict import images_per_batch
from utils import UserError

BATCH = 250  # images of 3x32x32


class Features(nn.Module):
    """A JEM's features (N, D) of uint8 images, as torchmetrics wants a feature network."""

    def __init__(self, model: JEM):
        super().__init__()
        self.model, self.num_features = model, model.f.n_features

    def forward(self, images: Tensor) -> Tensor:
        return self.model.f(to_float(images)).float()


def frechet_distance(feature: nn.Module, real: Tensor) -> Callable[[Tensor], float]:
    """The Fréchet distance of images to ``real`` as a function of those images.

    ``feature``: a module from images to (N, D), with D as its ``num_features``.
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


class PrecomputedFeatures(nn.Identity):
    """The feature network of features (N, ``num_features``) that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def inception(device: torch.device) -> nn.Module:
    """torch-fidelity's Inception-v3 with the original TensorFlow weights, downloaded once, and TensorFlow's resizing.

    It maps uint8 (N, 3, H, W) to the pool layer (N, 2048) and the logits without their bias (N, 1008). torchmetrics'
    own variant of it resizes otherwise, which moves every score. Raises UserError where the weights cannot be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress of a download that fails
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:  # of the network; the others of a torn file
        raise UserError(inception_help(error)) from None
    return network.to(device).eval()


def inception_scorer(
    network: Callable[[Tensor], tuple[Tensor, Tensor]], real: Tensor
) -> Callable[[Tensor], InceptionScores]:
    """FID (Heusel et al. 2017), IS (Salimans et al. 2016) and KID (Binkowski et al. 2018) against ``real``.

    ``network``: ``inception``, or another map of uint8 RGB images to features (N, D) and logits (N, K).
    """
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    def outputs(images: Tensor, title: str) -> tuple[Tensor, Tensor]:
        parts = []
        feed(lambda batch: parts.append(network(as_rgb(batch))), images, title)
        pool, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return pool, logits

    pool, _ = outputs(real, "Inception's features of training images")
    precomputed = PrecomputedFeatures(pool.shape[1])
    fid = frechet_distance(precomputed, pool)
    kid = KernelInceptionDistance(precomputed, reset_real_features=False).to(real.device)
    kid.update(pool, real=True)
    inception_score = InceptionScore(precomputed).to(real.device)

    def scores(images: Tensor) -> InceptionScores:
        pool, logits = outputs(images, "Inception's features of samples")
        inception_score.reset()
        inception_score.update(logits)
        kid.reset()
        kid.subset_size = min(1000, len(images) - 1, len(real) - 1)
        kid.update(pool, real=False)
        mean_and_std = (tuple(v.item() for v in metric.compute()) for metric in (inception_score, kid))
        return InceptionScores(fid(pool), *mean_and_std)

    return scores


def inception_help(error: Exception) -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return (
        f"the Inception weights cannot be loaded or downloaded ({error}): put the file {URL_INCEPTION_V3} "
        f"into {torch.hub.get_dir()}/checkpoints"
    )


def feed(update: Callable[[Tensor], None], images: Tensor, title: str) -> None:
    with torch.no_grad():
        for batch in tqdm(
            images.split(images_per_batch(BATCH, images.shape[1:])), desc=title, unit="batch", leave=False
        ):
            update(batch)


def as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def nearest(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) to each point's nearest reference, and that one's index; (N, ...), (M, ...)."""
    found = []
    references = references.flatten(1)
    for batch in points.flatten(1).split(100):  # a distance matrix of 100 x 50,000
        found.append(torch.cdist(batch.float(), references.float(), compute_mode="donot_use_mm_for_euclid_dist").min(1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
