"""Distances and scores of samples against closed forms and torch-fidelity, and the choice of images."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy import linalg
from small_runs import DIGITS, equal, new_run, reference_chain, refused, seeded, state

import trainer
from checkpoints.resume import continued
from config import Config
from data import load, to_float
from evaluation import fid, quality
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from logger.images import to_uint8
from logger.metrics_log import read_log
from main import main
from models import build_model
from sgld import finite_images, uniform_images
from utils import UserError


class Tiny(torch_fidelity.FeatureExtractorBase):
    """uint8 RGB images to features (N, 4), a fixed random projection, which are their logits, too."""

    def __init__(self, name="tiny", features_list=("features",), **options):
        super().__init__(name, features_list)
        self.register_buffer("weight", torch.randn(3 * 16, 4, generator=seeded(9)) / 255)

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"

    def forward(self, images):
        return (images.flatten(1).float() @ self.weight,)


@pytest.fixture
def images():
    real = torch.randint(256, (300, 3, 4, 4), dtype=torch.uint8, generator=seeded(1))
    return real, torch.randint(100, 256, (200, 3, 4, 4), dtype=torch.uint8, generator=seeded(2))


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of points (Dowson & Landau 1982)."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)


def test_distances_and_inception_score_are_those_of_torch_fidelity(images, monkeypatch):
    monkeypatch.setattr(fid, "CHUNK", 7)
    real, fake = images
    torch_fidelity.register_feature_extractor("tiny", Tiny)
    sets = {"input1": torch.utils.data.Subset(fake, range(200)), "input2": torch.utils.data.Subset(real, range(300))}
    how = dict.fromkeys(("fid", "kid", "isc", "prc", "save_cpu_ram"), True)  # the last: no processes of its own
    how |= dict.fromkeys(("cuda", "cache", "verbose"), False) | {"feature_extractor": "tiny", "kid_subset_size": 150}
    theirs = torch_fidelity.calculate_metrics(**sets, **how)
    features = Tiny()(fake)[0], Tiny()(real)[0]
    found = {"FID": fid.frechet_distance(*map(fid.feature_statistics, features))}
    found |= fid.kid_precision_recall(*features, 150) | fid.inception_score(features[0])
    names = {"FID": "frechet_inception_distance", "precision": "precision", "recall": "recall"}
    names |= {"KID": "kernel_inception_distance_mean", "KID, standard deviation": "kernel_inception_distance_std"}
    names |= {"IS": "inception_score_mean", "IS, standard deviation": "inception_score_std"}
    assert found == {name: pytest.approx(theirs[their_name], rel=1e-4) for name, their_name in names.items()}
    assert 0 < found["recall"] != found["precision"] < 1


def test_distances_of_few_images_carry_a_warning_or_a_reason(images, tmp_path):
    real, fake = images
    section, sets = Section("quality", tmp_path), {"some": (fake[:70], "drawn"), "one": (fake[:1], "drawn")}

    class Space:
        table, frechet_name, network_name = "t", "FID", "pixels"

        def outputs(self, images):
            return {"features": images.flatten(1).float() / 255}

    for n_real in (300, 47):  # 48 features
        quality.add_distances(section, Space(), sets, quality.ImageSet(real[:n_real], "real ones"))
    assert section.absent == {"t, one": "needs at least 20 samples and real images, not 1"}
    (note,) = section.notes
    assert note.startswith("**FID means little here** (some)") and "fewer images than the 48 features" in note
    assert {row for _, row, _ in section.measurements()} == {"some"}
    found = section.results["t"]["some"]
    features = (Space().outputs(part)["features"] for part in (fake[:70], real[:47]))
    expected = fid.kid_precision_recall(*features, 46)
    assert all(found[name]["value"] == pytest.approx(expected[name]) for name in ("precision", "recall"))
    assert expected["precision"] != expected["recall"]
    assert found["KID"]["protocol"].startswith("drawn; pixels, against real ones; KID of 100 subsets of 46 images")


def test_without_inception_weights_one_line_says_where_to_get_them(network):
    with pytest.raises(UserError, match=r"no network.*weights-inception-2015-12-05-6726825d.pth into .*checkpoints"):
        fid.InceptionSpace(torch.device("cpu"))
    assert len(network) == 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="torch_fidelity is not installed"):
        patch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
        fid.load_inception()  # in each of several processes


def test_inception_takes_small_grey_images(monkeypatch):
    module = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(f"{module}.FeatureExtractorInceptionV3.load_state_dict", lambda *_: None)  # they stay random
    space = fid.InceptionSpace(torch.device("cpu"))
    assert space.network.get_name() == "inception-v3-compat" and not space.network.training
    grey = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8, generator=seeded(3))
    outputs = space.outputs(grey)
    assert outputs["features"].shape == (2, 2048) and outputs["logits"].shape == (2, 1008)
    torch.testing.assert_close(outputs, space.outputs(grey.repeat(1, 3, 1, 1)))
    space.network = Mock(side_effect=lambda x: (x[:, 0], x[:, 0]))  # whose memory is that of 299x299, whatever comes
    space.outputs(torch.zeros(600, 1, 8, 8, dtype=torch.uint8))
    assert [len(call.args[0]) for call in space.network.mock_calls] == [250, 250, 100]


def test_the_most_confident_of_each_class_are_kept():
    logits = 3 * torch.randn(100, 3, generator=seeded())
    p, classes = logits.softmax(1).max(1)
    kept = quality.most_confident(logits, 0.9)
    for k in range(3):
        mine = [i for i in range(100) if classes[i] == k]
        best = sorted(mine, key=lambda i: -p[i])[: round(0.9 * len(mine))]
        assert sorted(best) == sorted(i for i in kept.tolist() if classes[i] == k)
    assert quality.most_confident(torch.tensor([[25.0, 0], [30, 0], [28, 0]]), 0.4).tolist() == [1]  # in float32 all 1
    assert quality.most_confident(torch.eye(2), 0.1).tolist() == [0, 1]  # of each class one at least


def test_nearest_is_the_slow_loop():
    points, references = torch.randn(7, 2, 3, generator=seeded(1)), torch.randn(130, 2, 3, generator=seeded(2))
    distance, index = fid.nearest(points, references)
    for i in range(7):
        slow = [(points[i] - reference).square().sum().sqrt().item() for reference in references]
        assert index[i] == int(np.argmin(slow)) and distance[i].item() == pytest.approx(min(slow), rel=1e-5)
    assert fid.nearest(references[5:6], references)[0].item() == 0


def inputs_with(buffer=None, **options):
    torch.manual_seed(0)
    cfg = Config(mode="test", load_ckpt="x", dataset="digits", n_sample_steps=1, n_samples=30, **options)
    model = build_model((1, 8, 8), 10, 10, 1).eval()
    drawn = SimpleNamespace(start=uniform_images(30, (1, 8, 8), seeded()), x=uniform_images(30, (1, 8, 8), seeded()))
    return EvalInputs(cfg, model, load("digits"), buffer, None, torch.device("cpu"), True, lambda n, y: drawn)


def rows(images):
    return sorted(map(bytes, images.flatten(1).numpy()))


def test_the_reference_is_all_training_images_or_test_images_too():
    data = load("digits")
    for name, parts, expected in (
        ("train", (data.train, data.valid), "1437 training and validation images"),
        ("train+test", (data.train, data.valid, data.test), "1797 training, validation and test images"),
    ):
        images, what = quality.reference(inputs_with(fid_reference=name))
        assert what == expected and rows(images) == rows(torch.cat([part.images for part in parts]))
    assert len(quality.reference(inputs_with(max_images=40))[0]) == 40


def test_images_of_the_buffer_are_taken_at_random_and_without_broken_ones(tmp_path):
    levels = torch.linspace(-1, 1, 256)  # image i is grey of level i
    buffer = levels[:, None, None, None].expand(256, 1, 8, 8).clone()
    buffer[200:, 0, 0, 0] = torch.nan
    found = []
    for seed in (1, 1, 2):
        sets = quality.sample_sets(inputs_with(finite_images(buffer), seed=seed), Section("quality", tmp_path), 30)
        found.append(sets["buffer"].images[:, 0, 0, 0].tolist())
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 30 and max(found[0]) in range(150, 200) and min(found[0]) < 50
    assert sorted(found[0]) != found[0]
    filtered, top = (sets[name].images for name in ("buffer, filtered", "buffer, most confident"))
    assert len(filtered) == pytest.approx(27, abs=3) and 3 <= len(top) < 10
    assert set(rows(top)) < set(rows(filtered))


TINY = (
    "--batch_size 100 --p_x_batch_size 50 --buffer_size 200 --n_valid 100 --lr 1e-3 --max_steps 39 --dropout_rate 0.1"
)
TINY = [*DIGITS, *TINY.split(), "--no_log"]  # 13 steps an epoch
TEST = "--mode test --eval quality --n_samples 30 --n_sample_steps 2 --gpu cpu".split()


def measured(run, *options, features=None):
    before = set(run.glob("eval*"))
    assert main([*TEST, "--load_ckpt", str(run), "--feature_ckpt", str(features or run), *options]) == 0
    (report,) = set(run.glob("eval*")) - before
    return json.loads((report / "results.json").read_text())["quality"]


ROWS = ["test images", "chain starts", "fresh", "fresh, class-conditional", "buffer", "buffer, filtered"]
DISTANCES = ["KID", "KID, standard deviation", "precision", "recall"]


def test_one_row_a_protocol_and_one_column_a_measure(tmp_path, monkeypatch):
    class Projection(torch.nn.Module):
        weight = torch.randn(3 * 64, 4, generator=seeded(9)) / 255

        def forward(self, x):
            return (x.flatten(1).float() @ self.weight,) * 2

    monkeypatch.setattr(fid, "load_inception", lambda: Projection())
    run, features = new_run(TINY, tmp_path / "1"), new_run(TINY, tmp_path / "2", "--seed", "2", "--max_steps", "13")
    results = measured(run, "--fid_reference", "train+test", features=features)["results"]
    assert results["L2 distance to the nearest training image"]["test images"]["mean"]["value"] > 0
    inception_table, table = results["Inception scores"], results["in a classifier's features"]
    assert list(inception_table) == ROWS and list(table) == [*ROWS, "buffer, most confident"]  # too few for distances
    for name in ROWS:
        assert list(inception_table[name]) == ["FID", *DISTANCES, "IS", "IS, standard deviation"]
        assert list(table[name]) == ["Fréchet distance", *DISTANCES, "same class"]
    assert min(table[name]["same class"]["value"] for name in ROWS) < 1
    assert [table[name]["recall"]["n"] for name in ROWS[:5]] == [30] * 5 and table[ROWS[5]]["recall"]["n"] < 30
    assert len({table[name]["Fréchet distance"]["value"] for name in ROWS}) == len(ROWS)
    assert "log p(x)" in table["fresh"]["KID"]["protocol"] and "log p(x|y)" in table[ROWS[3]]["KID"]["protocol"]
    assert "against 1797 training, validation and test images; KID of 100 subsets" in table["fresh"]["KID"]["protocol"]


def test_a_model_without_labels_leaves_out_what_needs_classes(tmp_path, capsys):
    run, features = new_run(TINY, tmp_path / "1", "--p_y_x_weight", "0"), new_run(TINY, tmp_path / "2")
    result = measured(run, features=features)
    reason = "the model was trained without labels"
    assert {result["absent"][name] for name in ("fresh, class-conditional", "buffer, filtered")} == {reason}
    table = result["results"]["in a classifier's features"]
    assert list(table) == ["test images", "chain starts", "fresh", "buffer"] and "same class" not in table["fresh"]
    assert "samples: 1 times 30 chains of 2 SGLD steps" in capsys.readouterr().out
    err = refused(capsys, *TEST, "--load_ckpt", features, "--feature_ckpt", run)
    assert "was trained without labels: name a classifier" in err


def test_quality_while_training(tmp_path, monkeypatch):
    """The distances are those of a slow computation, the best step's weights are kept, training is as without."""
    monkeypatch.setattr(trainer, "MIN_EPOCH", 1)
    monkeypatch.setattr(fid, "N_REFERENCE", 500)
    features = new_run(TINY, tmp_path / "features", "--mode", "baseline_train", "--max_steps", "2")
    measured = ["--quality_every", "2", "--n_samples", "150", "--n_sample_steps", "3", "--feature_ckpt", str(features)]
    averaged = [*TINY, "--ema", "0.99", "--lr", "0.01"]  # far from the last weights
    run, plain = new_run(averaged, tmp_path / "measured", *measured), new_run(averaged, tmp_path / "plain")
    weights, scores = state(run)["ema"], state(run)["best"]
    assert equal(state(run)["model"], state(plain)["model"])
    lines = {line["step"]: line for line in read_log(run / "metrics.jsonl") if "quality/buffer" in line}
    assert list(lines) == [26, 39]
    assert state(run, "best_quality.pt")["step"] == min(lines, key=lambda step: lines[step]["quality/fresh_samples"])
    assert scores.keys() == {"best.pt", "best_quality.pt"}
    for n, best in ((150, scores), (149, {"best.pt": scores["best.pt"]})):
        assert continued({"resume": str(run), "n_samples": n}, str(run)).content["state"]["best"] == best
    (model, network), images = (build_model((1, 8, 8), 10, 10, 1) for _ in "ab"), load("digits", n_valid=100)
    model.load_state_dict(weights)
    network.load_state_dict(state(features, "best.pt")["model"])
    rng, starts, fresh = seeded(1 + 39), [], []
    *seeds, after = torch.randint(2**31, (4,), generator=rng).tolist()
    for seed in seeds:  # of three batches, as large as in training
        rng.manual_seed(seed)
        starts.append(uniform_images(50, (1, 8, 8), rng))
        fresh.append(reference_chain(model.log_density, starts[-1], 3, 1.0, 0.01, rng).x)
    held = [state(run)["buffer"]["images"][torch.randperm(200, generator=rng.manual_seed(after))[:150]]]
    of = lambda images: network.eval().f(images).double().detach().numpy()  # noqa: E731
    real = of(to_float(images.train.images[torch.randperm(1337, generator=seeded())[:500]]))
    for name, samples in {"fresh_samples": fresh, "chain_starts": starts, "buffer": held}.items():
        expected = closed_form(of(to_float(to_uint8(torch.cat(samples)[:150]))), real)
        assert lines[39][f"quality/{name}"] == pytest.approx(expected, rel=0.01), name


CANNOT_BE = {"": "--quality_every needs --feature_ckpt, a classifier, or Inception"}
CANNOT_BE |= {"--norm batch --sync_batch_norm": "--sync_batch_norm would mix"}


@pytest.mark.parametrize("options, words", CANNOT_BE.items())
def test_quality_while_training_that_cannot_be(options, words, tmp_path, capsys):
    assert main([*TINY, "--quality_every", "1", *options.split(), "--logdir", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()
