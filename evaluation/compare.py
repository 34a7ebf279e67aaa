"""``--compare``: the report of another evaluation, read back from its results.json."""

import json
import os
import re
from pathlib import Path

from config.options import METRICS
from evaluation.report import ALONE, VALUE, Measurement, Report
from utils import UserError


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
        report = Report(folder, {name: dict(content[name]) for name in ("about", "options", "environment")})
        for name in filter(content.get, METRICS):
            read_section(report, name, content[name])
    except OSError as error:
        raise UserError(f"--compare cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"--compare {path} is broken, or not from --mode test: measure that run again") from None
    return report


def read_section(report: Report, name: str, content: dict[str, dict]) -> None:
    """The section that ``as_dict`` has made this content of."""
    section = report.section(name)
    for title, item in content["results"].items():
        alone = isinstance(item.get("protocol"), str)  # a table's row of this name would be a dict
        table, rows = (ALONE, {title: {VALUE: item}}) if alone else (title, item)
        for row, line in rows.items():
            for column, cell in line.items():
                interval = cell["interval"]
                if interval is not None:
                    low, high = interval
                    interval = float(low), float(high)
                measurement = Measurement(float(cell["value"]), interval, int(cell["n"]), str(cell["protocol"]))
                section.measurements[table, row, column] = measurement
    section.notes, section.absent = list(content["notes"]), dict(content["absent"])
    for picture, caption in content["pictures"].items():
        if re.fullmatch(r"[\w-]+", picture) and os.access(report.directory / f"{picture}.png", os.R_OK):
            section.pictures[picture] = str(caption)
