"""SGLD chains that draw samples: those that --mode sample shows, and --mode test and --quality_every measure."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

import distributed
from config import Config
from logger.images import to_uint8
from models import JEM
from sgld import SGLD, ChainInit, chain_options

FRAMES = 60  # at most, in a film


class StartImages(NamedTuple):
    """Where ``n`` chains begin, and what holds them."""

    name: str  # for people
    n: int
    images: Tensor | ChainInit  # float32 (M, C, H, W), which chains start from in turn, or what draws new ones
    classes: Sequence[int]  # of the chains, in turn
    class_cond: bool = False  # chains climb log p(x|y) of their class instead of log p(x)
    known: Tensor | None = None  # bool (H, W), the pixels that keep their value
    originals: Tensor | None = None  # uint8 (n, C, H, W), the test images, or the user's own
    given: Tensor | None = None  # float32 (n, C, H, W), what the starts were made from: with noise, or grey in parts


class ChainResult(NamedTuple):
    """Where n chains have begun and gone, on the CPU; values may lie outside [-1, 1]."""

    start: Tensor  # float32 (n, C, H, W)
    x: Tensor  # their ends, of the same shape
    logits_start: Tensor  # float32 (n, K), at their starts
    logits: Tensor  # float32 (n, K), at their ends
    labels: Tensor  # int64 (n,), the classes that the chains climb, or else the most probable at their ends
    frames: Tensor  # the first M chains at the recorded steps, uint8 (M, T, C, H, W)


def recorded_steps(steps: int) -> list[int]:
    """0, ``steps`` and evenly spaced steps between, at most FRAMES + 1 in all."""
    return [*range(0, steps, math.ceil(steps / FRAMES) or 1), steps]


@torch.no_grad()
def run_chains(
    model: JEM, start: StartImages, steps: int, cfg: Config, rng: Generator, n_filmed: int = 0
) -> ChainResult:
    """SGLD of ``steps`` steps from every start, by all processes together.

    With classes it climbs log p(x, y), whose gradient in x is that of log p(x|y). With batch normalisation an image
    depends on its batch. So batches are always whole, of as many chains as in training (``cfg.n_chains``): the last one
    is filled up, and cut again. Each batch has randomness of its own: a seed's first chains are the same however many
    follow. ``model`` is a ``frozen_sampler_model`` on the device of ``rng``; ``frames`` shows the first ``n_filmed``.
    """
    compiled = cfg.compile == "on" and cfg.mode == "sample"  # in training it would take longer than the chains
    sgld = SGLD(model.log_density, **chain_options(cfg), compile=compiled)
    batches = [range(first, first + cfg.n_chains) for first in range(0, start.n, cfg.n_chains)]
    own = math.ceil(len(batches) / distributed.current_world().size)  # batches of this process

    def run_batch(numbers: range) -> ChainResult:
        classes = [start.classes[i % len(start.classes)] for i in numbers]
        y = torch.tensor(classes, device=rng.device) if start.class_cond else None
        if isinstance(start.images, Tensor):
            first = start.images[torch.tensor(numbers, device=rng.device) % len(start.images)]
        else:
            first = start.images(classes, rng)
        n_frames = max(0, n_filmed - numbers[0])  # chains of this batch that are filmed
        x, frames = first, [to_uint8(first[:n_frames]).cpu()]
        for before, after in pairwise(recorded_steps(steps)):
            if start.known is None:
                x = sgld(x, after - before, cfg.sgld_lr, cfg.sgld_std, rng, y).x
            else:
                for _ in range(after - before):
                    x = torch.where(start.known, first, sgld(x, 1, cfg.sgld_lr, cfg.sgld_std, rng, y).x)
            frames.append(to_uint8(x[:n_frames]).cpu())
            bar.update(after - before)
        logits_start, logits = model.logits(first).cpu(), model.logits(x).cpu()
        labels = logits.argmax(1) if y is None else y.cpu()
        return ChainResult(first.cpu(), x.cpu(), logits_start, logits, labels, torch.stack(frames, 1))

    with tqdm(total=own * steps, desc="SGLD", unit="step", leave=False) as bar:
        results = distributed.sharded_map(batches, run_batch, "cpu", rng)
    return ChainResult(*(torch.cat(parts)[: start.n] for parts in zip(*results, strict=True)))
