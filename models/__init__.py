"""Networks: input to output, no sampler, no buffer, no device."""

import torch

from models.batch_norm import batch_norms, frozen_statistics
from models.jem import JEM, StepLogits, copy_weights, log_density, sampling_copy
from models.wide_resnet import BACKBONES, WideResNet

__all__ = [
    "JEM",
    "StepLogits",
    "WideResNet",
    "batch_norms",
    "build_model",
    "copy_weights",
    "frozen_statistics",
    "log_density",
    "sampling_copy",
]


def build_model(
    channels: int,
    n_classes: int,
    depth: int = 28,
    width: int = 10,
    norm: str = "none",
    dropout_rate: float = 0.0,
    activation: str = "leaky_relu",
    separate_energy: bool = False,
    stages: int = 3,
    backbone: str = "jem",
) -> JEM:
    """A JEM on a Wide-ResNet, freshly initialised from PyTorch's global generator, in channels_last memory."""
    f = BACKBONES[backbone](channels, depth, width, norm, dropout_rate, activation, stages)
    return JEM(f, n_classes, separate_energy).to(memory_format=torch.channels_last)
