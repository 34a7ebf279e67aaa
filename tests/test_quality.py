"""Distances and scores of samples against closed forms, and the choice of images."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation import quality
from evaluation.distances import Features, as_rgb, frechet_distance, inception, inception_scorer, nearest
from evaluation.quality import fresh_samples, most_confident
from evaluation.report import Section
from models import build_model
from sgld import SGLD, reference_chain, uniform_images
from starts import UniformStart
from storage.pictures import to_uint8
from utils import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tiny(torch.nn.Module):
    """uint8 RGB images to (N, 4): a fixed random projection."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(3 * 16, 4, generator=seeded(9)) / 255)

    def forward(self, images):
        return images.flatten(1).float() @ self.weight


@pytest.fixture
def images():
    real = torch.randint(256, (300, 3, 4, 4), dtype=torch.uint8, generator=seeded(1))
    fake = torch.randint(100, 256, (200, 3, 4, 4), dtype=torch.uint8, generator=seeded(2))
    return real, fake


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of points (Dowson & Landau 1982)."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)


def test_frechet_distance_is_the_closed_form(images):
    real, fake = images
    distance = frechet_distance(Tiny(), real)
    for other in (fake, real[:150], fake):  # the second use starts afresh
        expected = closed_form(Tiny()(real).double().numpy(), Tiny()(other).double().numpy())
        assert distance(other) == pytest.approx(expected, rel=1e-3)


def test_inception_scores_of_a_tiny_network(images):
    real, fake = images
    torch.manual_seed(0)
    scorer = inception_scorer(lambda batch: (Tiny()(batch), Tiny()(batch)), real)
    scorer(real[:150])  # what was scored before leaves no trace
    torch.manual_seed(0)
    scores = scorer(fake)
    x, y = Tiny()(real).double(), Tiny()(fake).double()
    assert scores.fid == pytest.approx(closed_form(x.numpy(), y.numpy()), rel=1e-3)
    # on all images at once, where the metric takes the mean over ten parts of them
    log_p = y.log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1)
    assert scores.inception_score[0] == pytest.approx(divergence.mean().exp().item(), rel=0.1)
    # the unbiased squared MMD with the kernel (x.y / 4 + 1)^3, on all images instead of subsets
    k_xx, k_yy, k_xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    mmd = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_xx, k_yy)) - 2 * k_xy.mean()
    assert scores.kid[0] == pytest.approx(mmd.item(), rel=0.15)


@pytest.mark.parametrize(("n", "n_real", "few"), [(63, 300, True), (64, 64, False), (300, 63, True)])
def test_a_frechet_distance_of_fewer_images_than_features_is_called_so(n, n_real, few, tmp_path):
    section = Section("quality", tmp_path)
    quality.warn_of_few(section, "FID of a set", torch.zeros(n), torch.zeros(n_real), 64)
    assert bool(section.notes) == few
    if few:
        assert "FID of a set means little" in section.markdown() and "63 images but 64 features" in section.markdown()


def test_inceptions_scores_of_few_images_carry_a_warning_or_a_reason(images, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "inception", lambda _: lambda batch: (Tiny()(batch), Tiny()(batch)))
    real, fake = images
    section = Section("quality", tmp_path)
    quality.add_inception_scores(section, {"many": (fake, "drawn"), "one": (fake[:1], "drawn")}, real)
    assert list(section.tables["Inception scores"]) == ["many"]
    assert section.absent == {"FID, IS, KID of one": "they need at least 20 images, not 1"}
    assert len(section.notes) == 1 and "rests on 200 images but 2048 features" in section.notes[0]


def test_without_inception_weights_one_line_says_where_to_get_them(network):
    with pytest.raises(UserError, match=r"no network.*weights-inception-2015-12-05-6726825d.pth into .*checkpoints"):
        inception(torch.device("cpu"))
    assert len(network) == 1


def test_inception_takes_small_uint8_images_and_resizes_as_tensorflow_does(monkeypatch):
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    # The weights stay random, and the network in training mode, in which torch-fidelity 0.3 leaves it.
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    original = FeatureExtractorInceptionV3.__init__
    monkeypatch.setattr(FeatureExtractorInceptionV3, "__init__", lambda *a: original(*a) or a[0].train() and None)
    seen = []
    network = inception(torch.device("cpu"))
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=seeded(3))
    with torch.no_grad():
        pool, logits = network(images)
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008) and not network.training
    # TensorFlow 1 samples at i * 32 / 299, without the half pixel that torch's interpolate adds
    at = torch.arange(299) * 32 / 299
    low, weight = at.long(), (at - at.long()).float()
    high = (low + 1).clamp(max=31)
    rows = images.float()[:, :, low] * (1 - weight)[:, None] + images.float()[:, :, high] * weight[:, None]
    expected = rows[..., low] * (1 - weight) + rows[..., high] * weight
    torch.testing.assert_close(seen[0], (expected - 128) / 128, atol=1e-4, rtol=0)


def test_grey_images_become_rgb():
    grey = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(as_rgb(grey), grey.repeat(1, 3, 1, 1))


def test_features_are_the_backbones():
    model = build_model(1, 3, depth=10, width=1).eval()
    grey = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    network = Features(model)
    torch.testing.assert_close(network(grey), model.f(grey / 127.5 - 1))
    torch.testing.assert_close(model.class_output(network(grey)), model(grey / 127.5 - 1))
    assert network.num_features == network(grey).shape[1]


def test_the_most_confident_of_each_class_are_kept():
    torch.manual_seed(0)
    logits = 3 * torch.randn(100, 3)
    p, classes = logits.softmax(1).max(1)
    kept = most_confident(logits, 0.9)
    for k in range(3):
        mine = [i for i in range(100) if classes[i] == k]
        best = sorted(mine, key=lambda i: -p[i])[: round(0.9 * len(mine))]
        assert sorted(best) == sorted(i for i in kept.tolist() if classes[i] == k)


def test_nearest_is_the_slow_loop():
    points, references = torch.randn(7, 2, 3, generator=seeded(1)), torch.randn(130, 2, 3, generator=seeded(2))
    distance, index = nearest(points, references)
    for i in range(7):
        slow = [(points[i] - reference).square().sum().sqrt().item() for reference in references]
        assert index[i] == int(np.argmin(slow))
        assert distance[i].item() == pytest.approx(min(slow), rel=1e-5)
    assert nearest(references[5:6], references)[0].item() == 0


@pytest.mark.parametrize("class_cond", [False, True])
def test_fresh_samples_are_chains_from_the_start(class_cond, monkeypatch):
    monkeypatch.setattr(quality, "images_per_batch", lambda *_: 4)

    def log_density(x, y=None):
        goal = 0 if y is None else y[:, None] / 10
        return -(x.flatten(1) - goal).square().sum(1)

    shape, rng = (1, 4, 4), seeded(3)
    starts, ends = fresh_samples(SGLD(log_density), 6, UniformStart(shape), 3, 3, 0.1, 0.01, seeded(3), class_cond)
    first, last = [], []
    for classes in ([0, 1, 2, 0], [1, 2, 0, 1]):
        first.append(uniform_images(4, shape, rng))
        y = torch.tensor(classes) if class_cond else None
        last.append(reference_chain(log_density, first[-1], 3, 0.1, 0.01, rng, y).x)
    assert torch.equal(starts, to_uint8(torch.cat(first))[:6])
    assert ends.shape == (6, *shape) and torch.equal(ends, to_uint8(torch.cat(last))[:6])
