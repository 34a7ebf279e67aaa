"""Initialization of chains: uniform noise, Gaussians fitted to the training images, or other images.

Called with the wanted images' classes, a list on the host, and a generator, it returns float32 (n, C, H, W) in [-1, 1],
channels_last, on the generator's device. Only training images that are kept on the host make it synchronise.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import distributed
import image_folder
from data import ImageData, augment, some_of_each_class, to_float
from sgld import ChainInit, uniform_images
from utils import UserError

MAX_ROWS = 8192  # of a Gaussian's factor
Shape = tuple[int, int, int]  # (C, H, W)
Gaussian = tuple[Tensor, Tensor, float]  # mean (D,), factor (R, D) and noise; see ``fit``


class StoredStarts(NamedTuple):
    """What an included file has in the place of training images: their shape, and Gaussians fitted to them by name."""

    shape: Shape
    gaussians: dict[str, list[Gaussian]]


def build_chain_init(cfg, images: ImageData | StoredStarts, shares: dict[str, float] | None = None) -> ChainInit:
    """What ``--start`` names, or other ``shares`` of such images, by name."""
    shares = shares or cfg.start_shares
    inits = [build_one(name, cfg, images) for name in shares]
    return inits[0] if len(inits) == 1 else partial(mixture_init, inits, list(shares.values()))


def build_one(name: str, cfg, images: ImageData | StoredStarts) -> ChainInit:
    """What ``name``, one of STARTS, means; a Gaussian of each class is fitted to the images whose label is used."""
    random_images = {"uniform": uniform_images, "smooth": smooth_images, "shapes": shape_images}
    if name in random_images:
        return lambda classes, rng: random_images[name](len(classes), images.shape, rng)
    if isinstance(images, StoredStarts):
        return GaussianInit(images.gaussians[name], images.shape)
    if name in ("patches", "mixed"):
        return partial(patches_init if name == "patches" else mixed_pairs_init, images.train.images)
    device, (channels, height, width) = images.test.images.device, images.shape  # training images may be on the host
    if name == "folder":
        if height != width:
            raise UserError(f"--start_dir needs square training images, and these are {width}x{height}")
        folder = Path(cfg.start_dir)
        others = distributed.rank0_first(lambda: image_folder.read_unlabelled(folder, height, "--start_dir "))
        others = image_folder.grey_or_rgb(others, channels).to(device)
        return partial(folder_init, others, images.flip and not cfg.no_flip)
    if name == "gaussian":
        return GaussianInit([fit(images.train.images, device)], images.shape)
    train = some_of_each_class(images.train, cfg.labels_per_class, len(images.class_names))
    gaussians = [fit(train.images[train.labels == k], device) for k in range(len(images.class_names))]
    return GaussianInit(gaussians, images.shape)


def mixture_init(inits: Sequence[ChainInit], shares: Sequence[float], classes: Sequence[int], rng: Generator) -> Tensor:
    """Each image from one of several inits, chosen at random with the given shares, which add up to 1."""
    chosen = torch.rand(len(classes), 1, 1, 1, generator=rng, device=rng.device)
    x, below = inits[0](classes, rng), shares[0]
    for init, share in zip(inits[1:], shares[1:], strict=True):
        x, below = torch.where(chosen < below, x, init(classes, rng)), below + share
    return x.contiguous(memory_format=torch.channels_last)


def smooth_noise(n: int, shape: Shape, rng: Generator, white: float) -> Tensor:
    """Noise of random smoothness, of mean 0 and standard deviation 1 in each image, float32 (n, C, H, W).

    Its amplitude falls with the frequency f as f^-a, a uniform in [0.5, 3]; a share ``white`` of the images has a = 0.
    """
    draw, (_, h, w) = partial(torch.rand, n, 1, 1, 1, generator=rng, device=rng.device), shape
    exponent = torch.where(draw() < white, 0.0, 0.5 + 2.5 * draw())
    fy, fx = torch.fft.fftfreq(h, device=rng.device), torch.fft.rfftfreq(w, device=rng.device)
    frequency = (fy[:, None].square() + fx.square()).sqrt().clamp(min=1 / max(h, w))
    white_noise = torch.randn(n, *shape, generator=rng, device=rng.device)
    x = torch.fft.irfft2(torch.fft.rfft2(white_noise) * frequency**-exponent, s=(h, w))
    x = x - x.mean((2, 3), keepdim=True)
    return x / (x.std((1, 2, 3), keepdim=True) + 1e-6)


def smooth_images(n: int, shape: Shape, rng: Generator) -> Tensor:
    """Noise of random smoothness, colour and contrast, down to one colour; a third of it is white."""
    c, draw = shape[0], partial(torch.rand, generator=rng, device=rng.device)
    x = smooth_noise(n, shape, rng, white=1 / 3)
    grey, contrast = draw(n, 1, 1, 1), draw(n, 1, 1, 1).square()  # how far the channels are alike
    x = grey * x.mean(1, keepdim=True) * c**0.5 + (1 - grey) * x
    return (2 * draw(n, c, 1, 1) - 1 + contrast * x).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def shape_images(n: int, shape: Shape, rng: Generator) -> Tensor:
    """Areas and strokes of one colour on another, half of them black and white, with edges of random softness."""
    (c, h, w), draw = shape, partial(torch.rand, generator=rng, device=rng.device)
    height = smooth_noise(n, (1, h, w), rng, white=0.0)
    areas = height - 1.5 * (2 * draw(n, 1, 1, 1) - 1)  # above a random level
    strokes = 0.3 - height.abs()  # near level 0
    softness = 0.02 + 0.5 * draw(n, 1, 1, 1).square()
    mask = torch.sigmoid(torch.where(draw(n, 1, 1, 1) < 0.5, strokes, areas) / softness)
    white = torch.where(draw(n, 1, 1, 1) < 0.5, -1.0, 1.0).expand(n, c, 1, 1)
    plain = draw(n, 1, 1, 1) < 0.5
    first, second = (torch.where(plain, bw, 2 * draw(n, c, 1, 1) - 1) for bw in (white, -white))
    return (first + (second - first) * mask).contiguous(memory_format=torch.channels_last)


def draw_images(images: Tensor, n: int, rng: Generator) -> Tensor:
    """Random ones of the training images, uint8 (N, C, H, W), whatever their class."""
    chosen = torch.randint(len(images), (n,), generator=rng, device=rng.device)
    return to_float(images[chosen.to(images.device)].to(rng.device))


def patches_init(images: Tensor, classes: Sequence[int], rng: Generator) -> Tensor:
    """Training images whose square patches, of a half, a quarter or an eighth of the side, are in a random order."""
    n = len(classes)
    x = draw_images(images, n, rng)
    size = torch.randint(3, (n, 1, 1, 1), generator=rng, device=rng.device)
    for k, parts in enumerate((2, 4, 8)):
        x = torch.where(size == k, shuffled_patches(x, parts, rng), x)
    return x.contiguous(memory_format=torch.channels_last)


def shuffled_patches(x: Tensor, parts: int, rng: Generator) -> Tensor:
    """Images (N, C, H, W) cut into ``parts`` x ``parts`` patches in a random order; a rest at the edge stays."""
    x, size = x.clone(), (x.shape[2] // parts, x.shape[3] // parts)
    whole = x[:, :, : size[0] * parts, : size[1] * parts]
    patches = F.unfold(whole.float(), size, stride=size)  # (n, c * ph * pw, parts^2)
    order = torch.rand(len(x), parts**2, generator=rng, device=rng.device).argsort(1)
    order = torch.where((order.diff() == 1).all(1, keepdim=True), order.roll(1, 1), order)  # not all in their places
    patches = patches.gather(2, order[:, None].expand_as(patches))
    whole.copy_(F.fold(patches, whole.shape[2:], size, stride=size))
    return x


def mixed_pairs_init(images: Tensor, classes: Sequence[int], rng: Generator) -> Tensor:
    """Weighted means of two training images, the weight uniform in [0.3, 0.7]."""
    n = len(classes)
    weight = 0.3 + 0.4 * torch.rand(n, 1, 1, 1, generator=rng, device=rng.device)
    mixed = torch.lerp(draw_images(images, n, rng), draw_images(images, n, rng), weight)
    return mixed.contiguous(memory_format=torch.channels_last)


def folder_init(images: Tensor, flip: bool, classes: Sequence[int], rng: Generator) -> Tensor:
    """Random ones of other images, uint8 (N, C, H, W), cropped with black edges and perhaps flipped (DAT)."""
    chosen = torch.randint(len(images), (len(classes),), generator=rng, device=rng.device)
    return augment(images[chosen], flip, 0.0, rng, "black")


class GaussianInit:
    """Samples of Gaussians, clamped to [-1, 1]; ``fit`` gives them the images' mean and covariance.

    One Gaussian for each class: JEM++ (ICCV 2021, section 4.2) and SADA-JEM; one for all: M-JEM.
    """

    def __init__(self, gaussians: list[Gaussian], shape: Shape):
        self.gaussians, self.shape = gaussians, shape

    def __call__(self, classes: Sequence[int], rng: Generator) -> Tensor:
        return self._unclamped(classes, rng).clamp(-1, 1).contiguous(memory_format=torch.channels_last)

    def _groups(self, classes: Sequence[int]) -> list[tuple[Gaussian, list[int]]]:
        """The Gaussians of these classes, each with the places of its images."""
        classes = classes if len(self.gaussians) > 1 else [0] * len(classes)
        return [(self.gaussians[k], [i for i, c in enumerate(classes) if c == k]) for k in dict.fromkeys(classes)]

    def _unclamped(self, classes: Sequence[int], rng: Generator | None) -> Tensor:
        rows = [None] * len(classes)
        for (mean, factor, noise), places in self._groups(classes):
            x = mean.expand(len(places), -1)  # (n, D)
            if rng is not None:
                x = x + torch.randn(len(places), len(factor), generator=rng, device=rng.device) @ factor
                if noise:
                    x += noise * torch.randn(x.shape, generator=rng, device=rng.device)
            for i, row in zip(places, x, strict=True):
                rows[i] = row  # an index on the device would synchronise
        return torch.stack(rows).unflatten(1, self.shape)

    def conditioned(
        self, x: Tensor, known: Tensor | None, std: float, classes: Sequence[int], rng: Generator | None = None
    ) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], drawn (without ``rng``: expected) given some pixels.

        x, of the same shape, has them where ``known``, bool (H, W), or everywhere, with normal noise of ``std``.
        """
        images = self._unclamped(classes, rng).flatten(1)
        mask = slice(None) if known is None else known.expand(self.shape).flatten()
        residual = x.flatten(1) - images
        if rng is not None:
            residual += std * torch.randn(images.shape, generator=rng, device=rng.device)
        # Matheron's rule adds C[:, k] (C[k, k] + std^2 I)^-1 residual[k]; k known, C = factor^T factor + noise^2 I.
        for (_, factor, noise), places in self._groups(classes):
            factor_k, residual_k, variance = factor[:, mask], residual[places][:, mask], noise**2 + std**2
            inner = factor_k @ factor_k.T / variance + torch.eye(len(factor), device=factor.device)  # (R, R)
            correction = torch.linalg.solve(inner, factor_k @ residual_k.T / variance).T @ factor
            correction[:, mask] += noise**2 / variance * (residual_k - correction[:, mask])
            images[places] += correction
        return images.clamp(-1, 1).view_as(x)


def fit(images: Tensor, device: torch.device) -> Gaussian:
    """Mean (D,), factor (R, D) and noise of a Gaussian: its samples are mean + normal @ factor + noise * normal.

    images: uint8 (N, C, H, W). If N > D, the factor is the Cholesky factor of the covariance plus 1e-4 I, and noise 0.
    If not, it is the centred images over sqrt(N), and noise 0.01. At most ``MAX_ROWS`` random images represent more.
    """
    n, d = len(images), images.shape[1:].numel()
    if not n:
        raise UserError("--start class_gaussian: a class has no training images")
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
