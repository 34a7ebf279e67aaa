"""A report as Markdown, which also reads well as plain text."""

from evaluation.content import Absent, Block, Document, Items, Picture, Pictures, Remark, Table


def markdown(document: Document) -> str:
    """The text of report.md; its pictures lie beside it."""
    parts = [f"# {document.title}", *map(text_of, document.blocks)]
    for chapter in document.chapters:
        parts += [f"## {chapter.title}", *map(text_of, chapter.blocks)]
    return "\n\n".join(parts) + "\n"


def text_of(block: Block) -> str:
    match block:
        case Table():
            return f"**{escaped(block.title)}**\n\n{table(block)}" if block.title else table(block)
        case Items():
            return "\n".join(f"- {escaped(line)}" for line in block.lines)
        case Remark():
            return escaped(block.text)
        case Absent():
            return f"*Absent: {escaped(block.what)}* — {escaped(block.reason)}"
        case Pictures([picture]):
            return f"{image(picture)}\n\n{escaped(picture.caption)}"
        case Pictures(pictures):
            return table(Table("", tuple(map(image, pictures)), [tuple(picture.caption for picture in pictures)]))


def image(picture: Picture) -> str:
    return f"![{escaped(picture.name)}]({picture.file})"


def table(block: Table) -> str:
    lines = [map(cell, block.header), ["---"] * len(block.header), *(map(cell, row) for row in block.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    return escaped(text).replace("|", "\\|").replace("\n", " ")


def escaped(text: str) -> str:
    """The text with nothing in it that a viewer takes for HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
