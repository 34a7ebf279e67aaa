"""Everything that a new GPU should be asked, in one command that can be stopped, started again, and fits 25 minutes.

    python benchmarks/gpu.py --out gpu                                        # CIFAR-10's files in data/
    python benchmarks/gpu.py --out gpu --dataset folder --data_dir PATH       # further options go to the training run

Its parts, in this order: the tests marked gpu; sampler and training step of two networks against the plain loop,
without and with torch.compile; a training step of each recipe, and of the run that follows, which takes the time that
is left; its reports. What is done stands in OUT/gpu.json and is not repeated by the next start, which continues the
rest; OUT/gpu.md has the same as tables, in the form of docs/speed.md. What the compiler makes is kept in OUT/compiled.
The tests need requirements-dev.txt, the reports requirements-eval.txt.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import utils  # noqa: E402
from benchmarks.command import device_named  # noqa: E402
from benchmarks.reproduce import TRAIN  # noqa: E402
from benchmarks.throughput import measure, synthetic, timed_recipe  # noqa: E402
from config import Config  # noqa: E402
from config.cli import parse  # noqa: E402
from config.recipes import RECIPES  # noqa: E402
from trainer import Trainer  # noqa: E402

SIZES = {"cuda": {"WRN-16-2": (16, 2, 64), "WRN-28-10": (28, 10, 128)}, "cpu": {"WRN-10-1": (10, 1, 8)}}
RUN = "cifar10_gpu"  # of reproduce.py
REPORTS = {
    "report": "--eval classification,calibration,ood",
    "report of samples": "--eval quality --n_samples 5000",
    "report of attacks": "--eval robustness --attacks pgd --one_epsilon --attack_images 500",
    "report of AutoAttack": "--eval robustness --attacks autoattack --one_epsilon --attack_images 100",
}
REPORT = 500  # seconds that the reports at the end may take
LONGEST_TESTS = 600  # seconds: a test that hangs must not take all the time there is
SET_HERE = {"mode", "recipe", "logdir", "note", "resume", "load_ckpt", "max_steps", "gpu"}  # not by further options
START_UP = 60  # seconds that the training run needs besides its steps
SHORTEST = 180  # seconds of steps that are worth a run
DUMPS = 1.1  # how much longer steps take with log, pictures, evaluation and checkpoints


class Results:
    """What has been measured so far, by the name of the part: OUT/gpu.json and OUT/gpu.md, written after each part.

    Each part notes the commit of the program that measured it.
    """

    def __init__(self, out: Path, device: torch.device):
        out.mkdir(parents=True, exist_ok=True)
        self.path, here = out / "gpu.json", utils.environment(device)
        self.parts: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"environment": here}
        before = self.parts["environment"]
        if (before["device"], before["torch"]) != (here["device"], here["torch"]):
            sys.exit(f"error: {self.path} is of {before['device']}, torch {before['torch']}: give another --out")
        self.commit = here["git_commit"]

    def add(self, name: str, content: dict[str, Any]) -> None:
        self.parts[name] = content | {"commit": self.commit}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.parts, indent=2) + "\n")
        os.replace(unfinished, self.path)
        self.path.with_suffix(".md").write_text(tables(self.parts))

    def add_done(self, name: str, done: dict[str, Any], content: dict[str, Any] | None = None) -> None:
        """Add what a ``call`` did, or what it wrote; if it failed, the next start asks again."""
        if done["status"] == 0:
            self.add(name, content or done)
        else:
            reason = "was stopped" if done["status"] is None else f"failed with exit status {done['status']}"
            print(f"{name} {reason}; the next start asks again. Its last words:\n{done['output'][-1000:]}", flush=True)


def call(arguments: list[Any], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a program of this repository for at most ``seconds``: its exit status (None: it ran out of time), output."""
    words = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        words, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            output, _ = child.communicate(timeout=max(1, seconds))
            status = child.returncode
        except subprocess.TimeoutExpired:
            child.terminate()  # training writes a checkpoint first
            try:
                output, _ = child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                output, _ = child.communicate()
            status = None
        except BaseException:  # SIGTERM or Ctrl-C: nothing is left running on the GPU
            child.terminate()
            raise
    return {"status": status, "output": output[-4000:]}


def gpu_option(device: torch.device) -> str:
    """The value of --gpu for a device."""
    return str(device.index or 0) if device.type == "cuda" else "cpu"


def training_step(cfg: Config, images: data.ImageData, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a training step, and its labelled images a second."""
    run = Trainer(cfg, images, device)
    for run.step in (1, 2):  # the first captures graphs
        run.training_step()
    seconds = statistics.median(measure({"step": run.training_step}, device, repeats)["step"])
    return {"seconds": seconds, "images_per_second": cfg.batch_size / seconds}


def recipe_step(recipe: str, depth: int, width: int, device: torch.device, repeats: int) -> dict[str, float]:
    """A ``training_step`` of a recipe on random images."""
    cfg = Config(recipe=recipe, depth=depth, width=width, compile="off", **timed_recipe(recipe))
    return training_step(cfg, synthetic(5000, (3, 32, 32), device), device, repeats)


def run_step(cfg: Config, device: torch.device, repeats: int) -> dict[str, float]:
    """A ``training_step`` of the run ``RUN``, on its images."""
    images = data.load(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device)
    return training_step(cfg, images, device, repeats)


def training_run(out: Path, further: list[str], seconds: float, step_seconds: float, environment) -> dict[str, Any]:
    """The run ``RUN``, as long as fits into ``seconds``, or what is left of it if it was stopped before."""
    planned = out / "steps.txt"
    if not planned.exists():
        if seconds < START_UP + SHORTEST:
            return {"status": None, "output": "too little time is left for it"}
        planned.write_text(str(int((seconds - START_UP) / (DUMPS * step_seconds))))
    steps = planned.read_text()
    options = ["main.py", "--logdir", out / "runs", "--resume", "auto", *run_options(further), "--max_steps", steps]
    return call(options, seconds, environment) | {"steps": int(steps)}


def run_options(further: list[str]) -> list[str]:
    return [*TRAIN[RUN].split(), "--note", RUN, "--gif_every", "100000", *further]


def trained_run(out: Path) -> Path:
    """The newest directory of the run ``RUN`` that has a checkpoint."""
    return max((out / "runs").glob(f"*{RUN}/ckpt/last.pt"), key=lambda path: path.stat().st_mtime).parent.parent


def test_accuracy(run: Path) -> dict[str, float]:
    """The accuracy in the reports of a run, if one of them has it."""
    for file in run.glob("eval*/results.json"):
        measured = json.loads(file.read_text())
        if "classification" in measured:
            found = measured["classification"]["results"].get("accuracy")  # absent, if it failed
            return {"accuracy": found["value"]} if found else {}
    return {}


def tables(parts: dict[str, Any]) -> str:
    """The parts as Markdown, in the form of docs/speed.md."""
    here = parts["environment"]
    commits = ", ".join(sorted({part["commit"] for part in parts.values() if "commit" in part}))
    lines = [f"{here['device']}, torch {here['torch']}, commit {commits}", ""]
    if "tests" in parts:
        lines += [f"Tests marked gpu: {parts['tests']['output'].strip().splitlines()[-1]}", ""]
    compared = {name: part for name, part in parts.items() if name.startswith("throughput")}
    if compared:
        lines += ["| | plain | here | ratio | share of the ceiling |", "|---|---|---|---|---|"]
    for name, part in compared.items():
        seconds = {row["what"]: row["seconds"] for row in part.get("rows", [])}
        for row in (row for row in part.get("rows", []) if "speedup" in row):
            plain, share = seconds[f"{row['what']}, plain"], 100 * row["share_of_ceiling"]
            times = f"{1e3 * plain:.1f} ms | {1e3 * row['seconds']:.1f} ms | {row['speedup']:.1f} x | {share:.0f} %"
            what = f"{name.removeprefix('throughput ')} (compiled: {part['compiled']}): {row['what']}"
            lines.append(f"| {what} | {times} |")
    recipes = {name: part for name, part in parts.items() if name.startswith("recipe")}
    if recipes:
        lines += ["", "| recipe | a step | images a second |", "|---|---|---|"]
    for name, part in recipes.items():
        numbers = f"{1e3 * part['seconds']:.1f} ms | {part['images_per_second']:,.0f}"
        lines.append(f"| {name.removeprefix('recipe ')} | {numbers} |")
    if "run" in parts:
        lines += ["", f"Training run: {parts['run']['steps']} steps, exit status {parts['run']['status']}."]
    if "accuracy" in parts.get("report", {}):
        lines.append(f"Its test accuracy: {100 * parts['report']['accuracy']:.1f} %; the rest is in its eval folders.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=25, help="for this start, all parts together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: to try it out")
    parser.add_argument("--repeats", type=int, default=5)
    args, further = parser.parse_known_args()
    end = time.monotonic() + 60 * args.minutes
    try:  # what the run at the end needs should be there now, and a data set may have to be downloaded
        if taken := SET_HERE & parse(further, Config).keys():
            raise utils.UserError(f"--{', --'.join(sorted(taken))}: this program sets it itself")
        device, cfg = device_named(args.device), Config(**parse(run_options(further), Config))
        data.load(cfg.dataset, cfg.data_dir, cfg.image_size)
    except utils.UserError as error:
        parser.error(str(error))
    further += ["--data_dir", cfg.data_dir, "--gpu", gpu_option(device)]  # absolute: programs start in HERE
    utils.set_speed_options(device)
    out = args.out.absolute()
    results, sizes = Results(out, device), SIZES[device.type]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out / "compiled"), "PYTHONUNBUFFERED": "1"}

    def todo(name: str, kept: float = 60) -> bool:
        """Whether a part is not done yet and more than ``kept`` seconds are left."""
        if name not in results.parts and left() > kept:
            print(f"{name} ...", flush=True)
            return True
        return False

    def left() -> float:
        return end - time.monotonic()

    if todo("tests"):
        done = call(["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"], min(left(), LONGEST_TESTS), environment)
        if done["status"] == 1 and " failed" in done["output"]:  # they ran: that some fail is an answer, too
            results.add("tests", done)
        else:
            results.add_done("tests", done)
    for compile in ("off", "on"):
        for network, (depth, width, batch_size) in sizes.items():
            name, file = f"throughput {network}, compile {compile}", out / f"throughput_{network}_{compile}.json"
            options = ["--depth", depth, "--width", width, "--batch_size", batch_size, "--compile", compile]
            options += ["--device", args.device, "--repeats", args.repeats, "--parts", "sampler,step", "--json", file]
            if todo(name):
                done = call(["benchmarks/throughput.py", "--images", 5000, *options], left(), environment)
                results.add_done(name, done, json.loads(file.read_text()) if done["status"] == 0 else None)
    steps = {
        f"recipe {recipe}, {network}": partial(recipe_step, recipe, depth, width, device)
        for network, (depth, width, _) in sizes.items()
        for recipe in RECIPES
    }
    steps["recipe of the run"] = partial(run_step, cfg, device)
    for name, step in steps.items():
        if todo(name):
            try:
                results.add(name, step(args.repeats))
            except Exception:  # out of memory, say: the next start asks again
                traceback.print_exc()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the training run, a process of its own
    if "recipe of the run" in results.parts and todo("run", kept=REPORT):
        seconds = results.parts["recipe of the run"]["seconds"]
        results.add_done("run", training_run(out, further, left() - REPORT, seconds, environment))
    for name, options in REPORTS.items():
        if "run" in results.parts and todo(name):
            run = trained_run(out)
            arguments = ["main.py", "--mode", "test", "--load_ckpt", run, *options.split(), "--gpu", gpu_option(device)]
            results.add_done(name, call(arguments, left(), environment) | test_accuracy(run))
    print(f"Look at {out / 'gpu.md'}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
