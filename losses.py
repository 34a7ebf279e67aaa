"""The JEM loss: from logits to a number and its parts. Pure functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Logits, log_density


def joint_loss(
    cfg: Any,
    logits: Logits,
    y: Tensor,
    y_sampled: Tensor | None = None,
    class_weights: Tensor | None = None,
    y_real: Tensor | None = None,
    energy_l2: float = 0.0,
    mean_over_processes: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of JEM (section 4: log p(x) + log p(y|x)) and its family, and its parts.

    Where there are such images, each of these parts is measured; ``--generative`` and the weights say which count:

    - ``loss/classification``: the cross-entropy of p(y|x);
    - ``loss/generative``: mean log p(x) of samples minus that of real images;
    - ``loss/logistic``: the binary cross-entropy of telling them apart by the sigmoid of log p(x) (DAT);
    - ``loss/joint``: mean log p(x, y) of samples minus that of labelled images;
    - ``loss/outliers``: mean of softplus(log p(outlier) - log p(real) + ``outlier_margin``) over all pairs (outlier
      exposure for energies: Liu et al., NeurIPS 2020, there with squared hinges).

    The penalties keep log-densities small: ``energy_l2`` the mean square, real and sampled (Du & Mordatch, NeurIPS
    2019), ``mean_energy_l2`` the squares of the two means, over all processes' images (M-JEM, section 3), or with
    ``mean_energy_form`` "real_squares" the mean square of real images (M-JEM's code).

    Args:
        cfg: a Config, or anything with its options generative and the weights.
        logits: of N labelled images, P real ones for log p(x), M samples and Q outliers.
        y: the labels, int64 (N,).
        y_sampled: the class of each sample, int64 (M,), or None where samples are of log p(x).
        class_weights: float (K,), how much a sample of each class counts, where ``y_sampled`` names the classes: there
            are as many chains for each class, but the data may have more images of one than of another.
        y_real: the classes of the P real images. With them and ``y_sampled``, ``sgld/auroc`` is by log p(x, y), which
            chains of p(x|y) climb; or else by log p(x). Used for nothing else.
        energy_l2: the weight of that penalty now; after a divergence it may be larger than ``cfg.energy_l2``.
        mean_over_processes: gives a tensor's mean over all processes.

    Returns the loss, and measurements by name: numbers, 0-dim, and counts of classes, int64 (K,).
    """
    classification = F.cross_entropy(logits.labelled, y)
    loss = cfg.p_y_x_weight * classification
    real = log_density(logits.real)
    parts = {
        "loss/classification": classification,
        "accuracy/train": (logits.labelled.argmax(1) == y).float().mean(),
        "log_density/real": real.mean(),
        "log_density/real_std": real.std(correction=0),
    }
    if logits.sampled is not None:
        sampled = log_density(logits.sampled)
        weights = torch.ones_like(sampled)
        if y_sampled is not None and class_weights is not None:
            weights = class_weights[y_sampled]
        mean_sampled = (weights * sampled).mean()
        if y_sampled is not None:  # weights are 1 on average over all classes, not over those of this step's samples
            mean_weight = mean_over_processes(weights.mean())
            mean_sampled = mean_sampled + (1 - mean_weight) * real.mean()  # a constant in log p(x) cancels in the gap
        gap = mean_sampled - real.mean()
        logistic = 0.5 * (F.softplus(-real).mean() + (weights * F.softplus(sampled)).mean())
        loss = loss + cfg.p_x_weight * (logistic if cfg.generative == "logistic" else gap)
        loss = loss + energy_l2 * torch.cat([real, sampled]).square().mean()
        if cfg.mean_energy_l2:
            of_real, of_sampled = mean_over_processes(torch.stack([real.mean(), mean_sampled])).square()
            if cfg.mean_energy_form == "real_squares":
                of_real = real.square().mean()
            loss = loss + cfg.mean_energy_l2 * (of_real + of_sampled)
        climbed = real, sampled
        if y_sampled is not None and y_real is not None:
            climbed = log_density(logits.real, y_real), log_density(logits.sampled, y_sampled)
        parts |= {
            "loss/generative": gap,
            "loss/logistic": logistic,
            "sgld/auroc": auroc(*climbed, weights).float(),
            "log_density/sampled": mean_sampled,
            "log_density/sampled_std": sampled.std(correction=0),
            "sgld/classes": (logits.sampled == logits.sampled.amax(1, keepdim=True)).sum(0),  # bincount synchronises
        }
    if y_sampled is not None:
        joint_sampled = (weights * log_density(logits.sampled, y_sampled)).mean()
        joint = joint_sampled - mean_weight * log_density(logits.labelled, y).mean()
        loss = loss + cfg.p_x_y_weight * joint
        parts |= {"loss/joint": joint, "accuracy/sampled": (logits.sampled.argmax(1) == y_sampled).float().mean()}
    if logits.outliers is not None:
        outliers = log_density(logits.outliers)
        outlier_loss = F.softplus(outliers[:, None] - real + cfg.outlier_margin).mean()  # (Q, P) pairs
        loss = loss + cfg.outlier_weight * outlier_loss
        parts |= {"loss/outliers": outlier_loss, "log_density/outliers": outliers.mean()}
        parts["outliers/auroc"] = auroc(real, outliers).float()
    return loss, parts


def auroc(real: Tensor, sampled: Tensor, weights: Tensor | None = None) -> Tensor:
    """The probability that a real image's log p(x), (N,), exceeds a sample's, (M,), drawn by weight; ties: half."""
    ordered, order = sampled.detach().sort()
    weights = torch.ones_like(ordered) if weights is None else weights[order]
    total = F.pad(weights.double().cumsum(0), (1, 0))  # of the samples before each place, (M + 1,)
    real = real.detach()
    below = total[torch.searchsorted(ordered, real)]
    below_or_equal = total[torch.searchsorted(ordered, real, right=True)]
    return (below + below_or_equal).mean() / (2 * total[-1])
