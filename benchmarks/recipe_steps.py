"""How long a training step takes: of recipes on random images, and of a command line of main.py on its own images.

    python benchmarks/recipe_steps.py --recipes jem sada-jem --depth 16 --width 2
    python benchmarks/recipe_steps.py --command "--recipe m-jem --dataset digits --depth 10 --width 2"

It prints a line of JSON for each: seconds of a step (the median), labelled images a second, how much memory of the GPU
was taken at most, in MB, and what was compiled.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import utils  # noqa: E402
from benchmarks.command import device_named, run_script  # noqa: E402
from benchmarks.throughput import measure, synthetic, timed_recipe  # noqa: E402
from config import Config  # noqa: E402
from config.cli import parse  # noqa: E402
from config.recipes import RECIPES  # noqa: E402
from logger.progress import compiled  # noqa: E402
from trainer import Trainer  # noqa: E402


def show(name: str, cfg: Config, images: data.ImageData, device: torch.device, repeats: int) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = Trainer(cfg, images, device)
    run.warm_up()
    for run.step in (1, 2):  # the first captures graphs
        run.training_step()
    seconds = statistics.median(measure({"step": run.training_step}, device, repeats)["step"])
    row = {"name": name, "seconds": seconds, "images_per_second": cfg.batch_size / seconds}
    if device.type == "cuda":
        row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    print(json.dumps(row | {"compiled": compiled(run.forward, run.sampler)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=[])
    parser.add_argument("--depth", type=int, default=16, help="of the recipes' networks")
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--compile", choices=["on", "off"], default="off", help="for the recipes")
    parser.add_argument("--command", help="options of main.py, in quotes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = device_named(args.device)
    utils.set_speed_options(device)
    if args.command is not None:
        cfg = Config(**parse(shlex.split(args.command), Config))
        images = data.load(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device)
        show("command", cfg, images, device, args.repeats)
    for recipe in args.recipes:
        network = {"depth": args.depth, "width": args.width, "compile": args.compile}
        cfg = Config(recipe=recipe, **network, **timed_recipe(recipe))
        show(recipe, cfg, synthetic(5000, (3, 32, 32), device), device, args.repeats)


if __name__ == "__main__":
    run_script(main)
