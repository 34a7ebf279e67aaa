"""log Z against closed forms and quadrature, HMC against known moments, bits against a hand computation."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from evaluation.ais import (
    Box,
    GeometricPath,
    bits_per_dim,
    dequantise,
    forward_ais,
    hmc_step,
    leapfrog,
    reverse_ais,
    tune_step_sizes,
)
from utils import UserError


@dataclass(frozen=True)
class Gaussian:
    """N(0, I), a base for densities on R^D, whose log Z is known in closed form."""

    shape: tuple[int, ...]

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, *self.shape, generator=generator)

    def log_prob(self, y: torch.Tensor) -> torch.Tensor:
        return -0.5 * y.flatten(1).square().sum(1) - math.prod(self.shape) * math.log(math.sqrt(2 * math.pi))  # (N,)

    def score(self, y: torch.Tensor) -> torch.Tensor:
        return -y

    def log_ratio(self, log_density, y: torch.Tensor) -> torch.Tensor:
        return log_density(y) - self.log_prob(y)

    def to_image(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def from_image(self, x: torch.Tensor) -> torch.Tensor:
        return x


def annealed(density, base, n_chains, n_temperatures, seed):
    """A forward run with tuned step sizes, and these."""
    generator = seeded(seed)
    step_sizes = tune_step_sizes(density, base, 64, n_temperatures, 50, generator)
    return forward_ais(density, base, n_chains, step_sizes, generator), step_sizes


D = 64
MEAN = torch.linspace(-0.5, 0.5, D)
STD = torch.linspace(0.3, 1.2, D)
LOG_Z = 3 + STD.log().sum().item() + D / 2 * math.log(2 * math.pi)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_density(x):
    """Shifted, with unequal variances, normalised to exp(LOG_Z); x: (N, 64)."""
    return 3 - 0.5 * ((x - MEAN) / STD).square().sum(1)


def gaussian_samples(n: int) -> torch.Tensor:
    return MEAN + STD * torch.randn(n, D, generator=seeded(10))


def tilt(x):
    """A density that crowds each pixel's right wall and dents its middle; x: (N, ...)."""
    return (1.5 * x - 0.5 * torch.exp(-4 * x**2)).flatten(1).sum(1)


GRID = np.linspace(-1, 1, 20001)
TILT = np.exp(1.5 * GRID - 0.5 * np.exp(-4 * GRID**2))
TILT_CDF = integrate.cumulative_trapezoid(TILT, GRID, initial=0)  # not normalised: its last value is Z


def test_log_z_of_a_64d_gaussian_is_sandwiched_to_a_tenth_of_a_nat():
    base = Gaussian((D,))
    forward, step_sizes = annealed(gaussian_density, base, 512, 400, 1)
    reverse = reverse_ais(gaussian_density, base, gaussian_samples(512), step_sizes, seeded(2))
    assert forward.log_z == pytest.approx(LOG_Z, abs=0.1)
    assert reverse.log_z == pytest.approx(LOG_Z, abs=0.1)
    # the mean log-weights are the bounds in expectation, with a margin that the estimates themselves lack
    assert forward.log_weights.mean() < LOG_Z < reverse.log_weights.mean()
    assert forward.log_z_interval[0] < forward.log_z < forward.log_z_interval[1]
    assert 200 < forward.ess <= 512


def test_log_z_in_the_box_agrees_with_quadrature():
    shape = (1, 8, 8)
    log_z = math.prod(shape) * math.log(TILT_CDF[-1])
    forward, step_sizes = annealed(tilt, Box(shape), 512, 200, 3)
    assert forward.log_z == pytest.approx(log_z, abs=0.1)
    assert forward.samples.shape == (512, *shape) and forward.samples.abs().max() <= 1

    uniform = np.random.default_rng(0).random((512, *shape))
    exact = torch.tensor(np.interp(uniform, TILT_CDF / TILT_CDF[-1], GRID), dtype=torch.float32)
    reverse = reverse_ais(tilt, Box(shape), exact, step_sizes, seeded(4))
    assert reverse.log_z == pytest.approx(log_z, abs=0.1)
    assert forward.log_weights.mean() < log_z < reverse.log_weights.mean()


def test_without_annealing_it_is_importance_sampling():
    base = Gaussian((2,))

    def density(x):
        return -((x - 0.5) ** 2).sum(1)

    result = forward_ais(density, base, 1000, torch.tensor([0.5]), seeded(11))
    x = base.sample(1000, seeded(11)).double().numpy()
    log_w = -((x - 0.5) ** 2).sum(1) - stats.norm.logpdf(x).sum(1)
    assert np.allclose(result.log_weights.numpy(), log_w, atol=1e-5)
    w = np.exp(log_w)
    assert result.log_z == pytest.approx(math.log(w.mean()), abs=1e-5)
    assert result.ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-4)
    spread = 2 * 1.96 * w.std() / math.sqrt(1000) / w.mean()  # delta method
    low, high = result.log_z_interval
    assert high - low == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_hmc_keeps_the_moments_of_the_path(beta):
    precision = (1 - beta) + beta / STD**2  # product of the base's and the model's Gaussians
    mean, std = beta * MEAN / STD**2 / precision, precision.rsqrt()
    path = GeometricPath(gaussian_density, Gaussian((D,)))
    generator = seeded(12)
    at = path.point(mean + std * torch.randn(4000, D, generator=generator))
    for _ in range(30):
        at, p_accept = hmc_step(path, at, beta, torch.tensor(0.4), generator)
    assert 0.3 < p_accept.mean() < 0.99  # so that accepting everything would show
    z = (at.y - mean) / std
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(4000)
    assert (z.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2 / 4000)


def test_hmc_in_the_box_converges_to_the_density_up_to_the_walls():
    path = GeometricPath(tilt, Box((3,)))
    generator = seeded(13)
    at = path.point(path.base.sample(10_000, generator))
    for _ in range(30):
        at, p_accept = hmc_step(path, at, 1.0, torch.tensor(0.8), generator)
    assert 0.3 < p_accept.mean() < 0.95
    x = path.base.to_image(at.y)
    for pixel in x.double().numpy().T:
        assert stats.kstest(pixel, lambda x: np.interp(x, GRID, TILT_CDF / TILT_CDF[-1])).pvalue > 1e-4
    assert torch.equal(at.ratio, path.point(at.y).ratio)  # carried along with the right point


def test_the_box_is_uniform_and_includes_its_walls(monkeypatch):
    box = Box((2, 2))
    y = box.sample(5000, seeded(26))
    assert stats.kstest(box.to_image(y).flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    logistic = stats.logistic(scale=0.5).logpdf(y.double().numpy()).sum((1, 2))
    assert np.allclose(box.log_prob(y).numpy(), logistic, atol=1e-4)
    x = torch.tensor([[[-1.0, 1.0], [0.3, -0.99]]])
    assert torch.allclose(box.to_image(box.from_image(x)), x, atol=2e-6)
    assert box.from_image(x).isfinite().all()
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))  # happens once in 2^24
    assert Box((2,)).sample(5, seeded(27)).isfinite().all()


def test_a_flat_density_has_the_volume_of_the_box_whatever_the_walls_do():
    """A constant density makes every weight exactly 2^D, so any error is one of the coordinates."""
    result, _ = annealed(lambda x: 0 * x.flatten(1).sum(1), Box((D,)), 8, 20, 28)
    assert torch.allclose(result.log_weights, torch.full((8,), D * math.log(2), dtype=torch.float64))


def test_pixels_that_crowd_a_wall_are_no_obstacle():
    slope = 50.0  # the mass lies within 0.02 of the wall, a width that steps of the interior would jump over
    log_z = 8 * math.log((1 - math.exp(-2 * slope)) / slope)
    result, step_sizes = annealed(lambda x: slope * (x - 1).sum(1), Box((8,)), 500, 200, 29)
    assert result.log_z == pytest.approx(log_z, abs=0.15)
    assert step_sizes.min() > 0.3


@pytest.mark.parametrize("base", [Gaussian((2, 3)), Box((2, 3))])
def test_leapfrog_leads_back_to_the_start(base):
    path = GeometricPath(tilt, base)
    start = path.point(base.sample(50, seeded(14)).double())
    v = torch.randn(start.y.shape, generator=seeded(15), dtype=torch.float64)
    end, end_v = leapfrog(path, start, v, 0.7, torch.tensor(0.1), 20)
    back, back_v = leapfrog(path, end, -end_v, 0.7, torch.tensor(0.1), 20)
    assert (end.y - start.y).abs().mean() > 0.1
    assert torch.allclose(back.y, start.y, atol=1e-9)
    assert torch.allclose(back_v, -v, atol=1e-9)


@pytest.mark.parametrize("density, base", [(gaussian_density, Gaussian((D,))), (tilt, Box((D,)))])
def test_tuning_reaches_the_wanted_acceptance_at_every_temperature(density, base):
    step_sizes = tune_step_sizes(density, base, 64, 100, 50, seeded(16))
    assert step_sizes.shape == (100,)
    assert step_sizes[-1] < 0.8 * step_sizes[0]
    result = forward_ais(density, base, 100, step_sizes, seeded(17))
    assert result.acceptance.min() > 0.65 and result.acceptance.max() < 0.95
    assert result.acceptance.mean() == pytest.approx(0.8, abs=0.04)


def test_burn_in_carries_poor_samples_to_the_model():
    base, cold = Gaussian((D,)), MEAN.expand(512, D)  # every chain at the mode
    step_sizes = tune_step_sizes(gaussian_density, base, 64, 10, 10, seeded(18))
    exact = reverse_ais(gaussian_density, base, gaussian_samples(512), step_sizes, seeded(19))
    raw = reverse_ais(gaussian_density, base, cold, step_sizes, seeded(19))
    burnt = reverse_ais(gaussian_density, base, cold, step_sizes, seeded(19), burn_in=50)
    assert raw.log_weights.mean() > exact.log_weights.mean() + 4
    assert burnt.log_weights.mean() == pytest.approx(exact.log_weights.mean(), abs=1)


def test_a_network_gets_no_parameter_gradients_even_under_no_grad():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))
    base = Box((1, 4, 4))

    def density(x):
        return net(x).logsumexp(1)

    with torch.no_grad():
        forward, step_sizes = annealed(density, base, 8, 5, 22)
        reverse = reverse_ais(density, base, forward.samples, step_sizes, seeded(23))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not forward.samples.requires_grad
    assert forward.log_z == pytest.approx(reverse.log_z, abs=0.5)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(UserError, match="not finite"):
        forward_ais(lambda x: tilt(x) * math.nan, Box((2,)), 4, torch.full((5,), 0.1), seeded())


def test_bits_bound_the_code_length_and_are_tight_for_a_density_flat_in_each_cell():
    p_level = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    grey = torch.multinomial(p_level.expand(2000, 4), 6, replacement=True, generator=seeded(24))  # (2000, 6)
    x = dequantise(grey, 4, seeded(25))
    within = (x + 1) / 2 * 4 - grey
    assert stats.kstest(within.flatten().numpy(), "uniform").pvalue > 1e-4  # on [0, 1], so in the right cell
    cell = (2 * x + 2).floor().long()
    log_px = (p_level[cell] / 0.5).log().sum(1)  # each of the 4 cells of [-1, 1] is 0.5 wide
    code_length = -p_level[grey].log2().mean(1)
    assert torch.allclose(bits_per_dim(log_px, 6, 4), code_length)
