"""--mode sample: images drawn from a trained model, and test images filled in or cleaned by it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import data
import distributed
import utils
from chain_init import UniformInit, build_chain_init
from checkpoints.load import load_data, load_model, origin
from config import Config
from config.checks import check_variance
from generation import counterfactual
from generation.chains import COLUMNS, SHOWN, Result, Start, recorded_steps, run_chains
from generation.restore import restoration_picture, restoration_start
from logger.files import save_arrays
from logger.images import captioned, image_grid, save_each, save_gif, save_png, to_uint8
from logger.run_dir import RunDir
from models import JEM, frozen_sampler_model, log_density
from models.predict import predict
from sgld import chain_options, finite_images
from utils import UserError


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Do what ``--mode sample`` asks of a checkpoint, the ``content`` of ``path``; returns the exit status.

    Raises UserError for input that does not fit, before anything is written.
    """
    if cfg.counterfactual is not None:
        return counterfactual.run(cfg, path, content)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    dtype = utils.pick_dtype(cfg.precision, device)
    model = frozen_sampler_model(load_model(cfg, path, content).to(device), dtype)
    rng = Generator(device).manual_seed(cfg.seed)
    if cfg.class_cond and not Config.from_dict(content["config"], str(path)).classifies:
        raise UserError(f"{path} was trained without labels: leave --class_cond out")
    if cfg.inpaint or cfg.denoise:
        start = restoration_start(cfg, path, content, rng)
    else:
        start = sampling_start(model, cfg, path, content, rng)
    steps = cfg.sgld_step if cfg.denoise and cfg.n_sample_steps is None else cfg.fresh_steps
    settings = {
        **origin(path, content),
        "precision": str(dtype).removeprefix("torch."),
        "start": start.name,
        "target": "log p(x|y)" if cfg.class_cond else "log p(x)",
        "steps": steps,
        "sgld_lr": cfg.sgld_lr,
        "sgld_std": cfg.sgld_std,
        **{f"sgld_{name}": value for name, value in chain_options(cfg).items()},
        "start_dir": cfg.start_dir,
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
    }

    batches = torch.arange(len(start.x), device=device).tensor_split(math.ceil(len(start.x) / cfg.batch_size))
    check_variance(cfg, tuple(start.x.shape[1:]), len(batches[-1]))  # the smallest
    directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    recorded = recorded_steps(steps)
    result = run_chains(model, start, batches, recorded, cfg, rng)
    if distributed.current_world().rank:
        return 0
    directory.write_config(asdict(cfg), utils.environment(device))
    name = "inpaint" if cfg.inpaint else "denoise" if cfg.denoise else "samples"
    write_pictures(directory.path, name, start, result, recorded, content["data"]["class_names"])
    save_archive(directory.path / f"{name}.npz", start, result, settings)
    if cfg.save_images:
        save_each(directory.path / "samples", name, to_uint8(result.x))
    summarise(start, result, settings)
    print(f"Done. Look at {utils.printable(directory.path)}")
    return 0


# ---------------------------------------------------------------------------------------------- starts


def sampling_start(model: JEM, cfg: Config, path: Path, content: dict[str, Any], rng: Generator) -> Start:
    """Where the model's training started its chains, or random images of the replay buffer; classes in turn.

    A class's chains start from images of the buffer that the model puts into that class.
    """
    n_classes, available = len(content["data"]["class_names"]), math.inf
    if cfg.from_buffer:
        if "buffer" not in content["state"]:
            raise UserError(f"{path} has no replay buffer, which only last.pt of --mode energy_train has: name the run")
        images = finite_images(content["state"]["buffer"]["images"]).to(rng.device)
        available = len(images)
    n = cfg.n_samples or (COLUMNS * n_classes if cfg.class_cond else min(SHOWN, available))
    if n > available:
        raise UserError(f"{n} samples are more than the {available} images of the replay buffer: give --n_samples")
    if cfg.class_cond and n % n_classes:
        raise UserError(f"--n_samples {n} must be a multiple of the {n_classes} classes for --class_cond")
    classes = torch.arange(n, device=rng.device) % n_classes
    y = classes if cfg.class_cond else None
    if cfg.from_buffer:
        order = torch.randperm(available, generator=rng, device=rng.device)
        if cfg.class_cond:
            order = by_class(predict(model, images[order]).argmax(1), n, content["data"]["class_names"], order)
        return Start("buffer", images[order[:n]], y)
    if cfg.start == "uniform":  # needs no training images
        return Start("uniform", UniformInit(content["data"]["shape"])(classes.tolist(), rng), y)
    start = build_chain_init(cfg, load_data(cfg, path, content, rng.device))
    return Start(cfg.start, start(classes.tolist(), rng), y)


def by_class(predicted: Tensor, n: int, names: Sequence[str], order: Tensor) -> Tensor:
    """Of places ``order`` (M,) with classes ``predicted`` (M,), n in all: the first of each class, classes in turn.

    Raises UserError if a class has too few.
    """
    places = []
    for k, name in enumerate(names):
        found = order[predicted == k]
        if len(found) < n // len(names):
            raise UserError(
                f"--class_cond needs {n // len(names)} images of the class {name}, but the model finds only "
                f"{len(found)} in the replay buffer: give a smaller --n_samples"
            )
        places.append(found[: n // len(names)])
    return torch.stack(places, 1).flatten()


# ------------------------------------------------------------------------------------------ what is written


def write_pictures(
    directory: Path, name: str, start: Start, result: Result, recorded: list[int], class_names: list[str]
) -> None:
    """``name``.png, the chains' ends (of test images also what was before), and ``name``.gif, the way."""
    frames, columns = result.frames, COLUMNS
    if start.originals is not None:
        picture = restoration_picture(start.originals[:SHOWN].cpu(), frames[:, :SHOWN], recorded)
    elif start.y is None:
        picture = image_grid(frames[-1][:SHOWN], columns)
    else:  # chain i has class i mod K; the picture has a row for each class
        columns = min(columns, len(start.x) // len(class_names))
        by_class = torch.arange(columns * len(class_names)).view(columns, -1).T
        frames = frames[:, by_class.flatten()]
        picture = captioned(image_grid(frames[-1], columns), rows=class_names)
    save_png(directory / f"{name}.png", picture)
    if len(recorded) > 1:
        captions = [f"SGLD step {step}" for step in recorded]
        pictures = [image_grid(images[:SHOWN], columns, tile=32) for images in frames]
        save_gif(directory / f"{name}.gif", pictures, captions)


def save_archive(path: Path, start: Start, result: Result, settings: dict[str, Any]) -> None:
    """Write the chains' ends and how they came about as a NumPy archive.

    images: uint8 (N, H, W, C), clamped; x: float32 (N, C, H, W), the same as the chain left it; labels:
    int64 (N,), the class that was asked for or else the most probable; log_p_x and log_p_x_y: float32 (N,),
    unnormalised log-densities of x alone and with that label (nats); settings: JSON text. Of test images also
    originals, uint8 (N, H, W, C), start, float32 (N, C, H, W), and for inpainting known, bool (H, W).
    Equal chains give equal bytes.
    """
    labels = result.logits.argmax(1) if start.y is None else start.y.cpu()
    arrays = {
        "images": to_uint8(result.x).permute(0, 2, 3, 1),
        "x": result.x,
        "labels": labels,
        "log_p_x": log_density(result.logits),
        "log_p_x_y": log_density(result.logits, labels),
    }
    if start.originals is not None:
        arrays |= {"originals": start.originals.permute(0, 2, 3, 1), "start": start.x}
    if start.known is not None:
        arrays["known"] = start.known
    save_arrays(path, arrays, settings)


def summarise(start: Start, result: Result, settings: dict[str, Any]) -> None:
    """Print how far the chains climbed and, of test images, how near they came to the originals."""
    before, after = (log_density(logits).mean() for logits in (result.logits_start, result.logits))
    print(
        f"{len(start.x)} chains, {settings['steps']} steps on {settings['target']}: mean log p(x) "
        f"{before:.2f} -> {after:.2f} (unnormalised, nats)"
    )
    if start.originals is not None:
        truth = data.to_float(start.originals).cpu()
        kind, lost = "noisy", torch.ones(truth.shape[2:], dtype=torch.bool)
        if start.known is not None:
            kind, lost = "unknown", ~start.known.cpu()
        before, after = ((x.cpu().clamp(-1, 1) - truth)[..., lost].square().mean().sqrt() for x in (start.x, result.x))
        print(f"root mean square error of the {kind} pixels: {before:.3f} -> {after:.3f} ([-1, 1] scale)")
