"""A report's files: results.json, also read back for --compare; report.md and report.html from a template each."""

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from config.options import METRICS
from evaluation.report import ALONE, VALUE, Measurement, Report, Section
from logger.files import replace_file
from utils import UserError

RUNS = ("this run", "other run")
NOT_SHOWN = ("mode", "logdir", "note", "no_log", "load_ckpt", "compare")  # options that do not change a measurement


class Table(NamedTuple):
    title: str
    columns: list[str]
    lines: list[list[str]]


def write_files(report: Report) -> None:
    """Bring the files up to date; called after each metric, so that an interrupted evaluation leaves its part."""
    results, markdown = (
        json.dumps(report.as_dict(), indent=2),
        render(report, "report.md.jinja", finalize=markdown_text),
    )
    replace_file(report.directory / "results.json", f"{results}\n".encode())
    replace_file(report.directory / "report.md", markdown.encode())
    replace_file(report.directory / "report.html", render(report, "report.html.jinja").encode())  # pictures inside


def render(report: Report, template: str, **options: Any) -> str:
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **options)
    env.trim_blocks = env.lstrip_blocks = env.keep_trailing_newline = True
    env.globals |= {f.__name__: f for f in (facts, changed_options, runs_of, protocols, tables, unique)}
    env.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return env.get_template(template).render(report=report)


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
    pair = {RUNS[0]: report, RUNS[1]: report.other}
    return {run: r.sections[name] for run, r in pair.items() if r and name in r.sections}


def protocols(report: Report, name: str) -> dict[str, str]:
    """The protocols of a section, each with the sign that stands for it in the tables."""
    texts = unique([m.protocol for m in section.measurements.values()] for section in runs_of(report, name).values())
    return {text: f"({i})" for i, text in enumerate(texts, 1)}


def tables(report: Report, name: str) -> list[Table]:
    """A section's tables; a line ends with how many images it rests on and the signs of its protocols.

    Beside another run, a line holds one measurement of each, and a mark if these were made in another way.
    """
    found: dict[str, dict[str, dict[str, Measurement]]] = {}
    for run, section in runs_of(report, name).items():
        for (table, row, column), measurement in section.measurements.items():
            if report.other:
                row, column = (row if table == ALONE else f"{row}, {column}"), run
            found.setdefault(table, {}).setdefault(row, {})[column] = measurement
    same_images = report.other and report.header["about"]["data set"] == report.other.header["about"].get("data set")
    signs, filled = protocols(report, name), []
    for table, rows in found.items():
        columns, lines = (list(RUNS) if report.other else unique(rows.values())), []
        for row, cells in rows.items():
            n = unique([str(m.n)] for m in cells.values())
            sign = unique([signs[m.protocol]] for m in cells.values())
            line = [row, *(str(cells.get(column, "")) for column in columns), " / ".join(n), " / ".join(sign)]
            if report.other and len(cells) == 2 and not (same_images and len(n) == len(sign) == 1):
                line[2] += " ≠"
            lines.append(line)
        filled.append(Table(table, ["", *columns, "n", "protocol"], lines))
    return filled


def unique(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every text once, in the order of their first appearance."""
    return list(dict.fromkeys(text for group in groups for text in group))


def read_report(place: str) -> Report:
    """The report in an eval folder, or in the folder ``eval`` of a run directory.

    Raises UserError if there is none, or if its results.json cannot be read. A picture that is missing is left out.
    """
    folder = next((f for f in (Path(place), Path(place, "eval")) if os.path.isfile(f / "results.json")), None)
    if folder is None:
        raise UserError(f"--compare {place}: no results.json there or in its folder eval; --mode test writes one")
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        report = Report(folder, {name: content[name] for name in ("about", "options", "environment")})
        for name in filter(content.get, METRICS):
            read_section(report, name, content[name])
        render(report, "report.html.jinja")  # here what cannot be shown is one line
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--compare {path} is broken, or not from --mode test: measure that run again") from None
    return report


def read_section(report: Report, name: str, content: dict[str, dict]) -> None:
    """The section that ``as_dict`` has made this content of."""
    section = report.section(name)
    for title, item in content["results"].items():
        table, rows = (ALONE, {title: {VALUE: item}}) if "protocol" in item else (title, item)
        cells = [(row, column, cell) for row, line in rows.items() for column, cell in line.items()]
        section.measurements |= {(table, row, column): Measurement(**cell) for row, column, cell in cells}
    section.notes, section.absent = content["notes"], content["absent"]
    shown, at = content["pictures"].items(), report.directory
    section.pictures = {name: text for name, text in shown if os.access(at / f"{name}.png", os.R_OK)}
