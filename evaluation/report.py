"""The report of ``--mode test``: measurements that carry their protocol, remarks and pictures, in sections."""

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

import distributed
from evaluation.intervals import Interval, bootstrap, wilson
from logger.files import replace_file
from logger.images import save_png
from utils import printable

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
        self, name: str, value: float, n: int, protocol: str, interval: Interval | None = None, at: tuple | None = None
    ) -> None:
        """A measurement; ``at`` is its row and column in the table ``name``. One that is not finite is absent."""
        if not math.isfinite(value):
            self.add_absent(" ".join((name, *(at or ()))), f"the result is {float(value)}")
            return
        table, row, column = (printable(text, "utf-8") for text in ((name, *at) if at else (ALONE, name, VALUE)))
        self.measurements[table, row, column] = Measurement(float(value), interval, n, printable(protocol, "utf-8"))

    def add_mean(self, name: str, values: Tensor, protocol: str, at: tuple | None = None) -> None:
        """The mean of one value an image, (N,), with its bootstrap interval."""
        values = values.double()
        self.add(name, values.mean().item(), len(values), protocol, bootstrap(Tensor.mean, values), at)

    def add_proportion(self, name: str, true: Tensor, protocol: str, at: tuple | None = None) -> None:
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
        if distributed.current_world().rank == 0:
            if isinstance(content, Figure):
                content.savefig(encoded, dpi=120)
                replace_file(path, encoded.getvalue())
            else:
                save_png(path, content)
        self.pictures[name] = printable(caption, "utf-8")

    def as_dict(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for (table, row, column), measurement in self.measurements.items():
            line = results if table == ALONE else results.setdefault(table, {}).setdefault(row, {})
            line[row if table == ALONE else column] = asdict(measurement)
        return {"results": results, "notes": self.notes, "absent": self.absent, "pictures": self.pictures}


class Report:
    """Facts about an evaluation, and its sections so far, whose pictures lie in ``directory``.

    header: "about", "options" and "environment", each a dict. ``other``: another run's report, to be shown beside.
    """

    def __init__(self, directory: Path, header: dict[str, dict], other: "Report | None" = None):
        self.directory, self.other = directory, other
        self.header = {
            name: {k: printable(v, "utf-8") if isinstance(v, str) else v for k, v in part.items()}
            for name, part in header.items()
        }
        self.sections: dict[str, Section] = {}

    def section(self, name: str) -> Section:
        return self.sections.setdefault(name, Section(name, self.directory))

    def as_dict(self) -> dict[str, Any]:
        return self.header | {name: section.as_dict() for name, section in self.sections.items()}
