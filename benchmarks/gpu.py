"""Everything that a new GPU should be asked, in one command that can be stopped, started again, and fits 25 minutes.

    python benchmarks/gpu.py --out runs/gpu                                   # CIFAR-10's files in data/
    python benchmarks/gpu.py --dataset folder --data_dir PATH                 # further options go to the training run
    python benchmarks/gpu.py --minutes 8.5                                    # the next start does what is left

Its parts, in this order: the tests marked gpu; sampler and training step of two networks against the plain loop; a
training step of the recipe COMPILED with torch.compile, as long runs have it; the first again with torch.compile; a
training step of the run that follows, and of each recipe; that run, for the time that is left, or for RUN_MINUTES in as
many starts as it takes; its reports. Without a data set, all but the run. They run in processes of their own. What is
done stands in OUT/gpu.json and is not repeated by the next start, which continues the rest; what failed or ran out of
time, other than the run and its step, is asked again after all else. OUT/gpu.md has the same as tables, in the form of
docs/speed.md, and says what failed. What the compiler makes is kept in OUT/compiled. The tests need
requirements-dev.txt, the reports requirements-eval.txt.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before the seconds in which torch is imported

import torch  # noqa: E402

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import trainer  # noqa: E402, F401  a package that is missing ends it here, and not in each part
import utils  # noqa: E402
from benchmarks.command import device_named  # noqa: E402
from benchmarks.reproduce import TRAIN  # noqa: E402
from config import Config  # noqa: E402
from config.cli import parse  # noqa: E402
from config.recipes import RECIPES  # noqa: E402

SIZES = {"cuda": {"WRN-16-2": (16, 2, 64), "WRN-28-10": (28, 10, 128)}, "cpu": {"WRN-10-1": (10, 1, 8)}}
RUN = "cifar10_gpu"  # of reproduce.py
STEP_OF_RUN = "recipe of the run"
COMPILED = "sada-jem"
REPORTS = {
    "report": "--eval classification,calibration,ood",
    "report of samples": "--eval quality --n_samples 5000",
    "report of attacks": "--eval robustness --attacks pgd --one_epsilon --attack_images 500",
    "report of AutoAttack": "--eval robustness --attacks autoattack --one_epsilon --attack_images 100",
}
REPORT = 500  # seconds that the reports at the end may take
LONGEST_TESTS = 600  # seconds: a test that hangs must not take all the time there is
SET_HERE = {"mode", "recipe", "logdir", "note", "resume", "load_ckpt", "max_steps", "gpu", "compile"}
START_UP = 60  # seconds that the training run needs besides its steps
SHORTEST = 180  # seconds of steps that are worth a run
DUMPS = 1.1  # how much longer steps take with log, pictures, evaluation and checkpoints
LAST = 60  # seconds: a part that is stopped may take them to end, and none begins with fewer


class Results:
    """What has been measured so far, by the name of the part: OUT/gpu.json and OUT/gpu.md, written after each part.

    Each part notes the commit of the program that measured it; "failed" has what each part said that did not end well.
    """

    def __init__(self, out: Path, device: torch.device, further: list[str]):
        out.mkdir(parents=True, exist_ok=True)
        self.path, here = out / "gpu.json", utils.environment(device)
        new = {"environment": here, "further options": further, "failed": {}}
        self.parts: dict[str, Any] = new | (json.loads(self.path.read_text()) if self.path.exists() else {})
        before = self.parts["environment"]
        if (before["device"], before["torch"]) != (here["device"], here["torch"]):
            sys.exit(f"error: {self.path} is of {before['device']}, torch {before['torch']}: give another --out")
        if self.parts["further options"] != further:
            options = shlex.join(self.parts["further options"]) or "no further options"
            sys.exit(f"error: {self.path} is of {options}: give the same, or another --out")
        self.commit, self.failed = here["git_commit"], self.parts["failed"]

    def add(self, name: str, content: dict[str, Any]) -> None:
        self.parts[name] = content | {"commit": self.commit}
        self.failed.pop(name, None)
        self.write()

    def fail(self, name: str, done: dict[str, Any], limit: str = "") -> None:
        """Note what a ``call`` said that failed, or was stopped; a later start asks again."""
        reason = f"was stopped{limit}" if done["status"] is None else f"failed with exit status {done['status']}"
        self.failed[name] = reason + ": " + " ".join(done["output"].split()[-30:])
        self.write()
        print(f"{name} {reason}; a later start asks again. Its last words:\n{done['output'][-2000:]}", flush=True)

    def write(self) -> None:
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.parts, indent=2) + "\n")
        os.replace(unfinished, self.path)
        self.path.with_suffix(".md").write_text(tables(self.parts))


class Questions:
    """The parts, each a method that asks for a program's answer, and adds it to the results."""

    def __init__(self, args: argparse.Namespace, device: torch.device, further: list[str], results: Results):
        self.args, self.further, self.results = args, further, results
        self.out, self.end = args.out.absolute(), STARTED + 60 * args.minutes
        self.environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(self.out / "compiled"), "PYTHONUNBUFFERED": "1"}
        self.gpu = str(device.index or 0) if device.type == "cuda" else "cpu"  # as --gpu takes it

    def left(self) -> float:
        return self.end - time.monotonic()

    def call(self, arguments: list[Any], seconds: float | None = None) -> dict[str, Any]:
        """Run a program of this repository for ``seconds`` at most: its exit status (None: it was stopped), output."""
        words, seconds = [sys.executable, *map(str, arguments)], self.left() - 10 if seconds is None else seconds
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with subprocess.Popen(words, cwd=HERE, env=self.environment, **pipes) as child:
            try:
                output, _ = child.communicate(timeout=max(1, seconds))
                status = child.returncode
            except subprocess.TimeoutExpired:
                child.terminate()  # training writes a checkpoint first
                try:
                    output, _ = child.communicate(timeout=LAST)
                except subprocess.TimeoutExpired:
                    child.kill()
                    output, _ = child.communicate()
                status = None
            except BaseException:  # SIGTERM or Ctrl-C: nothing is left running on the GPU
                child.terminate()
                raise
        return {"status": status, "output": output}

    def tests(self, name: str) -> None:
        limit = min(self.left() - LAST if name in self.results.failed else self.left() / 2, LONGEST_TESTS)
        done = self.call(["-m", "pytest", "-v", "-n", "4", "-m", "gpu", "tests/test_gpu.py"], limit)
        words = done["output"].strip().splitlines() or [""]
        if done["status"] == 0 or done["status"] == 1 and " failed" in words[-1]:  # that some fail is an answer, too
            self.results.add(name, {"summary": words[-1].strip("= "), "output": "\n".join(words[-60:])})
        else:
            self.results.fail(name, done, f" after {limit:.0f} s")

    def throughput(self, depth: int, width: int, batch_size: int, compile: str, name: str) -> None:
        file = self.out / f"throughput_WRN-{depth}-{width}_{compile}.json"
        options = ["--depth", depth, "--width", width, "--batch_size", batch_size, "--compile", compile]
        options += ["--device", self.args.device, "--repeats", self.args.repeats, "--parts", "sampler,step"]
        done = self.call(["benchmarks/throughput.py", "--images", 5000, *options, "--json", file])
        if done["status"] == 0:
            self.results.add(name, json.loads(file.read_text()))
        else:
            self.results.fail(name, done)

    def compiled(self, depth: int, width: int, _: int, name: str) -> None:
        self.steps({COMPILED: name}, ["--depth", depth, "--width", width, "--compile", "on", "--recipes", COMPILED])

    def step_of_run(self, name: str) -> None:
        self.steps({"command": name}, ["--command", shlex.join(run_options(self.further))])

    def recipes(self, network: str, depth: int, width: int, _: str) -> None:
        """A step of each recipe on random images; after one that fails the others are asked by a new process."""
        names = recipe_names(network)
        wanted = [recipe for recipe, name in names.items() if name not in self.results.parts]
        while wanted and self.left() > LAST:
            options = ["--depth", depth, "--width", width, "--recipes", *wanted]
            wanted = self.steps({recipe: names[recipe] for recipe in wanted}, options)[1:]

    def steps(self, names: dict[str, str], options: list[Any]) -> list[str]:
        """Add what recipe_steps.py says of each of ``names``; returns those from the first that failed on."""
        program = ["benchmarks/recipe_steps.py", "--device", self.args.device, "--repeats", self.args.repeats]
        done = self.call([*program, *options])
        rows = [json.loads(line) for line in done["output"].splitlines() if line.startswith("{")]
        for row in rows:
            self.results.add(names[row.pop("name")], row)
        missing = list(names)[len(rows) :]
        if missing:
            self.results.fail(names[missing[0]], done)
        return missing

    def run(self, name: str) -> None:
        """The run ``RUN``, as long as the first start that has time for it planned, or what is left of it."""
        parts, whole = self.results.parts, 60 * (self.args.run_minutes or 0)
        if STEP_OF_RUN not in parts:
            print(f"{name} needs {STEP_OF_RUN}")
            return
        if self.left() < START_UP + LAST:
            print(f"{name} needs {START_UP + LAST} s, for its start and its end alone")
            return
        reports_fit = self.left() > REPORT + START_UP + SHORTEST and not whole
        seconds = self.left() - (REPORT if reports_fit else LAST)  # or the next start reports
        if "plan of the run" not in parts:
            whole = whole or (seconds if reports_fit else 60 * self.args.minutes - LAST)  # in a short start a start's
            steps = int((whole - START_UP) / (DUMPS * parts[STEP_OF_RUN]["seconds"]))
            if whole < START_UP + SHORTEST or steps < 1:
                print(f"{name} needs {START_UP + SHORTEST} s: it is not begun")
                return
            self.results.add("plan of the run", {"steps": steps})
        limit = ["--max_steps", parts["plan of the run"]["steps"], "--gpu", self.gpu]
        options = ["--logdir", self.out / "runs", "--resume", "auto", *run_options(self.further), *limit]
        done = self.call(["main.py", *options], seconds)
        if done["status"] == 0:
            self.results.add(name, {"output": done["output"][-4000:]})
        else:
            self.results.fail(name, done, " and will go on")

    def trained(self) -> Path | None:
        """The newest directory of the run ``RUN`` that has a checkpoint."""
        checkpoints = (self.out / "runs").glob(f"*{RUN}*/ckpt/last.pt")
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
        return newest and newest.parent.parent

    def report(self, options: str, name: str) -> None:
        run = self.trained()
        if "run" not in self.results.parts or run is None:
            print(f"{name} needs the run, and its checkpoint in {self.out / 'runs'}")
            return
        done = self.call(["main.py", "--mode", "test", "--load_ckpt", run, *options.split(), "--gpu", self.gpu])
        if done["status"] == 0:
            self.results.add(name, {"output": done["output"][-4000:]} | test_accuracy(run))
        else:
            self.results.fail(name, done)


def recipe_names(network: str) -> dict[str, str]:
    return {recipe: f"recipe {recipe}, {network}" for recipe in RECIPES}


def run_options(further: list[str]) -> list[str]:
    return [*TRAIN[RUN].split(), "--note", RUN, "--gif_every", "100000", "--compile", "off", *further]


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
        lines += [f"Tests marked gpu: {parts['tests']['summary']}", ""]
    compared = {name: part for name, part in parts.items() if name.startswith("throughput")}
    if compared:
        lines += ["| | plain | here | ratio | share of the ceiling |", "|---|---|---|---|---|"]
    for name, part in compared.items():
        seconds = {row["what"]: row["seconds"] for row in part["rows"]}
        for row in (row for row in part["rows"] if "speedup" in row):
            plain, share = seconds[f"{row['what']}, plain"], 100 * row["share_of_ceiling"]
            times = f"{1e3 * plain:.1f} ms | {1e3 * row['seconds']:.1f} ms | {row['speedup']:.1f} x | {share:.0f} %"
            what = f"{name.removeprefix('throughput ')} (compiled: {part['compiled']}): {row['what']}"
            lines.append(f"| {what} | {times} |")
    recipes = {name: part for name, part in parts.items() if "recipe " in name}
    if recipes:
        lines += ["", "| recipe | a step | images a second | memory of the GPU |", "|---|---|---|---|"]
    for name, part in recipes.items():
        memory = f"{part['gpu_memory_mb']:,.0f} MB" if "gpu_memory_mb" in part else "-"
        numbers = f"{1e3 * part['seconds']:.1f} ms | {part['images_per_second']:,.0f} | {memory}"
        lines.append(f"| {name.removeprefix('recipe ')} | {numbers} |")
    if "run" in parts:
        lines += ["", f"Training run: {parts['plan of the run']['steps']} steps, all done."]
    if "accuracy" in parts.get("report", {}):
        lines.append(f"Its test accuracy: {100 * parts['report']['accuracy']:.1f} %; the rest is in its eval folders.")
    for name, reason in parts["failed"].items():
        lines += ["", f"Not done: {name} {reason}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=25, help="for this start, all parts together")
    parser.add_argument("--run_minutes", type=float, help="for the run, over all starts; default: what is left")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: to try it out")
    parser.add_argument("--repeats", type=int, default=5)
    args, further = parser.parse_known_args()
    try:
        if taken := SET_HERE & parse(further, Config).keys():
            raise utils.UserError(f"--{', --'.join(sorted(taken))}: this program sets it itself")
        device, cfg = device_named(args.device), Config(**parse(run_options(further), Config))
    except utils.UserError as error:
        parser.error(str(error))
    further += ["--data_dir", cfg.data_dir]  # absolute: programs start in HERE
    results = Results(args.out.absolute(), device, further)
    ask, sizes = Questions(args, device, further, results), SIZES[device.type]

    def throughput(compile: str) -> dict[str, Callable]:
        asked = {network: partial(ask.throughput, *size, compile) for network, size in sizes.items()}
        return {f"throughput {network}, compile {compile}": part for network, part in asked.items()}

    parts = {"tests": ask.tests} | throughput("off")
    parts |= {f"compiled recipe {COMPILED}, {network}": partial(ask.compiled, *size) for network, size in sizes.items()}
    parts |= throughput("on") | {STEP_OF_RUN: ask.step_of_run}
    for network, (depth, width, _) in sizes.items():
        if not set(recipe_names(network).values()) <= results.parts.keys():
            parts[f"recipes, {network}"] = partial(ask.recipes, network, depth, width)
    parts["run"] = ask.run
    parts |= {name: partial(ask.report, options) for name, options in REPORTS.items()}
    try:
        data.load(cfg.dataset, cfg.data_dir, cfg.image_size)
    except utils.UserError as error:
        print(f"The run, its step and its reports are left out: {error}", flush=True)
        parts = {name: part for name, part in parts.items() if name not in (STEP_OF_RUN, "run", *REPORTS)}

    failed = {re.sub("^recipe .*, ", "recipes, ", name) for name in results.failed} - {"run", STEP_OF_RUN}
    for name in sorted(parts, key=failed.__contains__):  # what failed before comes last
        if name not in results.parts and ask.left() > LAST:
            print(f"{name} ...", flush=True)
            parts[name](name)
    print(f"Look at {args.out / 'gpu.md'}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
