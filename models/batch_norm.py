"""Batch normalisation: which statistics it uses, which batches change them, and what several processes do together."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import distributed


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def other_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers of all layers that are no batch normalisation."""
    return [x for layer in model.modules() if not isinstance(layer, _BatchNorm) for x in layer.buffers(recurse=False)]


@contextmanager
def attribute_set(layers: Iterable[nn.Module], name: str, value: bool | float) -> Iterator[None]:
    """Inside, the layers' attribute has this value; afterwards each has its own again."""
    before = {layer: getattr(layer, name) for layer in layers}
    try:
        for layer in before:
            setattr(layer, name, value)
        yield
    finally:
        for layer, own in before.items():
            setattr(layer, name, own)


def running_stats_update(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Inside, if not ``enabled``, batches in training mode are normalised as usual but change no running statistics."""
    return attribute_set(batch_norms(model), "track_running_stats", enabled)


def running_stats_only(model: nn.Module) -> AbstractContextManager:
    """Inside, batch normalisation uses its running statistics, as in evaluation mode, and does not change them."""
    return attribute_set(batch_norms(model), "training", False)


@torch.no_grad()
def average_running_stats(model: nn.Module) -> None:
    """Give every process the mean of all processes' running statistics."""
    kept = [buffer for layer in batch_norms(model) for buffer in (layer.running_mean, layer.running_var)]
    if kept and distributed.current_world().size > 1:
        together = distributed.all_reduce_mean(torch.cat(kept))
        torch._foreach_copy_(kept, list(together.split([len(buffer) for buffer in kept])))


class SyncedBatchNorm(_BatchNorm):
    """Batch normalisation by all processes' batches, of one size, together; ``nn.SyncBatchNorm`` is only for GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Channels (N, C, ...) in any float type; the arithmetic is float32, the result of x's type."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        n = distributed.current_world().size * x.numel() // x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            h = x.float()
            variance, mean = torch.var_mean(h, (0, *range(2, h.ndim)), correction=0)
            near = self.running_mean.clone()  # the same in all processes; squares far from 0 would lose digits
            mean, square = distributed.all_reduce_mean(torch.stack([mean, variance + (mean - near).square()]))
            variance = (square - (mean - near).square()).clamp(min=0)
            if self.track_running_stats:
                self.num_batches_tracked += 1
                share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                with torch.no_grad():
                    self.running_mean.lerp_(mean, share)
                    self.running_var.lerp_(variance * n / (n - 1), share)
            scale, of_all = self.weight * (variance + self.eps).rsqrt(), (-1, *(1,) * (h.ndim - 2))
            h = h * scale.view(of_all) + (self.bias - mean * scale).view(of_all)
        return h.to(x.dtype)


def convert_sync_batchnorm(model: nn.Module) -> None:
    """From now on the model's batch normalisation is by all processes' batches together."""
    for layer in batch_norms(model):
        layer.__class__ = SyncedBatchNorm  # the same parameters and buffers, by the same names
