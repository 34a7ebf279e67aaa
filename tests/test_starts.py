"""Gaussian starts against the images' own statistics."""

import pytest
import torch
from small_runs import seeded as generator

import chain_init
import data
from chain_init import GaussianInit, build_chain_init, fit
from config import Config
from utils import UserError


def grey_images(n, side=4, seed=0):
    """uint8 (n, 1, side, side) near the middle of the range, so that clamping changes nothing; neighbours agree."""
    rough = torch.randn(n, 1, side, side, generator=generator(seed))
    return ((rough + rough.roll(1, 3) + rough.roll(1, 2)) * 12 + 120).clamp(0, 255).to(torch.uint8)


def assert_same_statistics(samples, images, noise=0.01):
    """Mean and covariance of many samples are those of the images, and 1e-4 more variance."""
    x, found = data.to_float(images).flatten(1).double(), samples.flatten(1).double()
    covariance = torch.cov(x.T, correction=0) + noise**2 * torch.eye(x.shape[1])
    sd = covariance.diagonal().sqrt()
    n = len(found)
    assert ((found.mean(0) - x.mean(0)).abs() < 5 * sd / n**0.5).all()
    assert ((torch.cov(found.T) - covariance).abs() / sd[:, None] / sd[None]).max() < 6 * (2 / n) ** 0.5


@pytest.mark.parametrize("n", [10, 400, 2500])
def test_few_and_many_images_give_their_mean_and_covariance(n):
    """With 10 images of 16 pixels by the images themselves, with 400 by a Cholesky factor, of 2,500 in three parts."""
    images = grey_images(n)
    start = GaussianInit([fit(images, images.device)], tuple(images.shape[1:]))
    assert start.gaussians[0][1].shape == (min(n, 16), 16)
    assert_same_statistics(start([0] * 20_000, generator()), images)


@pytest.mark.parametrize("n", [12, 400])
def test_pixels_given_others_are_those_of_the_conditional_gaussian(n):
    """Mean and covariance of all pixels given some of them with noise of 0.05, in closed form."""
    images, known = grey_images(n), torch.arange(16).view(4, 4) % 3 > 0
    start = GaussianInit([fit(images[:9], images.device), fit(images, images.device)], (1, 4, 4))
    mean, factor, noise = start.gaussians[1]
    covariance, k = factor.T @ factor + noise**2 * torch.eye(16), known.flatten()
    x = data.to_float(grey_images(1, seed=5))
    drawn = start.conditioned(x.expand(20_000, -1, -1, -1), known, 0.05, [1] * 20_000, generator()).flatten(1)
    gain = covariance[:, k] @ torch.linalg.inv(covariance[k][:, k] + 0.05**2 * torch.eye(k.sum()))
    expected = mean + gain @ (x.flatten() - mean)[k]
    assert (start.conditioned(x, known, 0.05, [1]).flatten() - expected).abs().max() < 1e-4
    assert (drawn.mean(0) - expected).abs().max() < 0.005
    assert (torch.cov(drawn.T) - covariance + gain @ covariance[k]).abs().max() < 0.0005


def test_too_many_large_images_are_represented_by_some(monkeypatch):
    monkeypatch.setattr(chain_init, "MAX_ROWS", 12)
    images = grey_images(500)
    mean, factor, noise = chain_init.fit(images, images.device)
    assert factor.shape == (12, 16) and noise == 0.01
    assert torch.equal(chain_init.fit(images, images.device)[1], factor)  # the same ones in a resumed run


@pytest.mark.parametrize(
    "name", ["uniform", "gaussian", "class_gaussian", "smooth", "shapes", "patches", "mixed", "smooth:0.7,mixed:0.3"]
)
def test_starts_are_images_and_follow_their_generator(name):
    start = build_chain_init(Config(start=name), data.load("digits"))
    one, two, other = (start([3, 1, 4, 1], generator(seed)) for seed in (1, 1, 2))
    assert one.shape == (4, 1, 8, 8) and one.dtype == torch.float32 and one.abs().max() <= 1
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_class_gaussian_knows_no_label_that_the_training_does_not():
    digits = data.load("digits")
    start = build_chain_init(Config(start="class_gaussian", labels_per_class=1), digits)
    own = data.to_float(data.some_of_each_class(digits.train, 1, 10).images)  # of one image, noise alone is around it
    order = data.some_of_each_class(digits.train, 1, 10).labels.tolist()
    assert (start(order, generator()) - own).abs().max() < 0.06  # standard deviation 0.01


def test_several_starts_have_their_shares():
    inits = [lambda classes, rng, value=v: torch.full((len(classes), 1, 2, 2), value) for v in (0.1, 0.2, 0.3)]
    assert Config(start="smooth:3, uniform").start_shares == {"smooth": 0.75, "uniform": 0.25}
    x = chain_init.mixture_init(inits, [0.5, 0.3, 0.2], [0] * 20_000, generator())
    assert (x == x[:, :, :1, :1]).all()  # an image is of one kind
    for value, share in ((0.1, 0.5), (0.2, 0.3), (0.3, 0.2)):
        assert (x[:, 0, 0, 0] == value).float().mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("text", ["", "gaussian:", "noise", "gaussian:0", "gaussian:nan", "gaussian:0.5,uniform:-1"])
def test_starts_that_there_are_not(text):
    with pytest.raises(UserError, match="--start takes one of uniform"):
        Config(start=text)


@pytest.mark.parametrize("white", [0.0, 1.0])
def test_spectrum_of_smooth_noise(white):
    """White noise has one power at all frequencies f; of f^-2a with a in [0.5, 3], a low f has far more than a high."""
    x = chain_init.smooth_noise(4000, (1, 16, 16), generator(), white)
    assert x.mean((2, 3)).abs().max() < 1e-5 and (x.std((1, 2, 3)) - 1).abs().max() < 1e-3
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    low, high = power[0, 1], power[0, 8]
    assert (0.9 < low / high < 1.1) if white else low / high > 50


def test_starts_made_from_training_images():
    digits = data.load("digits")
    original = data.to_float(digits.train.images[:1])
    x = chain_init.patches_init(digits.train.images[:1], [0] * 20, generator())
    assert torch.equal(x.flatten(1).sort(1).values, original.flatten(1).sort(1).values.expand(20, -1))
    assert ((x != original).flatten(1).any(1)).sum() >= 18
    halves = original.unfold(2, 4, 4).unfold(3, 4, 4).reshape(4, 16)
    x = chain_init.patches_init(digits.train.images[:1], [0] * 90, generator())[:, :, :4, :4].reshape(-1, 1, 16)
    assert 15 < (x == halves).all(2).any(1).sum() < 45  # a third has patches of half the side
    drawn = chain_init.draw_images(digits.train.images, 4, generator()).flatten(1).sum(1)  # not the first of them
    assert not torch.isin(drawn, data.to_float(digits.train.images[:4]).flatten(1).sum(1)).any()
    numbered = torch.arange(49.0).view(1, 1, 7, 7).expand(200, -1, -1, -1)  # patches of 3 pixels, and a rest of one
    moved = chain_init.shuffled_patches(numbered, 2, generator())
    assert torch.equal(moved[..., 6], numbered[..., 6]) and len(moved.unique(dim=0)) == 23  # all orders but one
    for x in (numbered, moved):
        patches = x[:, :, :6, :6].unfold(2, 3, 3).unfold(3, 3, 3).reshape(-1, 9)
        assert len(patches.unique(dim=0)) == 4 and (patches - patches[:, :1] - patches[0] + patches[0, 0] == 0).all()
    two = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 255.0)]).to(torch.uint8)
    mixed = chain_init.mixed_pairs_init(two, [0] * 400, generator())
    values = mixed[:, 0, 0, 0]
    between = values[(values.abs() < 0.99)]
    assert (mixed == values.view(-1, 1, 1, 1)).all() and len(between) > 100 and 0.3 < between.abs().max() < 0.4001


def test_shapes_are_of_two_colours_and_half_of_them_grey():
    x = chain_init.smooth_images(400, (3, 16, 16), generator())
    contrast, colour = x.std((2, 3)).mean(1), x.mean((2, 3))
    assert contrast.min() < 0.01 < 0.4 < contrast.max() and colour.min() < -0.9 < 0.9 < colour.max()
    x = chain_init.shape_images(200, (3, 16, 16), generator())
    grey = (x == x[:, :1]).all(dim=(1, 2, 3))
    assert 70 < grey.sum() < 130 and (x.flatten(2).std(2).amax(1) > 0.05).all()
