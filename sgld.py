"""Stochastic gradient Langevin dynamics and its replay buffer.

Knows tensors and a callable ``log_density(x)`` or ``log_density(x, y)`` that returns (N,), nothing else. Images are
float32 (N, C, H, W); chains start in [-1, 1] and may leave it.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acceleration import CompiledOrEager, CUDAGraphStep

LogDensity = Callable[..., Tensor]
ChainInit = Callable[[Sequence[int], torch.Generator], Tensor]  # fresh images of given classes; see starts.py


class Chain(NamedTuple):
    x: Tensor  # the chains' end, float32 (N, C, H, W)
    grad: Tensor  # d log_density / dx at the last step's start, same shape


def uniform_images(n: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Fresh chain starts: uniform in [-1, 1], float32 (n, C, H, W) in channels_last memory."""
    c, h, w = shape
    x = torch.rand(n, h, w, c, generator=generator, device=generator.device)
    return x.mul_(2).sub_(1).permute(0, 3, 1, 2)


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise in the shape and memory format of ``x``, a channels_last (N, C, H, W).

    Drawn into a contiguous (N, H, W, C): filling a channels_last tensor takes ten times longer on a CPU.
    """
    n, c, h, w = x.shape
    return torch.randn(n, h, w, c, generator=generator, device=x.device).permute(0, 3, 1, 2)


def input_gradient(log_density: LogDensity, x: Tensor, y: Tensor | None) -> Tensor:
    """d log_density / dx, of the shape of x (N, C, H, W)."""
    given = () if y is None else (y,)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_density(x, *given).sum(), x)[0]


def traceable_input_gradient(log_density: LogDensity, x: Tensor, y: Tensor | None) -> Tensor:
    """The same in the form that torch.compile takes whole; run eagerly it is slower and needs 1.5 times the memory."""
    given = () if y is None else (y,)
    return torch.func.grad(lambda x: log_density(x, *given).sum())(x)


def reference_chain(
    log_density: LogDensity,
    x: Tensor,
    steps: int,
    step_size: float,
    noise_std: float,
    generator: torch.Generator,
    y: Tensor | None = None,
    grad_clamp: float | None = None,
    clamp: bool = False,
    normalize: bool = False,
) -> Chain:
    """SGLD as one reads it in the papers: what ``SGLD`` must agree with, given the same generator state."""
    grad = torch.zeros_like(x)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        density = log_density(x) if y is None else log_density(x, y)
        (grad,) = torch.autograd.grad(density.sum(), x)
        if normalize:
            grad = grad / (grad.flatten(1).norm(dim=1)[:, None, None, None] + 1e-12)
        if grad_clamp is not None:
            grad = grad.clamp(-grad_clamp, grad_clamp)
        x = x.detach() + step_size * grad + noise_std * normal_like(x, generator)
        if clamp:
            x = x.clamp(-1, 1)
    return Chain(x.detach(), grad)


class SGLD:
    """The same chains, fast: the whole step compiled where asked, and replayed as a CUDA graph on a GPU.

    ``grad_clamp`` limits the gradient in each pixel and ``clamp`` keeps images in [-1, 1] (JEM++, section 4.1);
    ``normalize`` brings each image's gradient to length 1 (DAT). A graph reads the weights where they were when it was
    captured, so they must be updated in place; ``capture`` False uses no graphs, which a network needs that
    communicates with other processes. Nothing in a chain waits for the device.
    """

    def __init__(
        self,
        log_density: LogDensity,
        grad_clamp: float | None = None,
        clamp: bool = False,
        normalize: bool = False,
        compile: bool = False,
        capture: bool = True,
    ):
        def step(x, y, noise, step_size, noise_std, gradient=input_gradient):  # JEM, equation 2
            grad = gradient(log_density, x, y)
            if normalize:
                grad = grad / (grad.flatten(1).norm(dim=1)[:, None, None, None] + 1e-12)
            if grad_clamp is not None:
                grad = grad.clamp(-grad_clamp, grad_clamp)
            x = x + step_size * grad + noise_std * noise
            return x.clamp(-1, 1) if clamp else x, grad

        def traceable(*inputs):
            return step(*inputs, traceable_input_gradient)

        self.step, self.capture = CompiledOrEager(traceable, fallback=step) if compile else step, capture
        self.graphs: dict[tuple, CUDAGraphStep] = {}

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        steps: int,
        step_size: float,
        noise_std: float,
        generator: torch.Generator,
        y: Tensor | None = None,
    ) -> Chain:
        """Run ``steps`` >= 1 updates from x, float32 (N, C, H, W), on the generator's device; x is left as it is."""
        x = x.contiguous(memory_format=torch.channels_last)
        size, std = (torch.full((), value, device=x.device) for value in (step_size, noise_std))
        capture = self.capture and x.is_cuda
        step = self.captured(x, y, size, std) if capture else self.step
        no_noise = torch.zeros_like(x) if noise_std == 0 else None
        for _ in range(steps):
            x, grad = step(x, y, normal_like(x, generator) if no_noise is None else no_noise, size, std)
        return Chain(x.clone(), grad.clone()) if capture else Chain(x, grad)  # the next replay overwrites a graph's

    def captured(self, x: Tensor, y: Tensor | None, size: Tensor, std: Tensor) -> CUDAGraphStep:
        key = (x.shape, y is None)
        if key not in self.graphs:
            self.graphs[key] = CUDAGraphStep(self.step, x, y, torch.zeros_like(x), size, std)
        return self.graphs[key]


def chain_options(cfg) -> dict[str, Any]:
    """What a Config says of each step of a chain, as arguments of ``SGLD``."""
    return {"grad_clamp": cfg.sgld_grad_clamp, "clamp": cfg.sgld_clamp, "normalize": cfg.sgld_normalize}


def step_protocol(cfg) -> str:
    """The same in words, with step size and noise."""
    words = [f"step size {cfg.sgld_lr:g}, noise {cfg.sgld_std:g}"]
    words += [f"gradient clamped to {cfg.sgld_grad_clamp:g}"] if cfg.sgld_grad_clamp else []
    words += ["images clamped to [-1, 1]"] if cfg.sgld_clamp else []
    words += ["gradients of length 1"] if cfg.sgld_normalize else []
    return ", ".join(words)


def annealed_chain(
    sgld: SGLD,
    x: Tensor,
    sgld_lr: float,
    sgld_std: float,
    generator: torch.Generator,
    every: int = 1,
) -> Tensor:
    """A chain of 300 steps from x, float32 (N, C, H, W): x and each ``every``-th state after it, (T, N, C, H, W).

    Ten levels of 30 steps lie evenly in log from 1 to 0.1; the step size is 0.01 * (level / 0.1)^2 and keeps the
    training chain's ratio of noise to step size (the annealing of Song & Ermon, NeurIPS 2019). Clamped to [-1, 1] after
    each step.
    """
    frames = [x]
    sizes = (0.01 * (torch.logspace(0, -1, 10, dtype=torch.float64) / 0.1) ** 2).repeat_interleave(30)
    for i, step_size in enumerate(sizes.tolist(), 1):
        x = sgld(x, 1, step_size, step_size * sgld_std / sgld_lr, generator).x.clamp(-1, 1)
        if i % every == 0:
            frames.append(x)
    return torch.stack(frames)


def finite_images(images: Tensor) -> Tensor:
    """Those of the images (N, C, H, W) of a replay buffer that hold neither NaN nor infinity; a chain may leave one."""
    return images[images.isfinite().all(dim=(1, 2, 3))]


class ReplayBuffer:
    """The persistent chains' last images, on the generator's device (JEM, section 4; Du & Mordatch, NeurIPS 2019).

    images: float32 (size, C, H, W); age: int64 (size,), the training chains run since an image was last drawn fresh.
    Image i is of class i * n_classes // size, which matters where draws name classes.
    """

    def __init__(self, size: int, n_classes: int, start: ChainInit, generator: torch.Generator):
        self.n_classes = n_classes
        self.images = start([i * n_classes // size for i in range(size)], generator)
        self.age = torch.zeros(size, dtype=torch.int64, device=generator.device)

    def places(self, n: int, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
        """n different random places, int64 (n,); with classes y (n,), of images of these classes.

        There must be at most size // n_classes of a class in y.
        """
        if y is None:
            return torch.randperm(len(self.images), generator=generator, device=generator.device)[:n]
        size, k = len(self.images), self.n_classes
        first = (torch.arange(k, device=y.device) * size + k - 1) // k  # of each class; all have at least size // k
        order = torch.rand(k, size // k, generator=generator, device=y.device).argsort(1)
        of_class = y[:, None] == torch.arange(k, device=y.device)  # (n, K)
        rank = (of_class.cumsum(0) - 1).gather(1, y[:, None])  # which of its class each is, (n, 1)
        return first[y] + order[y].gather(1, rank).squeeze(1)

    def store(self, index: Tensor, x: Tensor) -> None:
        """Put the chains' ends (n, C, H, W) back into their places (n,)."""
        self.images[index] = x
        self.age[index] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "age": self.age}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images.copy_(state["images"])
        self.age.copy_(state["age"])


class Sampler:
    """A training step's negative samples: chains from the replay buffer, and back into it (JEM, algorithm 1).

    All randomness comes from ``rng``, except how many chains start afresh, and of which classes: this must be known
    without waiting for the device, and comes from a generator on the host. Nothing waits for the device.
    """

    def __init__(
        self,
        engine: SGLD,
        buffer: ReplayBuffer,
        start: ChainInit,
        reinit_freq: float,
        step_size: float,
        noise_std: float,
        rng: torch.Generator,
    ):
        self.engine, self.buffer, self.start, self.rng = engine, buffer, start, rng
        self.reinit_freq, self.step_size, self.noise_std = reinit_freq, step_size, noise_std
        self.host_rng = random.Random(rng.initial_seed())

    def reseed(self) -> None:
        """Take the host's randomness from ``rng``'s seed."""
        self.host_rng.seed(self.rng.initial_seed())

    def draw(self, n: int, class_cond: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Starts of n chains (n, C, H, W), their places (n,) and, where asked for, their classes (n,).

        A start is an image of the buffer or, with probability ``reinit_freq``, a fresh one; one that holds a value that
        is not finite is replaced by noise. Classes are as many of each as can be.
        """
        k, buffer = self.buffer.n_classes, self.buffer
        fresh = sum(self.host_rng.random() < self.reinit_freq for _ in range(n))
        shift, y = self.host_rng.randrange(k), None
        if class_cond:
            classes = [(i + shift) % k for i in range(fresh)]
            y = (torch.arange(n, device=self.rng.device) + shift) % k
        else:
            classes = [self.host_rng.randrange(k) for _ in range(fresh)]
        index = buffer.places(n, self.rng, y)
        x = buffer.images[index].contiguous(memory_format=torch.channels_last)
        finite = x.isfinite().all(dim=(1, 2, 3))
        x = torch.where(finite[:, None, None, None], x, uniform_images(n, x.shape[1:], self.rng))
        x[:fresh] = self.start(classes, self.rng)
        buffer.age[index] *= finite
        buffer.age.index_fill_(0, index[:fresh], 0)  # age[...] = 0 would wait for the device
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

    def state_dict(self) -> dict[str, Any]:
        return {"host_rng": self.host_rng.getstate()}  # the buffer has a state of its own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.host_rng.setstate(state["host_rng"])
