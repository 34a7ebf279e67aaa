"""What a report says, in the order in which it says it: ``markdown.py`` and ``html.py`` only write it down."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from config import Config
from evaluation.report import Measurement, Report, Section
from utils import printable

Rows = dict[str, dict[str, Measurement]]  # numbers by row and column

RUNS = ("this run", "other run")  # the second is that of --compare
DIFFERS = "≠"
OTHER_FILE = "other_"  # how the names of the other run's pictures begin


class Table(NamedTuple):
    """Rows of as many cells as the header has; a header of empty texts is not shown."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Items(NamedTuple):
    """A list of texts."""

    lines: list[str]


class Remark(NamedTuple):
    """A paragraph, in which ``**words**`` are bold."""

    text: str


class Absent(NamedTuple):
    """Something that could not be measured."""

    what: str
    reason: str


class Picture(NamedTuple):
    """A PNG file in the report's directory."""

    file: str
    name: str
    caption: str


class Pictures(NamedTuple):
    """Pictures side by side: one, or that of each run."""

    pictures: list[Picture]


Block = Table | Items | Remark | Absent | Pictures


class Chapter(NamedTuple):
    title: str
    blocks: list[Block]


class Document(NamedTuple):
    """The report: facts about the run, then a chapter for each section."""

    title: str
    blocks: list[Block]
    chapters: list[Chapter]


def document(report: Report) -> Document:
    """The report so far; all of its texts are printable."""
    runs = [report, *([report.other] if report.other else [])]
    blocks: list[Block] = [Table("", ("", *RUNS) if report.other else ("", ""), facts(runs))]
    if report.other:
        blocks += differences(report, report.other)
    alike = same_images(runs)
    chapters = [
        chapter(name, [run.sections.get(name, Section(name, run.directory)) for run in runs], alike)
        for name in report.sections
    ]
    return readable(Document("Evaluation", blocks, chapters))


def facts(runs: list[Report]) -> list[tuple[str, ...]]:
    """What was measured and with which program: a row for each fact, a column for each run."""
    names = {"device": "device", "git_commit": "version of the program (git commit)", "command": "command"}
    columns = [
        run.header["about"] | {text: run.header["environment"].get(name, "unknown") for name, text in names.items()}
        for run in runs
    ]
    return [(name, *(str(column.get(name, "")) for column in columns)) for name in union(columns)]


def differences(report: Report, other: Report) -> list[Block]:
    """The options that the two runs were measured with and that differ, and what a marked number means."""
    mine, others = report.header["options"], other.header["options"]
    names = [
        f.name
        for f in fields(Config)
        if f.metadata["group"] != "run" and f.name != "compare" and f.name in mine.keys() & others.keys()
    ]
    rows = [(f"--{name}", str(mine[name]), str(others[name])) for name in names if mine[name] != others[name]]
    blocks: list[Block] = [Table("options that differ", ("option", *RUNS), rows)] if rows else []
    blocks.append(
        Remark(
            f"{DIFFERS} marks a number of the other run that was measured in another way: on other images, on another "
            "number of them, or under another protocol. If n or protocol differ, the value of this run comes first."
        )
    )
    if missing := [name for name in other.sections if name not in report.sections]:
        blocks.append(Remark(f"Measured in the other run only: {', '.join(missing)}."))
    return blocks


def same_images(runs: list[Report]) -> bool:
    """Whether all runs were measured on the same data set, as far as their options say."""
    options = [run.header["options"] for run in runs]
    names = ("dataset", "image_size", *(["data_dir"] if options[0].get("dataset") == "folder" else []))
    return all(option.get(name) == options[0].get(name) for option in options for name in names)


def chapter(name: str, runs: list[Section], alike: bool) -> Chapter:
    """One metric: the section of this run and, where it is compared, that of the other run.

    alike: whether both were measured on the same images.
    """
    protocols = union([number.protocol for number in run.scalars().values()] for run in runs)
    signs = {protocol: f"({i})" for i, protocol in enumerate(protocols, 1)}
    blocks: list[Block] = []
    single = [{name: {"value [95 % interval]": number} for name, number in run.numbers.items()} for run in runs]
    if any(single):
        blocks.append(grid("", "measure", single, signs, alike))
    for title in union(run.tables for run in runs):
        blocks.append(grid(title, "", [run.tables.get(title, {}) for run in runs], signs, alike))
    if signs:
        blocks.append(Items([f"{sign} {protocol}" for protocol, sign in signs.items()]))
    for run, whose in zip(runs, ("", "Other run: "), strict=False):
        blocks += [Remark(whose + text) for text in run.notes]
        blocks += [Absent(whose + what, reason) for what, reason in run.absent.items()]
    if not all(run.numbers or run.tables or run.absent for run in runs[1:]):
        blocks.append(Remark("The other run has no results for this metric."))
    blocks += [Pictures(side_by_side(name, runs)) for name in union(run.pictures for run in runs)]
    return Chapter(name, blocks)


def grid(title: str, corner: str, runs: list[Rows], signs: dict[str, str], alike: bool) -> Table:
    """Numbers as a table, those of the runs in neighbouring columns.

    Behind them how many images each row rests on, and the signs of its protocols.
    """
    columns = union(line for run in runs for line in run.values())
    names = [f"{column}, {run}" for column in columns for run in RUNS] if len(runs) > 1 else columns
    rows = []
    for row in union(runs):
        lines = [run.get(row, {}) for run in runs]
        numbers = [shown(line.get(column), lines[0].get(column), alike) for column in columns for line in lines]
        n = [", ".join(union([str(x.n)] for x in line.values())) for line in lines]
        protocol = [" ".join(union([signs[x.protocol]] for x in line.values())) for line in lines]
        rows.append((row, *numbers, both(n), both(protocol)))
    return Table(title, (corner, *names, "n", "protocol"), rows)


def shown(number: Measurement | None, mine: Measurement | None, alike: bool) -> str:
    """A number; marked if this run's number ``mine``, to be compared with it, was measured in another way."""
    if number is None:
        return ""
    same = alike and mine is not None and (number.n, number.protocol) == (mine.n, mine.protocol)
    return str(number) if number is mine or mine is None or same else f"{number} {DIFFERS}"


def both(texts: list[str]) -> str:
    """One text where all are the same, else all of them."""
    return texts[0] if len(set(texts)) == 1 else " / ".join(text or "–" for text in texts)


def side_by_side(name: str, runs: list[Section]) -> list[Picture]:
    prefixes = (("", ""), (OTHER_FILE, "Other run: "))
    return [
        Picture(f"{file}{name}.png", name, f"{whose}{run.pictures[name]}.")
        for run, (file, whose) in zip(runs, prefixes, strict=False)
        if name in run.pictures
    ]


def union(keys: Iterable[Iterable[str]]) -> list[str]:
    """Every key once, in the order of their first appearance."""
    return list(dict.fromkeys(key for part in keys for key in part))


def readable(value: Any) -> Any:
    """The same tuples and lists with each line of every text printable."""
    if isinstance(value, str):
        return "\n".join(printable(line, "utf-8") for line in value.split("\n"))
    parts = [readable(part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
