"""Networks: input to output, no sampler, no buffer, no device."""

import torch

from models.batch_norm import batch_norms, no_running_stats_update
from models.jem import JEM, JointForward, copy_weights, frozen_sampler_model, log_density
from models.wide_resnet import BACKBONES, WideResNet

__all__ = [
    "JEM",
    "JointForward",
    "WideResNet",
    "batch_norms",
    "build_model",
    "copy_weights",
    "no_running_stats_update",
    "log_density",
    "frozen_sampler_model",
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
