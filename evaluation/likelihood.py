"""Bits per dimension of test images, by annealed importance sampling (ais.py)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from data import Split
from evaluation import ais
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from models import JEM, log_density
from models.predict import predict

AIS_BURN_IN = 200  # HMC steps


def measure(inputs: EvalInputs, section: Section) -> None:
    """log Z and bits per dimension of exp(log p(x) / T), for T = 1 and for the T that suits the validation images."""
    levels = 17 if inputs.cfg.dataset == "digits" else 256  # their loader spreads the digits' 17 over 0..255
    test, valid, rng = inputs.subset(inputs.data.test), inputs.subset(inputs.data.valid), inputs.rng()

    def on(split: Split) -> Tensor:
        x = ais.dequantise((split.images * ((levels - 1) / 255)).round(), levels, rng)
        return log_density(predict(inputs.model, x))

    section.note(
        "The forward estimate makes the bits look too good and the reverse one too bad: the truth lies "
        "between them as far as the reverse chains, begun in the buffer, have reached that density."
    )
    with exact_float32():
        sandwich_log_z(inputs, section, 1.0, on(test), levels, rng)
        if not len(valid):
            section.add_absent("likelihood at another temperature", "there are no validation images to choose it on")
            return
        beta = best_inverse_temperature(inputs, on(valid).mean().item(), rng)
        protocol = (
            "the power of two with the highest likelihood of validation images, measured in short forward runs, as "
            "long as a tenth of the chains are effective; the chains of training follow a colder density than T = 1"
        )
        section.add("inverse temperature 1/T", beta, len(valid), protocol)
        if beta > 1:
            sandwich_log_z(inputs, section, beta, on(test), levels, rng)


def tempered(model: JEM, beta: float) -> ais.LogDensity:
    return lambda x: beta * model.log_density(x)


def best_inverse_temperature(inputs: EvalInputs, mean_on_valid: float, rng: Generator) -> float:
    """The first maximum over 1, 2, 4, ... of the mean log-likelihood ``beta * mean_on_valid - log Z(beta)``.

    Ends before fewer than a tenth of the chains are effective: from there on log Z is far too low, and the likelihood
    too good.
    """
    base, chains = ais.Box(inputs.data.shape), inputs.cfg.ais_chains
    best, highest = 1.0, -math.inf
    temperatures = math.ceil(inputs.cfg.ais_temperatures / 5)  # only the scale of log p(x) is looked for
    for beta in tqdm([2.0**k for k in range(20)], desc="inverse temperatures, until the best is past", leave=False):
        density = tempered(inputs.model, beta)
        step_sizes = ais.tune_step_sizes(density, base, chains, temperatures, 10, rng)
        run = ais.forward_ais(density, base, chains, step_sizes, rng)
        if run.ess < chains / 10 or beta * mean_on_valid - run.log_z < highest:
            break
        best, highest = beta, beta * mean_on_valid - run.log_z
    return best


def sandwich_log_z(
    inputs: EvalInputs, section: Section, beta: float, on_test: Tensor, levels: int, rng: Generator
) -> None:
    """Both estimates of log Z of exp(beta * log p(x)), the bits that follow for test images, and the gap."""
    dim, chains, temperatures = math.prod(inputs.data.shape), inputs.cfg.ais_chains, inputs.cfg.ais_temperatures
    density, base = tempered(inputs.model, beta), ais.Box(inputs.data.shape)
    step_sizes = ais.tune_step_sizes(density, base, chains, temperatures, 20, rng)
    runs = {"forward": ais.forward_ais(density, base, chains, step_sizes, rng)}
    if inputs.buffer is None:
        section.add_absent(f"reverse estimate, 1/T = {beta:g}", "the checkpoint has no replay buffer to start from")
    else:
        chosen = torch.randperm(len(inputs.buffer), generator=rng, device=inputs.device)[:chains]
        runs["reverse"] = ais.reverse_ais(density, base, inputs.buffer[chosen], step_sizes, rng, burn_in=AIS_BURN_IN)
    bounds = {
        "forward": "stochastic lower bound",
        "reverse": f"backwards from images of the buffer after {AIS_BURN_IN} HMC steps; stochastic upper bound",
    }
    for name, run in runs.items():
        row, n = f"1/T = {beta:g}, {name}", len(run.log_weights)
        protocol = f"AIS by HMC from the uniform density on [-1, 1]^{dim}, {temperatures} temperatures; {bounds[name]}"
        section.add("log Z (nats)", run.log_z, n, protocol, run.log_z_interval, (row, "log Z"))
        section.add("log Z (nats)", run.ess, n, protocol, at=(row, "effective chains"))
        section.add("log Z (nats)", run.acceptance.mean(), n, protocol, at=(row, "mean HMC acceptance"))
        section.add("log Z (nats)", run.acceptance.min(), n, protocol, at=(row, "lowest HMC acceptance"))
        section.add_mean(
            "test bits per dimension",
            ais.bits_per_dim(beta * on_test - run.log_z, dim, levels),
            f"test images, uniformly dequantised from {levels} grey levels; "
            f"the uniform density has {math.log2(levels):.4g} bits; the interval covers the choice of test images, "
            "not the error of AIS nor the choice of the temperature",
            (row, "bits"),
        )
    if "reverse" in runs:
        gap = (runs["reverse"].log_z - runs["forward"].log_z) / dim / math.log(2)
        protocol = "reverse minus forward estimate of log Z, in bits per dimension"
        section.add("gap", gap, len(chosen), protocol, at=(f"1/T = {beta:g}", "bits"))
        if gap < -0.01:
            section.note(
                f"At 1/T = {beta:g} the upper bound lies below the lower one: the buffer holds no samples of "
                "that density, and the reverse estimate means nothing. The forward one still bounds log Z "
                "from below, so the true bits are higher than its own."
            )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, CUDA computes in float32 and not in TF32, whose error would swamp small steps of log p."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.set_float32_matmul_precision(matmul)
