"""Images changed a little, so that a function of them becomes as large as it can."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

NORMS = ("L2", "Linf")


def adversarial_images(
    logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, radius: float, norm: str, steps: int
) -> Tensor:
    """What makes the classifier most wrong: ``pgd`` on the cross-entropy with the labels y, int64 (N,)."""
    return pgd(lambda x: F.cross_entropy(logits(x), y, reduction="sum"), x, radius, norm, steps)


def pgd(
    function: Callable[[Tensor], Tensor], x: Tensor, radius: float, norm: str, steps: int, start: Tensor | None = None
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018) on the sum of a function of each image.

    Nothing waits for the device.

    Args:
        function: of images, with that sum as its value.
        x: float32 (N, C, H, W) in [-1, 1].
        radius: of the ball around each image, on the [-1, 1] scale; norm: "L2" or "Linf".
        start: what is added to x at first, inside the ball (default: nothing).

    Returns:
        Images like x, inside the ball and [-1, 1].
    """
    step_size = 2.5 * radius / steps
    change = torch.zeros_like(x) if start is None else (x + start).clamp(-1, 1) - x
    for _ in range(steps):
        change.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(function(x + change), change)
        change = change.detach()
        if norm == "L2":
            change = change + step_size * gradient / l2_norms(gradient)
            change = change * (radius / l2_norms(change)).clamp(max=1)
        else:
            change = (change + step_size * gradient.sign()).clamp(-radius, radius)
        change = (x + change).clamp(-1, 1) - x
    return x + change


def random_start(x: Tensor, radius: float, norm: str, generator: Generator) -> Tensor:
    """A random start inside the ball for images x (N, C, H, W): uniform in it for "Linf"; for "L2" in a uniform
    direction, at a uniform distance."""
    if norm == "Linf":
        return radius * (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1)
    direction = torch.randn(x.shape, generator=generator, device=x.device)
    distance = radius * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return distance * direction / l2_norms(direction)


def l2_norms(x: Tensor) -> Tensor:
    """The L2 norm of each image, (N, 1, 1, 1), and a little more than 0."""
    return x.flatten(1).norm(dim=1)[:, None, None, None] + 1e-12
