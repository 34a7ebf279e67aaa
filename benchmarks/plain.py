"""The loop that everybody writes, as the yardstick: fp32, NCHW, eager, one forward pass for each term of the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_sampler(model: nn.Module, x: Tensor, steps: int, step_size: float, noise_std: float) -> Tensor:
    """SGLD with mode switches, a graph retained at each step, and parameters that ask for gradients."""
    model.eval()
    x = x.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), [x], retain_graph=True)
        x.data += step_size * gradient + noise_std * torch.randn_like(x)
    model.train()
    return x.detach()


class PlainTraining:
    """A JEM training step on the same network, from a replay buffer on the device."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, buffer_size: int, batch_size: int, steps: int):
        self.model, self.images, self.labels = model, images, labels
        self.batch_size, self.steps = batch_size, steps
        self.buffer = torch.rand(buffer_size, *images.shape[1:], device=images.device) * 2 - 1
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def __call__(self) -> None:
        device = self.images.device
        chosen = torch.randint(len(self.images), (self.batch_size,), device=device)
        x = self.images[chosen].float() / 127.5 - 1
        x = x + 0.03 * torch.randn_like(x)
        places = torch.randint(len(self.buffer), (self.batch_size,), device=device)
        fresh = torch.rand(self.batch_size, 1, 1, 1, device=device) < 0.05
        start = torch.where(fresh, torch.rand_like(x) * 2 - 1, self.buffer[places])
        samples = plain_sampler(self.model, start, self.steps, 1.0, 0.01)
        self.buffer[places] = samples
        generative = self.model(samples).logsumexp(1).mean() - self.model(x).logsumexp(1).mean()
        classification = F.cross_entropy(self.model(x), self.labels[chosen])
        loss = generative + classification
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
