"""Optimizers, the learning rate's schedule, and the average of the weights."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from config import Config
from data import to_float
from models.predict import images_per_batch

FINAL_LR = 1e-6
REFIT_IMAGES = 5000  # enough for means and variances of channels


def build_optimizer(cfg: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    shared = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    match cfg.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, fused=True, **shared)
        case "sgd":
            return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, fused=True, **shared)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, **shared)


def learning_rate(step: int, peak: float, warmup_steps: int, cycle_ends: Sequence[int]) -> float:
    """Linear warm-up, then a cosine to 1e-6 (or a lower ``peak``); ``step`` counts from 1.

    ``cycle_ends``, ascending: a run has one cycle that ends with its last step. Each time that a run is made longer,
    another cycle follows (Loshchilov & Hutter, ICLR 2017), whose warm-up takes at most a tenth of it.
    """
    start = max((end for end in cycle_ends if end < step), default=0)
    length = next(end for end in cycle_ends if step <= end) - start
    warmup = min(warmup_steps, length // 10) if start else warmup_steps
    step -= start
    if step <= warmup:
        return peak * step / warmup
    done, final = (step - warmup) / max(1, length - warmup), min(FINAL_LR, peak)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the parameters, in place; ``step`` counts from 1.

    The decay is (1 + step) / (10 + step) as long as that is less: a short memory first, since the start is no model
    yet. Running statistics are not averaged: see ``refit_statistics``.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def refit_statistics(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Give a model's batch normalisation the statistics that images uint8 (N, C, H, W) have under its own weights.

    A no-op without batch normalisation. Neither the model's mode nor any random generator changes.
    """
    device = images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # dropout's
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            batches = images[:REFIT_IMAGES].split(images_per_batch(500, images.shape[1:]))
            torch.optim.swa_utils.update_bn(map(to_float, batches), model)
