"""The files of a report: results.json, report.md, report.html, and the same for TensorBoard."""

import json

import numpy as np
from PIL import Image

from evaluation.content import OTHER_FILE, document
from evaluation.html import html
from evaluation.markdown import markdown
from evaluation.report import Report
from logger.files import disk_errors, replace_file
from logger.metrics_log import tensorboard_writer


def write_files(report: Report) -> None:
    """Bring the files up to date; called after each metric, so that an interrupted evaluation leaves its part."""
    with disk_errors(report.directory):
        content = document(report)
        texts = {
            "results.json": json.dumps(report.as_dict(), indent=2) + "\n",
            "report.md": markdown(content),
            "report.html": html(content, report.directory),
        }
        for name, text in texts.items():
            replace_file(report.directory / name, text.encode())


def copy_pictures(report: Report, names: list[str]) -> None:
    """Put the other run's pictures of these sections beside this run's, so that the report stays whole by itself."""
    with disk_errors(report.directory):
        for name in names:
            section = report.other.sections.get(name)
            for picture in section.pictures if section else ():
                content = (section.directory / f"{picture}.png").read_bytes()
                replace_file(report.directory / f"{OTHER_FILE}{picture}.png", content)


def to_tensorboard(report: Report, step: int) -> None:
    with disk_errors(report.directory), tensorboard_writer(report.directory) as board:
        board.add_text("report", markdown(document(report)), step)
        for name, section in report.sections.items():
            for key, number in section.scalars().items():
                board.add_scalar(f"{name}/{key}", number.value, step)
            for picture in section.pictures:
                with Image.open(report.directory / f"{picture}.png") as image:
                    pixels = np.asarray(image.convert("RGB"))
                board.add_image(f"{name}/{picture}", pixels, step, dataformats="HWC")
