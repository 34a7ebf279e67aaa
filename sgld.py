"""Stochastic gradient Langevin dynamics and its replay buffer.

All it knows of a network is a function ``log_density(x)`` or ``log_density(x, y)`` that returns (N,). Images are
float32 (N, C, H, W); fresh chains start in [-1, 1] and may leave it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from acceleration import CompiledOrEager, CUDAGraphStep
from pgd import l2_norms

LogDensity = Callable[..., Tensor]
ChainInit = Callable[[Sequence[int], Generator], Tensor]  # fresh images of given classes; see chain_init.py


class Chain(NamedTuple):
    x: Tensor  # the chains' end, float32 (N, C, H, W)
    grad: Tensor  # d log_density / dx at the last step's start, same shape


def uniform_images(n: int, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """Fresh chain starts: uniform in [-1, 1], float32 (n, C, H, W) in channels_last memory."""
    c, h, w = shape
    return torch.rand(n, h, w, c, generator=generator, device=generator.device).mul_(2).sub_(1).permute(0, 3, 1, 2)


def normal_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise in the shape and memory format of ``x``, a channels_last (N, C, H, W)."""
    n, c, h, w = x.shape  # drawn as (N, H, W, C): filling a channels_last tensor takes ten times longer on a CPU
    return torch.randn(n, h, w, c, generator=generator, device=x.device).permute(0, 3, 1, 2)


def langevin_step(
    x: Tensor,
    grad: Tensor,
    noise: Tensor,
    step_size: float | Tensor,
    noise_std: float | Tensor,
    grad_clamp: float | None = None,
    clamp: bool = False,
    normalize: bool = False,
) -> Tensor:
    """The Langevin step of all chains: x + step_size * grad + noise_std * noise (JEM, equation 3).

    x: images; grad: d log_density / dx; noise: standard normal; all float32 (N, C, H, W). With ``normalize`` the
    gradient of each image gets L2 norm 1 (DAT), with ``grad_clamp`` it is clamped in each pixel; ``clamp`` keeps images
    in [-1, 1] (both JEM++, section 4.1).
    """
    if normalize:
        grad = grad / l2_norms(grad)
    if grad_clamp is not None:
        grad = grad.clamp(-grad_clamp, grad_clamp)
    x = x + step_size * grad + noise_std * noise
    return x.clamp(-1, 1) if clamp else x


def input_gradient(log_density: LogDensity, x: Tensor, y: Tensor | None) -> Tensor:
    """d log_density / dx, of the shape of x (N, C, H, W); with y also that of log p(x|y): p(y) does not depend on x."""

    def total(x: Tensor) -> Tensor:
        return (log_density(x) if y is None else log_density(x, y)).sum()

    if torch.compiler.is_compiling():  # it takes this form whole; run eagerly, the form below is faster and smaller
        return torch.func.grad(total)(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(total(x), x)[0]


class SGLD:
    """Runs chains of ``langevin_step``: compiled where asked, and each step replayed as a CUDA graph on a GPU.

    A graph reads the weights where they were when it was captured, so they must be updated in place. A network that
    communicates with other processes needs ``capture`` False: no graphs. Chains never synchronise with the device.
    ``limits``: those of each step, by the names that ``langevin_step`` gives them.
    """

    def __init__(self, log_density: LogDensity, *, compile: bool = False, capture: bool = True, **limits: Any):
        self.capture = capture

        def step(x: Tensor, y: Tensor | None, noise: Tensor, size: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
            grad = input_gradient(log_density, x, y)  # no self: graphs and their memory go when the engine goes
            return langevin_step(x, grad, noise, size, std, **limits), grad

        self.step = CompiledOrEager(step) if compile else step
        self.graphs: dict[tuple, CUDAGraphStep] = {}

    @torch.no_grad()
    def __call__(
        self, x: Tensor, steps: int, step_size: float, noise_std: float, generator: Generator, y: Tensor | None = None
    ) -> Chain:
        """Run ``steps`` updates from x, float32 (N, C, H, W), on the generator's device; x is left as it is."""
        x = x.contiguous(memory_format=torch.channels_last)
        size, std = torch.full((), step_size, device=x.device), torch.full((), noise_std, device=x.device)
        noise = torch.zeros_like(x)
        grad = noise  # what a chain of 0 steps returns: zeros
        step, use_graph = self.step, self.capture and x.is_cuda
        if use_graph:
            key = (x.shape, y is None)
            if key not in self.graphs:
                self.graphs[key] = CUDAGraphStep(self.step, x, y, noise, size, std)
            step = self.graphs[key]
        for _ in range(steps):
            if noise_std > 0:
                noise = normal_like(x, generator)
            x, grad = step(x, y, noise, size, std)
        if use_graph:  # x and grad are the graph's own memory, which its next replay overwrites
            x, grad = x.clone(), grad.clone()
        return Chain(x, grad)


def chain_options(cfg) -> dict[str, Any]:
    """A Config's limits of each step, as arguments of ``SGLD``."""
    return {"grad_clamp": cfg.sgld_grad_clamp, "clamp": cfg.sgld_clamp, "normalize": cfg.sgld_normalize}


def step_protocol(cfg) -> str:
    """The same in words, with step size and noise."""
    gradient = f", gradient clamped to {cfg.sgld_grad_clamp:g}" if cfg.sgld_grad_clamp else ""
    images = ", images clamped to [-1, 1]" if cfg.sgld_clamp else ""
    length = ", gradients of length 1" if cfg.sgld_normalize else ""
    return f"step size {cfg.sgld_lr:g}, noise {cfg.sgld_std:g}{gradient}{images}{length}"


def annealed_chain(
    sgld: SGLD, x: Tensor, sgld_lr: float, sgld_std: float, rng: Generator, every: int = 1, y: Tensor | None = None
) -> Tensor:
    """A chain of 300 steps from x, float32 (N, C, H, W): x and each ``every``-th state after it, (T, N, C, H, W).

    Ten levels of 30 steps lie evenly in log from 1 to 0.1, as Song & Ermon's (NeurIPS 2019); step size and noise are
    the training chain's times the level's square (theirs: noise times the level). Images stay in [-1, 1].
    """
    frames = [x]
    factors = (torch.logspace(0, -1, 10, dtype=torch.float64) ** 2).repeat_interleave(30)
    for i, factor in enumerate(factors.tolist(), 1):
        x = sgld(x, 1, factor * sgld_lr, factor * sgld_std, rng, y).x.clamp(-1, 1)
        if i % every == 0:
            frames.append(x)
    return torch.stack(frames)


def finite_images(images: Tensor) -> Tensor:
    """Those images (N, C, H, W) of a replay buffer without NaN and infinity, which other programs may have stored."""
    return images[images.isfinite().all(dim=(1, 2, 3))]


class ReplayBuffer:
    """The persistent chains' last images, on the generator's device (JEM, section 4; Du & Mordatch, NeurIPS 2019).

    images: float32 (size, C, H, W); age: int64 (size,), the training chains run since an image was last drawn fresh.
    Image i is of class i * n_classes // size, which matters where draws name classes.
    """

    def __init__(self, size: int, n_classes: int, chain_init: ChainInit, generator: Generator):
        self.n_classes = n_classes
        self.images = chain_init([i * n_classes // size for i in range(size)], generator)
        self.age = torch.zeros(size, dtype=torch.int64, device=generator.device)

    def places_of_classes(self, y: Tensor, generator: Generator) -> Tensor:
        """Different random places for the classes y, int64 (n,), which must be c, c + 1, ... modulo n_classes."""
        size, k, device = len(self.images), self.n_classes, y.device
        order = torch.randperm(size, generator=generator, device=device)
        classes = order * k // size
        order = order[classes.argsort(stable=True)]  # class by class, each in random order
        begin = (torch.arange(k, device=device) * size + k - 1) // k  # where each class begins, ceil(class * size / k)
        n_before = torch.arange(len(y), device=device) // k  # chains of the same class before this one
        return order[begin[y] + n_before]

    def filled_up(self, images: Tensor, n: int) -> Tensor:
        """``images`` (N, C, H, W) and, up to ``n`` in all, images of the buffer, of all classes."""
        n_more = min(max(0, n - len(images)), len(self.images))
        places = torch.arange(n_more) * len(self.images) // max(1, n_more)
        return torch.cat([images, self.images[places]])

    def store(self, index: Tensor, x: Tensor) -> None:
        self.images[index] = x
        self.age[index] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "age": self.age}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images.copy_(state["images"])
        self.age.copy_(state["age"])


@dataclass(eq=False)
class Sampler:
    """A training step's negative samples: chains from the replay buffer, and back into it (JEM, algorithm 1).

    Randomness comes from ``rng``, except how many chains start afresh and of which classes: that is drawn on the host,
    because nothing here synchronises with the device, unless starts are made of training images on the host.
    """

    engine: SGLD
    buffer: ReplayBuffer
    chain_init: ChainInit
    reinit_freq: float
    step_size: float
    noise_std: float
    rng: Generator
    host_rng: random.Random

    def draw(self, n: int, class_cond: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Starts of n chains (n, C, H, W), their places in the buffer (n,) and, with ``class_cond``, classes (n,).

        With probability ``reinit_freq`` a start is fresh.
        """
        k, buffer = self.buffer.n_classes, self.buffer
        n_fresh = sum(self.host_rng.random() < self.reinit_freq for _ in range(n))
        first_class = self.host_rng.randrange(k)
        if class_cond:  # all classes in turn
            fresh_classes = [(first_class + i) % k for i in range(n_fresh)]
            y = (first_class + torch.arange(n, device=self.rng.device)) % k
            index = buffer.places_of_classes(y, self.rng)
        else:
            fresh_classes = [self.host_rng.randrange(k) for _ in range(n_fresh)]
            y = None
            index = torch.randperm(len(buffer.images), generator=self.rng, device=self.rng.device)[:n]
        x = buffer.images[index].contiguous(memory_format=torch.channels_last)
        if n_fresh:  # places in the buffer are random, so the first chains are as good as any
            x[:n_fresh] = self.chain_init(fresh_classes, self.rng)
        buffer.age.index_fill_(0, index[:n_fresh], 0)  # age[...] = 0 would synchronise
        return x, index, y

    def __call__(self, n: int, steps: int, class_cond: bool = False) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """n samples (n, C, H, W), the classes whose p(x|y) they are from, and what the log says of their chains."""
        start, index, y = self.draw(n, class_cond)
        samples, gradient = self.engine(start, steps, self.step_size, self.noise_std, self.rng, y)
        self.buffer.store(index, samples)
        measured = {
            "sgld/gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
            "sgld/distance_moved": (samples - start).flatten(1).norm(dim=1).mean(),
            "sgld/saturated_share": (samples.abs() >= 1).float().mean(),
            "sgld/buffer_age": self.buffer.age.float().mean(),
        }
        return samples, y, measured
