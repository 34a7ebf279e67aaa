"""Restoration: images filled in (--inpaint) or cleaned (--denoise) by chains."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

import data
import distributed
from config import Config
from generation.chains import StartImages
from image_folder import to_8_bits
from logger.images import captioned, image_grid
from sgld import normal_like, uniform_images
from utils import UserError


def restoration_start(cfg: Config, images: data.Split, rng: Generator) -> StartImages:
    """Chains from these images, with noise added or with noise in place of their unknown pixels."""
    x, known = data.to_float(images.images), None
    if cfg.denoise:
        name, x = f"denoise {cfg.denoise:g}", x + cfg.denoise * normal_like(x, rng)
    else:
        name = f"inpaint {cfg.inpaint}"
        known = ~distributed.broadcast_from_rank0(lambda: unknown_pixels(cfg.inpaint, *x.shape[2:])).to(x.device)
        x = torch.where(known, x, uniform_images(len(x), tuple(x.shape[1:]), rng))
    return StartImages(name, len(x), x, images.labels.tolist(), cfg.class_cond, known, images.images)


def unknown_pixels(name: str, height: int, width: int) -> Tensor:
    """The mask, bool (H, W), that ``--inpaint`` names: "left", "center" or a picture, white where unknown.

    Where the picture is transparent, it is black.
    """
    unknown = torch.zeros(height, width, dtype=torch.bool)
    if name == "left":
        unknown[:, : width // 2] = True
    elif name == "center":
        unknown[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    else:
        try:
            with Image.open(name) as mask:
                ImageOps.exif_transpose(mask, in_place=True)  # a copy has no format, which sets the white level
                mask = to_8_bits(mask)
                if mask.has_transparency_data:
                    mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
                unknown = torch.from_numpy(np.array(mask.convert("L")) >= 128)
        except Exception as error:  # image codecs raise almost anything on a broken file
            raise UserError(f"--inpaint takes left, center or a picture, not {name}: {error}") from None
        if mask.size != (width, height):
            raise UserError(f"the mask {name} has {mask.width}x{mask.height} pixels, and the images {width}x{height}")
    if not unknown.any():
        raise UserError(f"the mask {name} has no white pixels, so nothing is to be filled in")
    return unknown


def restoration_picture(originals: Tensor, frames: Tensor, recorded: list[int]) -> np.ndarray:
    """A row for each image: itself, the chain's start, some of its steps (most of them early), its end.

    originals: uint8 (N, C, H, W); frames: uint8 (N, T, C, H, W), at the steps ``recorded`` (T).
    """
    last = len(recorded) - 1
    during = sorted({round(last ** (i / 4)) for i in range(4)} & set(range(1, last)))
    stages = torch.cat([originals[:, None], frames[:, [0, *during, last]]], 1)  # (N, stages, C, H, W)
    names = ["original", "before", *(f"step {recorded[i]}" for i in during), "after"]
    return captioned(image_grid(stages.flatten(0, 1), len(names)), columns=names)
