"""What a report says, in the order in which it says it: ``markdown.py`` and ``html.py`` only write it down."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from evaluation.report import Number, Report, Section
from utils import printable

Rows = dict[str, dict[str, Number]]  # numbers by row and column


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


Block = Table | Items | Remark | Absent | Picture


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
    table = Table("", ("", ""), list(facts(report).items()))
    return readable(Document("Evaluation", [table], [chapter(section) for section in report.sections.values()]))


def facts(report: Report) -> dict[str, str]:
    """What was measured, and with which program."""
    names = {"device": "device", "git_commit": "version of the program (git commit)", "command": "command"}
    environment = report.header["environment"]
    return report.header["about"] | {text: str(environment[name]) for name, text in names.items()}


def chapter(section: Section) -> Chapter:
    protocols = dict.fromkeys(number.protocol for number in section.scalars().values())
    signs = {protocol: f"({i})" for i, protocol in enumerate(protocols, 1)}
    blocks: list[Block] = []
    if section.numbers:
        numbers = {name: {"value [95 % interval]": number} for name, number in section.numbers.items()}
        blocks.append(grid("", "measure", numbers, signs))
    blocks += [grid(name, "", rows, signs) for name, rows in section.tables.items()]
    if signs:
        blocks.append(Items([f"{sign} {protocol}" for protocol, sign in signs.items()]))
    blocks += [Remark(text) for text in section.notes]
    blocks += [Absent(what, reason) for what, reason in section.absent.items()]
    blocks += [Picture(f"{name}.png", name, f"{caption}.") for name, caption in section.pictures.items()]
    return Chapter(section.name, blocks)


def grid(title: str, corner: str, rows: Rows, signs: dict[str, str]) -> Table:
    """Numbers as a table; behind them how many images each row rests on, and the signs of its protocols."""
    columns = union(rows.values())
    lines = []
    for row, numbers in rows.items():
        n = ", ".join(dict.fromkeys(str(x.n) for x in numbers.values()))
        protocol = " ".join(dict.fromkeys(signs[x.protocol] for x in numbers.values()))
        lines.append((row, *(str(numbers.get(column, "")) for column in columns), n, protocol))
    return Table(title, (corner, *columns, "n", "protocol"), lines)


def union(keys: Iterable[Iterable[str]]) -> list[str]:
    """Every key once, in the order of their first appearance."""
    return list(dict.fromkeys(key for part in keys for key in part))


def readable(value: Any) -> Any:
    """The same tuples and lists with each line of every text printable."""
    if isinstance(value, str):
        return "\n".join(printable(line, "utf-8") for line in value.split("\n"))
    parts = [readable(part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
