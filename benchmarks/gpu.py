"""Everything that a new GPU should be asked, in one command that can be stopped, started again, and fits 25 minutes.

    python benchmarks/gpu.py --out gpu                                        # CIFAR-10's files in data/
    python benchmarks/gpu.py --out gpu --dataset folder --data_dir PATH       # further options go to the training run

Its parts, in this order: the tests marked gpu; sampler and training step of two networks against the plain loop,
without and with torch.compile; a training step of each recipe; a training run for the time that is left, and its
report. What is done stands in OUT/gpu.json and is not repeated by the next start; OUT/gpu.md has the same as tables, in
the form of docs/speed.md. What the compiler makes is kept in OUT/compiled.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import utils  # noqa: E402
from benchmarks.reproduce import TRAIN  # noqa: E402
from benchmarks.throughput import measure, synthetic  # noqa: E402
from config import Config  # noqa: E402
from config.recipes import RECIPES  # noqa: E402
from trainer import Trainer  # noqa: E402

SIZES = {"cuda": {"WRN-16-2": (16, 2, 64), "WRN-28-10": (28, 10, 128)}, "cpu": {"WRN-10-1": (10, 1, 8)}}
RUN = "cifar10_gpu"  # of reproduce.py
REPORT = 240  # seconds that the report at the end may take
START_UP = 60  # seconds that the training run needs besides its steps
DUMPS = 1.1  # how much longer steps take with log, pictures, evaluation and checkpoints


class Results:
    """What has been measured so far, by the name of the part: OUT/gpu.json and OUT/gpu.md, written after each part."""

    def __init__(self, out: Path, device: torch.device):
        out.mkdir(parents=True, exist_ok=True)
        self.path, here = out / "gpu.json", utils.environment(device)
        self.parts: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"environment": here}
        before = self.parts["environment"]
        if (before["device"], before["torch"]) != (here["device"], here["torch"]):
            sys.exit(f"error: {self.path} is of {before['device']}, torch {before['torch']}: give another --out")

    def add(self, name: str, content: dict[str, Any]) -> None:
        self.parts[name] = content
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.parts, indent=2) + "\n")
        os.replace(unfinished, self.path)
        self.path.with_suffix(".md").write_text(tables(self.parts))


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
            output, _ = child.communicate()
            status = None
    return {"status": status, "output": output[-4000:]}


def recipe_step(recipe: str, depth: int, width: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a training step of a recipe as it stands, on random images, and its labelled images a second."""
    gpu = str(device.index or 0) if device.type == "cuda" else "cpu"
    cfg = Config(recipe=recipe, depth=depth, width=width, gpu=gpu, compile="off")
    run = Trainer(cfg, synthetic(5000, (3, 32, 32), device), device)
    for run.step in (1, 2):  # the first captures graphs
        run.training_step()
    seconds = statistics.median(measure({"step": run.training_step}, device, repeats)["step"])
    return {"seconds": seconds, "images_per_second": cfg.batch_size / seconds}


def training_run(out: Path, further: list[str], seconds: float, step_seconds: float, environment) -> dict[str, Any]:
    """The run ``RUN``, as long as fits into ``seconds``, or what is left of it if it was stopped before."""
    options = ["main.py", "--logdir", out / "runs", "--resume", "auto"]
    planned = out / "steps.txt"
    if not planned.exists():
        planned.write_text(str(max(1, int((seconds - START_UP) / (DUMPS * step_seconds)))))
    steps = planned.read_text()
    options += [*TRAIN[RUN].split(), "--note", RUN, "--gif_every", 100_000, *further, "--max_steps", steps]
    return call(options, seconds, environment) | {"steps": int(steps)}


def tables(parts: dict[str, Any]) -> str:
    """The parts as Markdown, in the form of docs/speed.md."""
    here = parts["environment"]
    lines = [f"{here['device']}, torch {here['torch']}, commit {here['git_commit']}", ""]
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
            lines.append(f"| {name.removeprefix('throughput ')}: {row['what']} | {times} |")
    recipes = {name: part for name, part in parts.items() if name.startswith("recipe")}
    if recipes:
        lines += ["", "| recipe | a step | images a second |", "|---|---|---|"]
    for name, part in recipes.items():
        numbers = f"{1e3 * part['seconds']:.1f} ms | {part['images_per_second']:,.0f}"
        lines.append(f"| {name.removeprefix('recipe ')} | {numbers} |")
    if "run" in parts:
        lines += ["", f"Training run: {parts['run']['steps']} steps, exit status {parts['run']['status']}."]
    if "accuracy" in parts.get("report", {}):
        lines.append(f"Its test accuracy: {100 * parts['report']['accuracy']:.1f} %; the rest is in its report.html.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=25, help="for this start, all parts together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: to try it out")
    parser.add_argument("--repeats", type=int, default=5)
    args, further = parser.parse_known_args()
    end, device = time.monotonic() + 60 * args.minutes, torch.device(args.device)
    utils.set_speed_options(device)
    out = args.out.absolute()
    results, sizes = Results(out, device), SIZES[device.type]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out / "compiled"), "PYTHONUNBUFFERED": "1"}

    def todo(name: str) -> bool:
        """Whether there is time for a part that is not done yet."""
        if name not in results.parts and time.monotonic() < end - REPORT:
            print(f"{name} ...", flush=True)
            return True
        return False

    def left() -> float:
        return end - time.monotonic()

    if todo("tests"):
        results.add("tests", call(["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"], left(), environment))
    for compile in ("off", "on"):
        for network, (depth, width, batch_size) in sizes.items():
            name, file = f"throughput {network}, compile {compile}", out / f"throughput_{network}_{compile}.json"
            options = ["--depth", depth, "--width", width, "--batch_size", batch_size, "--compile", compile]
            options += ["--device", args.device, "--repeats", args.repeats, "--parts", "sampler,step", "--json", file]
            if todo(name):
                done = call(["benchmarks/throughput.py", "--images", 5000, *options], left(), environment)
                results.add(name, json.loads(file.read_text()) if done["status"] == 0 else done)
    for network, (depth, width, _) in sizes.items():
        for recipe in RECIPES:
            if todo(f"recipe {recipe}, {network}"):
                step = recipe_step(recipe, depth, width, device, args.repeats)
                results.add(f"recipe {recipe}, {network}", step)
    slowest = [part["seconds"] for name, part in results.parts.items() if name.startswith("recipe sada-jem")]
    if slowest and todo("run"):
        done = training_run(out, further, left() - REPORT, slowest[-1], environment)
        if done["status"] == 0:
            results.add("run", done)
        else:
            print(f"The training run is not finished; start this again.\n{done['output'][-1000:]}")
    if "run" in results.parts and "report" not in results.parts:
        print("report ...", flush=True)
        (run,) = (out / "runs").glob(f"*{RUN}")
        options = ["--mode", "test", "--load_ckpt", run, "--attack_images", 500, "--n_samples", 5000]
        options += ["--eval", "classification,calibration,ood,robustness,quality", "--gpu", "0"]
        done = call(["main.py", *options], max(left(), 60), environment)
        for file in run.glob("eval*/results.json"):
            measured = json.loads(file.read_text())["classification"]["results"]
            done["accuracy"] = measured["accuracy"]["value"]
        results.add("report", done)
    print(f"Look at {out / 'gpu.md'}.")


if __name__ == "__main__":
    main()
