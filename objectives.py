"""From logits to a loss and its parts: pure functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import log_density


def joint_loss(
    logits: Tensor,
    y: Tensor,
    logits_sampled: Tensor | None,
    p_y_x_weight: float,
    p_x_weight: float,
    energy_l2: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """JEM's loss (section 3, equation 6, with Du & Mordatch's penalty on energies) and its parts.

    logits: real images' (N, K) with labels y (N,); logits_sampled: negative samples' (M, K), or None for a plain
    classifier. Minimising ``loss/generative`` raises log p(x) of real images against samples.
    """
    classification = F.cross_entropy(logits, y)
    real = log_density(logits)
    parts = {
        "loss/classification": classification,
        "accuracy/train": (logits.argmax(1) == y).float().mean(),
        "log_density/real": real.mean(),
        "log_density/real_std": real.std(correction=0),
    }
    loss = p_y_x_weight * classification
    if logits_sampled is not None:
        sampled = log_density(logits_sampled)
        generative = sampled.mean() - real.mean()
        loss = loss + p_x_weight * generative
        parts |= {
            "loss/generative": generative,
            "log_density/sampled": sampled.mean(),
            "log_density/sampled_std": sampled.std(correction=0),
            "sgld/classes": class_counts(logits_sampled),
        }
        real = torch.cat([real, sampled])
    loss = loss + energy_l2 * real.square().mean()
    return loss, {"loss/total": loss, **parts}


def class_counts(logits: Tensor) -> Tensor:
    """How many of N images each class is the most likely of, int64 (K,). Bincount would wait for the device."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return (logits.argmax(1) == classes[:, None]).sum(1)
