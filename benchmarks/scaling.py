"""How the speed of training grows with the number of processes, which torchrun starts.

    python benchmarks/scaling.py --depth 16 --width 2 --recipe m-jem --device cpu
    python benchmarks/scaling.py --depth 28 --width 10 --recipe sada-jem --device cuda --json scaling.json

Each process has ``--batch_size`` images of a step, so that the work grows with the processes (weak scaling): of n
processes an efficiency of 100 % has n times the images a second of one. On a CPU each has one thread. Communication is
what a step takes longer than one whose gradients are not exchanged (DistributedDataParallel's ``no_sync``), as a share
of the step: what the backward pass hides does not count. Times are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distributed  # noqa: E402
import utils  # noqa: E402
from benchmarks.command import device_named, run_script
from benchmarks.throughput import measure, synthetic, timed_recipe  # noqa: E402
from config import Config  # noqa: E402
from config.recipes import RECIPES  # noqa: E402
from trainer import Trainer  # noqa: E402


def numbers(text: str) -> list[int]:
    """The whole numbers above 0 of a list with commas; ValueError if there are others."""
    if min(found := [int(n) for n in text.split(",")]) < 1:
        raise ValueError
    return found


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64, help="labelled images of each process in a step")
    parser.add_argument("--recipe", choices=RECIPES, default="jem")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=numbers, help="comma list (default: 1,2 or, with GPUs, 1,2,4,8 of these)")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed, of each kind")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the file in which rank 0 leaves its times
    return parser


def work(args: argparse.Namespace) -> None:
    """What each of the processes does: time its training steps."""
    distributed.connect()
    place = distributed.current_world()
    torch.set_num_threads(1)
    device = utils.pick_device("cpu" if args.device == "cpu" else "0")
    utils.set_speed_options(device)
    recipe = RECIPES[args.recipe].options | timed_recipe(args.recipe)
    if recipe.get("p_x_batch_size"):  # as many chains for each image as the recipe has
        share = recipe["p_x_batch_size"] / recipe.get("batch_size", Config().batch_size)
        recipe["p_x_batch_size"] = round(share * args.batch_size) * place.size
    recipe["batch_size"] = args.batch_size * place.size
    given = {"recipe": args.recipe, "depth": args.depth, "width": args.width, "buffer_size": 200 * recipe["batch_size"]}
    cfg = Config(**(recipe | given), compile="on" if device.type == "cuda" else "off")
    shape = (3, args.image_size, args.image_size)
    run = Trainer(cfg, synthetic(20 * cfg.batch_size, shape, device), device, place)

    def step() -> None:
        run.step += 1
        run.training_step()

    def step_alone() -> None:
        with run.joint_forward.no_sync():
            step()

    step()
    kinds = {"step": step} if place.size == 1 else {"step": step, "alone": step_alone}
    times = measure(kinds, device, args.steps)
    if place.rank == 0:
        medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
        spread = {"min": min(times["step"]), "max": max(times["step"])}
        about = {"device": utils.device_name(device), "precision": str(run.dtype).removeprefix("torch.")}
        parameters = sum(p.numel() for p in run.model.parameters())
        result = medians | spread | about | {"batch_size": cfg.batch_size, "parameters": parameters}
        Path(args.worker).write_text(json.dumps(result))
    os._exit(0)  # torch 2.11 may wait for ever where it takes the network of several processes down


def timed(n: int, args: argparse.Namespace) -> dict:
    """What n processes of the benchmark measure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__]
    names = ("depth", "width", "batch_size", "recipe", "device", "image_size", "steps")
    command += [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--worker", str(file)], env=threads, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{n} processes failed:\n{done.stderr}")
        return json.loads(file.read_text())


def main() -> None:
    args = options().parse_args()
    if args.worker:
        work(args)
        return
    there = torch.cuda.device_count() if device_named(args.device).type == "cuda" else 2
    rows = []
    for n in args.processes or [n for n in (1, 2, 4, 8) if n <= there]:
        result = timed(n, args)
        speed = result["batch_size"] / result["step"]
        row = {"processes": n, "images_per_second": speed, "efficiency": None, "communication": None} | result
        if not rows:
            network = f"WRN-{args.depth}-{args.width} ({result['parameters']:,} parameters)"
            work_of = f"{args.recipe}, {args.batch_size} images for each process, {result['precision']}"
            print(f"{result['device']}, torch {torch.__version__}; {network}, {work_of}")
        elif rows[0]["processes"] == 1:
            row["efficiency"] = speed / n / rows[0]["images_per_second"]
        text = f"{n} processes: {1e3 * result['step']:8.1f} ms a step ({1e3 * result['min']:.1f} to "
        text += f"{1e3 * result['max']:.1f}), {speed:8.1f} images/s"
        if row["efficiency"]:
            text += f", efficiency {100 * row['efficiency']:.0f} %"
        if "alone" in result:
            row["communication"] = max(0.0, 1 - result["alone"] / result["step"])
            text += f", communication {100 * row['communication']:.1f} % of the step"
        print(text, flush=True)
        rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
