"""Each metric against an independent computation, and the report of a real command line read back."""

import errno
import json
import math
import os
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from small_runs import new_run, refused, seeded, start
from test_data import write_pngs

import utils
from config import Config
from data import Split, load
from evaluation import classification, likelihood, ood, robustness
from evaluation.calibration import calibration_errors, fit_temperature, reliability_panel
from evaluation.inputs import EvalInputs
from evaluation.ood import converted, foreign_images
from evaluation.report import Section, bootstrap, read_report, value_and_interval
from losses import auroc
from main import main
from models import build_model
from models import predict as prediction
from models.predict import accuracy, predict
from utils import UserError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model((1, 8, 8), 10, depth=10, width=1).eval()


@pytest.fixture(scope="module")
def inputs(model):
    cfg = Config(mode="test", load_ckpt="x", dataset="digits", max_images=40)
    return EvalInputs(cfg, model, load("digits"), None, None, torch.device("cpu"), True, None)


def test_auroc_counts_ties_half():
    inside = torch.randint(0, 30, (70,), generator=seeded(1)).float() + 5
    outside = torch.randint(0, 30, (50,), generator=seeded(2)).float()
    target = [1] * len(inside) + [0] * len(outside)
    assert auroc(inside, outside).item() == pytest.approx(roc_auc_score(target, torch.cat([inside, outside])))
    assert auroc(inside + 100, outside) == 1 and auroc(inside - 100, outside) == 0


def test_images_are_moved_up_log_p_x_within_their_ball(inputs):
    images = torch.randint(256, (6, *inputs.data.shape), dtype=torch.uint8)
    x, moved = images / 127.5 - 1, ood.moved_towards_data(inputs.model, images)
    assert (inputs.model.log_density(moved) > inputs.model.log_density(x) + 0.01).all()
    assert ((moved - x) / 2).flatten(1).norm(dim=1).max() <= 1 + 1e-4 and moved.abs().max() <= 1


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0, 0.037), (100, 0.963, 1), (50, 0.404, 0.596)])
def test_a_share_has_a_wilson_interval(right, low, high, tmp_path):
    section = Section("one", tmp_path)
    section.add_proportion("share", torch.arange(100) < right, "")
    assert section.results["share"]["interval"] == pytest.approx((low, high), abs=5e-4)


def test_calibration_errors_by_hand():
    p = torch.tensor([[0.93, 0.07], [0.96, 0.04], [0.98, 0.02], [0.42, 0.58], [0.41, 0.59], [0.33, 0.67]])
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    # bins of 0.05: 0.93 | 0.96 0.98 | 0.58 0.59 | 0.67
    gaps = [(1, abs(1 - 0.93)), (2, abs(0.5 - 0.97)), (2, abs(1 - 0.585)), (1, abs(0 - 0.67))]
    assert calibration_errors(p, labels) == pytest.approx((sum(n * gap for n, gap in gaps) / 6, 0.67), abs=1e-6)
    above, below = Figure().subplots(2)
    reliability_panel((above, below), p, labels, "")
    assert [bar.get_height() for bar in above.patches][11:] == [1, 0, 0, 0, 0, 0, 0, 1, 0.5]  # shares that are right
    p = torch.tensor([1.0] * 10 + [0.96] * 10)  # full confidence belongs to the last bin
    errors = calibration_errors(torch.stack([p, 1 - p], 1), torch.tensor([0] * 5 + [1] * 5 + [0] * 10))
    assert errors == pytest.approx((0.98 - 0.75, 0.98 - 0.75), abs=1e-6)


def test_named_sets_are_not_downloaded_into_a_folder_of_images(model, monkeypatch, tmp_path):
    places = []
    monkeypatch.setattr(ood.data, "load", lambda name, place, device: places.append(str(place)) or load("digits"))
    for dataset, place in (("folder", "data"), ("digits", str(tmp_path))):
        cfg = Config(mode="test", dataset=dataset, data_dir=str(tmp_path), max_images=40)
        inputs = EvalInputs(cfg, model, load("digits"), None, None, torch.device("cpu"), True, None)
        assert foreign_images("mnist", inputs.data.test.images[:20], inputs).shape == (20, 1, 8, 8)
        assert places.pop() == str(Path(place).absolute())
    for place in ("data", "."):  # the default is in data/
        cfg = Config(mode="test", dataset="folder", data_dir=place, max_images=40)
        with pytest.raises(UserError, match="would be downloaded into your images"):
            foreign_images("mnist", inputs.data.test.images[:20], replace(inputs, cfg=cfg))
        assert foreign_images("digits", inputs.data.test.images[:20], replace(inputs, cfg=cfg)).shape == (20, 1, 8, 8)


@pytest.mark.parametrize("true_temperature", [0.4, 3.0])
def test_temperature_scaling_finds_the_temperature_of_a_miscalibrated_model(true_temperature):
    honest = 2 * torch.randn(20_000, 5, generator=seeded(3))
    labels = torch.multinomial(honest.softmax(1), 1, generator=seeded(4)).squeeze(1)
    assert fit_temperature(true_temperature * honest, labels) == pytest.approx(true_temperature, rel=0.05)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = torch.randn(400, generator=seeded(5)).double()
    low, high = bootstrap(torch.mean, values)
    expected = stats.norm.interval(0.95, values.mean().item(), values.std().item() / math.sqrt(400))
    assert (low, high) == pytest.approx(expected, abs=0.02)
    difference = bootstrap(lambda a, b: a.mean() - b.mean(), values, values + 5)
    assert np.mean(difference) == pytest.approx(-5, abs=0.03)
    assert difference[1] - difference[0] == pytest.approx(math.sqrt(2) * (high - low), rel=0.15)


def test_the_slope_is_that_of_finite_differences_and_leaves_the_model_alone(model):
    model.train()
    x, h = 0.5 * torch.randn(2, 1, 8, 8, generator=seeded(6)), 1e-2
    slope = -ood.scores(model, x)["-|grad log p(x)|"]
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()
    steps = h * torch.eye(64).view(64, 1, 1, 8, 8)
    with torch.no_grad():
        partial = torch.stack([(model.log_density(x + step) - model.log_density(x - step)) / (2 * h) for step in steps])
    torch.testing.assert_close(slope, partial.norm(dim=0), rtol=0.02, atol=1e-4)


def test_the_other_scores(model):
    x = torch.rand(5, 1, 8, 8, generator=seeded(8)) * 2 - 1
    scores = ood.scores(model, x)
    logits = model(x).detach()
    torch.testing.assert_close(scores["log p(x)"], logits.exp().sum(1).log())
    torch.testing.assert_close(scores["max softmax"], logits.double().softmax(1).max(1).values)
    torch.testing.assert_close(scores["max logit"], logits.max(1).values)


def test_the_interval_knows_that_changed_test_images_come_in_pairs(tmp_path):
    section, inside, widths = Section("ood", tmp_path), torch.randn(300, generator=seeded(1)), {}
    outside = inside - 0.5 + 0.1 * torch.randn(300, generator=seeded(2))
    for name in ("patches", "digits"):
        ood.add_detection(section, (name, "score"), inside, outside, "")
        low, high = section.results["AUROC"][name]["score"]["interval"]
        widths[name] = high - low
    assert 0 < 2 * widths["patches"] < widths["digits"]


def test_predict_takes_uint8_and_float_and_accuracy_counts(model, inputs, monkeypatch):
    split = inputs.data.test[:30]
    monkeypatch.setattr(prediction, "images_per_batch", lambda *_: 7)
    logits = predict(model, split.images)
    torch.testing.assert_close(logits, predict(model, split.images / 127.5 - 1))
    right = sum(int(logits[i].argmax()) == int(split.labels[i]) for i in range(30))
    assert accuracy(model, split) == pytest.approx(right / 30)


def test_built_in_sets(inputs):
    test = inputs.data.test.images[:40]
    sets = {name: foreign_images(name, test, inputs) for name in ood.BUILT_IN}
    assert all(images.shape == test.shape and images.dtype == torch.uint8 for images in sets.values())
    assert torch.equal(sets["shuffled"].flatten(1).sort().values, test.flatten(1).sort().values)
    assert not torch.equal(sets["shuffled"], test)
    assert torch.equal(sets["constant"].flatten(1).amax(1), sets["constant"].flatten(1).amin(1))
    assert len(sets["constant"].flatten(1)[:, 0].unique()) > 10
    assert len(foreign_images("constant", torch.zeros(2, 3, 8, 8), inputs).unique()) > 3  # each channel has its own
    assert len(foreign_images("shuffled", test[:1].expand(9, -1, -1, -1), inputs).unique(dim=0)) == 9  # so has an image
    means = {tuple(((a.int() + b.int()) // 2).flatten().tolist()) for i, a in enumerate(test) for b in test[:i]}
    assert all(tuple(image.flatten().tolist()) in means for image in sets["interp"])
    assert 100 < sets["noise"].float().mean() < 155
    assert torch.equal(sets["inverted"].int() + test.int(), torch.full_like(test, 255).int())
    halves = [[half for image in images for half in image.split(4, 1)] for images in (sets["patches"], test)]
    quarters = [sorted(bytes(q.numpy()) for row in part for q in row.split(4, 2)) for part in halves]
    assert quarters[0] == quarters[1] and not torch.equal(sets["patches"], test)
    weights = torch.exp(-torch.arange(-4, 5).square() / (2 * 2.0**2))
    padded = F.pad(test.float(), (4, 4, 4, 4), mode="reflect")
    kernel = (weights[:, None] * weights / weights.sum() ** 2)[None, None]
    assert (F.conv2d(padded, kernel) - sets["blurred"]).abs().max() < 0.51
    assert all(torch.equal(images, foreign_images(name, test, inputs)) for name, images in sets.items())


def test_conversion_to_another_shape():
    rgb = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=seeded(9))
    grey = converted(rgb, (1, 16, 16))
    luma = (rgb.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert (grey.float() - luma).abs().max() < 1.1  # torchvision truncates
    assert torch.equal(converted(grey, (3, 16, 16)), grey.repeat(1, 3, 1, 1))
    noise = torch.randint(256, (1, 1, 64, 64), dtype=torch.uint8, generator=seeded())
    assert converted(noise, (1, 8, 8)).float().std() < 20  # each pixel is a mean of many
    flat = torch.full((1, 1, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(converted(flat, (1, 8, 8)), torch.full((1, 1, 8, 8), 77, dtype=torch.uint8))


def test_some_images_are_random_the_same_every_time_and_noisy_only_when_asked(inputs):
    split = Split(torch.arange(200), torch.arange(200))
    chosen = inputs.subset(split).images
    assert len(chosen) == 40 and torch.equal(chosen, inputs.subset(split).images)
    assert not torch.equal(chosen, torch.arange(40)) and len(chosen.unique()) == 40
    assert len(inputs.subset(split, 7)) == 7
    images = inputs.data.test.images
    assert torch.equal(inputs.with_noise(images), images)
    noisy = replace(inputs, cfg=replace(inputs.cfg, sigma_test=0.5))
    assert (noisy.with_noise(images) - (images / 127.5 - 1)).std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(noisy.with_noise(images), noisy.with_noise(images))
    others = inputs.data.valid.images[: len(images)]
    noise = [noisy.with_noise(part) - (part / 127.5 - 1) for part in (images[: len(others)], others)]
    assert abs(torch.corrcoef(torch.stack([part.flatten() for part in noise]))[0, 1]) < 0.1


def test_a_number_that_is_not_finite_is_absent_and_a_picture_that_cannot_be_saved_not_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    section = Section("one", tmp_path / "file")
    section.add("good", 1.5, 3, "by hand")
    section.add("bad", math.nan, 3, "by hand")
    assert list(section.results) == ["good"] and "bad" in section.absent
    assert "bad: absent" in capsys.readouterr().out
    section.picture("reliability", "bins", Figure())
    assert section.pictures == {} and "reliability.png could not be drawn: cannot write" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = "--dataset digits --depth 10 --width 1 --batch_size 32 --buffer_size 64 --max_steps 30 --warmup_steps 5 "
    options += "--lr 1e-3 --sgld_step 2 --gpu cpu --ema 0.5 --no_log"
    return new_run(options.split(), tmp_path_factory.mktemp("runs"))


SHORT = "--mode test --gpu cpu --max_images 20 --n_sample_steps 1".split()


def new_report(run, *command, logdir=None):
    """The numbers and the place of the report that the command leaves in the run, or in ``logdir``."""
    before = set((logdir or run).rglob("results.json"))
    assert main([*SHORT, "--load_ckpt", str(run), *command]) == 0
    (path,) = set((logdir or run).rglob("results.json")) - before
    return json.loads(path.read_text()), path.parent


@pytest.fixture
def quick(monkeypatch):
    """Shorter attacks and annealing; what they compute is tested elsewhere."""
    for name, value in {"PGD_STEPS": 2, "RESTARTS": 1, "REFINED_PGD_STEPS": 1, "CHAINS": 2}.items():
        monkeypatch.setattr(robustness, name, value)
    monkeypatch.setattr("pyautoattack.AutoAttack.run_standard_evaluation", lambda self, x, y, batch_size: (x, y))
    monkeypatch.setattr(likelihood, "AIS_BURN_IN", 2)


def test_the_report_s_numbers_by_a_slow_computation(run, monkeypatch):
    seen, drawn = [], classification.confusion_figure
    monkeypatch.setattr(classification, "confusion_figure", lambda *a: seen.append(a[0]) or drawn(*a))
    command = "--eval classification,calibration,ood --sigma_test 0.3 --ood_datasets shuffled --max_images 80"
    found = {name: part.get("results") for name, part in new_report(run, *command.split())[0].items()}
    model = build_model((1, 8, 8), 10, depth=10, width=1).eval()
    model.load_state_dict(torch.load(run / "ckpt" / "last.pt", weights_only=True)["state"]["ema"])
    cfg = Config(mode="test", load_ckpt="x", dataset="digits", max_images=80, sigma_test=0.3)
    inputs = EvalInputs(cfg, model, load("digits"), None, None, torch.device("cpu"), True, None)
    test, train, valid = (inputs.subset(part) for part in (inputs.data.test, inputs.data.train, inputs.data.valid))
    others = foreign_images("shuffled", test.images, inputs)
    with torch.no_grad():
        sets = (test.images, train.images, valid.images, others)
        of_test, of_train, of_valid, of_others = (model(inputs.with_noise(images)) for images in sets)
    right = (of_test.argmax(1) == test.labels).double()
    assert found["classification"]["accuracy"]["value"] == pytest.approx(right.mean().item())
    pairs = list(zip(test.labels.tolist(), of_test.argmax(1).tolist(), strict=True))
    assert all(seen[0][i, j] == pairs.count((i, j)) for i in range(10) for j in range(10))
    difference = of_train.logsumexp(1).mean() - of_test.logsumexp(1).mean()
    in_report = found["classification"]["log p(x), training minus test (nats)"]["value"]
    assert in_report == pytest.approx(difference.item(), abs=1e-4)
    expected = fit_temperature(of_valid, valid.labels)
    assert found["calibration"]["temperature"]["value"] == pytest.approx(expected, rel=1e-4)
    for name, t in {"as trained": 1, "temperature-scaled": found["calibration"]["temperature"]["value"]}.items():
        p = (of_test / t).softmax(1).double()
        confidence = p.max(1).values
        gaps = [(right - confidence)[(confidence * 20).long() == k].sum().abs() / 80 for k in range(20)]
        errors = {row: columns[name]["value"] for row, columns in found["calibration"]["calibration"].items()}
        assert errors["expected calibration error"] == pytest.approx(sum(gaps).item(), abs=1e-5)
        brier, nll = (p - F.one_hot(test.labels)).square().sum(1).mean().item(), F.nll_loss(p.log(), test.labels).item()
        assert [errors[row] for row in ("Brier score", "cross-entropy (nats)")] == pytest.approx([brier, nll], abs=1e-5)
    target, score = [1] * 80 + [0] * 80, torch.cat([of_test, of_others]).logsumexp(1)
    measured = {name: found["ood"][name]["shuffled"]["log p(x)"]["value"] for name in ("AUROC", "AUPR")}
    assert measured["AUROC"] == pytest.approx(roc_auc_score(target, score)) != 0.5
    assert measured["AUPR"] == pytest.approx(average_precision_score(target, score))
    threshold = score[:80].sort().values[4]  # 76 of 80 lie at or above it
    share = (score[80:] >= threshold).float().mean().item()
    assert found["ood"]["FPR at 95 % true positives"]["shuffled"]["log p(x)"]["value"] == pytest.approx(share)
    with torch.no_grad():
        moved = model(ood.moved_towards_data(model, others)).logsumexp(1)
    worst = found["ood"]["AUROC, worst case"]["shuffled"]["log p(x)"]["value"]
    assert worst == pytest.approx(roc_auc_score(target, torch.cat([score[:80], moved])), abs=1e-3)


def test_bits_count_the_grey_levels_and_are_of_test_images_at_each_temperature(inputs, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(likelihood, "add_bits", lambda *arguments: asked.append(arguments[2:5]))
    for dataset in ("digits", "cifar10"):
        other, section = replace(inputs, cfg=replace(inputs.cfg, dataset=dataset)), Section("likelihood", tmp_path)
        likelihood.measure(other, section)
    assert [levels for *_, levels in asked] == [17, 256] and "likelihood at another temperature" in section.absent
    other = replace(inputs, buffer=torch.zeros(2, *inputs.data.shape), cfg=replace(inputs.cfg, max_images=None))
    for best in (1.0, 4.0):
        curves = likelihood.Curves(np.array([best, 8.0]), dict.fromkeys(("forward", "reverse"), np.array([3.0, 4.0])))
        monkeypatch.setattr(likelihood, "bits_by_temperature", lambda *_, curves=curves: curves)
        likelihood.measure(other, Section("likelihood", tmp_path))
    assert [(beta, len(on_test)) for beta, on_test, _ in asked[2:]] == [(1, 360), (1, 360), (4, 360)]


@pytest.mark.slow
def test_the_whole_command_and_its_report_read_back(run, quick, tmp_path, capsys, monkeypatch):
    seen, dequantise = [], likelihood.ais.dequantise
    monkeypatch.setattr(likelihood.ais, "dequantise", lambda x, *a: seen.append(x) or dequantise(x, *a))
    command = "--mode test --gpu cpu --max_images 30 --n_samples 35 --n_sample_steps 3 --refine_steps 2".split()
    command += ["--ais_chains", "20", "--ais_temperatures", "3", "--seed", "3"]
    command += ["--load_ckpt", str(run), "--feature_ckpt", str(run), "--ood_datasets", f"noise,{tmp_path},shuffled"]
    before = set(run.glob("eval*"))
    assert main(command) == 0
    (report,) = set(run.glob("eval*")) - before
    results = json.loads((report / "results.json").read_text())
    assert {"classification", "calibration", "ood", "robustness", "quality", "likelihood"} < results.keys()
    assert {"weights": "moving average", "seed": "1 in training, 3 for measuring"}.items() <= results["about"].items()
    assert [results["options"][name] for name in ("width", "lr", "max_images")] == [1, 1e-3, 30]
    assert str(tmp_path) in results["ood"]["absent"] and f"{tmp_path}: absent" in capsys.readouterr().out
    assert set(results["ood"]["results"]["AUROC"]) == {"noise", "shuffled"}
    of_inception = "FID, IS, and KID, precision, recall in Inception's features"
    assert "Inception weights" in results["quality"]["absent"][of_inception]
    same_network = results["quality"]["results"]["in a classifier's features"]["buffer"]["same class"]
    assert same_network["value"] == 1
    nearest = results["quality"]["results"]["L2 distance to the nearest training image"]
    assert [nearest[row]["mean"]["n"] for row in ("fresh", "test images")] == [35, 30]  # samples whatever --max_images
    assert 0 < nearest["test images"]["mean"]["value"] < 2 * 64**0.5  # of pixels in [-1, 1]
    (note,) = results["quality"]["notes"]
    assert "means little" in note and "(test images, chain starts, fresh" in note and "64 features" in note
    assert {(x.min().item(), x.max().item(), (x == x.round()).all().item()) for x in seen} == {(0, 16, True)}
    valid = (load("digits").valid.images * (16 / 255)).round()
    assert all((valid == image).flatten(1).all(1).any() for image in seen[2])  # on which the temperature is chosen
    bits = results["likelihood"]["results"]["test bits per dimension"]
    assert bits["1/T = 1, forward"]["bits"]["value"] == pytest.approx(math.log2(17), abs=0.1)
    assert 2.8 < bits["a Gaussian, for comparison"]["bits"]["value"] < 3.1  # 2.94 of all 360 test images
    log_z = results["likelihood"]["results"]["log Z (nats)"]["1/T = 1, forward"]["log Z"]
    assert log_z["n"] == 20 and ", 3 temperatures" in log_z["protocol"]
    text = (report / "report.md").read_text()
    assert note in text
    for name in ("classification", "calibration", "ood", "robustness", "quality", "likelihood"):
        assert f"## {name}" in text
        for picture in results[name]["pictures"]:
            assert f"({picture}.png)" in text and (report / f"{picture}.png").stat().st_size > 1000


def test_a_second_evaluation_leaves_the_first_alone_and_a_lone_file_gets_its_own_run(run, tmp_path, monkeypatch):
    torch.save(torch.load(run / "ckpt" / "best.pt"), tmp_path / "model.pt")
    content = torch.load(run / "ckpt" / "last.pt")
    content["state"]["buffer"]["images"].fill_(torch.nan)
    torch.save(content, tmp_path / "nan.pt")
    before = {path: path.read_bytes() for path in run.rglob("eval/*")}
    short = [*SHORT, "--eval", "classification", "--load_ckpt"]
    assert main([*short, str(run)]) == 0 and main([*short, str(run / "ckpt" / "last.pt")]) == 0
    monkeypatch.chdir(tmp_path)
    for options, place in (["--note", "own"], "runs/*_test_own"), (["--logdir", "other"], "other/*_test"):
        assert main([*short, str(run), *options]) == 0 and len(list(tmp_path.glob(f"{place}/eval/report.md"))) == 1
    further = "--eval classification,quality,likelihood --ais_chains 2 --ais_temperatures 2".split()
    for name in ("model", "nan"):
        logdir = tmp_path / name
        results, _ = new_report(f"{logdir}.pt", *further, "--logdir", str(logdir), logdir=logdir)
        assert results["classification"]["results"]["accuracy"]["n"] == 20
        assert "samples of the replay buffer" in results["quality"]["absent"]
        assert {"likelihood at another temperature", "reverse estimate, 1/T = 1"} <= {*results["likelihood"]["absent"]}
    assert before == {path: path.read_bytes() for path in before}
    reports = sorted(path.parent.name for path in run.glob("eval*/report.md"))
    assert len(reports) >= 2 and f"eval-{len(reports)}" in reports


def test_one_broken_metric_does_not_stop_the_others(run, monkeypatch, capsys):
    monkeypatch.setattr(classification, "measure", Mock(side_effect=ZeroDivisionError("oh")))
    command = [*SHORT, "--load_ckpt", str(run), "--eval"]
    assert main([*command, "classification,calibration"]) == 0
    assert "classification: absent, ZeroDivisionError: oh" in capsys.readouterr().out
    assert main([*command, "classification"]) == 2
    assert "nothing could be measured" in capsys.readouterr().err
    monkeypatch.setattr(classification, "measure", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert main([*command, "classification,calibration"]) == 0
    said = capsys.readouterr()
    assert "classification: absent, not enough memory: measure fewer" in said.out and "Traceback" not in said.err
    monkeypatch.setitem(sys.modules, "evaluation.calibration", None)  # as one of a user's own that cannot be imported
    add, stop = lambda section: section.add("accuracy", 0.5, 20, "by hand"), Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(classification, "measure", lambda _, section: [add(section), stop()])
    assert main([*command, "calibration,classification"]) == 130  # Ctrl-C leaves what there is
    left = json.loads(max(run.glob("eval*/results.json"), key=os.path.getmtime).read_text())
    accuracy, absent = left["classification"]["results"]["accuracy"], left["classification"]["absent"]
    assert (accuracy["value"], absent) == (0.5, {"the rest": "stopped by Ctrl-C"}) and left["calibration"]["absent"]
    assert "/report.html." in capsys.readouterr().out


def test_one_broken_attack_or_set_does_not_stop_the_others(run, quick, monkeypatch):
    fails, foreign = Mock(side_effect=ZeroDivisionError("oh")), ood.foreign_images
    monkeypatch.setattr(robustness, "pgd_attack", lambda *given: fails() if given[2] == "Linf" else given[5])
    monkeypatch.setattr(ood, "foreign_images", lambda name, *a: fails() if name == "interp" else foreign(name, *a))
    results = new_report(run, *"--eval robustness,ood --ood_datasets interp,noise --attacks pgd,autoattack".split())[0]
    absent = {name: reason for part in ("robustness", "ood") for name, reason in results[part]["absent"].items()}
    assert {"the rest of PGD, Linf", "interp"} == {k for k, v in absent.items() if v == "ZeroDivisionError: oh"}
    found = results["robustness"]["results"]["accuracy under L2 attack"]["0.5"]
    assert found.keys() == {"PGD", "AutoAttack"} and results["ood"]["results"]["AUROC"].keys() == {"noise"}


def test_images_of_other_classes_are_measured_with_a_warning(run, tmp_path, capsys):
    content = torch.load(run / "ckpt" / "last.pt", weights_only=True)
    renamed = {**content["data"], "class_names": list("abcdefghij")}
    (tmp_path / "run").mkdir()
    torch.save({**content, "data": renamed}, tmp_path / "run" / "letters.pt")
    command = [*SHORT, "--logdir", str(tmp_path / "runs"), "--eval", "classification", "--load_ckpt"]
    assert main([*command, str(tmp_path / "run" / "letters.pt")]) == 0
    assert "the classes of digits are not those that" in capsys.readouterr().err
    assert "; other classes, so that" in next((tmp_path / "runs").glob("*/eval/report.md")).read_text()
    features = ["--feature_ckpt", str(tmp_path / "run" / "letters.pt"), "--eval", "quality"]
    assert "was trained on other images or classes" in refused(capsys, *command, str(run), *features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_ckpt", "RUN", "--eval", "classification,beauty"], "--eval takes all, or some of classification"),
        (["--load_ckpt", "RUN", "--width", "2"], "another network"),
        (["--load_ckpt", "RUN", "--ood_datasets", "noise,nowhere"], "'nowhere' is neither a folder nor one of interp"),
        (["--load_ckpt", "RUN", "--ood_datasets", "noise,"], "'' is neither a folder nor one of interp"),
        (["--load_ckpt", "RUN", "--ood_datasets", "x" * 300], "is neither a folder nor one of interp"),
        (["--load_ckpt", "RUN", "--feature_ckpt", "/nowhere"], "no checkpoint at /nowhere"),
        (["--load_ckpt", "RUN", "--n_sample_steps", "0"], "--n_sample_steps of at least 1"),
        (["--load_ckpt", "RUN", "--fid_reference", "test"], "--fid_reference takes one of train, train+test"),
        (["--load_ckpt", "RUN", "--max_images", "3"], "--max_images must be at least 20"),
        (["--load_ckpt", "RUN", "--attacks", "pgd,fgsm"], "autoattack, separated by commas, not 'fgsm'"),
        (["--load_ckpt", "RUN", "--attacks", "refined,pgd", "--refine_steps", "0"], "--refine_steps above 0"),
        (["--load_ckpt", "RUN", "--recipe", "dat"], "was trained with --recipe jem: give single options"),
        (["--load_ckpt", "a" * 300], "no checkpoint at"),
        ([], "needs --load_ckpt"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, options, message, capsys):
    before = sorted(run.rglob("*"))
    given = [str(run) if option == "RUN" else option for option in options]
    assert message in refused(capsys, "--mode", "test", "--gpu", "cpu", *given) and sorted(run.rglob("*")) == before


def test_a_missing_package_is_one_line_for_the_metric_that_needs_it(run, quick, monkeypatch, capsys):
    missing = {  # metric: package, and what is absent
        "calibration": ("torchmetrics", "the rest of calibration"),
        "robustness": ("pyautoattack", "AutoAttack"),
        "quality": ("torch_fidelity", "Fréchet distance in a classifier's features"),
    }
    for package, _ in missing.values():  # as if it were not installed
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    command = ["--feature_ckpt", str(run), "--eval", ",".join(["classification", *missing])]
    results, _ = new_report(run, *command, "--attacks", "autoattack")
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "accuracy" in results["classification"]["results"]
    for metric, (package, absent) in missing.items():
        assert f"{absent}: absent, {package} is not installed: pip install -r requirements-eval.txt" in out
        assert absent in results[metric]["absent"]
    with pytest.raises(ModuleNotFoundError), utils.evaluation_packages():  # another one is not taken for one of them
        import nowhere_to_be_found  # noqa: F401


def test_an_attack_gives_alone_what_it_gives_among_others(run, quick):
    def measured(*options):
        _, place = new_report(run, "--eval", "robustness", "--refine_steps", "1", "--one_epsilon", *options)
        section = read_report(str(place)).sections["robustness"]
        return section.measurements(), section.absent

    everything, absent = measured()
    assert absent == {} and {column for *_, column in everything} == set(robustness.TITLES.values())
    assert {row for table, row, _ in everything if table == "accuracy under L2 attack"} == {"0", "0.5", "4 (check)"}
    alone = [(name, {title}) for name, title in robustness.TITLES.items()]
    for attacks, titles in [*alone, ("autoattack, pgd", {"AutoAttack", "PGD"})]:
        found, absent = measured("--attacks", attacks)
        assert found == {at: number for at, number in everything.items() if at[2] in titles}
        assert absent == dict.fromkeys(set(robustness.TITLES.values()) - titles, "left out by --attacks")


@pytest.mark.parametrize("reason", ["another user", "read-only", "full disk"])
def test_a_run_that_cannot_be_written_gets_its_report_in_a_new_run(reason, run, tmp_path, monkeypatch, capsys):
    if reason == "another user":
        monkeypatch.setattr("os.geteuid", lambda: run.stat().st_uid + 1)
    elif reason == "read-only":
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != run and access(path, mode))
    else:
        full, mkdir = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), Path.mkdir
        monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: full() if path.parent == run else mkdir(path, *a, **k))
    before = sorted(run.rglob("*"))
    options = ["--eval", "classification", "--logdir", str(tmp_path / "mine")]
    if reason == "full disk":  # a full disk is no reason for another place
        monkeypatch.chdir(tmp_path)
        error = refused(capsys, *SHORT[:-2], "--load_ckpt", str(run), *options[:2])
        assert f"cannot write to {run}: No space left" in error and not list(tmp_path.iterdir())
        return
    results, place = new_report(run, *options, logdir=tmp_path / "mine")
    assert sorted(run.rglob("*")) == before
    assert place.parent.name.endswith("_test") and "accuracy" in results["classification"]["results"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "the report goes to a new run in" in line)
    assert str(run) in line and str(tmp_path / "mine") in line


def test_long_names_and_large_numbers_are_shown():
    labels = classification.confusion_figure(torch.eye(2).long(), ("a" * 40, "b")).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["a" * 19 + "…", "b"]
    assert value_and_interval(12345.44, (-9999.7, 7.12345), 1, "") == "12345.4 [-9999.7, 7.123]"


def levels(images):
    return sorted(images.flatten(1).float().mean(1).round().int().unique().tolist())


def test_which_images_of_a_folder_are_taken(inputs, tmp_path):
    test = inputs.data.test.images[:40]
    write_pngs(tmp_path, "flat", n=7, side=12)
    write_pngs(tmp_path, "classes/a", n=5, level=10)
    write_pngs(tmp_path, "classes/b", n=6, level=200)
    for part, level in {"train": 10, "test": 200}.items():
        write_pngs(tmp_path, f"parts/{part}/a", f"parts/{part}/b", n=3, level=level)
        write_pngs(tmp_path, f"unlabelled/{part}", n=4, level=level)
    found = {place.name: foreign_images(str(place), test, inputs) for place in sorted(tmp_path.iterdir())}
    sizes = {"flat": 7, "classes": 11, "parts": 6, "unlabelled": 4}
    assert {name: len(images) for name, images in found.items()} == sizes
    assert all(images.shape[1:] == (1, 8, 8) and images.dtype == torch.uint8 for images in found.values())
    assert (levels(found["classes"]), levels(found["parts"]), levels(found["unlabelled"])) == ([10, 200], [200], [200])
    some = foreign_images(str(tmp_path / "classes"), test[:5], inputs)
    assert len(some) == 5 and levels(some) == [10, 200]


def test_a_folder_may_hold_commas_and_start_with_a_tilde(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pngs(tmp_path, "cats", "cats, dogs", n=5)
    names = {name: [name] for name in (f"{tmp_path}/cats, dogs", "~/cats, dogs")}
    names["noise, ~/cats,noise"] = ["noise", "~/cats"]  # each once
    usual = ["interp", "noise", "constant", "shuffled", "patches", "blurred", "inverted"]
    others = {"digits": [], "cifar10": ["digits", "svhn", "cifar100"], "mnist": ["digits"]}
    for dataset, more in others.items():
        assert ood.set_names(Config(mode="test", dataset=dataset)) == [*usual, *more]
    for option, expected in names.items():
        assert ood.set_names(Config(mode="test", ood_datasets=option)) == expected
    assert len(foreign_images("~/cats", inputs.data.test.images, inputs)) == 5


def test_test_images_are_no_other_images(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test, folder = inputs.data.test.images, Path("test images")  # a name that the report has for something else
    folder.mkdir()
    for i in range(20):
        pixels = test[i, 0].numpy() if i < 4 else np.full((8, 8), i, "u1")
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    alone, section = Section("ood", tmp_path), Section("ood", tmp_path)
    for part, sets in ((alone, "noise"), (section, f"digits,{folder},noise")):
        ood.measure(replace(inputs, cfg=replace(inputs.cfg, ood_datasets=sets)), part)
    assert section.results["AUROC"]["noise"] == alone.results["AUROC"]["noise"]
    assert section.absent == {"digits": "40 of its 40 images are test images: it is not out of distribution"}
    (note,) = section.notes
    assert f"{folder}**: 4 of its 20 images are test images" in note


def test_names_that_are_no_utf8_or_look_like_mathematics(run, tmp_path, monkeypatch, capsys):
    names = ["$x$ <b>and $\\frac$", "_hidden", os.fsdecode(b"caf\xe9"), "two\nlines"]
    data_dir = tmp_path / os.fsdecode(b"images\xff")
    write_pngs(data_dir, *names, n=24)
    folder = str(write_pngs(tmp_path / os.fsdecode(b"$o$\xff,"), ".", n=5))
    options = "--dataset folder --batch_size 16 --buffer_size 32 --max_steps 2 --n_valid 8 --data_dir".split()
    status, trained = start(tmp_path, *options, str(data_dir))
    assert status == 0
    command = [*SHORT, "--load_ckpt", str(trained), "--ood_datasets", folder, "--feature_ckpt", str(trained)]
    assert main([*command, "--eval", "classification,ood,quality"]) == 0
    text = (trained / "eval" / "results.json").read_bytes().decode()
    results = json.loads(text)
    assert "\\udc" not in text.replace("\\\\udc", "")  # no lone surrogate, which strict readers refuse
    printed = ["$x$ <b>and $\\frac$", "_hidden", "caf\\udce9", "two\\nlines"]
    assert sorted(results["classification"]["results"]["accuracy of each class"]) == sorted(printed)
    assert all(results[metric]["absent"] == {} for metric in ("classification", "ood"))
    assert any("$o$\\udcff," in name for name in results["ood"]["results"]["AUROC"])
    report, page = ((trained / "eval" / f"report.{form}").read_bytes().decode() for form in ("md", "html"))
    assert all(f"| {name} |" in unescape(report) and f">{name}<" in unescape(page) for name in printed)
    assert "<b>" not in report + page
    sample = ["--mode", "sample", "--class_cond", "--n_sample_steps", "1", "--n_samples", "8", "--gpu", "cpu"]
    assert main([*sample, "--load_ckpt", str(trained), "--logdir", str(tmp_path / "samples")]) == 0
    assert len(list((tmp_path / "samples").glob("*/samples.png"))) == 1
    assert "Traceback" not in capsys.readouterr().err
