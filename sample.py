"""--mode sample: images drawn from a trained model, and test images filled in or cleaned by it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

import counterfactual
import data
import processes
import utils
from checks import check_variance
from config import Config
from models import JEM, log_density, sampling_copy
from models.load import load_data, load_model, origin
from models.predict import predict
from sgld import SGLD, chain_options, finite_images, normal_like, uniform_images
from starts import UniformStart, build_start
from storage.pictures import captioned, image_grid, save_each, save_gif, save_png, to_uint8
from storage.run_dir import RunDir
from storage.writer import save_arrays
from utils import UserError

COLUMNS = 10  # images in a row of a picture
SHOWN = 100  # images in a picture or film; of a class, COLUMNS
FRAMES = 60  # at most, in a film


class Start(NamedTuple):
    """Where chains begin, and what holds them."""

    name: str  # for people
    x: Tensor  # float32 (N, C, H, W)
    y: Tensor | None = None  # int64 (N,), the classes whose log p(x, y) they climb; None: they climb log p(x)
    known: Tensor | None = None  # bool (H, W), the pixels that keep their value
    originals: Tensor | None = None  # uint8 (N, C, H, W), the test images that x was made from


class Result(NamedTuple):
    """Where chains have gone."""

    x: Tensor  # the chains' ends, float32 (N, C, H, W) on the CPU; values may lie outside [-1, 1]
    logits_start: Tensor  # float32 (N, K), at the chains' starts
    logits: Tensor  # float32 (N, K), at their ends
    frames: Tensor  # the first M chains at the recorded steps, uint8 (T, M, C, H, W)


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Do what ``--mode sample`` asks of a checkpoint, the ``content`` of ``path``; returns the exit status.

    Raises UserError for input that does not fit, before anything is written.
    """
    if cfg.counterfactual is not None:
        return counterfactual.run(cfg, path, content)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    dtype = utils.pick_dtype(cfg.precision, device)
    model = sampling_copy(load_model(cfg, path, content).to(device), dtype)
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
    directory = processes.from_first(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    recorded = recorded_steps(steps)
    result = run_chains(model, start, batches, recorded, cfg, rng)
    if processes.place().rank:
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
        return Start("uniform", UniformStart(content["data"]["shape"])(classes.tolist(), rng), y)
    start = build_start(cfg, load_data(cfg, path, content, rng.device))
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


def restoration_start(cfg: Config, path: Path, content: dict[str, Any], rng: Generator) -> Start:
    """Test images, evenly spaced in the test part, with noise added or noise for their unknown pixels."""
    images = load_data(cfg, path, content, rng.device)
    known = None
    if cfg.inpaint:
        known = ~processes.from_first(lambda: unknown_pixels(cfg.inpaint, *images.shape[1:])).to(rng.device)
    n = cfg.n_samples or COLUMNS
    test = data.evenly_spaced(images.test, n, f"test images of {cfg.dataset}")
    x = data.to_float(test.images)
    y = test.labels if cfg.class_cond else None
    if cfg.denoise:
        return Start(f"denoise {cfg.denoise:g}", x + cfg.denoise * normal_like(x, rng), y, None, test.images)
    x = torch.where(known, x, uniform_images(n, images.shape, rng))
    return Start(f"inpaint {cfg.inpaint}", x, y, known, test.images)


def unknown_pixels(name: str, height: int, width: int) -> Tensor:
    """The mask, bool (H, W), that ``--inpaint`` names: "left", "center" or a picture, white where unknown.

    Where a picture is transparent, the pixel is known.
    """
    unknown = torch.zeros(height, width, dtype=torch.bool)
    if name == "left":
        unknown[:, : width // 2] = True
        return unknown
    if name == "center":
        unknown[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        return unknown
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            with Image.open(name) as picture:
                mask = on_black(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"the mask {name} is too large, the images have {width}x{height} pixels: resize it") from None
    except FileNotFoundError:
        raise UserError(f"no mask at {name}: --inpaint takes left, center or a picture") from None
    except (OSError, SyntaxError, ValueError):  # Pillow's exceptions for what is broken or no picture
        raise UserError(f"{name} is no readable picture; --inpaint takes left, center or a picture") from None
    if mask.shape != (height, width):
        raise UserError(
            f"the mask {name} has {mask.shape[1]}x{mask.shape[0]} pixels, but the images have "
            f"{width}x{height}: resize it"
        )
    unknown = torch.from_numpy(mask >= 128)
    if not unknown.any():
        raise UserError(f"the mask {name} has no white pixels, so nothing is to be filled in")
    return unknown


def on_black(picture: Image.Image) -> np.ndarray:
    """The grey levels, uint8 (H, W), of a picture that is laid on black where it is transparent."""
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return np.array(picture.convert("L"))


# ---------------------------------------------------------------------------------------------- chains


def recorded_steps(steps: int) -> list[int]:
    """0, ``steps`` and evenly spaced steps between, at most FRAMES + 1 in all."""
    return [*range(0, steps, math.ceil(steps / FRAMES) or 1), steps]


@torch.no_grad()
def run_chains(
    model: JEM, start: Start, batches: Sequence[Tensor], recorded: list[int], cfg: Config, rng: Generator
) -> Result:
    """SGLD from every start, a batch of them at a time, up to the last of the steps ``recorded``.

    With classes it climbs log p(x, y), whose gradient in x is that of log p(x|y). ``batches``, places of starts, are of
    about equal size: with batch normalisation, images depend on how many there are in their batch.
    """
    sgld = SGLD(model.log_density, **chain_options(cfg), compile=cfg.compile == "on")
    shown = max(SHOWN, COLUMNS * model.class_output.out_features)

    def run_batch(batch: Tensor) -> Result:
        x, y = start.x[batch], None if start.y is None else start.y[batch]
        held, logits_start = x, model.logits(x)
        filmed = max(0, shown - batch[0].item())
        film = [to_uint8(x[:filmed]).cpu()]
        for before, after in pairwise(recorded):
            for _ in range(after - before):
                x = sgld(x, 1, cfg.sgld_lr, cfg.sgld_std, rng, y).x
                if start.known is not None:
                    x = torch.where(start.known, held, x)
            film.append(to_uint8(x[:filmed]).cpu())
            bar.update(after - before)
        return Result(x.cpu(), logits_start.cpu(), model.logits(x).cpu(), torch.stack(film))

    n_steps = processes.own_share(len(batches)) * recorded[-1]
    with tqdm(total=n_steps, desc="SGLD", unit="step") as bar:
        results = processes.divided(batches, run_batch, "cpu", rng)
    *parts, films = zip(*results, strict=True)
    return Result(*map(torch.cat, parts), torch.cat(films, 1))


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


def restoration_picture(originals: Tensor, frames: Tensor, recorded: list[int]) -> np.ndarray:
    """A row for each test image: itself, the chain's start, some of its steps (most of them early), its end.

    originals: uint8 (N, C, H, W); frames: uint8 (T, N, C, H, W), at the steps ``recorded`` (T).
    """
    last = len(recorded) - 1
    during = sorted({round(last ** (i / 4)) for i in range(4)} & set(range(1, last)))
    stages = torch.stack([originals, *frames[[0, *during, last]]], 1)  # (N, stages, C, H, W)
    names = ["original", "before", *(f"step {recorded[i]}" for i in during), "after"]
    return captioned(image_grid(stages.flatten(0, 1), len(names)), columns=names)


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
