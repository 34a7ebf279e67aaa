"""Batch normalisation: which batches change its running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch normalisation layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def running_stats_update(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, if not ``enabled``, batches in training mode leave the running statistics of batch normalisation alone.

    They are normalised by their own statistics all the same.
    """
    layers = [] if enabled else [layer for layer in batch_norms(model) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
