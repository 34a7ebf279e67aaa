"""What a run measures between two lines of its log, kept on the device."""

from typing import Any

import torch
from torch import Tensor

import distributed


class Meter:
    """Means of numbers and totals of counts over steps; adding to them never synchronises with the device.

    sums: for each name the sum so far, 0-dim for a number and (K,) for counts; steps: how many were added.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Values of one step, in each step the same names: numbers, 0-dim, and counts, int64 (K,)."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.steps += 1

    def read(self) -> dict[str, float | list[int]]:
        """The mean of each number and total of each count since the last call, of all processes; synchronises."""
        numbers = [name for name, value in self.sums.items() if value.ndim == 0]
        means = distributed.all_reduce_mean(torch.stack([self.sums[name] for name in numbers]).div(self.steps)).tolist()
        counts = {name: distributed.all_reduce_sum(value).tolist() for name, value in self.sums.items() if value.ndim}
        self.sums, self.steps = {}, 0
        return dict(zip(numbers, means, strict=True)) | counts

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.steps = dict(state["sums"]), state["steps"]
