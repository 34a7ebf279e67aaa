"""--mode sample: images drawn from a trained model, and images filled in or cleaned by it."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

import data
import distributed
import image_folder
import utils
from checkpoints.load import Trained
from generation.chains import ChainResult, StartImages, recorded_steps, run_chains
from generation.restore import restoration_start
from generation.trained_run import TrainedRun
from logger.files import replace_file
from logger.images import captioned, image_grid, save_gif, save_png, to_uint8
from logger.run_dir import RunDir
from models import log_density
from models.predict import predict
from sgld import chain_options, finite_images
from utils import UserError

PICTURE_COLUMNS = 10  # images in a row of a picture
PICTURE_IMAGES = 100  # images in a picture or film; of a class, PICTURE_COLUMNS


def run(checkpoint: Trained) -> int:
    """Sample from a checkpoint; returns 0. Bad input is a UserError before all writing."""
    trained, cfg, path, state = TrainedRun(checkpoint), checkpoint.cfg, checkpoint.path, checkpoint.content["state"]
    if cfg.class_cond and not trained.classifies:
        raise UserError(f"{path} was trained without labels: leave --class_cond out")
    model, rng = trained.sampler_model(), Generator(trained.device).manual_seed(cfg.seed)
    start = start_images(trained, rng)
    steps = max(cfg.sgld_step, cfg.sgld_step_max or 0) if cfg.denoise else cfg.fresh_steps
    settings = {"checkpoint": str(path), "training_steps": state["step"], "start": start.name, "steps": steps}
    settings |= {"weights": "ema" if "ema" in state else "last", "precision": str(trained.dtype).removeprefix("torch.")}
    settings |= {"target": "log p(x|y)" if cfg.class_cond else "log p(x)", "batch_size": cfg.n_chains}
    settings |= {f"sgld_{name}": value for name, value in chain_options(cfg).items()}
    settings |= {name: getattr(cfg, name) for name in ("sgld_lr", "sgld_std", "start_dir", "seed")}

    directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    result = run_chains(model, start, steps, cfg, rng, max(PICTURE_IMAGES, PICTURE_COLUMNS * len(trained.class_names)))
    if distributed.current_world().rank:
        return 0
    name = "inpaint" if cfg.inpaint else "denoise" if cfg.denoise else "samples"
    print(summary(start, result, settings))
    directory.write_config(cfg, utils.environment(trained.device))
    images = to_uint8(result.x)
    write_archive(directory.path / f"{name}.npz", start, result, images, settings)
    write_pictures(directory.path, name, start, result, recorded_steps(steps), trained.class_names)
    if cfg.save_images:
        for i, image in enumerate(tqdm(images, desc="PNGs", unit="image", leave=False)):
            save_png(directory.path / "samples" / f"{name}_{i:05d}.png", image_grid(image[None], tile=1))
    print(f"Done. Look at {utils.printable(directory.path)}")
    return 0


def start_images(run: TrainedRun, rng: Generator) -> StartImages:
    """Test images or the user's own, whose classes the model sees; or the replay buffer; or as training's chains."""
    cfg, classes = run.cfg, range(len(run.class_names))
    if cfg.inpaint or cfg.denoise:
        if cfg.images:
            _, images = distributed.rank0_first(lambda: image_folder.read_pictures(Path(cfg.images), run.shape))
            y, kind = [], f"pictures of {cfg.images}"
        else:
            test = run.images.test
            y = test.labels.tolist() if cfg.class_cond or not run.classifies else []
            images, kind = test.images, f"test images of {cfg.dataset}"
        n = cfg.n_samples or (len(images) if cfg.images else min(PICTURE_COLUMNS, max(1, len(images))))
        if n > len(images):
            raise UserError(f"--n_samples {n} is more than the {len(images)} {kind}")
        chosen = [i * len(images) // n for i in range(n)]
        return restoration_start(run, images[chosen].to(run.device), [y[i] for i in chosen] if y else [], rng)
    if cfg.class_cond and cfg.classes:
        words = [cfg.classes] if cfg.classes in run.class_names else re.split(" *, *", cfg.classes.strip())
        classes = list(dict.fromkeys(run.classes(words)))
    n = cfg.n_samples or (PICTURE_COLUMNS * len(classes) if cfg.class_cond else PICTURE_IMAGES)
    if cfg.class_cond and n % len(classes):
        raise UserError(f"--n_samples {n} must be a multiple of the {len(classes)} classes for --class_cond")
    if cfg.from_buffer:
        images = buffer_images(run, n, classes, rng)
        return StartImages("buffer", len(images), images, classes, cfg.class_cond)
    name, chain_init = run.fresh_start
    return StartImages(name, n, chain_init, classes, cfg.class_cond)


def buffer_images(run: TrainedRun, n: int, classes: Sequence[int], rng: Generator) -> Tensor:
    """n random images (n, C, H, W) of the replay buffer; with ``--class_cond`` as the model sees classes, in turn."""
    if "buffer" not in run.content["state"]:
        raise UserError(f"{run.path} has no replay buffer; only last.pt of --mode energy_train has: name such a run")
    images = finite_images(run.content["state"]["buffer"]["images"]).to(run.device)
    if not (run.cfg.n_samples or run.cfg.class_cond):
        n = min(n, max(1, len(images)))
    if n > len(images):
        raise UserError(f"the replay buffer has {len(images)} good images, fewer than {n}: give a smaller --n_samples")
    images = images[torch.randperm(len(images), generator=rng, device=rng.device)]
    if run.cfg.class_cond:
        images = images[by_class(predict(run.model, images).argmax(1), n, {k: run.class_names[k] for k in classes})]
    return images[:n]


def by_class(predicted: Tensor, n: int, names: dict[int, str]) -> Tensor:
    """Places of n images with classes ``predicted`` (M,), the first of each in ``names``, in turn; or a UserError."""
    n_each, places = n // len(names), []
    for k, name in names.items():
        places.append((predicted == k).nonzero().flatten()[:n_each])
        if (n_found := len(places[-1])) < n_each:
            found = f"--class_cond needs {n_each} images of the class {name}, but the model finds only {n_found}"
            raise UserError(f"{found} in the replay buffer: train longer, or give a smaller --n_samples")
    return torch.stack(places, 1).flatten()


def write_pictures(
    directory: Path, name: str, start: StartImages, result: ChainResult, recorded: list[int], class_names: Sequence[str]
) -> None:
    """``name``.png, the chains' ends (of images restored also what they began with), and ``name``.gif, the way."""
    frames, columns, rows = result.frames[:PICTURE_IMAGES], PICTURE_COLUMNS, []
    if start.originals is not None:
        stages = (start.originals.cpu(), to_uint8(start.given).cpu(), frames[:, 0], frames[:, -1])
        tiles = torch.stack([images[:PICTURE_IMAGES] for images in stages], 1).flatten(0, 1)
        picture = captioned(image_grid(tiles, len(stages)), columns=["image", "given", "start", "end"])
    else:
        if start.class_cond and len(start.classes) > 1:  # chains have them in turn; the picture has a row for each
            rows = [class_names[k] for k in start.classes]
            columns = min(columns, start.n // len(rows))
            frames = torch.cat([result.frames[i :: len(rows)][:columns] for i in range(len(rows))])
        picture = captioned(image_grid(frames[:, -1], columns), rows=rows)
    save_png(directory / f"{name}.png", picture)
    if len(recorded) > 1:
        pictures = [image_grid(images, columns, tile=32) for images in frames[:PICTURE_IMAGES].unbind(1)]
        save_gif(directory / f"{name}.gif", pictures, [f"SGLD step {step}" for step in recorded])


def summary(start: StartImages, result: ChainResult, settings: dict[str, Any]) -> str:
    """How far the chains climbed and, where originals are known, how near they came to them."""
    before, after = (log_density(logits).mean() for logits in (result.logits_start, result.logits))
    text = f"{start.n} chains from {start.name}, {settings['steps']} steps on {settings['target']}: mean log p(x) "
    text += f"{before:.2f} -> {after:.2f} (unnormalised, nats)"
    if start.originals is None or torch.equal(start.given, data.to_float(start.originals)):
        return text
    kind, first = ("noisy", "as given") if start.known is None else ("unknown", "if grey")
    truth = data.to_float(start.originals).cpu()
    changed = torch.ones(truth.shape[2:], dtype=torch.bool) if start.known is None else ~start.known.cpu()
    errors = [(x.cpu().clamp(-1, 1) - truth)[..., changed] for x in (start.given, result.start, result.x)]
    given, before, after = (error.square().mean().sqrt() for error in errors)
    errors = f"{given:.3f} {first}, {before:.3f} at the start, {after:.3f} at the end"
    return f"{text}\nroot mean square error of the {kind} pixels ([-1, 1] scale): {errors}"


def write_archive(path: Path, start: StartImages, result: ChainResult, images: Tensor, settings: dict) -> None:
    """A compressed NumPy archive; equal results give equal bytes.

    It holds ``x`` and ``labels`` of the result; ``log_p_x`` of x and ``log_p_x_y`` with its label, float32 (N,),
    unnormalised, in nats; ``images``, x as uint8 (N, H, W, C); of restored ones ``originals``, as ``images``, what
    was ``given`` of them, their ``start`` and, to fill in, ``known``, bool (H, W); and ``settings`` as JSON text.
    """
    arrays = {"x": result.x, "labels": result.labels, "images": images.permute(0, 2, 3, 1)}
    arrays |= {"log_p_x": log_density(result.logits), "log_p_x_y": log_density(result.logits, result.labels)}
    if start.originals is not None:
        arrays |= {"originals": start.originals.permute(0, 2, 3, 1), "given": start.given, "start": result.start}
    if start.known is not None:
        arrays["known"] = start.known
    arrays = {name: array.cpu().contiguous().numpy() for name, array in arrays.items()}
    file = io.BytesIO()
    np.savez_compressed(file, settings=json.dumps(settings), **arrays)
    replace_file(path, file.getvalue())
