"""Measurements on a trained model."""

import torch
from torch import Tensor

from data import Split, to_float
from models import JEM


@torch.no_grad()
def predict(model: JEM, images: Tensor, dtype: torch.dtype = torch.float32, batch_size: int = 500) -> Tensor:
    """Logits float32 (N, K) of uint8 images (N, C, H, W), in evaluation mode, the backbone in ``dtype``.

    The model's mode is restored.
    """
    training = model.training
    model.eval()
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = [model(to_float(batch)) for batch in images.split(batch_size)]
    model.train(training)
    return torch.cat(logits)


def accuracy(model: JEM, split: Split, dtype: torch.dtype = torch.float32) -> float:
    """Share of a split's images whose most likely class is their label."""
    return (predict(model, split.images, dtype).argmax(1) == split.labels).float().mean().item()
