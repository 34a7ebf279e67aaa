"""The recipes and their ingredients: each option changes what it says, and a resumed run is the same run."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from small_runs import DIGITS, equal, new_run, refused, seeded, signal_at_step, state, trained

import chain_init
import data
import main
import optim
import trainer
from checkpoints.files import load_checkpoint
from config import Config
from config.checks import unused
from config.cli import parse
from config.recipes import RECIPES
from logger.metrics_log import read_log
from logger.run_dir import read_config
from losses import auroc, joint_loss
from pgd import adversarial_images, pgd

SMALL = [*DIGITS, *"--batch_size 20 --buffer_size 100 --max_steps 12 --sample_every 100 --no_log".split()]
start = partial(new_run, SMALL)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe, tmp_path, capsys):
    grey = ["--backbone", "jem", "--p_x_batch_size", "20"] if recipe == "dat" else []
    first = start(tmp_path / "first", "--norm", "batch", "--max_steps", "1") if recipe == "oe-jem" else None
    run = start(tmp_path / "run", "--recipe", recipe, *grey, *(["--load_ckpt", str(first)] if first else []))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert ["without --start_dir" in note for note in notes] == [True] * (recipe == "dat")
    (line,) = [line for line in read_log(run / "metrics.jsonl") if line["step"] == 12]
    assert abs(line["loss/total"]) < 100 and abs(line["loss/generative"]) < 10 and 0 <= line["accuracy/test"] <= 1
    given = {"batch_size": 20, "buffer_size": 100, "sgld_step": 2, "warmup_steps": 2, "recipe": recipe, "depth": 10}
    given |= {"backbone": "jem", "p_x_batch_size": 20} if grey else {}
    options = read_config(run)["options"]
    assert (RECIPES[recipe].options | given).items() <= options.items()  # what is given replaces the recipe's
    assert load_checkpoint(run / "ckpt" / "last.pt")["config"] == options


def test_recipes_are_what_their_papers_say():
    assert RECIPES["jem"].options == {}
    expected = {
        "jem++": {"norm": "batch", "sgld_step": 10, "batch_size": 64, "sigma": 0.03, "start": "class_gaussian"}
        | {"weight_decay": 4e-4, "epochs": 150, "decay_epochs": "50,100,125", "sam_rho": 0.0},
        "m-jem": {"norm": "batch", "sgld_step": 5, "batch_size": 128, "sigma": 0.0, "start": "gaussian"}
        | {"p_x_batch_size": 64, "p_x_no_augment": True, "mean_energy_l2": 0.5, "weight_decay": 5e-4}
        | {"separate_energy": True, "mean_energy_form": "real_squares"},
        "sada-jem": {"norm": "batch", "sgld_step": 5, "batch_size": 128, "start": "class_gaussian"}
        | {"p_x_no_augment": True, "sam_rho": 2.0, "sam_adaptive": True, "decay_epochs": "60,120,180"},
    }
    shared = {"sgld_grad_clamp": 1.0, "sgld_clamp": True, "sgld_std": 0.0, "sgld_lr": 1.0, "buffer_size": 10000}
    shared |= {"optimizer": "sgd", "lr": 0.1, "decay_rate": 0.2, "reinit_freq": 0.05}
    jem = {"sgld_std": 0.01, "sgld_lr": 1.0, "sgld_step": 20, "sigma": 0.03, "outlier_eps": 1.0, "outlier_margin": 2.0}
    jem |= {"warmup_steps": 1000, "diverge_threshold": 1e4, "sgld_step_auroc": 0.7, "lr": 1e-4, "max_recoveries": 10}
    dat = {"adversarial_eps": 0.5, "adversarial_norm": "L2", "adversarial_steps": 10, "adversarial_step_size": 0.1}
    dat |= {"class_cond": True, "reinit_freq": 1.0, "start": "class_gaussian", "generative": "logistic", "lr": 0.1}
    dat |= {"batch_size": 128, "depth": 34, "norm": "batch", "norm_statistics": "running", "ema": 0.999}
    dat |= {"sgld_normalize": True, "sgld_lr": 0.2, "sgld_std": 0.0, "sgld_step": 0, "sgld_step_max": 50}
    dat |= {"sgld_step_auroc": 0.8, "augment": "auto"}
    expected = {name: shared | options for name, options in expected.items()} | {"jem": jem, "dat": dat}
    for name, options in expected.items():
        assert options.items() <= vars(Config(recipe=name)).items()


def test_the_commands_with_the_authors_own_settings():
    text = (Path(main.__file__).parent / "docs" / "family.md").read_text()
    block = text.partition("own settings")[2].partition("```sh\n")[2].partition("```")[0]
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert all(line[:2] == ["python", "main.py"] for line in lines)
    given = [parse(line[2:], Config) for line in lines]
    runs = [Config(**options) for options in given]
    assert [cfg.recipe for cfg in runs] == ["jem", "jem++", "m-jem", "sada-jem", "dat", "dat"]
    assert not any(unused(options, cfg) for options, cfg in zip(given, runs, strict=True))
    names = ("optimizer", "lr", "batch_size", "n_chains", "n_valid", "epochs", "decay_at", "decay_rate", "sgld_step")
    assert [[getattr(cfg, name) for name in names] for cfg in runs[:4]] == [
        ["adam", 1e-4, 64, 64, None, 200, [160, 180], 0.3, 20],
        ["momentum", 0.1, 64, 64, None, 150, [50, 100, 125], 0.2, 10],
        ["momentum", 0.1, 128, 64, 0, 200, [60, 120, 180], 0.2, 5],
        ["momentum", 0.1, 128, 64, 0, 200, [60, 120, 180], 0.2, 5],
    ]
    first, dat = runs[4:]
    modes = (first.mode, dat.mode, dat.norm_statistics, dat.start)
    assert modes == ("baseline_train", "energy_train", "frozen", "folder")
    assert dat.load_ckpt and all((cfg.depth, cfg.width, cfg.augment) == (34, 10, "auto") for cfg in (first, dat))
    assert {optim.learning_rate(dat, step, 390, 39000) for step in (1, 390 * 70, 390 * 199)} == {1e-3}
    rates = [optim.learning_rate(first, 390 * epoch, 390, 390 * first.epochs) for epoch in (0.01, 150, 300)]
    assert first.epochs == 300 and rates == pytest.approx([0.1, 0.05, 0], abs=2e-6)
    assert (dat.adversarial_steps, dat.adversarial_step_size, dat.sgld_lr, dat.sgld_step_auroc) == (10, 0.1, 0.2, 0.8)


def test_chains_of_a_rare_class_count_less(monkeypatch):
    digits, loss = data.load("digits"), Mock(wraps=joint_loss)
    train = digits.train[(digits.train.labels != 3) | (torch.rand(len(digits.train), generator=seeded()) < 0.2)]
    monkeypatch.setattr(trainer, "joint_loss", loss)
    for labels in ({}, {"labels_per_class": 20}):
        trained(1, replace(digits, train=train), class_cond=True, p_x_y_weight=1.0, buffer_size=100, **labels)
        expected = torch.ones(10) if labels else 10 * train.labels.bincount() / len(train)
        torch.testing.assert_close(loss.call_args.kwargs["class_weights"], expected)


def test_what_a_recipe_switches_on_can_be_switched_off():
    options = "--recipe sada-jem --sam_rho 0 --no_sgld_clamp --no_p_x_no_augment --p_x_batch_size off"
    cfg = Config(**parse([*options.split(), "--sgld_grad_clamp", "off"], Config))
    assert (cfg.sam_rho, cfg.sgld_clamp, cfg.p_x_no_augment) == (0, False, False)
    assert cfg.sgld_grad_clamp is cfg.p_x_batch_size is None and cfg.norm == "batch"


@pytest.mark.parametrize(
    "options",
    [
        "--recipe sada-jem --dropout_rate 0.1 --ema 0.9 --augment auto --schedule cosine",
        "--recipe m-jem --class_cond --p_x_y_weight 0.5 --reinit_freq 0.5 --labels_per_class 9",
        "--norm batch --norm_statistics running --start mixed,shapes --reinit_freq 0.5 --outlier_weight 1 --lr 1e-3",
    ],
)
def test_stopped_and_resumed_is_the_same_run(options, tmp_path, monkeypatch):
    whole = start(tmp_path / "whole", *options.split())
    signal_at_step(monkeypatch, 7)
    run = start(tmp_path / "stopped", *options.split(), status=143)
    assert state(run)["step"] == 7
    assert main.main(["--resume", str(run)]) == 0 and equal(state(run), state(whole))


def test_chains_start_from_the_chosen_gaussian():
    train = data.load("digits").train
    mean, nine = (data.to_float(images).mean(0) for images in (train.images, train.images[train.labels == 9]))
    gap, gap_of_nine = {}, {}
    for name in ("uniform", "gaussian", "class_gaussian"):
        buffer = trained(start=name, sgld_step=1, buffer_size=1000).sampler.buffer.images
        gap[name] = (buffer.mean(0) - mean).abs().mean()
        gap_of_nine[name] = (buffer[900:].mean(0) - nine).abs().mean()  # the last class's
    assert gap["gaussian"] < 0.1 < gap["uniform"] and gap_of_nine["class_gaussian"] < 0.1 < gap_of_nine["gaussian"]


def test_outliers_move_up_log_p_x_before_they_count():
    changes = {"norm": "batch", "norm_statistics": "running", "outlier_weight": 1.0, "outlier_batch_size": 7}
    for eps in (0.0, 0.3):
        run = trained(**changes, outlier_steps=2, outlier_eps=eps, outlier_images="patches")
        run.outlier_init = Mock(wraps=run.outlier_init)
        before = run.rng.p_x.get_state()
        plain = run.outlier_init([0] * 7, run.rng.p_x)
        run.rng.p_x.set_state(before)
        x = run.draw_outliers()
        moved = (x - plain).flatten(1).norm(dim=1) / 2  # pixels in [0, 1]
        gain = run.sampler_model.log_density(x) - run.sampler_model.log_density(plain)
        assert run.outlier_init.call_args.args[0] == [*range(7)]
        assert len(x) == 7 and moved.max() <= eps + 1e-5
        assert (gain.mean() > 0 and moved.min() > 0.1) if eps else torch.equal(x, plain)
    torch.testing.assert_close(x, pgd(lambda x: run.sampler_model.log_density(x).sum(), plain, 2 * 0.3, "L2", 2))
    inputs = run.draw_step_batch(1)[0]
    parts, far = run.loss_and_gradient(inputs), run.sampler_model.log_density(inputs.outliers)
    assert parts["log_density/outliers"].item() == pytest.approx(far.mean().item(), abs=1e-4)
    total = parts["loss/classification"] + parts["loss/generative"] + parts["loss/outliers"]
    assert parts["loss/total"].item() == pytest.approx(total.item(), abs=1e-4)
    levels = data.to_float(run.data.train.images).flatten(1).sort(1).values  # of patches in any order
    assert torch.cdist(plain.flatten(1).sort(1).values, levels).amin(1).max() < 0.01


def test_clamps_hold_in_training():
    free, clamped = trained(sgld_lr=100.0), trained(sgld_lr=100.0, sgld_clamp=True)
    assert free.sampler.buffer.images.abs().max() > 1.01 and clamped.sampler.buffer.images.abs().max() == 1
    assert clamped.meter.sums["sgld/saturated_share"] > 0
    run = trained(sgld_grad_clamp=1e-4, sgld_std=0.0, sgld_lr=1.0)
    assert 0 < run.meter.sums["sgld/distance_moved"] <= 3 * 1e-4 * 64**0.5 * 1.001  # three steps of 64 pixels


def test_a_stream_of_its_own_for_log_p_x():
    changes = ({}, {"p_x_batch_size": 24}, {"p_x_no_augment": True})
    plain, own, clean = (trained(**options).draw_step_batch(1)[0] for options in changes)
    assert plain.x_real is None and torch.equal(plain.x, own.x) and torch.equal(plain.y, clean.y)
    assert own.x_real.shape == (24, 1, 8, 8) and len(own.samples) == 24
    known = {tuple(image.flatten().tolist()) for image in data.load("digits").train.images}

    def are_training_images(x):
        pixels = ((x + 1) * 127.5).flatten(1)
        return [(p - p.round()).abs().max() < 1e-3 and tuple(map(round, p.tolist())) in known for p in pixels]

    assert all(are_training_images(clean.x_real)) and not any(are_training_images(own.x_real))
    assert clean.x_real.is_contiguous(memory_format=torch.channels_last)
    run = trained(0, augment="auto", p_x_batch_size=16)
    assert (run.batches.augmentation, run.real_batches.augmentation) == ("auto", "black")


def test_the_loss_compares_the_stream_for_log_p_x_and_the_labelled_one_for_log_p_x_y():
    options = {"p_x_y_weight": 0.5, "p_x_no_augment": True, "p_x_batch_size": 32, "energy_l2": 0.2}
    run = trained(class_cond=True, **options)
    inputs = run.draw_step_batch(1)[0]
    parts, log_density = run.loss_and_gradient(inputs), run.model.log_density
    with torch.no_grad():
        sampled, real = log_density(inputs.samples), log_density(inputs.x_real)
        weights, climbed = run.class_weights[inputs.y_sampled], log_density(inputs.samples, inputs.y_sampled)
        labelled, excess = log_density(inputs.x, inputs.y).mean(), weights.mean() - 1
        joint = (weights * climbed).mean() - (1 + excess) * labelled
    difference = (weights * sampled).mean() - (1 + excess) * real.mean()
    penalty = 0.2 * torch.cat([sampled, real]).square().mean()
    assert parts["loss/generative"].item() == pytest.approx(difference.item(), abs=1e-5)
    assert parts["loss/joint"].item() == pytest.approx(joint.item(), abs=1e-5)
    expected = parts["loss/classification"] + difference + 0.5 * joint + penalty
    assert parts["loss/total"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_few_labels():
    run, again = (trained(labels_per_class=3, batch_size=30, p_x_batch_size=20, seed=seed) for seed in (1, 5))
    assert run.batches.split.labels.bincount().tolist() == [3] * 10
    assert len(run.real_batches.split) == len(run.data.train) and run.steps_per_epoch == len(run.data.train) // 20
    assert torch.equal(run.batches.split.images, again.batches.split.images)  # whatever the run's seed


def test_an_unconditional_model_reports_no_classes(tmp_path, capsys):
    run = start(tmp_path, "--p_y_x_weight", "0")
    assert not any("accuracy/test" in line for line in read_log(run / "metrics.jsonl"))
    options = "--mode test --gpu cpu --eval classification,ood --ood_datasets noise --max_images 30".split()
    assert main.main([*options, "--load_ckpt", str(run)]) == 0
    report = (run / "eval" / "report.md").read_text()
    assert "the model was trained without labels" in report and "AUROC" in report and "max softmax" not in report
    assert "log p(x), training minus test" in report and "cross-entropy" not in report and "onfusion" not in report


def test_separate_energy_is_kept_by_the_checkpoint(tmp_path, capsys):
    run = start(tmp_path, "--separate_energy")
    assert "energy_output.weight" in state(run)["model"]
    new_run("--mode sample --gpu cpu --n_sample_steps 2".split(), tmp_path / "samples", "--load_ckpt", str(run))
    err = refused(capsys, *SMALL, "--load_ckpt", run, "--logdir", tmp_path)
    assert "holds another network: give --separate_energy" in err
    plain = start(tmp_path / "plain", "--separate_energy", "--mode", "baseline_train")
    assert main.main([*"--mode test --gpu cpu --eval calibration --load_ckpt".split(), str(plain)]) == 0
    assert "has a head for log p(x) that was not trained" in capsys.readouterr().err
    assert "its head for log p(x) untrained" in (plain / "eval" / "report.md").read_text()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_adversarial_images_of_a_linear_classifier(norm):
    torch.manual_seed(0)
    w = torch.randn(2, 48)
    x, y = torch.rand(5, 3, 4, 4) - 0.5, torch.tensor([0, 1, 0, 1, 1])  # far from the walls at -1 and 1
    found = adversarial_images(lambda x: x.flatten(1) @ w.T, x, y, 0.2, norm, 10)
    away = (w[1] - w[0]) * torch.where(y == 0, 1.0, -1.0)[:, None]
    best = 0.2 * away / away.norm(dim=1, keepdim=True) if norm == "L2" else 0.2 * away.sign()
    torch.testing.assert_close(found, x + best.view_as(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(pgd(lambda z: 1e-30 * (z.flatten(1) * away).sum(), x, 0.2, norm, 10), found)
    noisy = x.sign() + 0.1 * torch.randn(x.shape)  # beyond the walls: it stays there, and takes no part of the 0.2
    change = adversarial_images(lambda x: x.flatten(1) @ w.T, noisy, y, 0.2, norm, 10) - noisy
    length = change.flatten(1).norm(dim=1) if norm == "L2" else change.abs().amax((1, 2, 3))
    assert 0.19 < length.min() and length.max() < 0.2 + 1e-5 and ((noisy + change).abs() <= noisy.abs().clamp(1)).all()


def test_the_classifier_trains_on_adversarial_images_and_log_p_x_on_the_others():
    plain = trained(norm="batch").draw_step_batch(1)[0]
    run = trained(norm="batch", adversarial_eps=0.1, adversarial_norm="Linf")
    statistics = run.model.f.bn1.running_mean.clone()
    inputs = run.draw_step_batch(1)[0]
    assert torch.equal(run.model.f.bn1.running_mean, statistics)
    assert torch.equal(inputs.x_real, plain.x) and torch.equal(inputs.y, plain.y)
    assert 0.15 < (inputs.x - inputs.x_real).abs().max() <= 0.2 + 1e-5
    run.model.eval()
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(run.model(x), inputs.y) for x in (inputs.x, inputs.x_real)]
    assert losses[0] > losses[1] + 0.01
    for steps in (1, 3):
        options = {"adversarial_eps": 0.5, "adversarial_steps": steps, "adversarial_step_size": 0.002, "sigma": 0.0}
        inputs = trained(**options).draw_step_batch(1)[0]
        moved = (inputs.x - inputs.x_real).flatten(1).norm(dim=1)  # at a wall of [-1, 1] less
        assert 0.004 * (steps - 1) < moved.max() <= 0.004 * steps + 1e-6


def test_chains_of_log_p_x_y_grow_from_no_step_by_what_they_climb():
    """Without a step samples are fresh starts; the AUROC that makes them grow is that of log p(x, y)."""
    run = trained(class_cond=True, sgld_step=0, sgld_step_max=3, reinit_freq=1.0, p_x_batch_size=40, norm="batch")
    rng = run.rng.sgld.get_state()
    inputs = run.draw_step_batch(run.chain_length)[0]
    run.rng.sgld.set_state(rng)
    starts, _, y = run.sampler.draw(40, True)
    assert torch.equal(starts, inputs.samples) and y.bincount().tolist() == [4] * 10
    real, labels = inputs.x_real, inputs.y_real
    known = run.data.train.images.flatten(1).float()
    nearest = torch.cdist(((real + 1) * 127.5).flatten(1), known).argmin(1)
    assert torch.equal(run.data.train.labels[nearest], labels)
    parts = run.loss_and_gradient(inputs)
    with torch.no_grad():
        values = [run.model.log_density(*batch) for batch in ((real, labels), (inputs.samples, inputs.y_sampled))]
    weights = run.class_weights[inputs.y_sampled]
    won = ((values[0][:, None] > values[1]) * weights).mean().item() / weights.mean().item()
    unlabelled = [run.model.log_density(x) for x in (real, inputs.samples)]
    assert parts["sgld/auroc"].item() == pytest.approx(won, abs=1e-6) and parts["sgld/auroc"] != auroc(*unlabelled)
    assert trained(class_cond=True, labels_per_class=3).draw_step_batch(1)[0].y_real is None  # not all may be used


def test_chains_grow_while_samples_are_told_apart(monkeypatch):
    run, made, original = trained(0, sgld_step=2, sgld_step_max=4, sgld_step_auroc=0.6), [], trainer.SGLD.__call__
    run.logger, read = Mock(speed=lambda step: 1.0), trainer.Meter.read
    monkeypatch.setattr(trainer.SGLD, "__call__", lambda self, x, n, *a: made.append(n) or original(self, x, n, *a))
    told_apart = {10: 0.7, 20: 0.5, 25: 0.9, 30: 0.9, 40: 0.9, 50: 0.9}
    monkeypatch.setattr(trainer.Meter, "read", lambda self: read(self) | {"sgld/auroc": told_apart[run.step]})
    for run.total_steps in (25, 50):  # at a run's end they do not
        run.loop(Mock(take=lambda: (False, 0)))
    logged = [call.args[1]["sgld/steps"] for call in run.logger.log_values.call_args_list]
    assert logged == [2, 3, 3, 3, 4, 4] and made == 10 * [2] + 20 * [3] + 20 * [4]
    assert run.sgld_step == 4
    run.load_state_dict(run.state_dict() | {"sgld_step": 3})
    assert run.sgld_step == 3


def test_images_of_another_folder_are_cropped_and_flipped():
    pictures = torch.arange(1, 1025).remainder(255).byte().view(1, 1, 32, 32).expand(2, -1, -1, -1).contiguous()
    found = chain_init.folder_init(pictures, True, [0] * 300, seeded())
    padded = torch.nn.functional.pad(data.to_float(pictures[:1]), [4] * 4, value=-1)
    crops = [padded[:, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    allowed = torch.cat(crops + [crop.flip(3) for crop in crops])
    distances = torch.cdist(found.flatten(1), allowed.flatten(1), p=torch.inf)
    assert distances.min(1).values.max() < 1e-5 and len(distances.argmin(1).unique()) > 100


@pytest.mark.parametrize("given", ["--start folder", "--recipe dat --backbone jem --p_x_batch_size 20"])
def test_chains_start_from_another_folder(given, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.new("RGB", (20, 20), (9 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    options = [*given.split(), "--start_dir", str(tmp_path / "images"), "--reinit_freq", "0"]
    run = start(tmp_path / "runs", *options)
    assert read_config(run)["options"]["start"] == "folder" and "note: " not in capsys.readouterr().err
    never_drawn = state(run)["buffer"]["images"][state(run)["buffer"]["age"] == 0]
    assert never_drawn.shape[1:] == (1, 8, 8)
    assert all((image == image[0, 0, 0]).all() for image in never_drawn) and never_drawn.max() < 0
    (tmp_path / "images").rename(tmp_path / "moved")
    longer = ["--resume", str(run), "--max_steps", "13"]
    assert f"cannot read --start_dir {tmp_path / 'images'}: No such file" in refused(capsys, *longer)
    assert main.main([*longer, "--start_dir", str(tmp_path / "moved")]) == 0 and state(run)["step"] == 13


def test_sam_trains_with_the_gradient_elsewhere_and_the_statistics_of_the_first_pass():
    plain, sharp = (trained(norm="batch", optimizer="sgd", lr=0.1, sam_rho=rho) for rho in (0.0, 0.5))
    assert not torch.equal(plain.model.f.conv1.weight, sharp.model.f.conv1.weight)
    assert torch.equal(plain.model.f.bn1.running_mean, sharp.model.f.bn1.running_mean)
    assert sharp.model.f.bn1.num_batches_tracked == 1
    assert plain.meter.sums["loss/total"] == sharp.meter.sums["loss/total"]  # of the weights before the step


def test_a_long_gradient_is_shortened():
    """The first step of SGD with Nesterov's momentum of 0.9 goes 1.9 * lr * gradient, whose length is the limit."""
    moved, first = {}, trained(0).model
    for limit in (None, 1e-3, 1e6):
        run = trained(optimizer="sgd", lr=0.1, grad_clip=limit)
        change = [a - b for a, b in zip(run.model.parameters(), first.parameters(), strict=True)]
        moved[limit] = torch.nn.utils.get_total_norm(change).item()
    assert moved[1e-3] == pytest.approx(1.9 * run.lr * 1e-3, rel=1e-3)
    assert moved[1e6] == moved[None] > 10 * moved[1e-3]


def test_step_schedule(tmp_path):
    cfg = Config(schedule="step", lr=0.1, warmup_steps=4, decay_epochs="1,2", decay_rate=0.2)
    rates = [optim.learning_rate(cfg, step, 10, 30) for step in (1, 4, 10, 11, 20, 21)]
    assert rates == pytest.approx([0.025, 0.1, 0.1, 0.02, 0.02, 0.004])
    options = "--mode baseline_train --batch_size 300 --n_valid 237 --schedule step --decay_epochs 3,6 --decay_rate 0.5"
    run = start(tmp_path, *options.split(), "--lr", "0.01", "--max_steps", "30")  # 4 steps an epoch
    lr = {line["step"]: line["lr"] for line in read_log(run / "metrics.jsonl") if "lr" in line}
    assert lr == {10: pytest.approx(0.01), 20: pytest.approx(0.005), 30: pytest.approx(0.0025)}


@pytest.mark.parametrize(
    "options, words",
    [
        ("--recipe best", "--recipe takes one of jem, jem++"),
        ("--schedule step --decay_epochs 3,x", "epochs, separated by commas"),
        ("--class_cond --p_x_y_weight 1 --adversarial_eps 0.5", "needs --adversarial_eps 0"),
        ("--stages 4 --norm instance", "--norm instance has one value of each channel"),
        ("--stages 4 --norm batch --p_x_batch_size 1", "or, for batch, larger batches"),
        ("--n_valid 1430 --batch_size 5", "are left: lower --n_valid"),
        ("--labels_per_class 500", "--labels_per_class 500 is too many"),
        ("--labels_per_class 1", "--batch_size 20 is larger than the 10 images that it may take"),
        ("--p_x_batch_size 101", "--buffer_size 100 is smaller than the 101 chains"),
        ("--class_cond --p_x_batch_size 95 --buffer_size 95", "too few images of each of 10 classes"),
        ("--start folder:0.2,uniform:0.8", "--start folder needs --start_dir"),
        ("--outlier_weight 1 --outlier_images folder", "--outlier_images folder needs --start_dir"),
        ("--outlier_weight 1 --outlier_images smoth", "--outlier_images takes one of uniform"),
        ("--outlier_weight 1 --p_x_weight 0", "--outlier_weight is for training with samples"),
        ("--outlier_weight 1 --norm batch", "give --norm_statistics running or frozen"),
        ("--norm batch --norm_statistics frozen", "needs --load_ckpt"),
        ("--p_x_y_weight 1 --class_cond --dropout_rate 0.1", "needs --adversarial_eps 0, --dropout_rate 0"),
        ("--sgld_step 0", "--sgld_step 0 needs --sgld_step_max"),
        ("--sgld_grad_clamp 0", "--sgld_grad_clamp must be above 0"),
        ("--sgld_grad_clamp of", "--sgld_grad_clamp takes a number, or off (default), not 'of'"),
        ("--depth off", "--depth takes a whole number, not 'off'"),
        ("--no-sgld-clam", "there is no option --no-sgld-clam (did you mean --no_sgld_clamp?)"),
        ("--sgld_clam 0", "there is no option --sgld_clam (did you mean --sgld_clamp?)"),
        ("-Lr 3", "there is no option -Lr (did you mean --lr?)"),
    ],
)
def test_contradictions_are_one_line(options, words, tmp_path, capsys):
    assert words in refused(capsys, *SMALL, "--logdir", tmp_path, *options.split()) and not list(tmp_path.iterdir())
