"""Restoration: images filled in (--inpaint) or cleaned (--denoise) by chains."""

import torch
from torch import Generator, Tensor

import data
import distributed
from generation.chains import StartImages
from generation.trained_run import TrainedRun
from image_folder import decode_file, grey_or_rgb
from models.predict import predict
from sgld import normal_like
from utils import UserError

BLUR = 0.05  # the noise with which known pixels count as seen: images are no Gaussians


def restoration_start(run: TrainedRun, images: Tensor, y: list[int], rng: Generator) -> StartImages:
    """Chains from noisy images, uint8 (N, C, H, W), or from images with what ``--start`` draws for unknown pixels.

    A Gaussian gives the mean of what is behind the noise, or draws unknown pixels given the known ones. If y is empty,
    the network tells the classes by what is given: noisy images, or images whose unknown pixels are grey.
    """
    cfg, x = run.cfg, data.to_float(images)
    gaussian = list(cfg.start_shares) in (["gaussian"], ["class_gaussian"])
    name, start = ("the noisy images", None) if cfg.denoise and not gaussian else run.fresh_start
    if cfg.denoise:
        given, known = x if cfg.images else x + cfg.denoise * normal_like(x, rng), None  # one's own are noisy
        y = y or predict(run.model, given).argmax(1).tolist()
        first = start.conditioned(given, None, cfg.denoise, y) if gaussian else given
    else:
        known = ~distributed.broadcast_from_rank0(lambda: unknown_pixels(cfg.inpaint, *x.shape[2:])).to(x.device)
        given = x * known
        y = y or predict(run.model, given).argmax(1).tolist()
        first = torch.where(known, x, start.conditioned(x, known, BLUR, y, rng) if gaussian else start(y, rng))
    task = f"--denoise {cfg.denoise:g}" if cfg.denoise else f"--inpaint {cfg.inpaint}"
    return StartImages(f"{name} ({task})", len(x), first, y, cfg.class_cond, known, images, given)


def unknown_pixels(name: str, height: int, width: int) -> Tensor:
    """The mask, bool (H, W), of ``--inpaint``: "left", "center" or a picture, white and not transparent if unknown."""
    unknown = torch.zeros(height, width, dtype=torch.bool)
    if name == "left":
        unknown[:, : width // 2] = True
    elif name == "center":
        unknown[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    else:
        mask = decode_file(name, None, behind="black")
        if mask.pixels is None:
            raise UserError(f"--inpaint takes left, center or a picture: {mask.problem or f'{name} is none'}")
        unknown = grey_or_rgb(torch.tensor(mask.pixels).permute(2, 0, 1)[None], 1)[0, 0] >= 128
        if unknown.shape != (height, width):
            found = f"the mask {name} has {unknown.shape[1]}x{unknown.shape[0]} pixels"
            raise UserError(f"{found}, and the images {width}x{height}")
    if not unknown.any():
        raise UserError(f"the mask {name} has no white pixels, so nothing is to be filled in")
    return unknown
