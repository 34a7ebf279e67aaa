"""Test accuracy, and the distance of samples to training images, against the hours of training: one curve for each run.

    python benchmarks/time_to_quality.py --out figure.png runs/<run> runs/<another run>
    python benchmarks/time_to_quality.py --out figure.png "plain JEM=runs/<run>" ...           # names of your own

It reads the runs' TensorBoard files, whose entries carry the time. Distances are there where a run was trained with
``--quality_every``. Pauses of a run that was resumed count as time. Compare only runs of one machine.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

START = "loss/total"  # in the log from the tenth step on
CURVES = {
    "accuracy/test": "test accuracy",
    "quality/buffer": "Fréchet distance of the replay buffer",
    "quality/fresh_samples": "Fréchet distance of fresh samples",
}


def stop(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Hours since the first entry, and values, of each of ``CURVES`` that the run has measured."""
    if not run.is_dir():
        stop(f"error: there is no run directory {run}")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    there = events.Tags()["scalars"]
    if START not in there:
        stop(f"error: {run} holds no TensorBoard file of a training run")
    start = events.Scalars(START)[0].wall_time
    measured = {tag: events.Scalars(tag) for tag in CURVES if tag in there}
    return {tag: ([(e.wall_time - start) / 3600 for e in es], [e.value for e in es]) for tag, es in measured.items()}


def figure(runs: dict[str, Path]) -> Figure:
    found = {name: curves(run) for name, run in runs.items()}
    tags = [tag for tag in CURVES if any(tag in of_run for of_run in found.values())]
    if not tags:
        stop("error: none of these runs has measured its accuracy or the quality of its samples")
    result = Figure(figsize=(5 * len(tags), 4), layout="constrained")
    for tag, axes in zip(tags, result.subplots(1, len(tags), squeeze=False)[0], strict=True):
        for i, (name, of_run) in enumerate(found.items()):
            if tag in of_run:
                axes.plot(*of_run[tag], "o-", markersize=3, label=name, color=f"C{i}")
        axes.set(xlabel="hours", title=CURVES[tag], yscale="log" if tag.startswith("quality") else "linear")
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in result.axes for line in axes.lines}
    result.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run directories")
    parser.add_argument("--out", required=True, help="the picture")
    args = parser.parse_args()
    runs = {}
    for given in args.runs:
        name, _, run = ("", "", given) if Path(given).exists() else given.rpartition("=")
        name = name or Path(run).resolve().name
        if name in runs:
            stop(f"error: two runs have the name {name}: give them names of their own, NAME=RUN")
        runs[name] = Path(run)
    figure(runs).savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
