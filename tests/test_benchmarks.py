"""The benchmarks run on small networks and measure what they say, named runs are right; no time is asserted."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch
from small_runs import equal, new_run, state
from torch.utils.tensorboard import SummaryWriter

from benchmarks import chain_length, gaussian_reference, gpu, reproduce, throughput, time_to_quality
from benchmarks.command import device_named
from config import Config
from config.cli import parse
from config.recipes import RECIPES
from main import main
from models import build_model
from utils import UserError

HERE = Path(__file__).parent.parent
SMALL = "--depth 10 --width 1 --batch_size 8 --sgld_step 2 --device cpu --precision fp32 --compile off".split()


def run(script, *options):
    """What it prints; in this process, which has imported torch already."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["", *map(str, options)])
        import_module(f"benchmarks.{script}").main()
    return printed.getvalue()


def test_throughput(tmp_path):
    parts = "--parts sampler,step,data,loop --repeats 1 --image_size 8 --images 100 --loop_steps 12".split()
    run("throughput", *SMALL, *parts, "--json", tmp_path / "numbers.json")
    rows = {row["what"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]}
    names = ["sampler", "training step", "batch and augmentation", "12 bare steps", "the same with log and dumps"]
    assert rows.keys() == {*names, "sampler, plain", "training step, plain"}
    for name in ("sampler", "training step"):
        assert rows[name]["speedup"] == pytest.approx(rows[f"{name}, plain"]["seconds"] / rows[name]["seconds"])
    # A training step has the chains' passes, and forward and backward passes of real and sampled images.
    assert 1 < rows["training step"]["flops"] / rows["sampler"]["flops"] < 4


def test_the_ceiling_is_the_best_of_several_rates(monkeypatch):
    seconds = iter([1.0, 0.5, 4.0, 1e-3])
    monkeypatch.setattr(throughput, "measure", lambda functions, device, repeats: {"rate": [9.0, next(seconds)]})
    rate, what = throughput.ceiling(build_model((3, 32, 32), 10, 10, 1), torch.zeros(2, 3, 32, 32))
    assert what == "a 3x3 convolution of 16 to 16 channels at 32x32" and rate == 2 * 2 * 32 * 32 * 16 * 16 * 9 / 1e-3


def test_recipe_steps():
    options = "--device cpu --repeats 1 --depth 10 --width 1 --recipes m-jem oe-jem --command".split()
    options += ["--dataset digits --depth 10 --width 1 --batch_size 16 --buffer_size 20 --sgld_step 1"]
    rows = [json.loads(line) for line in run("recipe_steps", *options).splitlines()]
    assert [row["name"] for row in rows] == ["command", "m-jem", "oe-jem"]
    assert rows[0]["seconds"] * rows[0]["images_per_second"] == pytest.approx(16)


def test_profile():
    assert "convolution" in run("profile_step", *SMALL)
    for name in ("gpu", "cuda:x"):
        with pytest.raises(UserError, match="--device"):
            device_named(name)


SIMULATED = """
import sys
from benchmarks import simulated_gpu
assert simulated_gpu.run(sys.argv[1:]) == 0 and not simulated_gpu.simulation.in_steps, simulated_gpu.simulation.in_steps
import trainer
joint_loss = trainer.joint_loss

def waiting(cfg, logits, y, **others):
    logits.labelled.register_hook(lambda gradient: print(gradient.sum().item()))
    return joint_loss(cfg, logits, y, **others)

trainer.joint_loss = waiting
assert simulated_gpu.run(sys.argv[1:]) == 0
print(*simulated_gpu.simulation.in_steps)
trainer.joint_loss = lambda cfg, logits, y, **others: joint_loss(cfg, logits, y.cpu(), **others)
try:
    simulated_gpu.run(sys.argv[1:])
except RuntimeError as error:
    print(error)
"""


def test_simulated_gpu(tmp_path):
    """Its numbers are a CPU's; no step waits; a loss that waits and takes labels on the host is found."""
    options = "--dataset digits --recipe sada-jem --class_cond --ema 0.9 --depth 10 --width 1 --batch_size 20"
    options += " --sgld_step 1 --p_x_batch_size 10 --buffer_size 60 --max_steps 6 --warmup_steps 2 --gif_every 5"
    options = [*options.split(), *"--precision fp32 --compile off --no_log --gpu cpu".split()]
    command = [sys.executable, "-c", SIMULATED, *options, "--logdir", str(tmp_path / "gpu")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert re.search(r"^trainer.py:\d+ _local_scalar_dense$", done.stdout, re.MULTILINE), done.stderr
    assert "aten::nll_loss_forward of tensors on simulated and on the CPU, losses.py" in done.stdout
    simulated, whole = min((tmp_path / "gpu").iterdir()), new_run(options, tmp_path / "cpu")
    for part in ("model", "ema", "buffer", "optimizer"):
        assert equal(state(simulated)[part], state(whole)[part]), part


def test_scaling(tmp_path):
    file = tmp_path / "numbers.json"
    small = "--depth 10 --width 1 --batch_size 4 --image_size 8 --steps 2 --recipe m-jem --device cpu --processes 2"
    subprocess.run([sys.executable, HERE / "benchmarks" / "scaling.py", *small.split(), "--json", file], check=True)
    (two,) = json.loads(file.read_text())["rows"]
    assert (two["processes"], two["batch_size"], two["efficiency"]) == (2, 8, None)
    assert throughput.timed_recipe("dat")["sgld_step"] == 25  # its chains begin with no step
    assert two["images_per_second"] == pytest.approx(8 / two["step"])
    assert two["communication"] == pytest.approx(max(0, 1 - two["alone"] / two["step"]))


def test_gaussian_reference(tmp_path):
    images = torch.randint(256, (300, 1, 2, 2), generator=torch.manual_seed(1), dtype=torch.uint8)
    q, b = gaussian_reference.GaussianReference(images, 0.1, torch.device("cpu")), torch.tensor([1.0, -2.0, 0.5, 3.0])
    chains = gaussian_reference.PreconditionedSGLD(lambda x: x.flatten(1) @ b, q)  # q exp(b x) is q, moved
    z = q.white(chains(q.images(torch.randn(4000, 4)), 60, 0.1, 0.19**0.5, torch.manual_seed(2)).x)
    assert (z.mean(0) - q.factor @ b).abs().max() < 0.07 and (z.T.cov() - torch.eye(4)).abs().max() < 0.1
    short = "--dataset digits --gpu cpu --norm none --norm_statistics batch --max_steps 1 --chains 4".split()
    run("gaussian_reference", *short, "--temperatures", 3, "--logdir", tmp_path, "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bits, forward"] == pytest.approx(found["bits, q alone"], abs=0.1) and found["accuracy"] > 0


def test_time_to_quality(tmp_path, monkeypatch, capsys):
    """Curves are the log's numbers at the log's times; a run without a measurement has no curve of it."""
    for name, accuracies in {"one": [0.2, 0.4], "other": []}.items():
        with SummaryWriter(str(tmp_path / name)) as log:
            log.add_scalar("loss/total", 1.0, 10, walltime=1000)
            for i, value in enumerate(accuracies, 1):
                log.add_scalar("accuracy/test", value, 100 * i, walltime=1000 + 1800 * i)
                log.add_scalar("quality/buffer", 10 * value, 100 * i, walltime=1000 + 1800 * i)
    assert time_to_quality.curves(tmp_path / "other") == {}
    hours, values = time_to_quality.curves(tmp_path / "one")["accuracy/test"]
    assert hours == [0.5, 1.0] and values == pytest.approx([0.2, 0.4])
    drawn = time_to_quality.figure({"a": tmp_path / "one", "b": tmp_path / "other"})
    assert [axes.get_title() for axes in drawn.axes] == ["test accuracy", "Fréchet distance of the replay buffer"]
    assert [line.get_label() for line in drawn.axes[0].lines] == ["a"]
    shutil.copytree(tmp_path / "one", tmp_path / "lr=0.1")
    picture = ["--out", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["", *picture, str(tmp_path / "lr=0.1"), f"b={tmp_path / 'one'}"])
    time_to_quality.main()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    for runs, message in (
        ([tmp_path / "other"], "none of these runs has measured"),
        ([tmp_path / "one", f"one={tmp_path / 'other'}"], "two runs have the name one"),
        ([tmp_path / "nowhere"], "there is no run directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["", *picture, *map(str, runs)])
        with pytest.raises(SystemExit, match="2"):
            time_to_quality.main()
        assert message in capsys.readouterr().err


def test_what_a_gpu_was_asked_is_not_asked_again(tmp_path, monkeypatch, capsys):
    """A second start does what is missing, and last what has failed; the tables hold the numbers of all parts."""
    asked, run = [], tmp_path / "runs" / f"1_{gpu.RUN}"
    failing = ["tests/test_gpu.py", "on", "--command", "m-jem", "--resume"]

    def call(self, arguments, seconds=None):
        asked.append(str(arguments[0]))
        broken = [word for word in failing if word in arguments]
        failing[:] = [word for word in failing if word not in broken]
        if "--json" in arguments:
            rows = [{"what": "sampler, plain", "seconds": 0.2}]
            rows.append({"what": "sampler", "seconds": 0.1, "speedup": 2.0, "share_of_ceiling": 0.4})
            Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({"rows": rows, "compiled": "nothing"}))
        if "--resume" in arguments and not broken:
            (run / "ckpt").mkdir(parents=True)
            (run / "ckpt" / "last.pt").touch()
        names = ["command"] if "--command" in arguments else [word for word in arguments if word in RECIPES]
        names = names[: names.index("m-jem")] if "m-jem" in broken else [] if broken else names
        lines = [json.dumps({"name": name, "seconds": 0.05, "images_per_second": 1280}) for name in names]
        return {"status": len(broken), "output": "\n".join([*lines, "27 passed"])}

    monkeypatch.setattr(gpu.Questions, "call", call)
    monkeypatch.setitem(gpu.TRAIN, gpu.RUN, gpu.TRAIN["digits"])
    speed, step = "benchmarks/throughput.py", "benchmarks/recipe_steps.py"
    first, second = ["-m", speed, step, speed, step, step, step], [step, "main.py", "-m", step, step]
    for minutes, expected, n in ((0.9, [], 0), (9.5, first, 4), (25, second, 1), (25, 5 * ["main.py"], 0), (25, [], 0)):
        options = ["", "--out", str(tmp_path), "--device", "cpu", "--dataset", "digits", "--minutes"]
        monkeypatch.setattr(sys, "argv", [*options, str(minutes + (time.monotonic() - gpu.STARTED) / 60)])
        asked.clear()
        gpu.main()
        assert asked == expected
        page = (tmp_path / "gpu.md").read_text() if minutes > 1 else ""
        assert page.count("Not done: ") == n
    assert "Tests marked gpu: 27 passed" in page and ": nothing): sampler | 200.0 ms | 100.0 ms | 2.0 x | 40" in page
    rows = ("of the run", *(f"{name}, WRN-10-1" for name in ("compiled recipe sada-jem", *RECIPES)))
    assert all(f"| {step} | 50.0 ms | 1,280 | - |" in page for step in rows)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--batch_size", "8"])
    with pytest.raises(SystemExit, match="give the same, or another --out"):
        gpu.main()


def test_log_density_and_chain_length(tmp_path):
    options = f"--dataset digits --gpu cpu --depth 10 --width 1 --sgld_step 2 --buffer_size 100 --logdir {tmp_path}"
    options += " --batch_size 50 --lr 1e-3 --max_steps 5 --warmup_steps 1 --p_x_batch_size 20 --no_log"
    assert main(options.split()) == 0
    (run_directory,) = tmp_path.iterdir()
    run("log_density", "--n", 40, "--json", tmp_path / "a.json", run_directory)
    chains = ["--n", 30, "--steps", 5, "--feature_ckpt", run_directory, "--out", tmp_path / "b.png"]
    run("chain_length", *chains, f"plain={run_directory}")
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found) >= 13 and all(0 <= row["worst"] <= row["auroc"] <= 1 for row in list(found.values())[3:])
    lengths = json.loads((tmp_path / "b.json").read_text())["plain"]
    assert lengths.keys() == {"options", "accuracy", "buffer", "noise 0", "noise 0.01"}
    assert lengths["noise 0"]["0"] == lengths["noise 0.01"]["0"] > 0 and (tmp_path / "b.png").stat().st_size > 5000
    assert lengths["noise 0"]["5"] != lengths["noise 0.01"]["5"]
    other = lengths | {"options": {"reinit_freq": 0.5}, "accuracy": 0.2}
    above, below = chain_length.figure_against({"reinit_freq": {"b": other, "a": lengths}}, [5]).axes
    assert above.lines[0].get_xydata().tolist() == [[0.05, 100 * lengths["accuracy"]], [0.5, 20.0]]
    assert [line.get_ydata()[0] for line in below.lines] == [lengths["buffer"], lengths["noise 0"]["5"]]


def options(name, *further):
    return parse(reproduce.command(name, False, list(further), "there")[2:], Config)


@pytest.mark.parametrize("name", reproduce.TRAIN)
def test_every_run_has_valid_options(name):
    cfg = Config(**options(name, "--seed", "7", "--load_ckpt", "first"))
    assert (cfg.note, cfg.seed, Path(cfg.logdir).name) == (name, 7, "there")
    assert (cfg.mode == "baseline_train") == name.endswith("_baseline")


def test_a_baseline_differs_in_nothing_but_the_samples():
    for name in (name for name in reproduce.TRAIN if name.endswith("_baseline")):
        jem, plain = options(name.replace("digits_baseline", "digits_jem").removesuffix("_baseline")), options(name)
        differ = {key for key in jem.keys() | plain.keys() if jem.get(key) != plain.get(key)}
        of_samples = {"sgld_step", "buffer_size", "gif_every", "start", "p_x_batch_size", "mean_energy_l2"}
        assert differ <= {"mode", "note", "mean_energy_form", "p_x_weight"} | of_samples


def test_the_newest_run_of_a_name_is_measured(tmp_path):
    for end in ("1_train_digits", "1_train_digits-10", "1_train_digits-2", "2_train_digits_jem"):
        (tmp_path / f"2026010{end}").mkdir()
    assert reproduce.command("digits", True, [], str(tmp_path))[7].endswith("_train_digits-10")


@pytest.mark.slow
def test_train_and_measure(tmp_path, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["", "digits", "--logdir", str(tmp_path), "--gpu", "cpu", *options])
        monkeypatch.setattr(os, "execv", lambda program, line: sys.exit(main(line[2:])))
        with pytest.raises(SystemExit) as stop:
            reproduce.main()
        return stop.value.code, *capsys.readouterr()

    status, _, err = run("--test")
    assert status == 2 and "train it first" in err
    status, out, _ = run("--max_steps", "3", "--sgld_step", "2", "--warmup_steps", "0")
    assert status == 0 and "--max_steps 601" in out.splitlines()[0]
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("_energy_train_digits")
    status, _, _ = run("--test", "--eval", "classification", "--max_images", "50")
    assert status == 0 and (folder / "eval" / "results.json").is_file()
    assert run("--lr", "x")[0] == 2
