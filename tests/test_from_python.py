"""``load_run`` and --mode score: the numbers are those of the command line and of a network at hand."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from small_runs import refused, state, trained
from test_data import write_pngs
from test_foreign import DOCS, checkpoint
from test_sample import TRAIN, pixels, sample, tiles, train
from torch import nn

import data
import main
import models
from benchmarks import ship_weights
from chain_init import fit
from checkpoints.export import safetensors_file
from checkpoints.other_programs import CIFAR10
from evaluation.robustness import differentiable_chain
from generation import load_run
from logger.images import to_uint8
from optim import recalibrate_batch_norm
from utils import UserError

ROOT = Path(__file__).parent.parent
DIGITS = data.load("digits", n_valid=50)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Batch normalisation, so that a chain depends on its batch, and Gaussians of each class."""
    return train(tmp_path_factory.mktemp("sada"), "--recipe", "sada-jem", "--max_steps", "30", "--ema", "0.5")


def test_numbers_and_images_are_those_of_the_command_line(run_dir, tmp_path):
    run = load_run(run_dir, gpu="cpu", precision="fp32")
    assert (run.shape, run.class_names[3], run.cfg.norm) == ((1, 8, 8), "3", "batch")
    options = "--n_sample_steps 4 --seed 5 --n_samples".split()
    _, drawn = sample(run_dir, tmp_path, *options, "30", "--class_cond")
    result = run.chains(30, range(10), steps=4, seed=5, n_filmed=2)
    np.testing.assert_array_equal(result.x, drawn["x"])
    np.testing.assert_array_equal(result.labels, drawn["labels"])
    assert torch.equal(result.frames[:, -1], to_uint8(result.x[:2])) and result.frames.shape == (2, 5, 1, 8, 8)
    _, drawn = sample(run_dir, tmp_path, *options, "7")
    np.testing.assert_array_equal(run.sample(7, steps=4, seed=5), drawn["x"].clip(-1, 1))
    assert (run.chains(np.int64(3), 8, steps=1).labels == 8).all()
    test = DIGITS.test
    assert main.main([*"--mode test --eval classification --gpu cpu --load_ckpt".split(), str(run_dir)]) == 0
    results = json.loads((run_dir / "eval" / "results.json").read_text())["classification"]["results"]
    right = (run.logits(test.images).argmax(1) == test.labels).float().mean().item()
    assert results["accuracy"]["value"] == pytest.approx(right)
    floats = test.images / 127.5 - 1
    torch.testing.assert_close(run.log_density(floats), run.logits(test.images).logsumexp(1))
    torch.testing.assert_close(run.log_density(floats, test.labels), run.logits(floats)[range(360), test.labels])


def by_hand(model, image: np.ndarray, y: int, radius: float, steps: int) -> torch.Tensor:
    """One image, uint8 (8, 8, 1), moved up f(x)[y] by projected gradient steps, all of it on the [0, 1] scale."""
    start = x = torch.from_numpy(image[None, ..., 0] / 255)[None].float()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        model(2 * x - 1)[0, y].backward()
        change = x.detach() + 2.5 * radius / steps * x.grad / x.grad.norm() - start
        change *= (radius / change.norm()).clamp(max=1)
        x = (start + change).clamp(0, 1)
    return x


def test_counterfactuals_climb_to_the_class_inside_their_ball(run_dir):
    run = load_run(run_dir, gpu="cpu", batch_size=4)
    images = DIGITS.test.images[DIGITS.test.labels != 7][:6]
    before, after = images / 127.5 - 1, run.counterfactual(images, 7, eps=1.5, steps=15)
    distance = (after - before).flatten(1).norm(dim=1) / 2
    assert (distance < 1.5 + 1e-5).all() and (distance > 1).all() and after.abs().max() <= 1
    logits = run.logits(torch.cat([before, after]))
    for log_p in (logits[:, 7], logits.log_softmax(1)[:, 7]):  # log p(x, y) and log p(y|x)
        assert (log_p[6:] > log_p[:6]).all()
    expected = by_hand(run.model, images[4].permute(1, 2, 0).numpy(), 7, 1.5, 15)
    np.testing.assert_allclose((after[4:5] + 1) / 2, expected, atol=1e-4)
    alone = run.counterfactual(before[:1], 7, eps=1.5, steps=15)  # batch normalisation has its running statistics
    torch.testing.assert_close(alone, after[:1], atol=1e-4, rtol=0)
    default = (run.counterfactual(images, 7, steps=1) - before).flatten(1).norm(dim=1) / 2
    assert (default < 2.5 + 1e-5).all() and (default > 1.5).all()


WRONG = [torch.rand(2, 1, 8, 8) * 255, torch.full((2, 1, 8, 8), np.nan), torch.zeros(2, 8, 8, dtype=torch.uint8)]
WRONG += [torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.zeros(2, 3, 8, 8), torch.zeros(0, 1, 8, 8)]


def test_other_images_are_refused(run_dir):
    run = load_run(run_dir, gpu="cpu")
    for images in WRONG:
        with pytest.raises(UserError, match="^(float )?images must be"):
            run.logits(images)
    with pytest.raises(UserError, match="takes float images in .-1, 1., not torch.uint8"):
        run.model(DIGITS.test.images)
    with pytest.warns(UserWarning, match=r"in \[0, 1\]") as warned:
        run.logits(DIGITS.test.images / 255)
        run.log_density(DIGITS.test.images / 255)
    assert [warning.filename for warning in warned] == [__file__] * 2  # each names the caller's line
    images = DIGITS.test.images[:2]
    for y in (10, 1.7, "three", ["1", "11"], True, [], [[1]], [np.array([1, 2])]):
        with pytest.raises(UserError, match="there is no class .*: classes are 0, 1, 2"):
            run.sample(2, y)
    with pytest.raises(UserError, match="there is no class 99: classes are 0, 1, 2"):
        run.counterfactual(images, 99)
    with pytest.raises(UserError, match="y has 1 classes for 2 images"):
        run.log_density(images, [3])
    assert torch.equal(run.log_density(images, 3), run.log_density(images, torch.tensor([3, 3])))
    for n in (0, 2.5):
        with pytest.raises(UserError, match="n, how many chains"):
            run.sample(n)


@pytest.fixture(scope="module")
def shipped(run_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("assets") / "digits.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(run_dir), str(file), "--images", "8x8 digits", "--licence", "BSD"])
        patch.setattr(ship_weights, "RANK", 40)
        ship_weights.main()
    return file


def test_images_that_are_named_serve_a_file_that_has_gaussians(shipped):
    with pytest.warns(UserWarning, match="does not use epochs, from_buffer$"):
        run = load_run(shipped, gpu="cpu", dataset="digits", epochs=3, from_buffer=True)
    assert run.fresh_start[0] == "class_gaussian" != load_run(shipped, gpu="cpu").fresh_start[0]


def test_an_exported_run_of_several_processes_draws_in_batches_of_one_of_them(run_dir, tmp_path):
    content = torch.load(run_dir / "ckpt" / "last.pt", weights_only=True) | {"processes": 2}
    (tmp_path / "a.safetensors").write_bytes(safetensors_file(content["state"]["model"], content))
    assert 2 * load_run(tmp_path / "a.safetensors", gpu="cpu").cfg.n_chains == load_run(run_dir, gpu="cpu").cfg.n_chains
    content["config"] |= {"sync_batch_norm": True, "p_y_x_weight": 0.0}  # chains are of all processes; no labels
    (tmp_path / "a.safetensors").write_bytes(safetensors_file(content["state"]["model"], content))
    assert load_run(tmp_path / "a.safetensors", gpu="cpu").cfg.n_chains == load_run(run_dir, gpu="cpu").cfg.n_chains
    with pytest.raises(UserError, match="a.safetensors was trained without labels"):
        load_run(tmp_path / "a.safetensors", gpu="cpu").sample(2, 3)
    assert load_run(run_dir, gpu="cpu", precision="bf16").sampler_model().f.conv1.weight.dtype == torch.bfloat16


def test_a_file_that_ships_draws_and_scores_without_images(run_dir, shipped, tmp_path, monkeypatch, capsys):
    about, ours = json.loads(shipped.with_suffix(".json").read_text()), load_run(run_dir, gpu="cpu")
    assert about["images"] == "8x8 digits" and str(ROOT) not in json.dumps(about) and shipped.stat().st_size < 220_000
    monkeypatch.setattr(data, "load", None)
    run = load_run(shipped, gpu="cpu")
    torch.testing.assert_close(run.logits(DIGITS.test.images), ours.logits(DIGITS.test.images), atol=0.02, rtol=0.01)
    low = np.quantile(ours.log_density(DIGITS.train.images).numpy(), 0.05)
    assert run.low_log_density == pytest.approx(low, abs=1e-4)
    theirs = {x.numpy().tobytes() for x in to_uint8(state(run_dir)["buffer"]["images"])}
    _, drawn = sample(shipped, tmp_path, "--from_buffer", "--n_samples", "20", "--n_sample_steps", "0")
    assert all(x.transpose(2, 0, 1).tobytes() in theirs for x in drawn["images"])
    sample(shipped, tmp_path, "--start", "smooth:1,class_gaussian:1", "--n_samples", "2", "--n_sample_steps", "0")
    _, drawn = sample(shipped, tmp_path, "--class_cond", "--n_samples", "1000", "--n_sample_steps", "0")
    assert "1000 chains from class_gaussian of digits.safetensors" in capsys.readouterr().out
    for k in (0, 7):
        images = DIGITS.train.images[DIGITS.train.labels == k]
        mean, factor, noise = fit(images, torch.device("cpu"))
        values, vectors = np.linalg.eigh((factor.T @ factor).numpy() + noise**2 * np.eye(64))
        x = drawn["x"][drawn["labels"] == k].reshape(100, 64)
        inside = np.abs(mean.numpy()) < 0.5  # where the limits of [-1, 1] do not matter
        assert np.abs(x.mean(0) - mean.numpy())[inside].max() < 0.3
        along = ((x - mean.numpy()) @ vectors).var(0)
        assert 0.3 < along[-1] / values[-1] < 1.7 and along[:40].mean() < along[-3:].mean() / 4


def test_scores_are_those_of_the_network(run_dir, tmp_path, capsys):
    run, mine = load_run(run_dir, gpu="cpu"), tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    pictures = torch.cat([DIGITS.test.images[:12], torch.randint(256, (3, 1, 8, 8)).byte()])
    for i, image in enumerate(pictures):
        Image.fromarray(image[0].numpy()).save(mine / ("deep" if i % 2 else ".") / f'{i:02}, "x".png')
    options = ["--mode", "score", "--gpu", "cpu", "--logdir", str(tmp_path / "out"), "--load_ckpt"]
    assert main.main([*options, str(run_dir), "--images", str(mine)]) == 0
    out, (csv_file,) = capsys.readouterr().out, (tmp_path / "out").glob("*_score/scores.csv")
    rows = {row["file"]: row for row in csv.DictReader(csv_file.open())}
    low = np.quantile(run.log_density(DIGITS.train.images).numpy(), 0.05)
    logits = run.logits(pictures)
    log_p, p = logits.logsumexp(1), logits.softmax(1).max(1).values
    for i in range(15):
        row = rows[f'{"deep/" if i % 2 else ""}{i:02}, "x".png']
        assert row["class"] == str(logits[i].argmax().item())
        assert float(row["p(y|x)"]) == pytest.approx(p[i].item(), abs=1e-4)
        assert float(row["log p(x)"]) == pytest.approx(log_p[i].item(), abs=1e-3)
        assert row["unlikely"] == ("yes" if log_p[i] < low else "no")
    assert f"{(log_p < low).sum()} are below {low:.2f}" in out and len(rows) == 15
    shown = pixels(csv_file.with_name("scores.png"))[16:114, -978:, 0]  # the first row
    for place, i in enumerate(log_p.argsort()[:10]):
        tile = shown[2 + 6 : 98 : 12, place * 98 + 8 : place * 98 + 96 : 12]
        np.testing.assert_array_equal(tile, pictures[i, 0])
    assert sorted(path.name for path in mine.iterdir() if path.is_file())[0][0] == "0"  # nothing was left there
    other = ["--dataset", "folder", "--data_dir", str(mine), "--images", str(next(mine.glob("*.png")))]
    assert main.main([*options, str(run_dir), *other]) == 0
    assert "the column unlikely is empty, because it needs the training images" in capsys.readouterr().out
    refused(capsys, *options, run_dir, "--images", csv_file)
    assert "needs --images" in refused(capsys, *options, run_dir)


@pytest.mark.parametrize("task", (["--inpaint", "left"], ["--denoise", "0.2"]))
def test_own_pictures_take_the_place_of_test_images(shipped, tmp_path, monkeypatch, capsys, task):
    monkeypatch.setattr(data, "load", None)
    own = torch.randint(256, (1, 8, 8), dtype=torch.uint8)
    Image.fromarray(own[0].numpy()).convert("RGB").save(tmp_path / "own.png")
    options = [*task, "--images", str(tmp_path / "own.png"), "--n_sample_steps", "2"]
    run, content = sample(shipped, tmp_path / "out", *options)
    np.testing.assert_array_equal(content["originals"][..., 0], own)
    if task[0] == "--denoise":  # it is noisy as it is, and how far it was from the truth is not known
        assert (content["given"] == data.to_float(own).numpy()).all() and "root mean" not in capsys.readouterr().out
    else:
        np.testing.assert_array_equal(tiles(pixels(run / "inpaint.png"), 1, 4)[0, 0], own[0])


def test_fine_tuning_on_other_classes_keeps_all_but_the_head(run_dir, tmp_path, capsys):
    for part, n in (("train", 30), ("test", 4)):
        for path in write_pngs(tmp_path / "set" / part, *"abc", n=n).rglob("*.png"):
            Image.open(path).convert("L").save(path)
    new = ["--dataset", "folder", "--data_dir", str(tmp_path / "set"), "--n_valid", "0", "--max_steps", "1"]
    options = ["--recipe", "sada-jem", "--lr", "1e-12", "--ema", "0.5", "--load_ckpt", str(run_dir)]
    run = train(tmp_path / "runs", *new, *options)
    assert "accuracy/valid" not in (run / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count("Its classes are others: the last layer") == 1
    mine, theirs = state(run)["model"], state(run_dir)["ema"]
    for name, value in theirs.items():
        if name.startswith("class_output"):
            assert mine[name].shape[0] == 3
        elif "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(mine[name], value)
    assert not torch.equal(state(run)["buffer"]["images"][:9], state(run_dir)["buffer"]["images"][:9])


class Small(nn.Module):
    in_channels, n_features, name = 1, 4, "small"

    def __init__(self, shape, *, width, depth, norm_statistics, **options):
        super().__init__()
        self.layer, self.idle, self.dropout = nn.Conv2d(1, 4, shape[1:]), nn.Linear(4, 4), nn.Dropout2d()

    def forward(self, x):
        return self.dropout(self.layer(x)).flatten(1)


def test_a_network_of_ones_own_may_have_idle_parts_and_dropout(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "jem", Small)
    run = trained(2, grad_clip=1.0)
    trained(1, sam_rho=0.1)  # some of its parameters get no gradient
    samples = run.draw_step_batch(1)[0].samples
    batch = run.draw_step_batch(1)[0]._replace(samples=samples)
    scored = run.loss_and_gradient(batch)["log_density/sampled"]  # without dropout
    torch.testing.assert_close(scored, run.sampler_model.log_density(samples).mean())
    assert batch.x_real is batch.x  # log p(x) learns without dropout, in a pass of its own


class Attentive(Small):
    def __init__(self, shape, **options):
        super().__init__(shape, **options)
        self.layer, self.attention = nn.Conv2d(1, 4, 2, 2), nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = self.layer(x).flatten(2).mT
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def test_attention_has_one_function_in_chains_and_loss_and_can_be_attacked_through_chains(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "jem", Attentive)
    run = trained(2)
    batch = run.draw_step_batch(1)[0]
    scored, x = run.loss_and_gradient(batch)["log_density/sampled"], batch.samples[:2].clone().requires_grad_()
    torch.testing.assert_close(scored, run.sampler_model.log_density(batch.samples).mean())
    differentiable_chain(run.model.eval().log_density, x, 2, 1.0, 0.0, torch.Generator()).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    images, attentive = DIGITS.train.images[:99], Attentive((1, 8, 8), width=1, depth=1, norm_statistics="batch")
    recalibrate_batch_norm(normed := nn.Sequential(attentive, nn.BatchNorm1d(4)), images, 99)
    torch.testing.assert_close(normed[1].running_var, attentive.eval()(data.to_float(images)).var(0))


def python(*options, **environment):
    return subprocess.run([sys.executable, *options], capture_output=True, text=True, env=os.environ | environment)


def test_it_works_from_anywhere(tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("logger.py", "utils.py", "models/__init__.py"):
        (tmp_path / name).write_text("")
    done = python(str(ROOT / "main.py"), "--mode", "sample", PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path))
    assert "error: --mode sample needs --load_ckpt" in done.stderr and done.returncode == 2


def test_ctrl_c_leaves_a_notebooks_process_alive(tmp_path):
    options = [*TRAIN, "--max_steps", "100000", "--logdir", str(tmp_path)]
    code = f"""
import os, runpy, signal, sys, threading, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
def interrupt():
    while not list(Path({str(tmp_path)!r}).glob("*/metrics.jsonl")): time.sleep(0.1)
    time.sleep(1); os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
sys.argv, before = ["main.py", *{options!r}], sys.stdout
try: runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
except SystemExit as end: print("alive", end.code, sys.stdout is before)
"""
    assert python("-c", code, PYTHONPATH=str(ROOT)).stdout.endswith("alive 130 True\n")


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    checkpoint(tmp_path / "a.pt", recipe="sada-jem", norm="batch", batch_size=10)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["data"]["class_names"] = CIFAR10
    stored = {"mean": torch.zeros(10, 3072), "factor": torch.zeros(10, 2, 2), "noise": torch.ones(10)}
    stored["basis"] = torch.ones(2, 3072)
    weights = content["state"]["model"] | {f"start.class_gaussian.{name}": value for name, value in stored.items()}
    (tmp_path / "a.safetensors").write_bytes(safetensors_file(weights, content, low_log_density=1.5))
    for name, value in {"WEIGHTS": tmp_path / "a.safetensors", "CHAIN_STEPS": 2, "TRAINING_STEPS": 30}.items():
        monkeypatch.setenv(f"TOUR_{name}", str(value))
    tour = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    client = NotebookClient(tour, timeout=120, resources={"metadata": {"path": DOCS.parent}})
    for execute in (lambda: None, client.execute):
        execute()  # the outputs that are stored, and new ones
        outputs = str([cell.get("outputs") for cell in tour.cells])
        assert (outputs.count("'image/png'"), outputs.count("'image/gif'"), "'error'" in outputs) == (4, 1, False)
    assert "5 % of the training images are below 1.50" in outputs


def test_the_network_that_ships_is_small_and_knows_noise():
    file = ROOT / "assets" / "cifar10_cpu_robust_oe.safetensors"
    assert file.stat().st_size <= 4e6
    run = load_run(file, gpu="cpu")
    kept, noise = to_uint8(run.content["state"]["buffer"]["images"]), torch.rand(50, 3, 32, 32) * 2 - 1
    assert len(kept) == 500 and run.logits(kept).argmax(1).unique().tolist() == list(range(10))
    assert (run.log_density(kept) > run.low_log_density).float().mean() > 0.9
    assert run.log_density(noise).max() < run.low_log_density > run.log_density(-torch.ones(1, 3, 32, 32)).item()
    assert json.loads(file.with_suffix(".json").read_text())["test accuracy"] == 0.851
    assert b"/work" not in file.read_bytes() and run.cfg.logdir == str(Path("runs").absolute())
