"""What ``--mode test`` has measured: numbers that carry their protocol, remarks and pictures, in sections."""

import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from logger.files import disk_errors, replace_file
from logger.images import save_png
from utils import printable

Interval = tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """A measurement; ``interval`` is of 95 %, ``n`` how many images (or pairs, or chains) it rests on."""

    value: float
    interval: Interval | None
    n: int
    protocol: str

    def __str__(self) -> str:
        text = f"{self.value:.4g}"
        return f"{text} [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else text


def bootstrap(
    statistic: Callable[..., Any],
    *groups: Tensor,
    seed: int = 0,
    replicates: int = 1000,
    centre: float | None = None,
) -> Interval:
    """95 % interval of ``statistic(*groups)`` when each group (N_i,) is drawn again, with replacement, on its own.

    ``centre``: where the mean of those statistics is moved to, for one of 0 or more that drawing again makes larger.
    """
    rng = torch.Generator().manual_seed(seed)
    groups = [group.cpu() for group in groups]
    drawn = []
    for _ in range(replicates):
        drawn.append(float(statistic(*(g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups))))
    low, high = np.quantile(drawn, [0.025, 0.975])
    if centre is not None:
        low, high = (max(0.0, bound - (np.mean(drawn) - centre)) for bound in (low, high))
    return float(low), float(high)


class Section:
    """One metric's numbers, remarks and pictures. Rows and columns, where given, become a table of their own."""

    def __init__(self, name: str, directory: Path, writes: bool = True):
        self.name, self.directory, self.writes = name, directory, writes
        self.numbers: dict[str, Measurement] = {}
        self.tables: dict[str, dict[str, dict[str, Measurement]]] = {}
        self.notes: list[str] = []
        self.absent: dict[str, str] = {}
        self.pictures: dict[str, str] = {}

    def add(
        self,
        name: str,
        value: float,
        n: int,
        protocol: str,
        interval: Interval | None = None,
        at: tuple[str, str] | None = None,
    ) -> None:
        """A number; ``at`` is its (row, column) in the table ``name``. One that is not finite is absent."""
        number = Measurement(float(value), interval, n, protocol)
        if not math.isfinite(number.value):
            self.add_absent(" ".join((name, *(at or ()))), f"the result is {number.value}")
        elif at is None:
            self.numbers[name] = number
        else:
            self.tables.setdefault(name, {}).setdefault(at[0], {})[at[1]] = number

    def add_mean(self, name: str, values: Tensor, protocol: str, at: tuple[str, str] | None = None) -> None:
        """The mean of one value an image, (N,), with its bootstrap interval."""
        values = values.double().cpu()
        self.add(name, values.mean().item(), len(values), protocol, bootstrap(torch.mean, values), at)

    def add_proportion(self, name: str, true: Tensor, protocol: str, at: tuple[str, str] | None = None) -> None:
        """The share of images, bool (N,), with its Wilson interval, which knows that 0 of 100 may be 3 %."""
        from scipy.stats import binomtest  # slow to import

        n = len(true)
        low, high = binomtest(int(true.sum()), n).proportion_ci(method="wilson") if n else (math.nan, math.nan)
        self.add(name, true.double().mean().item(), n, protocol, (float(low), float(high)), at)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def add_absent(self, what: str, reason: str) -> None:
        """Say that something could not be computed, and say so at once."""
        self.absent[what] = reason
        print(printable(f"  {what}: absent, {reason}"), flush=True)

    def picture(self, name: str, caption: str, content: Figure | np.ndarray) -> None:
        """Save a figure or an RGB picture (H, W, 3) uint8 as ``name``.png."""
        if self.writes:
            path = self.directory / f"{name}.png"
            with disk_errors(self.directory):
                if isinstance(content, Figure):
                    encoded = io.BytesIO()
                    content.savefig(encoded, dpi=120)
                    replace_file(path, encoded.getvalue())
                else:
                    save_png(path, content)
        self.pictures[name] = caption

    def scalars(self) -> dict[str, Measurement]:
        """Every number under one name: ``measure``, or ``measure/row/column``."""
        cells = {
            f"{name}/{row}/{column}": number
            for name, table in self.tables.items()
            for row, line in table.items()
            for column, number in line.items()
        }
        return self.numbers | cells

    def as_dict(self) -> dict[str, Any]:
        numbers = {name: asdict(number) for name, number in self.numbers.items()}
        tables = {
            name: {row: {column: asdict(number) for column, number in line.items()} for row, line in table.items()}
            for name, table in self.tables.items()
        }
        return {"results": numbers | tables, "notes": self.notes, "absent": self.absent, "pictures": self.pictures}


def all_printable(value: Any) -> Any:
    """The same dicts and lists with every text in them printable: a path or an error may hold what is no UTF-8."""
    if isinstance(value, dict):
        return {all_printable(key): all_printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(item) for item in value]
    return printable(value, "utf-8") if isinstance(value, str) else value


class Report:
    """Facts about an evaluation, and its sections so far, whose pictures lie in ``directory``.

    ``other``: the report of another run, to be shown beside this one. ``writes``: whether this process, if there are
    several, saves pictures.
    """

    def __init__(self, directory: Path, header: dict[str, Any], other: "Report | None" = None, writes: bool = True):
        self.directory, self.header, self.other, self.writes = directory, header, other, writes
        self.sections: dict[str, Section] = {}

    def section(self, name: str) -> Section:
        self.sections[name] = Section(name, self.directory, self.writes)
        return self.sections[name]

    def as_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return all_printable(self.header | {name: section.as_dict() for name, section in self.sections.items()})
