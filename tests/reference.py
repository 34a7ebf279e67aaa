"""What the program computes fast, written down as the papers have it."""

import torch
from torch import Generator, Tensor

from sgld import Chain, LogDensity, normal_like


def reference_chain(
    log_density: LogDensity,
    x: Tensor,
    steps: int,
    step_size: float,
    noise_std: float,
    generator: Generator,
    y: Tensor | None = None,
    grad_clamp: float | None = None,
    clamp: bool = False,
    normalize: bool = False,
) -> Chain:
    """SGLD (JEM, equation 3), step by step, with the random numbers that ``SGLD`` draws from the same generator."""
    grad = torch.zeros_like(x)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        density = log_density(x) if y is None else log_density(x, y)
        (grad,) = torch.autograd.grad(density.sum(), x)
        limited = grad / (grad.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-12) if normalize else grad
        if grad_clamp is not None:
            limited = limited.clamp(-grad_clamp, grad_clamp)
        x = x.detach() + step_size * limited + noise_std * normal_like(x, generator)
        if clamp:
            x = x.clamp(-1, 1)
    return Chain(x.detach(), grad)
