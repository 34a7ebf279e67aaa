"""Optimizers, learning-rate schedules, and the moving average of the weights; ``cfg`` is a run's Config."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data import to_float
from models.batch_norm import attribute_set, batch_norms, other_buffers
from models.predict import evaluation_mode, images_per_batch

REFIT_IMAGES = 5000  # enough for means and variances of channels


def build_optimizer(cfg: Any, model: nn.Module) -> "torch.optim.Optimizer | SAM":
    """What ``--optimizer`` names; inside SAM with ``--sam_rho``."""
    momentum = {"momentum": 0.9, "nesterov": cfg.optimizer == "sgd"}
    kind, options = (torch.optim.Adam, {}) if cfg.optimizer == "adam" else (torch.optim.SGD, momentum)
    optimizer = kind(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True, **options)
    return SAM(optimizer, cfg.sam_rho, cfg.sam_adaptive) if cfg.sam_rho else optimizer


class SAM:
    """Sharpness-aware minimisation (Foret et al., ICLR 2021): wraps an optimizer and is used instead of it.

    A step has two passes: the gradient g at the weights w, then the gradient at w + e, with which the optimizer updates
    w. Plain, e = rho * g / |g|; adaptive (Kwon et al., ICML 2021), e = rho * w^2 * g / |w * g|, norms of all weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float, adaptive: bool):
        self.optimizer, self.rho, self.adaptive = optimizer, rho, adaptive
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad
        self.state_dict = optimizer.state_dict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        self.param_groups = self.optimizer.param_groups  # it makes new ones

    def step(self, closure: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """One update. ``closure(update_statistics=...)`` computes gradients and returns measurements by name.

        Returns those of the first pass, but the second's ``gradient_norm``. Running statistics follow the first pass
        only: w + e is never evaluated.
        """
        result = closure(update_statistics=True)
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            direction = [p.grad for p in parameters]  # g
            if self.adaptive:
                direction = torch._foreach_mul(direction, before)  # w g
            norm = torch.nn.utils.get_total_norm(direction)
            if self.adaptive:
                torch._foreach_mul_(direction, before)  # w^2 g
            torch._foreach_add_(parameters, torch._foreach_mul(direction, self.rho / (norm + 1e-12)))
        applied = closure(update_statistics=False)
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        self.optimizer.step()
        return result | {"gradient_norm": applied["gradient_norm"]}


def learning_rate(cfg: Any, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Of a step that counts from 1: linear warm-up, then by ``--schedule`` steps, or a cosine to 1e-6 at the last."""
    warm_up = min(1, step / max(1, cfg.warmup_steps))
    if cfg.schedule == "step":
        return warm_up * cfg.lr * cfg.decay_rate ** sum(step > epoch * steps_per_epoch for epoch in cfg.decay_at)
    done = max(0, step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)  # from 0 to 1
    final = min(1e-6, cfg.lr)
    return warm_up * (final + (cfg.lr - final) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the parameters, in place, with a short memory at first; ``step`` counts from 1.

    Running statistics are not averaged: see ``recalibrate_batch_norm``. Other buffers are the model's.
    """
    for old, new in zip(other_buffers(average), other_buffers(model), strict=True):
        old.copy_(new)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, images: Tensor, least: int) -> None:
    """Give a model's batch normalisation the statistics that images uint8 (N, C, H, W) have under its own weights.

    Batches have 500 images of 32x32 pixels, as many pixels of larger ones, but at least about ``least`` images. All
    other layers are in evaluation mode.
    """
    layers, images = batch_norms(model), images[:REFIT_IMAGES].to(next(model.parameters()).device)
    n_batches = math.ceil(len(images) / max(least, images_per_batch(500, images.shape[1:])))
    with evaluation_mode(model), attribute_set(layers, "training", True), attribute_set(layers, "momentum", None):
        for layer in layers:
            layer.reset_running_stats()
        for batch in images.tensor_split(n_batches):  # equally large: each has the same part in the average
            model(to_float(batch))
