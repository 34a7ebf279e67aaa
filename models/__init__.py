"""Networks: images to logits, no sampler, no buffer, no options of a run.

A new network is a class in a file of its own and a line in ``BACKBONES``, whose names ``--backbone`` takes;
``models.jem.JEM`` says what the class must have.
"""

from typing import Any

import torch

from models.jem import JEM, JointForward, Logits, copy_weights, frozen_sampler_model, log_density
from models.wide_resnet import RobustWideResNet, WideResNet

__all__ = ["BACKBONES", "JEM", "JointForward", "Logits", "build_model"]
__all__ += ["copy_weights", "frozen_sampler_model", "log_density"]

BACKBONES = {"jem": WideResNet, "robust": RobustWideResNet}


def build_model(
    channels: int,
    n_classes: int,
    depth: int = 28,
    width: int = 10,
    *,
    backbone: str = "jem",
    separate_energy: bool = False,
    **options: Any,
) -> JEM:
    """A JEM for images of ``channels`` channels, freshly initialised from PyTorch's global generator, channels_last.

    depth, width and ``options`` (norm, dropout_rate, activation, stages) go to the backbone, which raises UserError if
    it cannot be built with them.
    """
    features = BACKBONES[backbone](channels, depth, width, **options)
    return JEM(features, n_classes, separate_energy).to(memory_format=torch.channels_last)
