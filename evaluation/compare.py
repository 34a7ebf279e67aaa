"""``--compare``: the report of another evaluation, read back from its results.json."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from config.options import METRICS
from evaluation.report import Measurement, Report, Section
from utils import UserError


def read_report(place: str) -> Report:
    """The report in an eval folder, or in the folder ``eval`` of a run directory.

    Raises UserError if there is none, or if its results.json cannot be read. A picture that is missing is absent.
    """
    folder = next((f for f in (Path(place), Path(place, "eval")) if os.path.isfile(f / "results.json")), None)
    if folder is None:
        raise UserError(
            f"--compare {place}: no results.json there or in its folder eval; name a run that --mode test has "
            "measured, or one of its eval folders"
        )
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        report = Report(folder, {name: of_type(dict, content[name]) for name in ("about", "options", "environment")})
        for name in METRICS:
            if name in content:
                fill(report.section(name), content[name])
    except OSError as error:
        raise UserError(f"--compare cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"--compare {path} is broken, or not from --mode test: measure that run again") from None
    return report


def fill(section: Section, content: dict[str, Any]) -> None:
    """Put into a section what ``as_dict`` has made of it."""
    for name, item in content["results"].items():
        if isinstance(item.get("protocol"), str):  # a table's row of this name would be a dict
            section.numbers[name] = number_of(item)
        else:
            section.tables[name] = {
                row: {column: number_of(cell) for column, cell in line.items()} for row, line in item.items()
            }
    section.notes = [of_type(str, note) for note in content["notes"]]
    section.absent = {what: of_type(str, reason) for what, reason in content["absent"].items()}
    for name, caption in content["pictures"].items():
        if is_picture(section.directory, name):
            section.pictures[name] = of_type(str, caption)
        else:
            section.absent[f"picture {name}"] = "its file is missing or broken"


def number_of(item: dict[str, Any]) -> Measurement:
    value, interval = float(of_type(int | float, item["value"])), item["interval"]
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    if interval is not None:
        low, high = (float(of_type(int | float, end)) for end in interval)
        interval = low, high
    return Measurement(value, interval, of_type(int, item["n"]), of_type(str, item["protocol"]))


def of_type(kind: Any, value: Any) -> Any:
    """The value; raises TypeError if it is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value


def is_picture(folder: Path, name: str) -> bool:
    """Whether ``folder`` holds a whole PNG file of this name, which must be a plain word."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        return False
    try:
        with Image.open(folder / f"{name}.png", formats=["PNG"]) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
