"""Write a run's network as one small file that draws and scores without any data set, and a .json that describes it.

    python benchmarks/ship_weights.py runs/<run> assets/NAME.safetensors --data_dir PATH \
        --named cifar10 --images "what the run was trained on" --licence "of weights and images"

The file holds the averaged weights in float16 (statistics of batch normalisation in float32), 500 images of the replay
buffer as uint8, of a run whose chains start from Gaussians these with a covariance of low rank, and the log p(x) below
which 5 % of the training images lie. The .json holds what can be measured of it at once: accuracy on the test images.
``--named`` is the data set that the file then names as its own, such as that of which a folder is a copy.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import utils
from benchmarks.command import run_script
from chain_init import build_one
from checkpoints.export import safetensors_file
from checkpoints.load import load_data, load_model, open_trained
from config import Config
from generation import TrainedRun, load_run
from generation.score import low_log_density
from logger.files import replace_file
from logger.images import to_uint8
from models.predict import accuracy, predict
from sgld import finite_images

BUFFER_IMAGES = 500
RANK = 112  # of a Gaussian's covariance, without its diagonal
LARGEST = 4e6  # bytes


def low_rank(gaussians: list[tuple[Tensor, Tensor, float]], rank: int) -> dict[str, Tensor]:
    """Gaussians with a basis in common, the main directions of their mean covariance, and noise in all others."""
    d = len(gaussians[0][0])
    covariances = [factor.T @ factor + noise**2 * torch.eye(d) for _, factor, noise in gaussians]
    _, vectors = torch.linalg.eigh(sum(covariances) / len(covariances))  # eigenvalues ascend
    basis = vectors[:, -rank:].T  # (R, D)
    inside = [basis @ covariance @ basis.T for covariance in covariances]
    outside = [(whole.trace() - part.trace()) / (d - rank) for whole, part in zip(covariances, inside, strict=True)]
    stacked = {
        "mean": torch.stack([mean for mean, _, _ in gaussians]),
        "factor": torch.stack([torch.linalg.cholesky(part).T for part in inside]),
        "basis": basis,
        "noise": torch.stack(outside).clamp(min=0).sqrt(),
    }
    return {name: value.half() for name, value in stacked.items()}


def small(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float16, running statistics and counts as they are."""
    kept = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value if name.endswith(kept) else value.half() for name, value in weights.items()}


def shipped_options(options: dict, named: str) -> dict:
    """A run's options without the paths of the machine that it ran on, for the data set ``named``."""
    paths = {f.name: f.default for f in fields(Config) if f.metadata["is_path"]}
    first_phase = Path(options["load_ckpt"]).name  # the name alone: frozen statistics need one
    known = {f.name: options[f.name] for f in fields(Config) if f.name in options}  # by this version
    return known | paths | {"load_ckpt": first_phase, "note": "", "dataset": named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("file", type=Path, help="NAME.safetensors")
    parser.add_argument("--data_dir", help="where its training images are (default: where they were)")
    parser.add_argument("--named", help="the data set that the file names (default: the run's)")
    parser.add_argument("--images", default="", help="what these images are, for the .json")
    parser.add_argument("--licence", default="", help="of the file, for the .json")
    args = parser.parse_args()

    if args.file.exists():
        raise SystemExit(f"error: {args.file} exists: name a new file")
    given = {"mode": "sample", "load_ckpt": args.run, "gpu": "cpu"}
    if args.data_dir:
        given["data_dir"] = args.data_dir
    trained = open_trained(given)
    cfg, path, content = trained
    device = utils.pick_device("cpu")
    images, model, state = load_data(trained, device), load_model(trained, device), content["state"]
    tensors = small(model.state_dict())
    if "buffer" in state:
        held = finite_images(state["buffer"]["images"])
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:BUFFER_IMAGES]
        tensors["buffer.images"] = to_uint8(held[order])
    for kind in cfg.start_shares:
        if kind in ("gaussian", "class_gaussian"):
            stored = low_rank(build_one(kind, cfg, images).gaussians, RANK)
            tensors |= {f"start.{kind}.{name}": value for name, value in stored.items()}
    low = low_log_density(TrainedRun(open_trained(given)))
    content["config"] = shipped_options(content["config"], args.named or cfg.dataset)
    written = safetensors_file(tensors, content, low_log_density=low)
    if len(written) > LARGEST:
        raise SystemExit(f"error: {args.file} would have {len(written):,} bytes, above {LARGEST:,.0f}")
    replace_file(args.file, written)

    run = load_run(args.file, gpu="cpu")
    few = images.test.images[:: max(1, len(images.test) // 500)][:500]  # of all classes, one after the other
    difference = (run.logits(few) - predict(model, few)).abs().max().item()
    about = {
        "network": model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training steps": state["step"],
        "weights": "moving average" if "ema" in state else "as trained",
        "test accuracy": round(accuracy(run.model, images.test), 4),
        "test images": len(images.test),
        "largest difference of a logit from the run's float32 weights (500 test images)": round(difference, 4),
        "log p(x) of 5 % of the training images is below": round(low, 2),
        "images": args.images,
        "licence": args.licence,
        "classes": list(run.class_names),
        "options": {name: value for name, value in content["config"].items() if value != asdict(Config())[name]},
    }
    replace_file(args.file.with_suffix(".json"), (json.dumps(about, indent=2) + "\n").encode())
    print(f"Wrote {args.file} ({len(written):,} bytes) and {args.file.with_suffix('.json').name}.")


if __name__ == "__main__":
    run_script(main)
