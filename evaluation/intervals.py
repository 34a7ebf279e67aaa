"""95 % intervals of what is measured on random images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Interval = tuple[float, float]


def bootstrap(
    statistic: Callable[..., Any], *groups: Tensor, replicates: int = 1000, centre: float | None = None
) -> Interval:
    """95 % interval of ``statistic(*groups)`` when each group (N_i,) is drawn again, with replacement, on its own.

    ``centre``: where the mean of those statistics is moved to, for one of 0 or more that drawing again makes larger.
    """
    rng = torch.Generator().manual_seed(0)
    groups = [group.cpu() for group in groups]
    drawn = []
    for _ in range(replicates):
        drawn.append(float(statistic(*(g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups))))
    low, high = np.quantile(drawn, [0.025, 0.975])
    if centre is not None:
        low, high = (max(0.0, bound - (np.mean(drawn) - centre)) for bound in (low, high))
    return float(low), float(high)


def wilson(true: Tensor) -> Interval:
    """95 % interval of the share of images, bool (N,), that are true: 0 of 100 may be 3 %."""
    from scipy.stats import binomtest  # slow to import

    low, high = binomtest(int(true.sum()), len(true)).proportion_ci(method="wilson")
    return float(low), float(high)
