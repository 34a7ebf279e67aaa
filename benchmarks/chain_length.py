"""How near fresh samples come to training images after more and more SGLD steps, with and without noise.

    python benchmarks/chain_length.py --feature_ckpt runs/<classifier> --out figure.png runs/<run> "other=runs/<run>"
    python benchmarks/chain_length.py --feature_ckpt ... --out figure.png --against p_x_weight runs/<run> runs/<run> ...

The second draws test accuracy and distances against an option in which the runs differ.
Fréchet distances in a classifier's features to 10,000 training images, of the same number of fresh chains at each
length, of images of the replay buffer and of what the chains start from. The data set must be the one of the training,
where it was then, or else --dataset and --data_dir name it.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import utils  # noqa: E402
from benchmarks.command import run_script
from chain_init import build_chain_init  # noqa: E402
from checkpoints.load import load_data, load_feature_model, load_model, open_trained  # noqa: E402
from config import Config  # noqa: E402
from data import ImageData  # noqa: E402
from evaluation.fid import ClassifierSpace, feature_statistics, frechet_distance  # noqa: E402
from logger.images import to_uint8  # noqa: E402
from logger.metrics_log import read_log  # noqa: E402
from models import frozen_sampler_model  # noqa: E402
from sgld import SGLD, chain_options, finite_images  # noqa: E402

LENGTHS = (0, 5, 10, 25, 50, 100, 200, 400)
NOISE = 0.01  # of a step, [-1, 1] scale, where training has none
N_REAL = 10_000


class Distance:
    """Fréchet distance of images uint8 (N, C, H, W) to training images."""

    def __init__(self, feature_ckpt: str, dataset: str, images: ImageData, device: torch.device):
        self.space = ClassifierSpace(load_feature_model(feature_ckpt, dataset, images, device), feature_ckpt)
        order = torch.randperm(len(images.train), generator=Generator().manual_seed(0))[:N_REAL]
        self.real = self.statistics(images.train.images[order])

    def statistics(self, images: Tensor) -> dict[str, Any]:
        return feature_statistics(self.space.outputs(images)["features"])

    def __call__(self, images: Tensor) -> float:
        return float(frechet_distance(self.statistics(images), self.real))


def measure(place: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Distances of a run: of its buffer, and for each noise one for each of LENGTHS up to ``--steps``."""
    given = {"mode": "test", "gpu": "cpu", "load_ckpt": place, "dataset": args.dataset, "data_dir": args.data_dir}
    trained = open_trained({name: value for name, value in given.items() if value})
    cfg, path, content = trained
    images = load_data(trained, device)
    dtype = utils.pick_dtype("auto", device)
    model = frozen_sampler_model(load_model(trained, device), dtype, cfg.norm_statistics)
    distance = Distance(args.feature_ckpt, cfg.dataset, images, device)
    start, sgld = build_chain_init(cfg, images), SGLD(model.log_density, **chain_options(cfg))
    accuracy = test_accuracy(path.parent.parent, content["state"]["step"])
    found: dict[str, Any] = {"options": asdict(Config.from_dict(content["config"], str(path))), "accuracy": accuracy}
    if "buffer" in content["state"]:
        buffer = finite_images(content["state"]["buffer"]["images"])
        order = torch.randperm(len(buffer), generator=Generator().manual_seed(0))[: args.n]
        found["buffer"] = distance(to_uint8(buffer[order]))
    lengths = [n for n in LENGTHS if n <= args.steps]
    n_batches = -(-args.n // cfg.n_chains)
    for noise in sorted({cfg.sgld_std, 0.0, NOISE}):
        rng, first, shown = Generator(device).manual_seed(1), Generator(device).manual_seed(2), {n: [] for n in lengths}
        for batch in tqdm(range(n_batches), desc=f"{place}, noise {noise:g}"):
            numbers = range(batch * cfg.n_chains, (batch + 1) * cfg.n_chains)
            x = start([i % len(images.class_names) for i in numbers], first)
            for before, after in zip([0, *lengths], lengths, strict=False):
                x = sgld(x, after - before, cfg.sgld_lr, noise, rng).x if after > before else x
                shown[after].append(to_uint8(x))
        found[f"noise {noise:g}"] = {n: distance(torch.cat(shown[n])[: args.n]) for n in lengths}
    return found


def test_accuracy(run: Path, step: int) -> float | None:
    """The last one in a run's log up to a step, if there is one."""
    lines = read_log(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return next((x["accuracy/test"] for x in reversed(lines) if "accuracy/test" in x and x["step"] <= step), None)


def figure_against(columns: dict[str, dict[str, dict[str, Any]]], lengths: Sequence[int] = (25, 50, 100)) -> Figure:
    """A column for each option, with results of runs that differ in it: accuracy above, distances below."""
    result = Figure(figsize=(4 * len(columns), 6), layout="constrained")
    rows = result.subplots(2, len(columns), squeeze=False, sharey="row", sharex="col")
    for (above, below), (option, found) in zip(rows.T, columns.items(), strict=True):
        runs = sorted(found.values(), key=lambda run: run["options"][option])
        values = [run["options"][option] for run in runs]
        above.plot(values, [100 * (run["accuracy"] or math.nan) for run in runs], "o-", color="black")
        below.plot(values, [run.get("buffer", math.nan) for run in runs], "s:", label="replay buffer")
        for n in lengths:
            distances = [{int(k): v for k, v in run["noise 0"].items()}.get(n, math.nan) for run in runs]
            below.plot(values, distances, "o-", label=f"fresh chains of {n} steps")
        below.set(xlabel=f"--{option}", xscale="log")
        below.set_xticks(values, [f"{value:g}" for value in values])
        below.minorticks_off()
        for axes in (above, below):
            axes.grid(alpha=0.3)
    rows[1, 0].set_ylim(bottom=0)  # of all columns, when all lines are there
    rows[0, 0].set_ylabel("test accuracy, %")
    rows[1, 0].set_ylabel("Fréchet distance")
    lines = rows[1, 0].get_legend_handles_labels()
    result.legend(*lines, loc="outside lower center", ncols=2 if len(columns) == 1 else 4, fontsize=8)
    return result


def figure(found: dict[str, dict[str, Any]]) -> Figure:
    result = Figure(figsize=(7, 4.5), layout="constrained")
    axes = result.subplots()
    for i, (name, of_run) in enumerate(found.items()):
        for line, values in of_run.items():
            if line in ("options", "accuracy"):
                continue
            if line == "buffer":
                axes.axhline(values, color=f"C{i}", linestyle=":", label=f"{name}, replay buffer")
            else:
                style = "-" if line == "noise 0" else "--"
                axes.plot(list(values), list(values.values()), f"o{style}", color=f"C{i}", label=f"{name}, {line}")
    axes.set(xlabel="SGLD steps of a fresh chain", ylabel="Fréchet distance", yscale="log")
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes.set_xlim(left=-0.5)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="a run's directory, or NAME=directory")
    parser.add_argument("--feature_ckpt", required=True)
    parser.add_argument("--out", required=True, help="picture; the numbers are beside it, as .json")
    numbers = [f.name for f in fields(Config) if f.type in (int, float)]
    parser.add_argument("--against", choices=numbers, metavar="OPTION", help="draw accuracy and distances against it")
    parser.add_argument("--dataset")
    parser.add_argument("--data_dir")
    parser.add_argument("--n", type=int, default=1000, help="samples of each length (default: 1000)")
    parser.add_argument("--steps", type=int, default=400, help="longest chain (default: 400)")
    args = parser.parse_args()
    given = [("", "", run) if Path(run).exists() else run.rpartition("=") for run in args.runs]
    names, places = [name or Path(place).name for name, _, place in given], [place for _, _, place in given]
    if len(set(names)) < len(names):
        parser.error("two runs have the same name: give NAME=directory")
    device = torch.device("cpu")
    utils.set_speed_options(device)
    found = {}
    for name, place in zip(names, places, strict=True):
        found[name] = measure(place, args, device)
        Path(args.out).with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    drawn = figure_against({args.against: found}) if args.against else figure(found)
    drawn.savefig(args.out, dpi=110)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_script(main)
