"""The report of ``--mode test``: measurements that carry their protocol, remarks and pictures, in sections."""

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

import distributed
from logger.files import replace_file
from logger.images import save_png
from utils import printable

Interval = tuple[float, float]
Place = tuple[str, str]  # row and column in a table
ALONE, VALUE = "", "value [95 % interval]"  # the table and the column of a measurement that is in no table


@dataclass(frozen=True)
class Measurement:
    """A number; ``interval`` is of 95 %, ``n`` how many images (or pairs, or chains) it rests on."""

    value: float
    interval: Interval | None
    n: int
    protocol: str

    def __str__(self) -> str:
        text = f"{self.value:.4g}"
        return f"{text} [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else text


class Section:
    """One metric's measurements, by table, row and column; its remarks and pictures.

    Every text is made printable on its way in: the name of a file or an error may hold what is no UTF-8.
    """

    def __init__(self, name: str, directory: Path):
        self.name, self.directory = name, directory
        self.measurements: dict[tuple[str, str, str], Measurement] = {}
        self.notes: list[str] = []
        self.absent: dict[str, str] = {}  # reasons, by what is absent
        self.pictures: dict[str, str] = {}  # captions, by the file's name without .png

    def add(
        self, name: str, value: float, n: int, protocol: str, interval: Interval | None = None, at: Place | None = None
    ) -> None:
        """A measurement; ``at`` is its place in the table ``name``. One that is not finite is absent."""
        if not math.isfinite(value):
            self.add_absent(" ".join((name, *(at or ()))), f"the result is {float(value)}")
            return
        table, row, column = (printable(text, "utf-8") for text in ((name, *at) if at else (ALONE, name, VALUE)))
        self.measurements[table, row, column] = Measurement(float(value), interval, n, printable(protocol, "utf-8"))

    def add_mean(self, name: str, values: Tensor, protocol: str, at: Place | None = None) -> None:
        """The mean of one value an image, (N,), with its bootstrap interval."""
        values = values.double().cpu()
        self.add(name, values.mean().item(), len(values), protocol, bootstrap(Tensor.mean, values), at)

    def add_proportion(self, name: str, true: Tensor, protocol: str, at: Place | None = None) -> None:
        """The share of images, bool (N,), with its Wilson interval."""
        self.add(name, true.double().mean().item(), len(true), protocol, wilson(true), at)

    def note(self, text: str) -> None:
        self.notes.append(printable(text, "utf-8"))

    def add_absent(self, what: str, reason: str) -> None:
        """Something that could not be measured, and why; the terminal says it at once."""
        self.absent[printable(what, "utf-8")] = printable(reason, "utf-8")
        print(printable(f"  {what}: absent, {reason}"), flush=True)

    def picture(self, name: str, caption: str, content: Figure | np.ndarray) -> None:
        """Save a figure or an RGB picture (H, W, 3) uint8 as ``name``.png; blanks become _."""
        name = name.replace(",", "").replace(" ", "_")
        path, encoded = self.directory / f"{name}.png", io.BytesIO()
        writes = distributed.current_world().rank == 0
        if writes and isinstance(content, Figure):
            content.savefig(encoded, dpi=120)
            replace_file(path, encoded.getvalue())
        elif writes:
            save_png(path, content)
        self.pictures[name] = printable(caption, "utf-8")

    def as_dict(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for (table, row, column), measurement in self.measurements.items():
            if table == ALONE:
                results[row] = asdict(measurement)
            else:
                results.setdefault(table, {}).setdefault(row, {})[column] = asdict(measurement)
        return {"results": results, "notes": self.notes, "absent": self.absent, "pictures": self.pictures}


class Report:
    """Facts about an evaluation, and its sections so far, whose pictures lie in ``directory``.

    header: "about", "options" and "environment", each a dict. ``other``: the report of another run, to be shown beside
    this one.
    """

    def __init__(self, directory: Path, header: dict[str, dict], other: "Report | None" = None):
        self.directory, self.other = directory, other
        self.header = {name: {k: as_printable(v) for k, v in part.items()} for name, part in header.items()}
        self.sections: dict[str, Section] = {}

    def section(self, name: str) -> Section:
        self.sections[name] = Section(name, self.directory)
        return self.sections[name]

    def as_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return self.header | {name: section.as_dict() for name, section in self.sections.items()}


def as_printable(value: Any) -> Any:
    return printable(value, "utf-8") if isinstance(value, str) else value


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
    """95 % interval of the share of images, bool (N,), that are true: 0 of 100 may be 3 %; nan without images."""
    from scipy.stats import binomtest  # slow to import

    if len(true) == 0:
        return math.nan, math.nan
    low, high = binomtest(int(true.sum()), len(true)).proportion_ci(method="wilson")
    return float(low), float(high)
