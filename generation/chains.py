"""Run chains from given starts: what --mode sample shows."""

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
from sgld import SGLD, chain_options

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

    n_steps = distributed.shard_size(len(batches)) * recorded[-1]
    with tqdm(total=n_steps, desc="SGLD", unit="step") as bar:
        results = distributed.sharded_map(batches, run_batch, "cpu", rng)
    *parts, films = zip(*results, strict=True)
    return Result(*map(torch.cat, parts), torch.cat(films, 1))
