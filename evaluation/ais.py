"""log Z of an energy model by annealed importance sampling, forward and in reverse, and bits per dimension.

``Z`` is the integral of ``exp(log_density(x))`` over [-1, 1]^D. Annealed importance sampling (AIS; Neal, 2001) walks
chains from a base density to the model along ``p_beta ~ base^(1 - beta) exp(beta log_density)``; the mean of their
weights is an unbiased estimate of Z, and its logarithm a stochastic lower bound. The same chains run backwards from
samples of the model give a stochastic upper bound (reverse AIS; Grosse et al. 2015, arXiv:1511.02543); SGLD's follow a
much colder density, so a burn-in moves them towards temperature one first. ``log_density`` maps (N, ...) to (N,), each
row on its own, without randomness, bf16 or TF32.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from models.predict import images_per_batch
from sgld import LogDensity
from utils import UserError

Move = tuple["Point", Tensor]
CHAIN_BATCH = 250  # points of 32x32 pixels whose gradient is computed at once
N_LEAPFROG = 3  # steps of a proposal
ACCEPTED = 0.8  # share of the proposals, at which step sizes aim
TUNING_CHAINS, TUNING_STEPS = 64, 10  # at most; at each temperature that the tuning visits


class Box(NamedTuple):
    """The uniform density on [-1, 1]^D; ``shape`` is that of one image.

    Chains walk in y = artanh(x), where the uniform density is a logistic one and there are no walls: to bounce off
    walls would cost tiny steps where pixels crowd a wall, as the background of digits does.
    """

    shape: tuple[int, ...]

    def sample(self, n: int, generator: Generator) -> Tensor:
        u = torch.rand(n, *self.shape, generator=generator, device=generator.device)
        return 0.5 * u.logit(eps=torch.finfo(u.dtype).eps)  # (n, *shape)

    def log_prob(self, y: Tensor) -> Tensor:
        return (logsigmoid(2 * y) + logsigmoid(-2 * y) + math.log(2)).flatten(1).sum(1)  # log((1 - tanh(y)^2) / 2)

    def score(self, y: Tensor) -> Tensor:
        return -2 * y.tanh()

    def log_ratio(self, log_density: LogDensity, y: Tensor) -> Tensor:
        return log_density(y.tanh()) + math.prod(self.shape) * math.log(2)  # dx/dy is in both and cancels

    def from_image(self, x: Tensor) -> Tensor:
        return x.clamp(-1 + 1e-6, 1 - 1e-6).atanh()  # the walls themselves are infinitely far away


class Point(NamedTuple):
    """Where the chains are in the base's coordinates, with what is expensive to compute there."""

    y: Tensor  # (N, ...)
    ratio: Tensor  # (N,), log of model over base
    grad: Tensor  # (N, ...), d ratio / dy


class GeometricPath(NamedTuple):
    """log p_beta = log base + beta log(model / base): the base at beta = 0, the model at beta = 1."""

    log_density: LogDensity
    base: Box
    betas: list[float] = [0.0, 1.0]  # ascending, T + 1

    def point(self, y: Tensor) -> Point:
        ratios, grads = [], []
        for part in y.detach().split(images_per_batch(CHAIN_BATCH, y.shape[1:])):
            with torch.enable_grad():
                part = part.requires_grad_()
                ratio = self.base.log_ratio(self.log_density, part)
                grads += torch.autograd.grad(ratio.sum(), part)
            ratios.append(ratio.detach())
        return Point(y.detach(), torch.cat(ratios), torch.cat(grads))

    def log_prob(self, at: Point, beta: float) -> Tensor:
        return self.base.log_prob(at.y) + beta * at.ratio  # (N,), unnormalised

    def score(self, at: Point, beta: float) -> Tensor:
        return self.base.score(at.y) + beta * at.grad  # (N, ...)


def leapfrog(path: GeometricPath, at: Point, v: Tensor, beta: float, step_size: Tensor, n_leapfrog: int) -> Move:
    """Hamiltonian dynamics with unit mass (Neal 2011, "MCMC using Hamiltonian dynamics", section 2.3).

    It preserves volume; from the end, with ``-v``, it leads back to the start. ``step_size`` broadcasts to y.
    """
    for _ in range(n_leapfrog):
        v = v + 0.5 * step_size * path.score(at, beta)
        at = path.point(at.y + step_size * v)
        v = v + 0.5 * step_size * path.score(at, beta)
    return at, v


def hmc_step(path: GeometricPath, at: Point, beta: float, step_size: Tensor, generator: Generator) -> Move:
    """One Hamiltonian Monte Carlo transition (Neal 2011, section 3.2) that leaves p_beta invariant.

    Each chain draws its step size within 40 % of ``step_size`` (), so that trajectories do not all return to their
    start. A proposal where the density is NaN is rejected. Returns the new point and acceptance probabilities, (N,).
    """
    draw = {"generator": generator, "device": at.y.device, "dtype": at.y.dtype}
    jitter = 0.6 + 0.8 * torch.rand(len(at.y), *[1] * (at.y.dim() - 1), **draw)  # (N, 1, ...)
    v = torch.randn(at.y.shape, **draw)
    new, new_v = leapfrog(path, at, v, beta, step_size * jitter, N_LEAPFROG)
    kinetic_loss = 0.5 * (v.square() - new_v.square()).flatten(1).sum(1)
    p_accept = (path.log_prob(new, beta) - path.log_prob(at, beta) + kinetic_loss).exp().clamp(max=1).nan_to_num(0)
    accept = torch.rand(len(at.y), **draw) < p_accept
    kept = (torch.where(accept.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, at, strict=True))
    return Point(*kept), p_accept


def sigmoid_schedule(n_temperatures: int) -> list[float]:
    """``n_temperatures + 1`` values of beta from 0 to 1, denser near both ends (Grosse et al. 2015)."""
    t = torch.linspace(-4, 4, n_temperatures + 1, dtype=torch.float64).sigmoid()
    return ((t - t[0]) / (t[-1] - t[0])).tolist()


def tune_step_sizes(path: GeometricPath, n_chains: int, n_knots: int, generator: Generator) -> Tensor:
    """HMC step sizes, (T,), at which about ``ACCEPTED`` of the proposals are accepted, but none above 2.

    There leapfrog on a Gaussian of standard deviation 1 becomes unstable (the box has 0.91). A run of its own: step
    sizes that followed the weighted chains would bias their weights. ``n_knots`` temperatures, interpolated between.
    """
    n_temperatures, log_max = len(path.betas) - 1, math.log(2)
    knots = np.linspace(0, n_temperatures - 1, min(n_knots, n_temperatures)).astype(int)
    at = path.point(path.base.sample(min(n_chains, TUNING_CHAINS), generator))
    log_step = torch.full((), log_max - 0.25 * math.log(math.prod(path.base.shape)), device=at.y.device)
    tuned = []
    for knot in knots:
        visited = []
        for _ in range(TUNING_STEPS):
            visited.append(log_step)
            at, p_accept = hmc_step(path, at, path.betas[knot + 1], log_step.exp(), generator)
            log_step = (log_step + p_accept.mean() - ACCEPTED).clamp(max=log_max)
        tuned.append(torch.stack(visited[TUNING_STEPS // 2 :]).mean())
    curve = np.interp(np.arange(n_temperatures), knots, torch.stack(tuned).cpu())
    return torch.tensor(np.exp(curve), dtype=torch.float32, device=at.y.device)


class AISResult(NamedTuple):
    """Estimates of log Z in nats, and what is needed to judge them (no interval: all of few chains may miss much)."""

    log_weights: Tensor  # (T, N) float64 on the CPU, of the chains between the base and each p_beta
    sign: int  # forward 1: mean exp(w) estimates Z; reverse -1: mean exp(-w) estimates 1/Z
    acceptance: Tensor  # (T,), mean HMC acceptance probability at each temperature, base first

    def log_z(self) -> Tensor:
        """log Z of each p_beta but the base, (T,); the last is the model's."""
        return self.sign * ((self.sign * self.log_weights).logsumexp(1) - math.log(self.log_weights.shape[1]))

    def ess(self) -> float:
        """Effective number of chains at the model, between 1 and N: (sum w)^2 / sum w^2."""
        log_w = self.sign * self.log_weights[-1]
        return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().item()


def anneal(path: GeometricPath, y: Tensor, step_sizes: Tensor, generator: Generator, sign: int = 1) -> AISResult:
    """One chain from each of y (N, ...): from samples of the base to the model or, with sign -1, back from the model's.

    Stochastic bounds: P(estimate > log Z + b) < exp(-b), in reverse P(estimate < log Z - b) < exp(-b). ``step_sizes``
    (T,) are of ``tune_step_sizes``; costs ``N_LEAPFROG * T`` gradients a chain. UserError if the density is not finite.
    """
    betas, at = path.betas, path.point(y)
    weight_steps = torch.zeros(len(step_sizes), len(y), dtype=torch.float64, device=y.device)
    acceptance = torch.zeros(len(step_sizes), device=y.device)
    name = "AIS" if sign > 0 else "reverse AIS"
    for t in tqdm(range(len(step_sizes))[::sign], desc=name, leave=False):
        before = at.ratio
        at, p_accept = hmc_step(path, at, betas[t + 1], step_sizes[t], generator)
        weight_steps[t] = (betas[t + 1] - betas[t]) * (before if sign > 0 else at.ratio).double()
        acceptance[t] = p_accept.mean()
    if not weight_steps.isfinite().all():
        raise UserError(f"{name}: the log density is not finite on some chains; check the model's weights")
    return AISResult(weight_steps.cumsum(0).cpu(), sign, acceptance.cpu())


def burn_in(path: GeometricPath, y: Tensor, steps: int, step_size: Tensor, generator: Generator) -> Tensor:
    """y (N, ...) after HMC transitions on the model itself."""
    at = path.point(y)
    for _ in tqdm(range(steps), desc="burn-in", leave=False):
        at, _ = hmc_step(path, at, path.betas[-1], step_size, generator)
    return at.y


def dequantise(grey: Tensor, levels: int, generator: Generator) -> Tensor:
    """Integers 0..levels-1 -> floats in the box [-1, 1], uniform within each grey level's cell; any shape."""
    return 2 * (grey + torch.rand(grey.shape, generator=generator, device=grey.device)) / levels - 1


def bits_per_dim(log_px: Tensor, dim: int, levels: int) -> Tensor:
    """Upper bound of -log2 P(image) / dim of images with ``levels`` grey levels (Theis et al. 2016, section 3.1).

    ``log_px``: normalised log density, in nats, of images from ``dequantise``, whose cells have volume (2/levels)^dim.
    """
    return -(log_px / dim + math.log(2 / levels)) / math.log(2)
