"""A network's outputs for many images, batch by batch. Training, evaluation and sampling all predict with this."""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

import distributed
from data import Split, to_float
from models.batch_norm import attribute_set
from models.jem import JEM


def images_per_batch(n: int, shape: tuple[int, int, int]) -> int:
    """How many images of ``shape`` (C, H, W) take a network's memory for ``n`` of 32x32 pixels, at least one."""
    return max(1, n * 1024 // math.prod(shape[1:]))


def evaluation_mode(network: nn.Module) -> AbstractContextManager:
    """The network with all its parts is in evaluation mode meanwhile; afterwards each part is in the mode it was in."""
    return attribute_set(network.modules(), "training", False)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Outputs (N, ...) of images (N, C, H, W), uint8 or float in [-1, 1]; of a JEM, its logits float32 (N, K).

    It is in evaluation mode meanwhile. All processes must predict together.
    """
    with evaluation_mode(network):
        batches = images.split(images_per_batch(500, images.shape[1:]))
        outputs = distributed.sharded_map(batches, lambda batch: network(to_float(batch)), images.device)
    return torch.cat(outputs)


def accuracy(model: JEM, split: Split) -> float:
    """Share of a split's images whose most likely class is their label."""
    return (predict(model, split.images).argmax(1) == split.labels).float().mean().item()
