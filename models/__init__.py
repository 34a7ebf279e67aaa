"""Networks: images to logits. A new one is a class (see ``models.jem.JEM``) and a line in ``BACKBONES``."""

from typing import Any

import torch

from models.jem import JEM, JointForward, Logits, StepBatch, copy_weights, frozen_sampler_model, log_density
from models.wide_resnet import RobustWideResNet, WideResNet

__all__ = ["JEM", "JointForward", "Logits", "StepBatch", "copy_weights", "frozen_sampler_model", "log_density"]

BACKBONES = {"jem": WideResNet, "robust": RobustWideResNet}


def build_model(
    shape: tuple[int, int, int],
    n_classes: int,
    depth: int = 28,
    width: int = 10,
    *,
    backbone: str = "jem",
    separate_energy: bool = False,
    **options: Any,
) -> JEM:
    """A JEM for images of ``shape`` (C, H, W), freshly initialised from PyTorch's global generator, channels_last.

    The backbone takes shape, depth, width and ``options``; it raises UserError if it cannot be built with them.
    """
    features = BACKBONES[backbone](shape, depth=depth, width=width, **options)
    model = JEM(features, n_classes, separate_energy)
    if hasattr(features, "initialise"):
        model.apply(features.initialise)
    return model.to(memory_format=torch.channels_last)
