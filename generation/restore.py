"""Restoration: test images filled in (--inpaint) or cleaned (--denoise) by chains."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

import data
import distributed
from checkpoints.load import load_data
from config import Config
from generation.chains import COLUMNS, Start
from logger.images import captioned, image_grid
from sgld import normal_like, uniform_images
from utils import UserError


def restoration_start(cfg: Config, path: Path, content: dict[str, Any], rng: Generator) -> Start:
    """Test images, evenly spaced in the test part, with noise added or noise for their unknown pixels."""
    images = load_data(cfg, path, content, rng.device)
    known = None
    if cfg.inpaint:
        known = ~distributed.broadcast_from_rank0(lambda: unknown_pixels(cfg.inpaint, *images.shape[1:])).to(rng.device)
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


def restoration_picture(originals: Tensor, frames: Tensor, recorded: list[int]) -> np.ndarray:
    """A row for each test image: itself, the chain's start, some of its steps (most of them early), its end.

    originals: uint8 (N, C, H, W); frames: uint8 (T, N, C, H, W), at the steps ``recorded`` (T).
    """
    last = len(recorded) - 1
    during = sorted({round(last ** (i / 4)) for i in range(4)} & set(range(1, last)))
    stages = torch.stack([originals, *frames[[0, *during, last]]], 1)  # (N, stages, C, H, W)
    names = ["original", "before", *(f"step {recorded[i]}" for i in during), "after"]
    return captioned(image_grid(stages.flatten(0, 1), len(names)), columns=names)
