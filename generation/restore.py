"""Restoration: images filled in (--inpaint) or cleaned (--denoise) by chains."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

import data
import distributed
from chain_init import GaussianInit
from generation.chains import StartImages
from generation.trained_run import TrainedRun
from image_folder import to_8_bits
from logger.images import captioned, image_grid
from models.predict import predict
from sgld import normal_like
from utils import UserError

BLUR = 0.05  # the noise with which known pixels count as seen: images are no Gaussians


def restoration_start(run: TrainedRun, images: Tensor, y: list[int], rng: Generator) -> StartImages:
    """Chains from images uint8 (N, C, H, W) with noise added, or with what ``--start`` draws for unknown pixels.

    If that is a Gaussian, from what it expects behind the noise, or draws given the known pixels. If y is empty, the
    network tells the classes by what is given: noisy images, or images whose unknown pixels are grey.
    """
    cfg, x, (name, start) = run.cfg, data.to_float(images), run.fresh_start
    if cfg.denoise:
        given, known = x + cfg.denoise * normal_like(x, rng), None
        everywhere = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device)
    else:
        known = ~distributed.broadcast_from_rank0(lambda: unknown_pixels(cfg.inpaint, *x.shape[2:])).to(x.device)
        given = x * known
    y = y or predict(run.model, given).argmax(1).tolist()
    if not isinstance(start, GaussianInit):
        first = given if cfg.denoise else torch.where(known, x, start(y, rng))
    elif cfg.denoise:
        first = start.given(given, everywhere, cfg.denoise, y)
    else:
        first = torch.where(known, x, start.given(x, known, BLUR, y, rng))
    task = f"denoise {cfg.denoise:g}" if cfg.denoise else f"inpaint {cfg.inpaint}"
    return StartImages(f"{task} from {name}", len(x), first, y, cfg.class_cond, known, images, given)


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


def restoration_picture(originals: Tensor, given: Tensor, frames: Tensor, recorded: list[int]) -> np.ndarray:
    """A row for each image: itself, what was given of it, its chain's start, some steps (most of them early), its end.

    originals, given: uint8 (N, C, H, W); frames: uint8 (N, T, C, H, W), at the steps ``recorded`` (T).
    """
    last = len(recorded) - 1
    during = sorted({round(last ** (i / 4)) for i in range(4)} & set(range(1, last)))
    stages = torch.cat([originals[:, None], given[:, None], frames[:, [0, *during, last]]], 1)  # (N, stages, C, H, W)
    names = ["original", "given", "start", *(f"step {recorded[i]}" for i in during), "end"]
    return captioned(image_grid(stages.flatten(0, 1), len(names)), columns=names)
