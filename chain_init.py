"""Initialization of chains: uniform noise, Gaussians fitted to the training images, or other images.

Called with the wanted images' classes, a list on the host, and a generator, it returns float32 (n, C, H, W) in [-1, 1],
channels_last, on the generator's device, and never waits for the device.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional

import distributed
import image_folder
from data import ImageData, Split, some_of_each_class, to_float
from sgld import ChainInit, uniform_images
from utils import UserError

MAX_ROWS = 8192  # of a Gaussian's factor

NAMES = {  # what reports call them
    "uniform": "uniform noise",
    "gaussian": "a Gaussian fitted to the training images",
    "class_gaussian": "a Gaussian fitted to each class's training images",
    "folder": "images of another folder",
}


def build_chain_init(cfg, images: ImageData) -> ChainInit:
    """What ``--start`` names. A Gaussian of each class is fitted to the labelled images of ``--labels_per_class``."""
    if cfg.start == "uniform":
        return UniformInit(images.shape)
    if cfg.start == "folder":
        read = partial(image_folder.read_unlabelled, Path(cfg.start_dir), images.shape[1], "--start_dir ")
        return FolderInit(distributed.rank0_first(read), images)
    device = images.test.images.device
    if cfg.start == "gaussian":
        return GaussianInit(images.train, None, device)
    n_classes = len(images.class_names)
    for k, name in enumerate(images.class_names):
        if not (images.train.labels == k).any():
            raise UserError(f"--start class_gaussian: the class {name} has no training images: lower --n_valid")
    return GaussianInit(some_of_each_class(images.train, cfg.labels_per_class, n_classes), n_classes, device)


class UniformInit:
    """Uniform noise in [-1, 1], whatever the class (JEM)."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def __call__(self, classes: Sequence[int], rng: Generator) -> Tensor:
        return uniform_images(len(classes), self.shape, rng)


class FolderInit:
    """Random images of another set, uint8 (N, C, H, W), made grey or RGB as the training images are (DAT)."""

    def __init__(self, images: Tensor, like: ImageData):
        self.shape = like.shape
        if images.shape[2:] != self.shape[1:]:
            raise UserError(f"--start_dir needs square training images, and these are {self.shape[2]}x{self.shape[1]}")
        if images.shape[1] != self.shape[0]:
            images = functional.rgb_to_grayscale(images, num_output_channels=self.shape[0])
        self.images = images.to(like.test.images.device)

    def __call__(self, classes: Sequence[int], rng: Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (len(classes),), generator=rng, device=rng.device)
        return to_float(self.images[chosen]).contiguous(memory_format=torch.channels_last)


class GaussianInit:
    """Samples of a Gaussian with the images' mean and full covariance plus 1e-4 I, clamped to [-1, 1].

    One Gaussian for each class: JEM++ (ICCV 2021, section 4.2) and SADA-JEM; one for all: M-JEM (n_classes None).
    """

    def __init__(self, split: Split, n_classes: int | None, device: torch.device):
        self.shape = tuple(split.images.shape[1:])
        groups = [split.images] if n_classes is None else [split.images[split.labels == k] for k in range(n_classes)]
        self.gaussians = [fit(group, device) for group in groups]

    def __call__(self, classes: Sequence[int], rng: Generator) -> Tensor:
        if not classes:
            return torch.empty(0, *self.shape, device=rng.device)
        if len(self.gaussians) == 1:
            classes = [0] * len(classes)
        rows = [None] * len(classes)
        for k in dict.fromkeys(classes):
            own = [i for i, of_class in enumerate(classes) if of_class == k]
            mean, factor, noise = self.gaussians[k]
            x = mean + torch.randn(len(own), len(factor), generator=rng, device=rng.device) @ factor  # (n, D)
            if noise:
                x += noise * torch.randn(x.shape, generator=rng, device=rng.device)
            for i, row in zip(own, x.clamp(-1, 1), strict=True):
                rows[i] = row  # an index on the device would wait for it
        return torch.stack(rows).unflatten(1, self.shape).contiguous(memory_format=torch.channels_last)


class StoredGaussians(GaussianInit):
    """Gaussians that came with a network's weights: mean (K, D), factor (K, R, D) and noise (K,); K = 1 is for all."""

    def __init__(self, stored: dict[str, Tensor], shape: Sequence[int], device: torch.device):
        self.shape, mean, factor = tuple(shape), stored["mean"].float(), stored["factor"].float()
        self.gaussians = list(zip(mean.to(device), factor.to(device), stored["noise"].tolist(), strict=True))


def fit(images: Tensor, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Mean (D,), factor (R, D) and noise of a Gaussian: its samples are mean + normal @ factor + noise * normal.

    images: uint8 (N, C, H, W). If N > D, the factor is the Cholesky factor of the covariance plus 1e-4 I, and noise 0.
    If not, it is the centred images over sqrt(N), and noise 0.01. At most ``MAX_ROWS`` random images represent more.
    """
    n, d = len(images), images[0].numel()
    if min(n, d) > MAX_ROWS:
        chosen = torch.randperm(n, generator=Generator().manual_seed(0))[:MAX_ROWS]
        images, n = images[chosen.to(images.device)], MAX_ROWS
    mean = sum(to_float(part.to(device)).flatten(1).sum(0) for part in images.split(1000)) / n
    if n <= d:
        return mean, (to_float(images.to(device)).flatten(1) - mean) / n**0.5, 1e-2
    covariance = 1e-4 * torch.eye(d, device=device)
    for part in images.split(1000):  # a few hundred megabytes less than all at once
        x = to_float(part.to(device)).flatten(1) - mean
        covariance.addmm_(x.T, x, alpha=1 / n)
    return mean, torch.linalg.cholesky(covariance).T.contiguous(), 0.0
