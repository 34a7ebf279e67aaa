"""A report as one HTML file: pictures inside, tables that sort, nothing loaded from anywhere."""

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from evaluation.content import Document


def html(document: Document, directory: Path) -> str:
    """The text of report.html. ``directory`` holds the document's pictures; raises OSError if one cannot be read."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    env.tests["instance_of"] = lambda block, name: type(block).__name__ == name
    env.filters["bold"] = bold
    template = env.get_template("report.html.jinja")
    return template.render(document=document, data_uri=lambda file: data_uri(directory / file)) + "\n"


def bold(text: str) -> Markup:
    """The text, escaped, with its ``**words**`` bold."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))


def data_uri(picture: Path) -> str:
    """A PNG file as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
