"""Distances and scores of samples against closed forms, and the choice of images."""

import json

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import prc_features_to_metric

import trainer
from chain_init import UniformInit
from checkpoints.files import load_checkpoint
from checkpoints.resume import continued
from config import Config
from data import load
from evaluation import fid, quality, training_fid
from evaluation.fid import (
    Features,
    as_rgb,
    distances_to,
    frechet_distance,
    inception,
    inception_score,
    nearest,
)
from evaluation.inputs import EvalInputs
from evaluation.quality import most_confident
from evaluation.report import Section
from evaluation.training_fid import fresh_samples
from logger.images import to_uint8
from logger.metrics_log import read_log
from main import main
from models import build_model
from sgld import SGLD, finite_images, reference_chain, uniform_images
from utils import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tiny(torch.nn.Module):
    """uint8 RGB images to (N, 4): a fixed random projection."""

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
    distance = frechet_distance(Tiny()(real))
    for other in (fake, real[:150], fake):  # the second use starts afresh
        expected = closed_form(Tiny()(real).double().numpy(), Tiny()(other).double().numpy())
        assert distance(Tiny()(other)) == pytest.approx(expected, rel=1e-3)


def test_distances_and_inception_score_of_a_tiny_network(images):
    real, fake = images
    torch.manual_seed(0)
    distances = distances_to(Tiny()(real))
    distances(Tiny()(real[:150]))  # what was measured before leaves no trace
    torch.manual_seed(0)
    found = distances(Tiny()(fake))
    x, y = Tiny()(real).double(), Tiny()(fake).double()
    assert found.frechet == pytest.approx(closed_form(x.numpy(), y.numpy()), rel=1e-3)
    # on all images at once, where the metric takes the mean over ten parts of them
    log_p = y.log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1)
    assert inception_score(Tiny()(fake))[0] == pytest.approx(divergence.mean().exp().item(), rel=0.1)
    torch.manual_seed(3)
    _, deviation = inception_score(y)
    torch.manual_seed(3)
    parts = [part.softmax(1) for part in y[torch.randperm(len(y))].chunk(10)]
    scores = [(p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item() for p in parts]
    assert deviation == pytest.approx(np.std(scores), rel=1e-4)
    # the unbiased squared MMD with the kernel (x.y / 4 + 1)^3, on all images instead of subsets
    k_xx, k_yy, k_xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    mmd = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_xx, k_yy)) - 2 * k_xy.mean()
    assert found.kid[0] == pytest.approx(mmd.item(), rel=0.15)
    assert found.subset_size == 199


def within(point, others):
    """Whether a point lies no farther from one of the others than the third nearest of the rest lies from that one."""
    for i, other in enumerate(others):
        rest = sorted(np.linalg.norm(other - p) for k, p in enumerate(others) if k != i)
        if np.linalg.norm(point - other) <= rest[2]:
            return True
    return False


def test_precision_and_recall_are_the_slow_loop_and_those_of_torch_fidelity(monkeypatch):
    monkeypatch.setattr(fid, "CHUNK", 7)
    real, fake = torch.randn(25, 3, generator=seeded(1)), 1.5 * torch.randn(32, 3, generator=seeded(2)) + 0.7
    found = distances_to(real)(fake)
    precision = np.mean([within(point, real.numpy()) for point in fake.numpy()])
    recall = np.mean([within(point, fake.numpy()) for point in real.numpy()])
    assert (found.precision, found.recall) == pytest.approx((precision, recall)) and precision != recall
    theirs = prc_features_to_metric(fake, real, verbose=False)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_distances_of_few_images_carry_a_warning_or_a_reason(images, tmp_path):
    real, fake = images
    section, sets = Section("quality", tmp_path), {"some": (fake[:70], "drawn"), "one": (fake[:1], "drawn")}

    def network(images):
        return images.flatten(1).float() / 255, None

    for n_real in (300, 47):  # 48 features
        quality.add_distances(section, "t", "FID", sets, (real[:n_real], "real ones"), network, "pixels", 1)
    assert section.absent == {"t, one": "needs at least 20 samples and real images, not 1"}
    (note,) = section.notes
    assert note.startswith("**FID means little here** (some)") and "fewer images than the 48 features" in note
    assert set(section.tables["t"]) == {"some"}
    protocol = section.tables["t"]["some"]["KID"].protocol
    assert protocol.startswith("drawn; pixels, against real ones; KID of 100 subsets of 46 images, precision")


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
    torch.testing.assert_close(network(grey), network(grey / 127.5 - 1))


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
    monkeypatch.setattr(training_fid, "images_per_batch", lambda *_: 4)

    def log_density(x, y=None):
        goal = 0 if y is None else y[:, None] / 10
        return -(x.flatten(1) - goal).square().sum(1)

    shape, rng = (1, 4, 4), seeded(3)
    starts, ends = fresh_samples(SGLD(log_density), 6, UniformInit(shape), 3, 3, 0.1, 0.01, seeded(3), class_cond)
    first, last = [], []
    seeds = torch.randint(2**31, (3,), generator=rng).tolist()  # each batch has randomness of its own
    for classes, seed in zip(([0, 1, 2, 0], [1, 2, 0, 1]), seeds, strict=False):
        rng.manual_seed(seed)
        first.append(uniform_images(4, shape, rng))
        y = torch.tensor(classes) if class_cond else None
        last.append(reference_chain(log_density, first[-1], 3, 0.1, 0.01, rng, y).x)
    assert torch.equal(starts, to_uint8(torch.cat(first))[:6])
    assert ends.shape == (6, *shape) and torch.equal(ends, to_uint8(torch.cat(last))[:6])


# ---------------------------------------------------------------------------------------------- what is compared


def inputs_with(buffer=None, **options):
    torch.manual_seed(0)
    cfg = Config(mode="test", load_ckpt="x", dataset="digits", n_sample_steps=1, n_samples=30, **options)
    return EvalInputs(
        cfg, build_model(1, 10, depth=10, width=1).eval(), load("digits"), buffer, None, torch.device("cpu")
    )


def rows(images):
    return sorted(map(bytes, images.flatten(1).numpy()))


def test_the_reference_is_all_training_images_or_test_images_too():
    inputs, more = inputs_with(), inputs_with(fid_reference="train+test")
    data = inputs.data
    images, what = quality.reference(inputs)
    assert what == "1437 training and validation images"
    assert rows(images) == rows(torch.cat([data.train.images, data.valid.images]))
    images, what = quality.reference(more)
    assert what == "1797 training, validation and test images"
    assert rows(images) == rows(torch.cat([data.train.images, data.valid.images, data.test.images]))
    assert len(quality.reference(inputs_with(max_images=40))[0]) == 40


def test_images_of_the_buffer_are_taken_at_random_and_without_broken_ones(tmp_path):
    levels = torch.linspace(-1, 1, 256)  # image i is grey of level i
    buffer = levels[:, None, None, None].expand(256, 1, 8, 8).clone()
    buffer[200:, 0, 0, 0] = torch.nan
    found = []
    for seed in (1, 1, 2):
        sets = quality.compared(inputs_with(finite_images(buffer), seed=seed), Section("quality", tmp_path))
        found.append(sets["buffer"][0][:, 0, 0, 0].tolist())
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 30 and max(found[0]) in range(150, 200) and min(found[0]) < 50
    assert sorted(found[0]) != found[0]
    assert len(sets["buffer, filtered"][0]) == pytest.approx(27, abs=3)


TINY = "--dataset digits --depth 10 --width 1 --batch_size 16 --buffer_size 40 --max_steps 2 --sgld_step 1".split()
TEST = "--mode test --eval quality --n_samples 30 --n_sample_steps 2 --gpu cpu --no_log".split()


def trained(logdir, *options):
    assert main([*TINY, "--gpu", "cpu", "--no_log", "--logdir", str(logdir), *options]) == 0
    return next(logdir.iterdir())


def measured(run, *options, features=None):
    before = set(run.glob("eval*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "nearest_figure", lambda rows: np.zeros((1, 1, 3), np.uint8))  # it takes its time
        assert main([*TEST, "--load_ckpt", str(run), "--feature_ckpt", str(features or run), *options]) == 0
    (report,) = set(run.glob("eval*")) - before
    return json.loads((report / "results.json").read_text())["quality"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Results by reference, and the classes of all chains; Inception is a random projection of the images."""
    run, classes = trained(tmp_path_factory.mktemp("runs")), []
    chain = SGLD.__call__

    def spy(self, x, steps, step_size, noise_std, generator, y=None):
        classes.append(y)
        return chain(self, x, steps, step_size, noise_std, generator, y)

    weight = torch.randn(3 * 64, 4, generator=seeded(9)) / 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGLD, "__call__", spy)
        patch.setattr(quality, "inception", lambda _: lambda x: (x.flatten(1).float() @ weight,) * 2)
        return {name: measured(run, "--fid_reference", name) for name in ("train", "train+test")}, classes


ROWS = ["test images", "chain starts", "fresh", "fresh, class-conditional", "buffer", "buffer, filtered"]
DISTANCES = ["KID", "KID, standard deviation", "precision", "recall"]


def test_one_row_a_protocol_and_one_column_a_measure(reports):
    results = reports[0]["train"]["results"]
    inception_table, table = results["Inception scores"], results["in a classifier's features"]
    assert list(inception_table) == list(table) == ROWS
    for name in ROWS:
        assert list(inception_table[name]) == ["FID", *DISTANCES, "IS", "IS, standard deviation"]
        assert list(table[name]) == ["Fréchet distance", *DISTANCES, "same class"]
    assert [table[name]["recall"]["n"] for name in ROWS[:5]] == [30] * 5 and table[ROWS[5]]["recall"]["n"] < 30
    assert len({table[name]["Fréchet distance"]["value"] for name in ROWS}) == len(ROWS)
    assert "log p(x)" in table["fresh"]["KID"]["protocol"] and "log p(x|y)" in table[ROWS[3]]["KID"]["protocol"]
    assert "against 1437 training and validation images; KID of 100 subsets of 29" in table["fresh"]["KID"]["protocol"]


def test_the_test_images_change_only_what_is_measured_against_them(reports):
    before, after = (reports[0][name]["results"] for name in ("train", "train+test"))
    changed = {"FID", "Fréchet distance", "KID", "KID, standard deviation"}
    for table in before:
        for row in before[table]:
            for column, number in before[table][row].items():
                other = after[table][row][column]
                if column in changed:
                    assert other["value"] != number["value"]
                elif column not in ("precision", "recall"):
                    assert other["value"] == number["value"]
                if column in [*changed, "precision", "recall"]:
                    assert "against 1797 training, validation and test images" in other["protocol"]
    assert after["in a classifier's features"]["test images"]["precision"]["value"] == 1


def test_conditional_chains_are_as_many_of_each_class_and_the_others_of_none(reports):
    for y in reports[1][::2]:
        assert y is None
    for y in reports[1][1::2]:
        assert y.bincount().tolist() == [3] * 10
    assert len(reports[1]) == 4


def test_a_model_without_labels_leaves_out_what_needs_classes(tmp_path, capsys):
    run, features = trained(tmp_path / "1", "--p_y_x_weight", "0"), trained(tmp_path / "2")
    result = measured(run, features=features)
    reason = "the model was trained without labels"
    assert {result["absent"][name] for name in ("fresh, class-conditional", "buffer, filtered")} == {reason}
    table = result["results"]["in a classifier's features"]
    assert list(table) == ["test images", "chain starts", "fresh", "buffer"] and "same class" not in table["fresh"]
    assert "samples: 1 times 30 chains of 2 SGLD steps" in capsys.readouterr().out
    assert main([*TEST, "--load_ckpt", str(features), "--feature_ckpt", str(run)]) == 2
    assert "was trained without labels: name a classifier" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- while training

TINY = "--dataset digits --gpu cpu --depth 10 --width 1 --batch_size 100 --sgld_step 2 --buffer_size 200 --n_valid 100"
TINY += " --precision fp32 --lr 1e-3 --warmup_steps 2 --max_steps 39 --dropout_rate 0.1"
TINY = TINY.split()  # 13 steps an epoch


def test_quality_while_training(tmp_path, monkeypatch):
    """The distances are those of a slow computation, the best step's weights are kept, training is as without."""
    monkeypatch.setattr(trainer, "MIN_EPOCH", 1)
    monkeypatch.setattr(training_fid, "REFERENCE", 500)

    def train(folder, *options):
        assert main([*TINY, "--logdir", str(tmp_path / folder), *options]) == 0
        (run,) = (tmp_path / folder).iterdir()
        return run, load_checkpoint(run / "ckpt" / "last.pt")["state"]

    features, _ = train("features", "--mode", "baseline_train", "--max_steps", "2")
    measured = ["--quality_every", "2", "--n_samples", "150", "--n_sample_steps", "3", "--feature_ckpt", str(features)]
    run, state = train("measured", *measured)
    _, plain = train("plain")
    assert all(torch.equal(plain["model"][name], value) for name, value in state["model"].items())

    lines = {line["step"]: line for line in read_log(run / "metrics.jsonl") if "quality/buffer" in line}
    assert list(lines) == [26, 39]
    best = min(lines, key=lambda step: lines[step]["quality/fresh_samples"])
    assert load_checkpoint(run / "ckpt" / "best_quality.pt")["state"]["step"] == best

    measured_best = {"best.pt": state["best"]["best.pt"]}
    assert state["best"].keys() == {"best.pt", "best_quality.pt"}
    for n, best in ((150, state["best"]), (149, measured_best)):
        assert continued({"resume": str(run), "n_samples": n}, str(run)).content["state"]["best"] == best

    model, network, images = build_model(1, 10, 10, 1), build_model(1, 10, 10, 1), load("digits", n_valid=100)
    model.load_state_dict(state["model"])
    network.load_state_dict(load_checkpoint(features / "ckpt" / "best.pt")["state"]["model"])
    rng = seeded(1 + 39)
    rng.manual_seed(torch.randint(2**31, (2,), generator=rng)[0].item())
    starts = uniform_images(150, (1, 8, 8), rng)
    fresh = reference_chain(model.log_density, starts, 3, 1.0, 0.01, rng).x
    of = lambda images: Features(network.eval())(images).double().detach().numpy()  # noqa: E731
    real = of(images.train.images[torch.randperm(1337, generator=seeded())[:500]])
    for name, samples in {"fresh_samples": fresh, "chain_starts": starts}.items():
        expected = closed_form(of(to_uint8(samples)), real)
        assert lines[39][f"quality/{name}"] == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--quality_every 1", "--quality_every needs --feature_ckpt, a classifier, or Inception"),
        ("--quality_every 1 --norm batch --sync_batch_norm", "--sync_batch_norm would mix"),
    ],
)
def test_quality_while_training_that_cannot_be(options, words, tmp_path, capsys):
    assert main([*TINY, *options.split(), "--logdir", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()
