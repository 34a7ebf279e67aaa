"""Samples of a model, and how good those of a run are while it trains."""

import torch
from torch import Generator, Tensor

import processes
from distances import BATCH
from models.predict import images_per_batch
from sgld import SGLD, Start
from storage.pictures import to_uint8


def fresh_samples(
    sgld: SGLD,
    n: int,
    start: Start,
    n_classes: int,
    steps: int,
    sgld_lr: float,
    sgld_std: float,
    generator: Generator,
    class_cond: bool = False,
) -> tuple[Tensor, Tensor]:
    """The starts of n chains, of each class in turn, and their ends after ``steps`` SGLD steps, uint8 (n, C, H, W)."""
    batch = min(n, images_per_batch(BATCH, start.shape))

    def samples(first: int) -> tuple[Tensor, Tensor]:
        # Always whole batches: a chain's CUDA graph has a fixed shape, and batch normalisation sees them all.
        classes = [i % n_classes for i in range(first, first + batch)]
        y = torch.tensor(classes, device=generator.device) if class_cond else None
        x = start(classes, generator)
        ends = sgld(x, steps, sgld_lr, sgld_std, generator, y).x
        return to_uint8(x[: n - first]), to_uint8(ends[: n - first])

    parts = processes.divided(range(0, n, batch), samples, generator.device, generator, "fresh samples")
    starts, ends = (torch.cat(part) for part in zip(*parts, strict=True))
    return starts, ends
