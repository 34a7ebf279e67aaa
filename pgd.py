"""Projected gradient ascent (PGD) in an L2 or Linf ball around images."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

NORMS = ("L2", "Linf")


def adversarial_images(
    logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, radius: float, norm: str, steps: int, **options: Any
) -> Tensor:
    """Adversarial examples: ``pgd`` on the classifier's cross-entropy with the labels y, int64 (N,)."""
    return pgd(lambda x: F.cross_entropy(logits(x), y, reduction="sum"), x, radius, norm, steps, **options)


def pgd(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    radius: float,
    norm: str,
    steps: int,
    offset: Tensor | None = None,
    step_size: float | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018). Never synchronises with the device.

    function: what is to grow: the sum of a value of each image. x: float32 (N, C, H, W). radius: of the ball around
    each image, on the [-1, 1] scale. norm: "L2" or "Linf". offset: added to x before the first step, inside the ball.
    step_size: by default 2.5 radius / steps. Returns images in the ball and, but for x's own noise beyond, in [-1, 1].
    """
    step_size = 2.5 * radius / max(steps, 1) if step_size is None else step_size
    low, high = x.clamp(max=-1), x.clamp(min=1)  # [-1, 1], wider where x itself is outside
    change = torch.zeros_like(x) if offset is None else (x + offset).clamp(low, high) - x
    for _ in range(steps):
        at = (x + change).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(function(at), at)
        if norm == "L2":
            gradient = gradient / gradient.abs().amax((1, 2, 3), True).clamp(min=1e-38)  # squares of a tiny one are 0
            change = change + step_size * gradient / l2_norms(gradient)
            change = change * (radius / l2_norms(change)).clamp(max=1)
        else:
            change = (change + step_size * gradient.sign()).clamp(-radius, radius)
        change = (x + change).clamp(low, high) - x
    return x + change


def random_offset(x: Tensor, radius: float, norm: str, generator: Generator) -> Tensor:
    """Random offsets in the ball, like x (N, C, H, W): "Linf" uniform in it; "L2" uniform in direction and distance."""
    if norm == "Linf":
        return radius * (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1)
    direction = torch.randn(x.shape, generator=generator, device=x.device)
    return radius * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) * direction / l2_norms(direction)


def l2_norms(x: Tensor) -> Tensor:
    """The L2 norm of each image, (N, 1, 1, 1), a little more than 0, so that one can divide by it."""
    return x.flatten(1).norm(dim=1)[:, None, None, None] + 1e-12
