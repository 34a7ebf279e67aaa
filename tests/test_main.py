"""The command line, driven for real on the digits: files, options, bad input, whatever it holds."""

import json
import math
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from small_runs import DIGITS, at_step, equal, metrics, new_run, refused, state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import write_pngs
from test_sample import changed_checkpoint as edited

import data
import main
import trainer
import utils
from checkpoints.files import load_checkpoint
from checkpoints.load import open_trained
from config import Config
from config.checks import unused
from config.cli import option_names, parse
from logger.metrics_log import read_log
from sgld import step_protocol
from trainer import Trainer

TINY = [*DIGITS, *"--batch_size 16 --buffer_size 64 --n_valid 100".split()]

SCALARS = "loss/total loss/classification loss/generative log_density/real log_density/sampled accuracy/train lr"
SCALARS = [*SCALARS.split(), "speed/images_per_second"]
CPU = torch.device("cpu")
train = partial(new_run, TINY)


def trainer_of(images, *options):
    return Trainer(Config(**parse([*TINY, "--max_steps", "6", *options], Config)), images, CPU)


@pytest.fixture(scope="module")
def jem(tmp_path_factory):
    options = ["--max_steps", "84", "--sample_every", "20", "--gif_every", "40", "--note", "short run"]
    return train(tmp_path_factory.mktemp("runs"), *options)


@pytest.fixture(scope="module")
def digits_100():
    return data.load("digits", n_valid=100)


class TestEnergyTrain:
    def test_sample_grids(self, jem):
        names = sorted(p.name for p in (jem / "samples").iterdir())
        assert names == [f"sampled_image_{step:08d}.png" for step in (1, 21, 41, 61, 81)]
        grid = np.asarray(Image.open(jem / "samples" / names[-1]))
        assert grid.shape == (8 * 66 + 2, 8 * 66 + 2, 3)  # 8x8 tiles of 64 pixels, 2 between them
        tile = grid[2:66, 2:66, 0].reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
        assert (tile == tile[:, :1]).all()  # each pixel enlarged to a block of 8x8, not smoothed
        assert len(np.unique(tile)) > 10

    def test_gifs(self, jem):
        names = sorted(p.name for p in (jem / "sgld").iterdir())
        assert names == [f"SGLD_process_demo_{step:08d}.gif" for step in (41, 81)]
        assert (jem / "SGLD_process_demo.gif").read_bytes() == (jem / "sgld" / names[-1]).read_bytes()
        with Image.open(jem / "SGLD_process_demo.gif") as gif:
            film = np.stack([frame.convert("RGB") for frame in ImageSequence.Iterator(gif)])
        assert film.shape == (31, 4 * 66 + 2 + 18, 4 * 66 + 2, 3)
        change = np.abs(np.diff(film[:, :266].astype(int), axis=0)).mean((1, 2, 3))
        assert (change > 0).all() and change[:5].mean() > change[-5:].mean()  # annealed: it comes to rest

    def test_metrics(self, jem):
        lines = read_log(jem / "metrics.jsonl")
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)) and steps[-1] == 84 and set(range(10, 81, 10)) <= set(steps)
        line = next(line for line in lines if line["step"] == 80)
        further = "epoch log_density/real_std log_density/sampled_std gradient_norm sgld/gradient_norm "
        further += "sgld/distance_moved sgld/saturated_share sgld/buffer_age sgld/classes"
        assert {*SCALARS, *further.split()} <= set(line)
        assert sum(line["sgld/classes"]) == 10 * 16 and line["epoch"] == pytest.approx(80 / 83)

    def test_tensorboard(self, jem):
        board = EventAccumulator(str(jem), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
        board.Reload()
        tags = board.Tags()
        assert {*SCALARS, "accuracy/valid", "accuracy/test"} <= set(tags["scalars"])
        for name in ("loss/total", "accuracy/test", "lr"):
            logged = {line["step"]: line[name] for line in metrics(jem) if name in line}
            assert {e.step: pytest.approx(e.value) for e in board.Scalars(name)} == logged
        samples = board.Images("samples")
        assert [e.step for e in samples] == [1, 21, 41, 61, 81]
        assert samples[-1].encoded_image_string == (jem / "samples" / "sampled_image_00000081.png").read_bytes()
        film = board.Images("SGLD_process_demo")[-1].encoded_image_string
        assert film == (jem / "SGLD_process_demo.gif").read_bytes() and "sgld/classes" in tags["histograms"]

    def test_config_curves_and_checkpoints(self, jem):
        assert jem.name.endswith("_energy_train_short run")
        content = json.loads((jem / "config.json").read_text())
        assert content["options"].keys() == {f.name for f in fields(Config)}
        assert content["environment"]["torch"] == version("torch")
        assert {"git_commit", "device", "command"} <= content["environment"].keys()
        for name in ("test_accuracy.png", "loss.png"):
            assert np.asarray(Image.open(jem / name)).std() > 5
        assert {"last.pt", "previous.pt", "best.pt"} == {p.name for p in (jem / "ckpt").iterdir()}
        assert state(jem, "best.pt").keys() == {"step", "model", "recovery"} and state(jem)["step"] == 84
        valid = [line["accuracy/valid"] for line in metrics(jem) if "accuracy/valid" in line]
        assert state(jem)["best"] == {"best.pt": max(valid)}


def test_evaluation_is_that_of_the_saved_weights_and_a_baseline_makes_no_samples(jem, tmp_path, digits_100):
    options = "--mode baseline_train --max_steps 84 --lr 1e-2 --warmup_steps 83 --ema 0.9 --sgld_step_max 9"
    run = train(tmp_path, *options.split())
    for trained, name in ((jem, "model"), (run, "ema")):
        model, right = trainer_of(digits_100).model.eval(), {}
        for weights, part in product({"model", name}, ("valid", "test")):
            model.load_state_dict(state(trained)[weights])
            split = getattr(digits_100, part)
            found = torch.cat([model(image[None] / 127.5 - 1).argmax(1) for image in split.images])
            right[weights, part] = (found == split.labels).float().mean().item()
        logged = {part: metrics(trained)[-1][f"accuracy/{part}"] for part in ("valid", "test")}
        assert logged == {part: pytest.approx(right[name, part]) for part in logged}
    assert any(right["ema", part] != right["model", part] for part in logged)
    names = {p.name for p in run.iterdir()}
    assert {"test_accuracy.png", "loss.png"} <= names and "buffer" not in state(run)
    assert not {"samples", "sgld", "SGLD_process_demo.gif"} & names
    line = metrics(run)[0]
    assert line["loss/total"] == line["loss/classification"] and "log_density/sampled" not in line
    assert metrics(run)[-1]["accuracy/test"] > 0.3  # 84 steps of 16 images teach a classifier that much


def parts_of(run):
    """The first step's inputs, and the loss and its parts with them."""
    inputs = run.draw_step_batch(run.cfg.sgld_step)[0]
    return inputs, run.loss_and_gradient(inputs)


CHANGES = {  # option: what of a trainer it changes, and to what
    "seed=2": (lambda run: run.rng.data.initial_seed(), 4),
    "n_valid=90": (lambda run: len(run.data.valid), 90),
    "depth=16": (lambda run: sum(type(m).__name__ == "Block" for m in run.model.modules()), 6),
    "width=2": (lambda run: run.model.f.n_features, 128),
    "dropout_rate=0.5": (lambda run: {m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout)}, {0.5}),
    "buffer_size=32": (lambda run: len(run.sampler.buffer.images), 32),
    "batch_size=8": (lambda run: [len(x) for x in (run.batches.next()[0], parts_of(run)[0].samples)], [8, 8]),
    "precision=bf16": (lambda run: run.sampler_model.f.conv1.weight.dtype, torch.bfloat16),
    "reinit_freq=1": (lambda run: (run.sampler(16, 1), run.sampler(16, 1), run.sampler.buffer.age.max().item())[-1], 1),
}


@pytest.mark.parametrize("option", CHANGES)
def test_options_change_what_they_say(option, digits_100):
    measure, expected = CHANGES[option]
    images = data.load("digits", n_valid=90) if "n_valid" in option else digits_100
    assert measure(trainer_of(images, f"--{option}")) == expected and measure(trainer_of(digits_100)) != expected


def test_options_that_do_not_concern_the_training_leave_it_alone(tmp_path, monkeypatch):
    """Evaluations, a film, checkpoints and averages in the middle of a run, whose epochs have 13 steps."""
    monkeypatch.setattr(trainer, "MIN_EPOCH", 1)
    long = ["--max_steps", "15", "--batch_size", "100", "--buffer_size", "100"]
    others = "--sample_every 2 --gif_every 9 --eval_every 1 --ckpt_every 2 --no_log --note x --ema 0.9".split()
    plain = train(tmp_path / "0", *long, "--eval_every", "9")
    run = train(tmp_path / "1", *long, *others, "--max_recoveries", "3", "--diverge_threshold", "500")
    assert equal(state(run)["model"], state(plain)["model"])
    assert list(plain.glob("events*")) and not list(run.glob("events*"))
    assert len(list(run.glob("sgld/*.gif"))) == 1 and sum("accuracy/test" in line for line in metrics(run)) == 2


@pytest.mark.parametrize(
    "options, min_epoch, saved_at, evaluated_at",
    [
        ("--batch_size 300 --max_steps 9 --eval_every 2 --ckpt_every 3", 1, [0, 3, 4, 6, 8, 9], [8, 9]),  # 4 an epoch
        ("--batch_size 200 --epochs 2", 1, [0, 6, 12], [6, 12]),
        ("--batch_size 200 --epochs 2 --max_steps 7", 1, [0, 6, 7], [6, 7]),
        ("--batch_size 500 --n_valid 300 --max_steps 53", 50, [0, 50, 53], [50, 53]),  # short epochs share: 2 steps
    ],
)
def test_when_it_evaluates_and_saves(options, min_epoch, saved_at, evaluated_at, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.MIN_EPOCH", min_epoch)
    saved, original = [], Trainer.checkpoint
    monkeypatch.setattr(Trainer, "checkpoint", lambda self, *a: saved.append((*a, self.step)) or original(self, *a))
    run = train(tmp_path, "--mode", "baseline_train", *options.split())
    assert [step for name, step in saved if name == "last.pt"] == saved_at
    assert [line["step"] for line in metrics(run) if "accuracy/test" in line] == evaluated_at


def test_no_weights_are_kept_that_diverged_before_their_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "MIN_EPOCH", 5)  # of epochs of 3 steps, each second one ends with a checkpoint

    def diverge(run):
        for p in run.model.parameters():
            p.data.fill_(torch.nan)
        run.diverged.fill_(True)

    at_step(monkeypatch, 8, diverge)
    options = [*TINY, "--batch_size", "400", "--buffer_size", "400", "--eval_every", "3", "--max_recoveries", "0"]
    assert main.main([*options, "--max_steps", "12", "--logdir", str(tmp_path)]) == 1
    (run,) = tmp_path.iterdir()
    assert not (run / "ckpt" / "best.pt").exists()


def test_a_folder_its_image_size_and_no_flip(tmp_path):
    write_pngs(tmp_path / "images", "a", "b", n=24)
    options = "--mode baseline_train --dataset folder --n_valid 4 --max_steps 3 --image_size 12".split()
    run = train(tmp_path / "runs", *options, "--data_dir", str(tmp_path / "images"))
    assert load_checkpoint(run / "ckpt" / "last.pt")["data"]["shape"] == [3, 12, 12]
    images = data.load("folder", tmp_path / "images", 12, 4)
    straight = trainer_of(images, "--no_flip", "--start_dir", str(tmp_path / "images"))
    usual = trainer_of(images, "--p_x_batch_size", "16")
    assert usual.batches.flip and usual.real_batches.flip
    assert not (straight.batches.flip or straight.chain_init.args[1])


def test_load_ckpt_brings_weights_and_buffer(tmp_path, jem, capsys):
    options = "--max_steps 1 --lr 1e-12 --warmup_steps 0 --reinit_freq 0".split()
    run = train(tmp_path, "--load_ckpt", str(jem), *options)
    mine, theirs = state(run), state(jem)
    assert all(torch.allclose(mine["model"][k], theirs["model"][k], atol=1e-6) for k in mine["model"])
    unchanged = (mine["buffer"]["images"] == theirs["buffer"]["images"]).flatten(1).all(1).sum()
    assert unchanged == 64 - 16 and mine["step"] == 1
    for other in (["--class_cond"], ["--buffer_size", "32"]):
        train(tmp_path / other[0], "--load_ckpt", str(jem), *options, *other)
        assert "replay buffer has another size, or no classes: starting with a fresh one" in capsys.readouterr().out


def test_another_programs_buffer_is_taken_but_for_images_that_are_not_finite(jem):
    content = load_checkpoint(jem / "ckpt" / "last.pt")
    held = content["state"]["buffer"]["images"]
    held[5, 0, 0, 0], held[6, 0, 0, 0] = math.nan, math.inf
    run = trainer_of(data.load("digits"))
    fresh = run.buffer.images.clone()
    run.load_weights(jem, content)
    good = [i for i in range(64) if i not in (5, 6)]
    assert torch.equal(run.buffer.images[good], held[good]) and torch.equal(run.buffer.images[5:7], fresh[5:7])


def test_what_a_run_says_and_compile_on_changes_the_speed_only(tmp_path, capfd):
    plain = train(tmp_path / "0", "--max_steps", "12")
    out, err = capfd.readouterr()
    words = [str(plain), *"CPU float32 WRN-10-1 parameters".split(), "1337 train, 100 valid, 360 test", "after 12"]
    assert [word for word in words if word not in out] == []
    assert "images/s" in err and "steps will take about" in out + err
    run = train(tmp_path / "1", "--max_steps", "12", "--compile", "on")
    assert "float32, compiled: network and chains" in capfd.readouterr().out
    mine, theirs = state(run)["model"], state(plain)["model"]
    assert all(torch.allclose(mine[k], theirs[k], atol=1e-4) for k in theirs)
    rounded = state(train(tmp_path / "2", "--max_steps", "12", "--precision", "bf16"))["model"]["f.conv1.weight"]
    assert "bfloat16, compiled" in capfd.readouterr().out and not torch.equal(rounded, theirs["f.conv1.weight"])


def test_gpu_that_is_not_there(monkeypatch, capsys):
    if not torch.cuda.is_available():
        assert utils.pick_device("0") == torch.device("cpu") and "running on the CPU" in capsys.readouterr().err
    assert utils.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "has GPUs 0 to 1" in refused(capsys, *TINY, "--gpu", "7")


def test_help_is_grouped_and_has_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for f in fields(Config):
        assert f"--{f.name}" in text and f"\n{f.metadata['group']}:" in text
        default = "off" if f.default is False else f.default
        assert default in (None, "") or f"(default: {default})" in " ".join(text.split())


def test_switches_and_numbers_as_other_programs_write_them():
    for line in ("--sgld_clamp", "--sgld_clamp=True", "--sgld_clamp true", "--no_sgld_clamp=0", "--sgld_clamp=1"):
        assert parse(line.split(), Config) == {"sgld_clamp": True}
    for line in ("--no_sgld_clamp", "--sgld_clamp=False", "--no_sgld_clamp 1", "--sgld_clamp --sgld_clamp 0"):
        assert parse(line.split(), Config) == {"sgld_clamp": False}
    assert parse("--no_log --width 2.0 -l 1e-3".split(), Config) == {"no_log": True, "width": 2, "lr": 1e-3}
    assert parse("--max_steps off --sgld_grad_clamp off".split(), Config) == dict(max_steps=None, sgld_grad_clamp=None)


def test_all_that_is_wrong_is_said_at_once(tmp_path, capsys):
    for options, *words in (
        ("--depth x --foo 3 --sgld_clamp=maybe --bar=4 --width 2.5", "--depth", "--foo", "--bar", "'maybe'", "--width"),
        ("--lr -1 --sigma -0.1 --norm weight", "--lr must be above 0", "--sigma must be at least 0", "--norm takes"),
        ("--schedule step --sgld_step_max 2 --p_x_y_weight 1", "--decay_epochs", "--sgld_step_max 2", "--class_cond"),
    ):
        err = refused(capsys, *TINY, *options.split())
        assert all(word in err for word in words)


def test_a_recipe_from_python_is_the_recipe():
    cfg = Config(recipe="sada-jem", batch_size=64)
    assert (cfg.norm, cfg.optimizer, cfg.sam_rho, cfg.batch_size) == ("batch", "sgd", 2.0, 64)
    assert replace(cfg, norm="none").sam_rho == 2.0 and replace(cfg, optimizer="adam").optimizer == "adam"
    steps = [Config(recipe=name, load_ckpt="x").fresh_steps for name in ("jem", "m-jem", "dat", "oe-jem")]
    assert steps == [200, 100, 50, 50]
    assert Config(p_x_weight=0, p_y_x_weight=0, p_x_y_weight=1, class_cond=True).draws_samples
    assert Config(gpu="0,1", sgld_step=300).fresh_steps == 300 and Config(mode="test", refine_steps=0).refinements
    assert Config(outlier_weight=1, outlier_images="folder", start_dir="a").start == "uniform"
    assert not Config().separate_p_x and Config(augment="auto").separate_p_x  # log p(x) is not of such images
    former = {"counterfactual": "", "counterfactual_eps": 1}  # options of older checkpoints
    plain = Config.from_dict({"recipe": "sada-jem", "lr": 1e-3} | former, "a checkpoint")  # of its options as they are
    assert (plain.recipe, plain.norm, plain.lr) == ("sada-jem", "none", 1e-3)
    said = "step size 0.2, noise 0, images clamped to [-1, 1], gradients of length 1"
    assert step_protocol(Config(recipe="dat")) == said and Config(logdir="~").logdir == str(Path.home())
    with pytest.raises(TypeError, match="teapot"):
        Config(teapot=1)
    assert Config(lr=1, seed=np.int64(3), data_dir=Path("a")).data_dir == str(Path("a").absolute())
    wrong = {"gpu": 0, "lr": "0.1", "batch_size": 2.5, "epochs": None, "width": True, "data_dir": 3, "recipe": ["jem"]}
    for name, value in wrong.items():
        with pytest.raises(utils.UserError, match=f"--{name} takes a"):
            Config(**{name: value})


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"mode": "test", "lr": 1.0, "epochs": 3, "n_samples": 9, "eval": "ood,quality"}, ["lr", "epochs"]),
        ({"mode": "test", "n_samples": 9, "ais_chains": 5, "eval": "ood"}, ["n_samples", "ais_chains"]),
        ({"mode": "test", "eval": "calibration", "precision": "bf16", "sgld_lr": 3, "start": "gaussian"},) * 2,
        ({"mode": "test", "eval": "robustness", "sgld_clamp": True, "sigma_test": 0.1, "refine_steps": 5}, []),
        ({"mode": "export", "note": "b", "export": "a.safetensors", "export_for": "jem"}, ["note", "export_for"]),
        ({"outlier_weight": 1.0, "outlier_images": "folder", "start_dir": "a", "norm": "none"}, []),
        ({"mode": "test", "eval": "robustness", "attacks": "pgd", "sigma_test": 0.1, "refine_steps": 5},) * 2,
        ({"mode": "sample", "sgld_step": 3, "sgld_lr": 1.0, "resume": "x"}, ["resume"]),
        ({"mode": "test", "sgld_step": 3, "sgld_step_max": 7, "n_sample_steps": 2}, ["sgld_step", "sgld_step_max"]),
        ({"mode": "sample", "sgld_step": 3, "from_buffer": True, "start": "uniform"}, ["start"]),
        ({"mode": "sample", "denoise": 0.1, "sgld_step": 3, "n_sample_steps": 3}, ["n_sample_steps"]),
        ({"mode": "sample", "sgld_step": 3, "n_sample_steps": 3}, ["sgld_step"]),
        ({"mode": "baseline_train", "sgld_step": 3, "lr": 1.0, "denoise": 0.1}, ["sgld_step", "denoise"]),
        ({"mode": "energy_train", "n_samples": 30, "decay_rate": 0.5}, ["n_samples", "decay_rate"]),
        ({"quality_every": 1, "n_samples": 30, "schedule": "step", "decay_epochs": "9", "decay_rate": 0.5}, []),
        ({"sgld_step_auroc": 0.8, "adversarial_steps": 3}, ["sgld_step_auroc", "adversarial_steps"]),
        ({"p_y_x_weight": 0.0, "adversarial_eps": 0.5}, ["adversarial_eps"]),
        ({"p_x_weight": 0.0, "energy_l2": 1.0}, ["energy_l2"]),
        ({"p_x_weight": 0.0, "sgld_step": 3, "mean_energy_l2": 1.0}, ["sgld_step", "mean_energy_l2"]),
    ],
)
def test_options_that_are_not_used(given, expected):
    assert unused(given, Config(**given)) == [name for name in expected if name not in ("mode", "eval", "attacks")]


def test_a_command_line_of_which_only_the_mode_was_changed(jem, tmp_path, capsys):
    options = [*TINY, "--lr", "1e-3", "--max_steps", "9", "--load_ckpt", str(jem), "--logdir", str(tmp_path)]
    for mode, more in (("sample", "--n_sample_steps 1"), ("test", "--eval classification --max_images 20")):
        assert main.main([*options, *more.split(), "--mode", mode]) == 0
        (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert all(word in note for word in (f"--mode {mode} ", "--lr", "--max_steps", "--buffer_size"))


def test_a_batch_of_samples_is_as_large_as_in_training_and_images_of_their_own_size(jem, tmp_path):
    path = str(edited(jem, tmp_path / "a.pt", recipe="sada-jem", p_x_batch_size=8, class_cond=True, p_y_x_weight=0.0))
    for mode in ("test", "sample"):
        cfg = open_trained({"mode": mode, "load_ckpt": path}).cfg
        assert (cfg.n_chains, cfg.sgld_step, cfg.start, cfg.lr, cfg.class_cond) == (8, 2, "uniform", 1e-4, False)
        given = {"mode": mode, "load_ckpt": path, "batch_size": 5, "p_x_batch_size": 9, "start_dir": "a", "lr": 7.0}
        cfg = open_trained(given).cfg
        assert (cfg.n_chains, cfg.start, cfg.start_dir, cfg.lr) == (5, "folder", str(Path("a").absolute()), 1e-4)
        mixture = str(edited(jem, tmp_path / "b.pt", start="gaussian:0.8,folder:0.2", start_dir="b"))
        assert open_trained(given | {"load_ckpt": mixture}).cfg.start == "gaussian:0.8,folder:0.2"
    path = str(edited(jem, tmp_path / "folder.pt", dataset="folder", image_size=8, data_dir="b"))
    assert open_trained({"mode": "test", "load_ckpt": path}).cfg.image_size == 8
    cfg = open_trained({"mode": "test", "load_ckpt": path, "dataset": "digits"}).cfg
    assert (cfg.image_size, cfg.n_valid, cfg.depth, cfg.precision) == (None, None, 10, "fp32")
    assert Path(cfg.data_dir).name == "data"


@pytest.mark.parametrize(
    "options, words",
    [
        ("stray", "stray"),
        ("--learning_rate 0.1", "no option --learning_rate; see"),  # another program's: nothing is proposed
        ("--lr", "expected one argument"),
        ("--quality_every 1 --n_samples 5", "--n_samples of 20"),
        ("--quality_every 1 --n_sample_steps 0", "--n_sample_steps of 1"),
        (f"--note {'é' * 130}", "at most 200 bytes"),
        ("--class_cond --p_y_x_weight 0", "need labels"),
        ("--depth 12", "6n + 4"),
        ("--batch_size 5000 --buffer_size 6000", "--batch_size 5000 is larger than the 1337"),
        ("--buffer_size 8", "--buffer_size 8 is smaller than the 16 chains"),
        ("--lr nan", "--lr must be above 0, not nan"),
        ("--width 1e400", "--width takes a whole number"),
        ("--gpu one", "--gpu"),
        ("--dataset folder --image_size 100000000", "--image_size must be at most 2048"),
        ("--load_ckpt=", "--load_ckpt is empty"),
        ("--resume \0", "no path has a null byte"),
        ("--mode sample --resume a", "--mode sample needs --load_ckpt"),
        ("--p_x_weight 0 --p_y_x_weight 0", "nothing to train"),
        ("--labels_per_class 5 --p_y_x_weight 0", "--labels_per_class need labels"),
        ("--norm act", "--norm act has no first values of its own"),
        ("--norm batch --norm_statistics running --class_cond --p_x_y_weight 1", "--norm_statistics batch or frozen"),
        ("--start gaussian:0.5,gaussian:0.5", "each once"),
        ("--note a/b", "--note"),
        ("--data_dir ~nosuchuser/x", "--data_dir ~nosuchuser/x is not"),
        (f"--resume auto --logdir {'x' * 300}", "File name too long"),
        ("--logdir file", "file"),
        ("--load_ckpt .", "no checkpoint"),
        ("--resume a --load_ckpt b", "give one of them"),
    ],
)
def test_bad_options(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert words in refused(capsys, *TINY, *options.split())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]  # nothing was written


@pytest.mark.parametrize(
    "place, error, n_checkpoints",  # before the run has a directory, and after: the state before that step
    [
        ("trainer.ReplayBuffer", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 0),
        ("trainer.Trainer.training_step", torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), 1),
    ],
)
def test_memory_that_runs_out(place, error, n_checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(place, Mock(side_effect=error))
    assert main.main([*TINY, "--logdir", str(tmp_path)]) == 2
    assert "error: not enough memory: make --image_size" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/ckpt/last.pt"))) == len(list(tmp_path.iterdir())) == n_checkpoints
    monkeypatch.setattr(place, Mock(side_effect=RuntimeError("a mistake of the program")))  # is not hidden
    with pytest.raises(RuntimeError, match="mistake"):
        main.main([*TINY, "--logdir", str(tmp_path)])


def test_broken_checkpoints_and_those_of_another_program_version_or_format(jem, tmp_path, capsys):
    path, last = tmp_path / "broken.pt", load_checkpoint(jem / "ckpt" / "last.pt")
    whole = (jem / "ckpt" / "last.pt").read_bytes()
    not_finite = {name: torch.full_like(value, torch.nan) for name, value in last["state"]["model"].items()}
    for content, words in (
        (b"", "broken.pt"),
        (b"PK\x03\x04 torn", "broken.pt"),
        (whole[: len(whole) // 2], "incomplete"),
        (whole[:90000] + bytes([whole[90000] ^ 1]) + whole[90001:], "broken.pt is corrupted"),
        ({"weights": torch.zeros(3)}, "not a checkpoint of this program"),
        (last | {"format": 99}, "format 99"),
        ({"format": 4}, "lacks config"),
        (last | {"data": {}}, "lacks data"),
        (last | {"state": last["state"] | {"model": not_finite}}, "weights that are not finite"),
        (last | {"config": last["config"] | {"teapot": True}}, "options this version does not know: teapot"),
        (last | {"config": last["config"] | {"sgld_lr": 0.0}}, "has an option this version refuses: --sgld_lr"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        mode = TINY if isinstance(content, bytes) else ["--mode", "sample", "--gpu", "cpu"]
        assert words in refused(capsys, *mode, "--load_ckpt", str(path), "--logdir", str(tmp_path / "runs"))
        assert path.read_bytes() == before and not (tmp_path / "runs").exists()


def test_a_network_that_fails_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("models.wide_resnet.WideResNet.forward", lambda self, x: x)
    pytest.raises(RuntimeError, main.main, [*TINY, "--logdir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


OTHER = [("--activation", "leaky_relu", "silu"), ("--norm", "group", "instance"), ("--width", "1", "2")]


@pytest.mark.parametrize("option, own, other", OTHER)
def test_another_network(option, own, other, tmp_path, capsys):
    run = train(tmp_path / "runs", "--max_steps", "1", option, own)
    capsys.readouterr()
    options = [option, other, "--load_ckpt", str(run), "--logdir", str(tmp_path / "new"), "--gpu", "cpu", "--mode"]
    for arguments in ([*TINY, *options, "energy_train"], [*options, "sample"], [*options, "test"]):
        err = refused(capsys, *arguments)
        assert "holds another network" in err and f"{option} {own}" in err and not (tmp_path / "new").exists()


OPTIONS = [f for f in fields(Config) if f.name not in ("mode", "gpu")]
SWITCHES = [[name + end] for f in OPTIONS if f.type is bool for name in option_names(f) for end in ("", "=True")]
NAMES = [f"--{f.name}" for f in OPTIONS if f.type is not bool]
OLD = str(Path(__file__).parent / "files" / "format_2.pt")  # a checkpoint of digits
WORDS = "0 1 -1 2 4 10 nan inf -inf 1e400 0.5 auto off digits folder all cpu .. /dev/null /nonexistent/x é"
WORDS = [*WORDS.split(), "", "\x00", "9" * 21]
VALUES = st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.integers().map(str), st.floats().map(str))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["energy_train", "baseline_train", "test", "sample", "export", "fly"]),
    options=st.lists(st.tuples(st.sampled_from(NAMES), VALUES) | st.sampled_from(SWITCHES), max_size=3),
    stray=st.sampled_from([True, *[False] * 9]),
)
def test_no_command_line_ends_in_a_traceback(mode, options, stray, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A command that is right does little: the last of equal options counts.
    little = {
        "test": f"--load_ckpt {OLD} --eval classification --max_images 20",
        "sample": f"--load_ckpt {OLD} --n_samples 10 --n_sample_steps 1",
        "export": f"--load_ckpt {OLD} --export weights.pt",
    }
    train = "--dataset digits --depth 10 --width 1 --batch_size 8 --buffer_size 20 --sgld_step 1 --max_steps 1"
    chosen = [part for option in options for part in option]
    arguments = ["--mode", mode, "--gpu", "cpu", *chosen, *little.get(mode, train).split()]
    try:
        status = main.main([*arguments, *(["stray"] if stray else [])])
    except SystemExit as stop:  # --help
        status = stop.code
    captured = capsys.readouterr()
    assert status in (0, 2) or (status == 1 and "failed: " in captured.err)  # it may diverge again and again
    assert "Traceback" not in captured.err
    if status == 2:
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0]
