"""What the program computes fast, written down as the papers have it."""

import torch

from sgld import Chain, normal_like


def reference_chain(
    log_density, x, steps, step_size, noise_std, generator, y=None, grad_clamp=None, clamp=False, normalize=False
):
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
