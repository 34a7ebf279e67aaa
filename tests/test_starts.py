"""Gaussian starts against the images' own statistics."""

import pytest
import torch

import chain_init
import data
from chain_init import GaussianInit, build_chain_init
from config import Config


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def grey_images(n, side=4, seed=0):
    """uint8 (n, 1, side, side) near the middle of the range, so that clamping changes nothing; neighbours agree."""
    rough = torch.randn(n, 1, side, side, generator=generator(seed))
    smooth = (rough + rough.roll(1, 3) + rough.roll(1, 2)) * 12
    return (smooth + 120).clamp(0, 255).to(torch.uint8)


def assert_same_statistics(samples, images, noise=0.01):
    """Mean and covariance of many samples are those of the images, and 1e-4 more variance."""
    x, found = data.to_float(images).flatten(1).double(), samples.flatten(1).double()
    covariance = torch.cov(x.T, correction=0) + noise**2 * torch.eye(x.shape[1])
    sd = covariance.diagonal().sqrt()
    n = len(found)
    assert ((found.mean(0) - x.mean(0)).abs() < 5 * sd / n**0.5).all()
    error = (torch.cov(found.T) - covariance).abs() / sd[:, None] / sd[None]
    assert error.max() < 6 * (2 / n) ** 0.5


@pytest.mark.parametrize("n", [10, 400])
def test_few_and_many_images_give_their_mean_and_covariance(n):
    """With 10 images of 16 pixels by the images themselves, with 400 by a Cholesky factor."""
    images = grey_images(n)
    start = GaussianInit(data.Split(images, torch.zeros(n, dtype=torch.int64)), None, images.device)
    assert start.gaussians[0][1].shape == (min(n, 16), 16)
    assert_same_statistics(start([0] * 20_000, generator()), images)


def test_each_class_has_its_own_gaussian():
    images = torch.cat([grey_images(300, seed=1) // 2 + 60, grey_images(200, seed=2)])
    labels = torch.tensor([0] * 300 + [1] * 200)
    start = GaussianInit(data.Split(images, labels), 2, images.device)
    classes = [1, 0, 0] * 10_000
    samples = start(classes, generator())
    for k in (0, 1):
        assert_same_statistics(samples[torch.tensor(classes) == k], images[labels == k])


def test_too_many_large_images_are_represented_by_some(monkeypatch):
    monkeypatch.setattr(chain_init, "MAX_ROWS", 12)
    images = grey_images(500)
    mean, factor, noise = chain_init.fit(images, images.device)
    assert factor.shape == (12, 16) and noise == 0.01
    assert torch.equal(chain_init.fit(images, images.device)[1], factor)  # the same ones in a resumed run


@pytest.mark.parametrize("name", ["uniform", "gaussian", "class_gaussian"])
def test_starts_are_images_and_follow_their_generator(name):
    start = build_chain_init(Config(start=name), data.load("digits"))
    one, two, other = (start([3, 1, 4, 1], generator(seed)) for seed in (1, 1, 2))
    assert one.shape == (4, 1, 8, 8) and one.dtype == torch.float32 and one.abs().max() <= 1
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert start([], generator()).shape == (0, 1, 8, 8)


def test_a_class_gaussian_knows_no_label_that_the_training_does_not():
    digits = data.load("digits")
    start = build_chain_init(Config(start="class_gaussian", labels_per_class=1), digits)
    own = data.to_float(data.some_of_each_class(digits.train, 1, 10).images)  # of one image, noise alone is around it
    order = data.some_of_each_class(digits.train, 1, 10).labels.tolist()
    assert (start(order, generator()) - own).abs().max() < 0.06  # standard deviation 0.01
