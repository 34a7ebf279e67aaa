"""Bits per dimension of test images, by annealed importance sampling (ais.py).

log p(x) counts up to a constant and, in effect, up to a factor, since chains of training follow exp(log p(x) / T) at a
T far below 1. So bits are measured at T = 1 and at the T that suits images that are not measured.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from data import Split
from evaluation import ais
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from models import log_density
from models.predict import predict

AIS_BURN_IN = 200  # HMC steps
LOWEST, HIGHEST = 2.0**-4, 2.0**14  # inverse temperatures, of which the best is looked for
BOUNDS = {
    "forward": "stochastic lower bound",
    "reverse": f"backwards from images of the buffer after {AIS_BURN_IN} HMC steps; stochastic upper bound",
}
LARGEST_GAP = 0.1  # bits per dimension between two estimates that still say something
MAX_VALUES = 4096  # values of an image: covariances of more take gigabytes


class Curves(NamedTuple):
    """Bits per dimension of exp(log p(x) / T), (T,) each, by inverse temperature 1/T, ascending."""

    betas: np.ndarray
    bits: dict[str, np.ndarray]  # by the estimate of log Z that they rest on; bounds at the last 1/T

    def best(self) -> float:
        """The 1/T with the fewest bits by the worse estimate, rounded to three digits.

        Only of those before they are ``LARGEST_GAP`` apart: at colder T no chain arrives, and either may be too low.
        """
        forward, reverse = self.bits.values()
        near = np.logical_and.accumulate(np.abs(reverse - forward) <= LARGEST_GAP)
        best = np.where(near, np.maximum(forward, reverse), np.inf).argmin()  # the first if none is near
        return float(f"{self.betas[best]:.3g}")


def measure(inputs: EvalInputs, section: Section) -> None:
    """log Z and bits per dimension of exp(log p(x) / T), for T = 1 and for the T that suits other images."""
    levels = 17 if inputs.cfg.dataset == "digits" else 256  # their loader spreads the digits' 17 over 0..255
    data, rng = inputs.data, inputs.rng()

    def log_p(split: Split) -> Tensor:
        x = ais.dequantise((split.images * ((levels - 1) / 255)).round(), levels, rng)
        return log_density(predict(inputs.model, x))

    note = "The forward estimate makes the bits look too good and the reverse one too bad: the truth lies between them "
    section.note(note + "as far as the reverse chains, begun in the buffer, have reached that density.")
    test = inputs.subset(data.test)
    add_gaussian(inputs, section, test, levels)
    name, others = ("validation", data.valid) if len(data.valid) else ("training", data.train)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # TF32 is too rough
        add_bits(inputs, section, 1.0, log_p(test), levels, rng)
        if not len(others) or inputs.buffer is None:
            reason = "it needs images of a buffer" if len(others) else "there are no other images to choose it on"
            section.add_absent("likelihood at another temperature", reason)
            return
        others = inputs.subset(others)
        curves = bits_by_temperature(inputs, log_p(others).mean().item(), levels, rng)
        beta = curves.best()
        protocol = f"that of {curves.betas[0]:.2g} to {HIGHEST:g} with the fewest bits of {name} images (no test "
        protocol += f"image) by the worse of two estimates, {LARGEST_GAP:g} apart at most, or the smallest 1/T if all "
        protocol += f"are farther apart; forward, reverse AIS over {len(curves.betas)} 1/T"
        section.add("inverse temperature 1/T", beta, len(others), protocol)
        section.picture("bits_by_temperature", f"Bits per dimension of {name} images", bits_figure(curves, levels))
        if beta != 1:
            add_bits(inputs, section, beta, log_p(test), levels, rng)


def add_gaussian(inputs: EvalInputs, section: Section, test: Split, levels: int) -> None:
    """What a log p(x) without a network reaches: bits of a Gaussian with the mean and covariance of training images."""
    train, dim, mean, second = inputs.data.train.images, math.prod(inputs.data.shape), 0, 0
    if len(train) <= dim or dim > MAX_VALUES:
        section.add_absent("bits of a Gaussian", f"it needs over {dim} images to fit, of up to {MAX_VALUES} values")
        return
    for part in train.split(1000):  # middles of cells, in float64: variances differ by factors of millions
        x = ((2 * (part.to(inputs.device) * ((levels - 1) / 255)).round().double() + 1) / levels - 1).flatten(1)
        mean, second = mean + x.sum(0) / len(train), second + x.T @ x / len(train)
    within = torch.full_like(mean, 1 / (3 * levels**2)).diag()  # the variance within a cell, of width 2 / levels
    gaussian = torch.distributions.MultivariateNormal(mean, second - mean.outer(mean) + within)
    x = ais.dequantise((test.images * ((levels - 1) / 255)).round(), levels, inputs.rng()).flatten(1)
    bits = ais.bits_per_dim(gaussian.log_prob(x.double()), dim, levels)
    protocol = f"mean and covariance of {len(train)} training images; test images dequantised from {levels} grey levels"
    section.add_mean("test bits per dimension", bits, protocol, ("a Gaussian, for comparison", "bits"))


def sandwich(
    inputs: EvalInputs, highest: float, betas: list[float], knots: int, rng: Generator
) -> Iterator[tuple[str, ais.AISResult]]:
    """Forward and, with a replay buffer, reverse AIS of exp(highest * log p(x)) along ``betas`` from 0 to 1."""
    chains, base = inputs.cfg.ais_chains, ais.Box(inputs.data.shape)
    path = ais.GeometricPath(lambda x: highest * inputs.model.log_density(x), base, betas)
    step_sizes = ais.tune_step_sizes(path, chains, knots, rng)
    yield "forward", ais.anneal(path, base.sample(chains, rng), step_sizes, rng)
    if inputs.buffer is not None:
        chosen = torch.randperm(len(inputs.buffer), generator=rng, device=inputs.device)[:chains]
        start = ais.burn_in(path, base.from_image(inputs.buffer[chosen]), AIS_BURN_IN, step_sizes[-1], rng)
        yield "reverse", ais.anneal(path, start, step_sizes, rng, sign=-1)


def bits_by_temperature(inputs: EvalInputs, mean_log_density: float, levels: int, rng: Generator) -> Curves:
    """Both estimates for images whose mean log p(x) is given, at every 1/T on the way to exp(HIGHEST log p(x))."""
    dim, n_temperatures = math.prod(inputs.data.shape), max(2, inputs.cfg.ais_temperatures // 2)
    first, bits = LOWEST / HIGHEST, {}  # beta goes from 0 to 1, evenly up to here, and in logarithm from here on
    shares = first * torch.linspace(0, math.log1p(1 / first), n_temperatures + 1, dtype=torch.float64).expm1()
    b = shares[1:]
    for name, run in sandwich(inputs, HIGHEST, shares.tolist(), 40, rng):
        log_z = run.log_z() + (1 - b) * dim * math.log(2)  # the path has base^(1 - b) as a factor, which is constant
        bits[name] = ais.bits_per_dim(b * HIGHEST * mean_log_density - log_z, dim, levels).numpy()
    return Curves((b * HIGHEST).numpy(), bits)


def bits_figure(curves: Curves, levels: int) -> Figure:
    """Both estimates against 1/T, near the bits of the best one and of the uniform density."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, best, uniform = figure.subplots(), curves.best(), math.log2(levels)
    for (name, bits), direction in zip(curves.bits.items(), ("too good", "too bad"), strict=True):
        axes.plot(curves.betas, bits, label=f"{name} ({direction})")
    axes.axhline(uniform, color="gray", linestyle=":", label="uniform density")
    axes.axvline(best, color="black", linestyle="--", linewidth=1, label=f"chosen, {best:g}")
    lowest = curves.bits["forward"][np.abs(curves.betas - best).argmin()]
    margin = max(uniform - lowest, 0.01)
    axes.set(xlabel="1/T", ylabel="bits per dimension", xscale="log", ylim=(lowest - margin, uniform + margin))
    axes.legend()
    return figure


def add_bits(inputs: EvalInputs, section: Section, beta: float, on_test: Tensor, levels: int, rng: Generator) -> None:
    """Both estimates of log Z of exp(beta * log p(x)), the bits that follow for test images, and the gap."""
    dim, temperatures = math.prod(inputs.data.shape), inputs.cfg.ais_temperatures
    log_z = {}
    bits_protocol = (
        f"test images dequantised from {levels} grey levels; log Z as above; uniform density: {math.log2(levels):.4g} "
        "bits; the interval covers the choice of test images, not the error of AIS nor the choice of the temperature"
    )
    for name, run in sandwich(inputs, beta, ais.sigmoid_schedule(temperatures), 20, rng):
        log_z[name] = run.log_z()[-1].item()
        row, n = f"1/T = {beta:g}, {name}", run.log_weights.shape[1]
        protocol = f"AIS by HMC from the uniform density on [-1, 1]^{dim}, {temperatures} temperatures; {BOUNDS[name]}"
        section.add("log Z (nats)", log_z[name], n, protocol, at=(row, "log Z"))
        section.add("log Z (nats)", run.ess(), n, protocol, at=(row, "effective chains"))
        section.add("log Z (nats)", run.acceptance.mean(), n, protocol, at=(row, "mean HMC acceptance"))
        section.add("log Z (nats)", run.acceptance.min(), n, protocol, at=(row, "lowest HMC acceptance"))
        bits = ais.bits_per_dim(beta * on_test - log_z[name], dim, levels)
        section.add_mean("test bits per dimension", bits, bits_protocol, (row, "bits"))
    if "reverse" not in log_z:
        section.add_absent(f"reverse estimate, 1/T = {beta:g}", "no finite image of a replay buffer to start from")
        return
    gap = (log_z["reverse"] - log_z["forward"]) / dim / math.log(2)
    protocol = f"reverse minus forward estimate of log Z, in bits per dimension; {temperatures} temperatures"
    section.add("gap", gap, n, protocol, at=(f"1/T = {beta:g}", "bits"))
    if gap < -0.01:
        section.note(
            f"Not so at 1/T = {beta:g}: the upper bound lies below the lower one, since the buffer holds no samples of "
            "that density. The reverse estimate means nothing, and the true bits are above those of the forward one."
        )
