"""log Z against closed forms and quadrature, HMC against known moments, bits against a hand computation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from small_runs import seeded
from torch import nn

from evaluation import ais, likelihood
from evaluation.report import Section
from utils import UserError


class Gaussian(ais.Box):
    """N(0, I), a base for densities on R^D, whose log Z is known in closed form."""

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, *self.shape, generator=generator)

    def log_prob(self, y: torch.Tensor) -> torch.Tensor:
        return -0.5 * y.flatten(1).square().sum(1) - math.prod(self.shape) * math.log(math.sqrt(2 * math.pi))  # (N,)

    def score(self, y: torch.Tensor) -> torch.Tensor:
        return -y

    def log_ratio(self, log_density, y: torch.Tensor) -> torch.Tensor:
        return log_density(y) - self.log_prob(y)

    def from_image(self, x: torch.Tensor) -> torch.Tensor:
        return x


def annealed(density, base, n_chains, n_temperatures, seed):
    """A forward run with tuned step sizes, the way back from samples, with a burn-in, and the step sizes."""
    generator, path = seeded(seed), ais.GeometricPath(density, base, ais.sigmoid_schedule(n_temperatures))
    step_sizes = ais.tune_step_sizes(path, 64, 50, generator)

    def back(samples, seed, steps=0):
        rng = seeded(seed)
        y = ais.burn_in(path, base.from_image(samples), steps, step_sizes[-1], rng)
        return ais.anneal(path, y, step_sizes, rng, sign=-1)

    return ais.anneal(path, base.sample(n_chains, generator), step_sizes, generator), back, step_sizes


def log_z(result):
    return result.log_z()[-1].item()


def mean(result):
    """Of the log weights: a bound in expectation, with a margin that the estimates themselves lack."""
    return result.log_weights[-1].mean()


D = 64
MEAN = torch.linspace(-0.5, 0.5, D)
STD = torch.linspace(0.3, 1.2, D)


def gaussian_density(x):
    """Shifted, with unequal variances; x: (N, 64)."""
    return 3 - 0.5 * ((x - MEAN) / STD).square().sum(1)


def tilt(x):
    """A density that crowds each pixel's right wall and dents its middle; x: (N, ...)."""
    return (1.5 * x - 0.5 * torch.exp(-4 * x**2)).flatten(1).sum(1)


GRID = np.linspace(-1, 1, 20001)
TILT = np.exp(1.5 * GRID - 0.5 * np.exp(-4 * GRID**2))
TILT_CDF = integrate.cumulative_trapezoid(TILT, GRID, initial=0)  # not normalised: its last value is Z


def test_log_z_is_sandwiched_to_a_tenth_of_a_nat():
    expected, exact = D * math.log(TILT_CDF[-1]), np.random.default_rng(0).random((512, 1, 8, 8))
    exact = torch.tensor(np.interp(exact, TILT_CDF / TILT_CDF[-1], GRID), dtype=torch.float32)
    forward, back, _ = annealed(tilt, ais.Box((1, 8, 8)), 512, 200, 3)
    reverse = back(exact, 4)
    assert (log_z(forward), log_z(reverse)) == pytest.approx((expected, expected), abs=0.1)
    assert mean(forward) < expected < mean(reverse)
    assert 100 < forward.ess() <= 512


def test_without_annealing_it_is_importance_sampling():
    base, rng = Gaussian((2,)), seeded(11)
    path = ais.GeometricPath(lambda x: -((x - 0.5) ** 2).sum(1), base)
    result = ais.anneal(path, base.sample(1000, rng), torch.tensor([0.5]), rng)
    x = base.sample(1000, seeded(11)).double().numpy()
    log_w = -((x - 0.5) ** 2).sum(1) - stats.norm.logpdf(x).sum(1)
    assert np.allclose(result.log_weights[-1].numpy(), log_w, atol=1e-5)
    w = np.exp(log_w)
    assert log_z(result) == pytest.approx(math.log(w.mean()), abs=1e-5)
    assert result.ess() == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-4)


@pytest.mark.parametrize("beta", [0.5, 30.0])
def test_the_likeliest_temperature_is_found_and_both_bounds_are_right_at_all(beta, tmp_path):
    """The density exp(2 sum(x) / T) on the box, whose log Z is known; 1/T = beta has made the data."""
    inputs = SimpleNamespace(
        model=SimpleNamespace(log_density=lambda x: 2 * x.flatten(1).sum(1)),
        data=SimpleNamespace(shape=(1, 2, 2)),
        cfg=SimpleNamespace(ais_chains=100, ais_temperatures=400),
        buffer=1 + torch.rand(400, 1, 2, 2, generator=seeded(3)).log() / 2**15,  # exact, of exp(2^15 sum(x))
        device=torch.device("cpu"),
    )
    mean_of_pixel = 1 / math.tanh(2 * beta) - 1 / (2 * beta)
    curves = likelihood.bits_by_temperature(inputs, 8 * mean_of_pixel, 16, seeded(1))
    slopes = 2 * curves.betas
    assert slopes[0] < 0.05 and curves.betas[-1] == pytest.approx(2**14)

    def exact(slopes):
        log_z = 4 * (slopes + np.log(-np.expm1(-2 * slopes) / slopes))
        return -(slopes * 4 * mean_of_pixel - log_z) / 4 / math.log(2) - math.log2(2 / 16)

    section = Section("likelihood", tmp_path)
    likelihood.add_bits(inputs, section, beta, torch.full((9,), 8 * mean_of_pixel), 16, seeded(1))
    for name in ("forward", "reverse"):
        assert np.abs(curves.bits[name] - exact(slopes)).max() < 0.15
        bits = section.measurements()["test bits per dimension", f"1/T = {beta:g}, {name}", "bits"]["value"]
        assert bits == pytest.approx(exact(2 * beta), abs=0.15)
    assert curves.best() == pytest.approx(beta, rel=0.25)
    # the fewest bits of the worse bound wherever they lie: neither the first minimum nor one where the bounds are far
    # apart, or have crossed after that
    bits = {"forward": np.array([8, 7.98, 8, 7, 2, 3]), "reverse": np.array([8, 8, 8.05, 7.05, 9, 2])}
    assert likelihood.Curves(np.array([1, 2, 4, 8, 16, 32.0]), bits).best() == 8


@pytest.mark.parametrize("last, crossed", [([1.0, 2.0], True), ([9.0, 8.0], False)])
def test_every_number_of_two_estimates(last, crossed, monkeypatch, tmp_path):
    forward = ais.AISResult(torch.tensor([[0.0, 2.0], [3.0, 7.0]]), 1, torch.tensor([0.5, 0.9]))
    reverse = ais.AISResult(torch.tensor([last])[:, [0, 1, 0, 1]], -1, torch.tensor([0.6, 0.8]))
    monkeypatch.setattr(likelihood, "sandwich", lambda *_: [("forward", forward), ("reverse", reverse)])
    cfg, section = SimpleNamespace(ais_chains=2, ais_temperatures=2), Section("likelihood", tmp_path)
    inputs = SimpleNamespace(data=SimpleNamespace(shape=(1, 2, 2)), cfg=cfg)
    likelihood.add_bits(inputs, section, 2.0, torch.tensor([1.0, 3.0]), 16, seeded())
    found = {(row, column): cell["value"] for (_, row, column), cell in section.measurements().items()}
    up, down = np.log(np.exp([3, 7]).mean()), -np.log(np.exp(np.negative(last)).mean())
    assert found["1/T = 2", "bits"] == pytest.approx((down - up) / 4 / math.log(2)) and len(section.notes) == crossed
    for name, log_z, lowest in (("forward", up, 0.5), ("reverse", down, 0.6)):
        columns = ("log Z", "mean HMC acceptance", "lowest HMC acceptance", "bits")
        bits = (log_z - 2 * 2) / 4 / math.log(2) + math.log2(16 / 2)
        numbers = [found[f"1/T = 2, {name}", column] for column in columns]
        assert numbers == pytest.approx([log_z, 0.7, lowest, bits])
    assert [cells["log Z"]["n"] for cells in section.results["log Z (nats)"].values()] == [2, 4]


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_hmc_keeps_the_moments_of_the_path(beta):
    precision = (1 - beta) + beta / STD**2  # product of the base's and the model's Gaussians
    mean, std = beta * MEAN / STD**2 / precision, precision.rsqrt()
    path, generator = ais.GeometricPath(gaussian_density, Gaussian((D,))), seeded(12)
    at = path.point(mean + std * torch.randn(4000, D, generator=generator))
    for _ in range(30):
        at, p_accept = ais.hmc_step(path, at, beta, torch.tensor(0.4), generator)
    assert 0.3 < p_accept.mean() < 0.99  # so that accepting everything would show
    z = (at.y - mean) / std
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(4000)
    assert (z.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2 / 4000)


def test_hmc_in_the_box_converges_to_the_density_up_to_the_walls():
    path, generator = ais.GeometricPath(tilt, ais.Box((3,))), seeded(13)
    at = path.point(path.base.sample(10_000, generator))
    for _ in range(30):
        at, p_accept = ais.hmc_step(path, at, 1.0, torch.tensor(0.8), generator)
    assert 0.3 < p_accept.mean() < 0.95
    x = at.y.tanh()
    for pixel in x.double().numpy().T:
        assert stats.kstest(pixel, lambda x: np.interp(x, GRID, TILT_CDF / TILT_CDF[-1])).pvalue > 1e-4
    assert torch.equal(at.ratio, path.point(at.y).ratio)  # carried along with the right point


def test_the_box_is_uniform_and_includes_its_walls(monkeypatch):
    box = ais.Box((2, 2))
    y = box.sample(5000, seeded(26))
    assert stats.kstest(y.tanh().flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    logistic = stats.logistic(scale=0.5).logpdf(y.double().numpy()).sum((1, 2))
    assert np.allclose(box.log_prob(y).numpy(), logistic, atol=1e-4)
    x = torch.tensor([[[-1.0, 1.0], [0.3, -0.99]]])
    assert torch.allclose(box.from_image(x).tanh(), x, atol=2e-6) and box.from_image(x).isfinite().all()
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))  # happens once in 2^24
    assert ais.Box((2,)).sample(5, seeded(27)).isfinite().all()


def test_walls_of_the_box_are_no_obstacle():
    """A constant density makes every weight exactly 2^D, so any error is one of the coordinates."""
    result, *_ = annealed(lambda x: 0 * x.flatten(1).sum(1), ais.Box((D,)), 8, 20, 28)
    assert torch.allclose(result.log_weights[-1], torch.full((8,), D * math.log(2), dtype=torch.float64))
    slope = 50.0  # the mass lies within 0.02 of the wall, a width that steps of the interior would jump over
    expected = 8 * math.log((1 - math.exp(-2 * slope)) / slope)
    result, _, step_sizes = annealed(lambda x: slope * (x - 1).sum(1), ais.Box((8,)), 500, 200, 29)
    assert log_z(result) == pytest.approx(expected, abs=0.15) and step_sizes.min() > 0.3


@pytest.mark.parametrize("base", [Gaussian((2, 3)), ais.Box((2, 3))])
def test_leapfrog_leads_back_to_the_start(base):
    path = ais.GeometricPath(tilt, base)
    start = path.point(base.sample(50, seeded(14)).double())
    v = torch.randn(start.y.shape, generator=seeded(15), dtype=torch.float64)
    end, end_v = ais.leapfrog(path, start, v, 0.7, torch.tensor(0.1), 20)
    back, back_v = ais.leapfrog(path, end, -end_v, 0.7, torch.tensor(0.1), 20)
    assert (end.y - start.y).abs().mean() > 0.1 and torch.allclose(back.y, start.y, atol=1e-9)
    assert torch.allclose(back_v, -v, atol=1e-9)


@pytest.mark.parametrize("density, base", [(gaussian_density, Gaussian((D,))), (tilt, ais.Box((D,)))])
def test_tuning_reaches_the_wanted_acceptance_at_every_temperature(density, base):
    path = ais.GeometricPath(density, base, ais.sigmoid_schedule(100))
    step_sizes, rng = ais.tune_step_sizes(path, 64, 50, seeded(16)), seeded(17)
    assert step_sizes.shape == (100,) and step_sizes[-1] < 0.8 * step_sizes[0]
    result = ais.anneal(path, base.sample(100, rng), step_sizes, rng)
    assert result.acceptance.min() > 0.65 and result.acceptance.max() < 0.95
    assert result.acceptance.mean() == pytest.approx(0.8, abs=0.04)


def test_burn_in_carries_poor_samples_to_the_model():
    cold, good = MEAN.expand(512, D), MEAN + STD * torch.randn(512, D, generator=seeded(10))  # all at the mode; exact
    _, back, _ = annealed(gaussian_density, Gaussian((D,)), 64, 10, 18)
    exact, raw, burnt = back(good, 19), back(cold, 19), back(cold, 19, steps=50)
    assert mean(raw) > mean(exact) + 4 and mean(burnt) == pytest.approx(mean(exact), abs=1)
    path = ais.GeometricPath(tilt, ais.Box((D,)), [0.0, 1e-6, 1.0])  # at its last temperature, no earlier one
    y = ais.burn_in(path, torch.zeros(100, D), 50, torch.tensor(0.4), seeded())
    assert y.tanh().mean().item() == pytest.approx(np.trapezoid(GRID * TILT, GRID) / TILT_CDF[-1], abs=0.05)


def test_a_network_gets_no_parameter_gradients_even_under_no_grad():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))
    with torch.no_grad():
        forward, back, _ = annealed(lambda x: net(x).logsumexp(1), ais.Box((1, 4, 4)), 8, 5, 22)
        reverse = back(torch.rand(8, 1, 4, 4, generator=seeded(21)) * 2 - 1, 23, steps=10)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not forward.log_weights.requires_grad and log_z(forward) == pytest.approx(log_z(reverse), abs=0.5)


def test_estimates_in_reverse_are_mirror_images_and_a_density_that_is_nan_is_never_entered():
    weights = torch.randn(1, 50, generator=seeded()).double()
    forward, reverse = ais.AISResult(weights, 1, None), ais.AISResult(-weights, -1, None)
    assert reverse.ess() == pytest.approx(forward.ess())
    assert torch.equal(reverse.log_z(), -forward.log_z())
    path = ais.GeometricPath(lambda x: torch.where(x > 0.5, math.nan, 0 * x).sum(1), ais.Box((1,)))
    at = path.point(torch.zeros(400, 1))
    for _ in range(5):
        at, p_accept = ais.hmc_step(path, at, 1.0, torch.tensor(1.0), seeded())
    assert at.ratio.isfinite().all() and p_accept.isfinite().all()
    for factor in (math.nan, math.inf):  # all of it, which is refused
        path = ais.GeometricPath(lambda x, factor=factor: tilt(x) * factor, ais.Box((2,)))
        with pytest.raises(UserError, match="not finite"):
            ais.anneal(path, path.base.sample(4, seeded()), torch.full((1,), 0.1), seeded())


def test_a_gaussian_for_comparison_has_the_moments_of_dequantised_training_images(tmp_path):
    images = torch.randint(4, (50, 1, 2, 2), generator=seeded(30), dtype=torch.uint8) * 85  # of 4 grey levels
    train, test, section = *(SimpleNamespace(images=x) for x in images.split(40)), Section("likelihood", tmp_path)
    inputs = SimpleNamespace(data=SimpleNamespace(train=train, shape=(1, 2, 2)), rng=seeded, device="cpu")
    likelihood.add_gaussian(inputs, section, test, 4)
    cells = ais.dequantise((train.images / 85).repeat(5000, 1, 1, 1), 4, seeded(31)).flatten(1).double().numpy()
    log_p = stats.multivariate_normal(cells.mean(0), np.cov(cells.T)).logpdf
    expected = 1 - log_p(ais.dequantise(test.images / 85, 4, seeded()).flatten(1)).mean() / 4 / math.log(2)
    found = section.measurements()["test bits per dimension", "a Gaussian, for comparison", "bits"]
    assert found["value"] == pytest.approx(expected, abs=2e-3) and found["n"] == 10
    train.images = images[:4]
    likelihood.add_gaussian(inputs, section, test, 4)
    assert "bits of a Gaussian" in section.absent


def test_bits_bound_the_code_length_and_are_tight_for_a_density_flat_in_each_cell():
    p_level = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    grey = torch.multinomial(p_level.expand(2000, 4), 6, replacement=True, generator=seeded(24))  # (2000, 6)
    x = ais.dequantise(grey, 4, seeded(25))
    within = (x + 1) / 2 * 4 - grey
    assert stats.kstest(within.flatten().numpy(), "uniform").pvalue > 1e-4  # on [0, 1], so in the right cell
    cell = (2 * x + 2).floor().long()
    log_px = (p_level[cell] / 0.5).log().sum(1)  # each of the 4 cells of [-1, 1] is 0.5 wide
    assert torch.allclose(ais.bits_per_dim(log_px, 6, 4), -p_level[grey].log2().mean(1))  # the code length
