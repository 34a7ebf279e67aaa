"""--mode sample: images drawn from a trained model, and images filled in or cleaned by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import data
import distributed
import utils
from chain_init import StoredStarts, build_chain_init
from checkpoints.load import given_images, load_data, load_model, origin
from config import Config
from config.checks import check_variance
from generation.chains import ChainResult, StartImages, recorded_steps, run_chains, write_result
from generation.restore import restoration_picture, restoration_start
from logger.images import captioned, image_grid, save_gif, save_png
from logger.run_dir import RunDir
from models import JEM, frozen_sampler_model, log_density
from models.predict import predict
from sgld import ChainInit, chain_options, finite_images
from utils import UserError, tree_to

PICTURE_COLUMNS = 10  # images in a row of a picture
PICTURE_IMAGES = 100  # images in a picture or film; of a class, PICTURE_COLUMNS


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Do what ``--mode sample`` asks of a checkpoint, the ``content`` of ``path``; returns the exit status.

    Raises UserError for input that does not fit, before anything is written.
    """
    if cfg.class_cond and not Config.from_dict(content["config"], str(path)).classifies:
        raise UserError(f"{path} was trained without labels: leave --class_cond out")
    class_names = content["data"]["class_names"]
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    dtype = utils.pick_dtype(cfg.precision, device)
    model = frozen_sampler_model(load_model(cfg, path, content).to(device), dtype, cfg.norm_statistics)
    check_variance(cfg, content["data"]["shape"], cfg.n_chains)
    rng = Generator(device).manual_seed(cfg.seed)
    start = start_images(model, cfg, path, content, rng)
    training_steps = cfg.sgld_step or cfg.sgld_step_max or 0
    steps = training_steps if cfg.denoise and cfg.n_sample_steps is None else cfg.fresh_steps
    settings = {
        **origin(path, content),
        "precision": str(dtype).removeprefix("torch."),
        "start": start.name,
        "target": "log p(x|y)" if cfg.class_cond else "log p(x)",
        "steps": steps,
        "batch_size": cfg.n_chains,
        **{f"sgld_{name}": value for name, value in chain_options(cfg).items()},
        **{name: getattr(cfg, name) for name in ("sgld_lr", "sgld_std", "start_dir", "seed")},
    }

    directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    result = run_chains(model, start, steps, cfg, rng, max(PICTURE_IMAGES, PICTURE_COLUMNS * len(class_names)))
    if distributed.current_world().rank:
        return 0
    name = "inpaint" if cfg.inpaint else "denoise" if cfg.denoise else "samples"
    write_pictures(directory.path, name, start, result, recorded_steps(steps), class_names)
    print(summary(start, result, settings))
    further = {}
    if start.originals is not None:
        further = {"originals": start.originals.permute(0, 2, 3, 1), "start": result.start}  # uint8 (N, H, W, C)
    if start.known is not None:
        further["known"] = start.known  # bool (H, W)
    write_result(directory, name, result, further, settings, cfg, device)
    return 0


def start_images(model: JEM, cfg: Config, path: Path, content: dict[str, Any], rng: Generator) -> StartImages:
    """Test images or the user's own; or images of the replay buffer; or what training started its chains from."""
    classes = range(len(content["data"]["class_names"]))
    if cfg.inpaint or cfg.denoise:
        images, kind = given_images(model, cfg, path, content)
        n = cfg.n_samples or (len(images) if cfg.images else PICTURE_COLUMNS)
        return restoration_start(cfg, data.evenly_spaced(images, n, kind), rng)
    n = cfg.n_samples or (PICTURE_COLUMNS * len(classes) if cfg.class_cond else PICTURE_IMAGES)
    if cfg.class_cond and n % len(classes):
        raise UserError(f"--n_samples {n} must be a multiple of the {len(classes)} classes for --class_cond")
    if cfg.from_buffer:
        images = buffer_images(model, n, cfg, path, content, rng)
        return StartImages("buffer", len(images), images, classes, cfg.class_cond)
    name, chain_init = fresh_start(cfg, path, content, rng.device)
    return StartImages(name, n, chain_init, classes, cfg.class_cond)


def fresh_start(cfg: Config, path: Path, content: dict[str, Any], device: torch.device) -> tuple[str, ChainInit]:
    """What ``--start`` names, in words and as chains need it: from the file, which may have it, or training images."""
    stored = StoredStarts(tuple(content["data"]["shape"]), tree_to(content.get("starts", {}), device))
    if not stored.suffice(cfg):
        return cfg.start, build_chain_init(cfg, load_data(cfg, path, content, device))
    ranks = [len(stored.gaussians[name][0][1]) for name in cfg.start_shares if name in stored.gaussians]
    return f"{cfg.start} of rank {ranks[0]}, from {path.name}" if ranks else cfg.start, build_chain_init(cfg, stored)


def buffer_images(model: JEM, n: int, cfg: Config, path: Path, content: dict[str, Any], rng: Generator) -> Tensor:
    """n random images (n, C, H, W) of the replay buffer; with ``--class_cond`` as the model sees classes, in turn."""
    if "buffer" not in content["state"]:
        raise UserError(f"{path} has no replay buffer, which only last.pt of --mode energy_train has: name the run")
    images = finite_images(content["state"]["buffer"]["images"]).to(rng.device)
    if not (cfg.n_samples or cfg.class_cond):
        n = min(n, len(images))
    if n > len(images):
        raise UserError(f"{n} samples are more than the {len(images)} images of the replay buffer: give --n_samples")
    order = torch.randperm(len(images), generator=rng, device=rng.device)
    if cfg.class_cond:
        order = by_class(predict(model, images[order]).argmax(1), n, content["data"]["class_names"], order)
    return images[order[:n]]


def by_class(predicted: Tensor, n: int, names: Sequence[str], order: Tensor) -> Tensor:
    """Of places ``order`` (M,) with classes ``predicted`` (M,), n in all: the first of each class, classes in turn.

    Raises UserError if a class has too few.
    """
    n_each, places = n // len(names), []
    for k, name in enumerate(names):
        places.append(order[predicted == k][:n_each])
        if len(places[k]) < n_each:
            raise UserError(
                f"--class_cond needs {n_each} images of the class {name}, but the model finds only {len(places[k])} in "
                "the replay buffer: give a smaller --n_samples"
            )
    return torch.stack(places, 1).flatten()


def write_pictures(
    directory: Path, name: str, start: StartImages, result: ChainResult, recorded: list[int], class_names: list[str]
) -> None:
    """``name``.png, the chains' ends (of test images also what was before), and ``name``.gif, the way."""
    frames, columns, rows = result.frames[:PICTURE_IMAGES], PICTURE_COLUMNS, []
    if start.originals is not None:
        picture = restoration_picture(start.originals[:PICTURE_IMAGES].cpu(), frames, recorded)
    else:
        if start.class_cond:  # chain i has class i mod K; the picture has a row for each class
            columns, rows = min(columns, start.n // len(class_names)), class_names
            frames = torch.cat([result.frames[k :: len(class_names)][:columns] for k in range(len(class_names))])
        picture = captioned(image_grid(frames[:, -1], columns), rows=rows)
    save_png(directory / f"{name}.png", picture)
    if len(recorded) > 1:
        pictures = [image_grid(images, columns, tile=32) for images in frames[:PICTURE_IMAGES].unbind(1)]
        save_gif(directory / f"{name}.gif", pictures, [f"SGLD step {step}" for step in recorded])


def summary(start: StartImages, result: ChainResult, settings: dict[str, Any]) -> str:
    """How far the chains climbed and, of test images, how near they came to the originals."""
    before, after = (log_density(logits).mean() for logits in (result.logits_start, result.logits))
    text = f"{start.n} chains from {start.name}, {settings['steps']} steps on {settings['target']}: mean log p(x) "
    text += f"{before:.2f} -> {after:.2f} (unnormalised, nats)"
    if start.originals is None:
        return text
    kind, truth = ("noisy" if start.known is None else "unknown"), data.to_float(start.originals).cpu()
    changed = torch.ones(truth.shape[2:], dtype=torch.bool) if start.known is None else ~start.known.cpu()
    errors = [(x.clamp(-1, 1) - truth)[..., changed] for x in (result.start, result.x)]
    before, after = (error.square().mean().sqrt() for error in errors)
    return f"{text}\nroot mean square error of the {kind} pixels: {before:.3f} -> {after:.3f} ([-1, 1] scale)"
