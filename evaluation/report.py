"""The report of ``--mode test``: results.json, also read back for --compare; report.md, report.html and pictures."""

import base64
import glob
import json
import math
import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, UndefinedError
from markupsafe import Markup
from torch import Tensor

import distributed
from config.options import METRICS
from logger.files import replace_file, warn_on_error
from logger.images import save_png
from utils import UserError, evaluation_packages, out_of_memory, printable

ALONE, VALUE = "", "value [95 % interval]"  # the table and the column of a measurement that is in no table
IN_FILE = ("results", "notes", "absent", "pictures")  # what results.json holds of a section
RUNS = ("this run", "other run")
Interval = tuple[float, float]  # of 95 %
NOT_SHOWN = ("mode", "logdir", "note", "no_log", "load_ckpt", "compare")  # options that do not change a measurement


@dataclass
class Section:
    """One metric's measurements, remarks and pictures.

    A measurement is a dict of its value, interval, protocol and n, how many images (or pairs, or chains) it rests on.
    Every text is made printable on its way in: the name of a file or an error may hold what is no UTF-8.
    """

    name: str
    directory: Path  # of the pictures
    results: dict[str, dict] = field(default_factory=dict)  # measurements by name, or by table, row and column
    notes: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # reasons, by what is absent
    pictures: dict[str, str] = field(default_factory=dict)  # captions, by the file's name without .png

    def add(
        self, name: str, value: float, n: int, protocol: str, interval: Interval | None = None, at: tuple = ()
    ) -> None:
        """A measurement; ``at`` is its row and column in the table ``name``. One that is not finite is absent."""
        if not math.isfinite(value):
            self.add_absent(" ".join((name, *at)), f"the result is {float(value)}")
            return
        *place, last = (printable(text, "utf-8") for text in (name, *at))
        line = self.results
        for text in place:
            line = line.setdefault(text, {})
        line[last] = {"value": float(value), "interval": interval, "n": n, "protocol": printable(protocol, "utf-8")}

    def add_mean(self, name: str, values: Tensor, protocol: str, at: tuple = ()) -> None:
        """The mean of one value an image, (N,), with its bootstrap interval."""
        values = values.double()
        self.add(name, values.mean().item(), len(values), protocol, bootstrap(Tensor.mean, values), at)

    def add_proportion(self, name: str, true: Tensor, protocol: str, at: tuple = ()) -> None:
        """The share of images, bool (N,), with its Wilson interval: 0 of 100 may be 3 %."""
        from scipy.stats import binomtest  # slow to import

        share = binomtest(int(true.sum()), len(true))
        self.add(name, share.statistic, share.n, protocol, share.proportion_ci(method="wilson"), at)

    def note(self, text: str) -> None:
        self.notes.append(printable(text, "utf-8"))

    def add_absent(self, what: str, reason: str) -> None:
        """Something that could not be measured, and why; the terminal says it at once."""
        self.absent[printable(what, "utf-8")] = printable(reason, "utf-8")
        print(printable(f"  {what}: absent, {reason}"), flush=True)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Call ``measure``, in all processes; if it fails, ``what``, or the rest of it, is absent, and no error."""
        distributed.raise_on_all_ranks(lambda: None)  # what has failed before, in another process, is no fault of this
        n_before = len(self.measurements())
        try:
            with evaluation_packages():
                distributed.raise_on_all_ranks(measure)
            return
        except UserError as error:
            reason = str(error)
        except Exception as error:
            if distributed.lost_connection(error):
                raise
            if out_of_memory(error):
                reason = "not enough memory: measure fewer images (--max_images, --attack_images, --n_samples)"
            else:
                reason = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        self.add_absent(what if len(self.measurements()) == n_before else f"the rest of {what}", reason)

    def picture(self, name: str, caption: str, content: Any) -> None:
        """Save a figure of Matplotlib or an array, an RGB picture (H, W, 3) uint8, as ``name``.png; blanks become _."""
        name = name.replace(",", "").replace(" ", "_")
        path = self.directory / f"{name}.png"
        with warn_on_error(f"{path} could not be drawn"):
            if distributed.current_world().rank == 0:
                save_png(path, content)
            self.pictures[name] = printable(caption, "utf-8")

    def measurements(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Measurements by table, row and column."""
        found = {}
        for name, item in self.results.items():
            alone = isinstance(item.get("protocol"), str)  # a row of a table may have this name, too
            table, rows = (ALONE, {name: {VALUE: item}}) if alone else (name, item)
            found |= {(table, row, column): cell for row, line in rows.items() for column, cell in line.items()}
        return found


def bootstrap(statistic: Callable[..., Any], *groups: Tensor, replicates: int = 1000) -> Interval:
    """95 % interval of ``statistic(*groups)`` when each group (N_i,) is drawn again, with replacement, on its own."""
    rng, groups, drawn = torch.Generator().manual_seed(0), [group.cpu() for group in groups], []
    for _ in range(replicates):
        drawn.append(float(statistic(*(g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups))))
    return tuple(np.quantile(drawn, [0.025, 0.975]).tolist())


class Report:
    """Facts about an evaluation, and its sections so far, whose pictures lie in ``directory``.

    header: "about", "options" and "environment", each a dict. ``other``: another run's report, to be shown beside.
    """

    def __init__(self, directory: Path, header: dict[str, dict], other: "Report | None" = None):
        self.directory, self.other, self.header = directory, other, {}
        for name, part in header.items():
            self.header[name] = {k: printable(v, "utf-8") if isinstance(v, str) else v for k, v in part.items()}
        self.sections: dict[str, Section] = {}

    def write_files(self) -> None:
        """Bring the files up to date; called after each metric, also after one that was stopped."""
        content = self.header | {n: {part: getattr(s, part) for part in IN_FILE} for n, s in self.sections.items()}
        replace_file(self.directory / "results.json", f"{json.dumps(content, indent=2)}\n".encode())
        replace_file(self.directory / "report.md", render(self, "report.md", finalize=markdown_text).encode())
        replace_file(self.directory / "report.html", render(self, "report.html").encode())  # pictures inside


def read_report(place: str) -> Report:
    """The report in an eval folder, or the newest of a run directory, in ``eval``, ``eval-2``, ...

    Raises UserError if there is none, or if its results.json cannot be read. A picture that is missing is left out.
    """
    names = ["", *glob.glob("eval*", root_dir=place)]
    found = [path for path in (Path(place, name, "results.json") for name in names) if os.path.isfile(path)]
    if not found:
        raise UserError(f"--compare {place}: no results.json there or in its folder eval; --mode test writes one")
    path = max(found, key=os.path.getmtime)
    try:
        content = json.loads(path.read_text("utf-8"))
        report = Report(path.parent, {name: content[name] for name in ("about", "options", "environment")})
        for name in filter(content.get, METRICS):
            section = report.sections[name] = Section(name, path.parent, **content[name])
            shown = section.pictures.items()
            section.pictures = {p: text for p, text in shown if os.access(path.with_name(f"{p}.png"), os.R_OK)}
        render(report, "report.html").encode()  # here what cannot be shown is one line
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UndefinedError):
        raise UserError(f"--compare {path} is broken, or not from --mode test: measure that run again") from None
    return report


class Table(NamedTuple):
    title: str
    columns: list[str]
    lines: list[list[str]]


def render(report: Report, name: str, **options: Any) -> str:
    """The file ``name`` of a report, from its template."""
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **options)
    env.trim_blocks = env.lstrip_blocks = env.keep_trailing_newline = True
    env.globals |= {f.__name__: f for f in (facts, changed_options, runs_of, protocols, tables, unique, printable)}
    env.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return env.get_template(f"{name}.jinja").render(report=report)


def markdown_text(value: Any) -> Markup:
    """A text with nothing in it that a viewer takes for HTML; what is Markup already has been through this."""
    return value if isinstance(value, Markup) else Markup(str(value).replace("&", "&amp;").replace("<", "&lt;"))


def facts(report: Report) -> Table:
    """What was measured and with which program."""
    runs = [run.header["about"] | run.header["environment"] for run in (report, report.other) if run]
    return Table("", ["", *RUNS[: len(runs)]], [[name, *(run.get(name, "") for run in runs)] for name in unique(runs)])


def changed_options(report: Report) -> Table:
    mine, others = report.header["options"], report.other.header["options"]
    names = [name for name in mine if name in others and mine[name] != others[name] and name not in NOT_SHOWN]
    return Table("options that differ", ["option", *RUNS], [[f"--{n}", str(mine[n]), str(others[n])] for n in names])


def runs_of(report: Report, name: str) -> dict[str, Section]:
    """A section of this run and, if it has been measured there, of the other, by which run it is."""
    pair = dict(zip(RUNS, (report, report.other), strict=True))
    return {run: r.sections[name] for run, r in pair.items() if r and name in r.sections}


def protocols(report: Report, name: str) -> dict[str, str]:
    """The protocols of a section, each with the sign that stands for it in the tables."""
    sections = runs_of(report, name).values()
    texts = unique([m["protocol"] for m in section.measurements().values()] for section in sections)
    return {text: f"({i})" for i, text in enumerate(texts, 1)}


def tables(report: Report, name: str) -> list[Table]:
    """A section's tables; a line ends with how many images it rests on and the signs of its protocols.

    Beside another run, a line holds one measurement of each, and a mark if these were made in another way.
    """
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for run, section in runs_of(report, name).items():
        for (table, row, column), measurement in section.measurements().items():
            if report.other:
                row, column = (row if table == ALONE else f"{row}, {column}"), run
            found.setdefault(table, {}).setdefault(row, {})[column] = measurement
    same_images = report.other and report.header["about"]["images"] == report.other.header["about"].get("images")
    signs, filled = protocols(report, name), []
    for table, rows in found.items():
        columns, lines = (list(RUNS) if report.other else unique(rows.values())), []
        for row, cells in rows.items():
            n = unique([str(m["n"])] for m in cells.values())
            sign = unique([signs[m["protocol"]]] for m in cells.values())
            shown = [value_and_interval(**cells[column]) if column in cells else "" for column in columns]
            if report.other and len(cells) == 2 and not (same_images and len(n) == len(sign) == 1):
                shown[1] += " ≠"
            lines.append([row, *shown, " / ".join(n), " / ".join(sign)])
        filled.append(Table(table, ["", *columns, "n", "protocol"], lines))
    return filled


def value_and_interval(value: float, interval: Interval | None, n: int, protocol: str) -> str:
    """A measurement in words."""
    shown, *ends = (f"{x:.4g}" if abs(x) < 9999.5 else f"{x:.1f}" for x in (value, *(interval or ())))
    return f"{shown} [{', '.join(ends)}]" if ends else shown


def unique(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every text once, in the order of their first appearance."""
    return list(dict.fromkeys(text for group in groups for text in group))
