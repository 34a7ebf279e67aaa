"""How far images lie from real ones in a network's features: Inception's, or a classifier's.

Images are uint8 (N, C, H, W).
"""

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

import distributed
from data import to_float
from models import JEM
from models.predict import images_per_batch
from utils import UserError

BATCH = 250  # images of 3x32x32
CHUNK = 1000  # rows of a matrix of distances, or of features in float64
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
NO_SYNC = {"sync_on_compute": False}  # each process has all features; torchmetrics would add those of the others


class Features(nn.Module):
    """A JEM's features (N, D) of images, uint8 or float in [-1, 1]."""

    def __init__(self, model: JEM):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.f(to_float(images)).float()


@dataclass(frozen=True)
class Distances:
    """How far features lie from real ones.

    ``kid`` is the mean and the standard deviation over ``KID_SUBSETS`` subsets of ``subset_size`` images.
    """

    frechet: float
    kid: tuple[float, float]
    subset_size: int
    precision: float
    recall: float


def distances_to(real: Tensor) -> Callable[[Tensor], Distances]:
    """The distances of features (N, D) to ``real``, (M, D), as a function of those features; N and M above 3.

    Fréchet distance (Heusel et al. 2017), kernel distance (KID, Binkowski et al. 2018), and improved precision and
    recall (Kynkäänniemi et al. 2019). KID draws its subsets with torch's global generator.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    frechet, radii = frechet_distance(real), neighbour_distance(real)
    kid = KernelInceptionDistance(
        PrecomputedFeatures(real.shape[1]), subsets=KID_SUBSETS, reset_real_features=False, **NO_SYNC
    ).to(real.device)
    kid.update(real, real=True)

    def distances(features: Tensor) -> Distances:
        kid.reset()
        kid.subset_size = min(KID_SUBSET_SIZE, len(features) - 1, len(real) - 1)
        kid.update(features, real=False)
        mean, std = (value.item() for value in kid.compute())
        precision = share_within(features, real, radii)
        recall = share_within(real, features, neighbour_distance(features))
        return Distances(frechet(features), (mean, std), kid.subset_size, precision, recall)

    return distances


def frechet_distance(real: Tensor) -> Callable[[Tensor], float]:
    """The Fréchet distance of features (N, D) to ``real``, (M, D), as a function of those features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(PrecomputedFeatures(real.shape[1]), reset_real_features=False, **NO_SYNC).to(
        real.device
    )
    for part in real.split(CHUNK):  # it works in float64
        metric.update(part, real=True)

    def distance(features: Tensor) -> float:
        metric.reset()
        for part in features.split(CHUNK):
            metric.update(part, real=False)
        return metric.compute().item()

    return distance


def neighbour_distance(points: Tensor) -> Tensor:
    """Distance (N,) from each of the points (N, D) to its ``NEIGHBOURS``-th nearest other one."""
    k = NEIGHBOURS + 1  # each point is its own nearest one
    found = [torch.cdist(part, points).topk(k, largest=False).values[:, -1] for part in points.split(CHUNK)]
    return torch.cat(found)


def share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points (N, D) that lie in the ball of at least one of the centres (M, D), of radii (M,)."""
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(CHUNK)]
    return torch.cat(inside).float().mean().item()


def inception_score(logits: Tensor) -> tuple[float, float]:
    """IS (Salimans et al. 2016) from Inception's logits (N, K): mean and standard deviation over 10 splits.

    torch's global generator draws the splits.
    """
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(PrecomputedFeatures(logits.shape[1]), **NO_SYNC).to(logits.device)
    metric.update(logits)
    mean, std = metric.compute()
    return mean.item(), std.item() * math.sqrt((metric.splits - 1) / metric.splits)  # the authors divide by n


class PrecomputedFeatures(nn.Identity):
    """The feature network of features (N, ``num_features``) that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def inception(device: torch.device) -> nn.Module:
    """torch-fidelity's Inception-v3 with the original TensorFlow weights, downloaded once, and TensorFlow's resizing.

    It maps uint8 (N, 3, H, W) to the pool layer (N, 2048) and the logits without their bias (N, 1008). torchmetrics'
    own variant of it resizes otherwise, which moves every score. Raises UserError if the weights cannot be loaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress of a download that fails
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:  # of the network; the others of a torn file
        raise UserError(inception_help(error)) from None
    return network.to(device).eval()


def inception_outputs(
    network: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, title: str
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of uint8 images, grey or RGB; ``title`` stands at the progress bar."""
    batches = images.split(images_per_batch(BATCH, images.shape[1:]))
    with torch.no_grad():
        parts = distributed.sharded_map(batches, lambda batch: network(as_rgb(batch)), images.device, title=title)
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, logits


def inception_help(error: Exception) -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return (
        f"the Inception weights cannot be loaded or downloaded ({error}): put the file {URL_INCEPTION_V3} "
        f"into {torch.hub.get_dir()}/checkpoints"
    )


def as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def nearest(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) to each point's nearest reference, and that one's index; (N, ...), (M, ...)."""
    found = []
    references = references.flatten(1)
    for batch in points.flatten(1).split(100):  # a distance matrix of 100 x 50,000
        found.append(torch.cdist(batch.float(), references.float(), compute_mode="donot_use_mm_for_euclid_dist").min(1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
