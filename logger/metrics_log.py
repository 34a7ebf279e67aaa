"""What a run measures and when: metrics.jsonl, and the same in TensorBoard."""

import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from logger.files import disk_errors
from utils import UserError

PATIENCE = 100  # steps
TOLD_APART = 0.95  # AUROC of real images against samples by log p(x); 0.5 is a balance, 0 the opposite error
BEHIND = "chains do not reach what the loss calls likely; --sgld_step_max, more --sgld_step or --start class_gaussian"
AHEAD = "chains climb faster than the loss pushes down; a smaller --sgld_lr, or --sgld_grad_clamp with --sgld_clamp"


def tensorboard_writer(directory: Path, purge_step: int):
    """A SummaryWriter. Disk errors of its background thread are raised at the next call, and not printed as well."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    threading.excepthook = lambda a: type(a.thread).__name__ == "_AsyncWriterThread" or threading.__excepthook__(a)
    try:
        return SummaryWriter(str(directory), purge_step=purge_step)
    except UnicodeEncodeError:
        raise UserError(f"{directory} is not valid UTF-8; rename it, or give --no_log: TensorBoard needs it") from None


class Log:
    """metrics.jsonl (one object a line) and, unless switched off, the same in TensorBoard's event file.

    Lines of measurements carry "step" and the values; lines of events carry "step", "event" and a message. The file
    is opened for each line, so that another takes its place if somebody removes it.
    """

    def __init__(self, directory: Path, tensorboard: bool, position: int = 0, step: int = 0):
        """Continue at byte ``position`` of metrics.jsonl and at ``step``: what lies behind them is cut."""
        self.path = directory / "metrics.jsonl"
        with disk_errors(directory):
            self.path.touch()
            whole = self.path.read_bytes()[:position].rfind(b"\n") + 1  # a file that lost its end may stop in a line
            os.truncate(self.path, whole)
            self.board = tensorboard_writer(directory, step + 1) if tensorboard else None

    def values(self, step: int, values: dict[str, float | list[int]]) -> None:
        """Scalars; a list holds how often each of K classes occurred, in TensorBoard a histogram."""
        with disk_errors(self.path):
            self._line({"step": step, **values})
            if self.board:
                for name, value in values.items():
                    if isinstance(value, list):
                        classes = np.repeat(np.arange(len(value)), value)
                        self.board.add_histogram(name, classes, step, bins=np.arange(len(value) + 1) - 0.5)
                    else:
                        self.board.add_scalar(name, value, step)

    def _line(self, content: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(plain) + "\n")

    def event(self, step: int, kind: str, message: str, **further: int) -> None:
        """What happened at ``step``, in words."""
        with disk_errors(self.path):
            self._line({"step": step, "event": kind, **further, "message": message})
            if self.board:
                self.board.add_text(f"event/{kind}", message, step)

    def recovery(self, step: int, back_to: int, message: str) -> None:
        """Training diverged at ``step``; the measurements after ``back_to`` no longer count (see ``read_log``)."""
        if self.board:
            with disk_errors(self.path):
                self.board.close()
                self.board = tensorboard_writer(self.path.parent, back_to + 1)
        self.event(step, "recovery", message, back_to=back_to)

    def image(self, step: int, name: str, encoded: bytes) -> None:
        """A PNG or GIF file's bytes; TensorBoard plays a GIF."""
        if self.board:
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(height=1, width=1, encoded_image_string=encoded)  # is shown in its own size
            self.board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def flush(self) -> int:
        """Have all of it on disk; returns the length of metrics.jsonl in bytes."""
        with disk_errors(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())
            if self.board:
                self.board.flush()
            return file.tell()

    def close(self) -> None:
        if self.board:
            with disk_errors(self.path):
                self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that count.

    Left out are a last line that was cut short, lines that somebody has damaged, and the measurements behind which a
    recovery went back. The file only grows, so that a checkpoint's position in it stays true.
    """
    lines = []
    for text in path.read_text(errors="replace").splitlines(keepends=True):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            line = json.loads(text if text.endswith("\n") else "")
            if not isinstance(line["step"], int):
                continue
            if "back_to" in line:
                lines = [before for before in lines if "event" in before or before["step"] <= line["back_to"]]
            lines.append(line)
    return lines


class Balance:
    """Whether chains keep up with the loss, by ``sgld/auroc`` in a run's log; lines before a resume are read again."""

    def __init__(self, lines: list[dict[str, Any]]):
        self.balanced_at = 0  # step
        self.warning = ""  # that is due since then
        for line in lines:
            self.add(line["step"], line)

    def add(self, step: int, values: dict[str, Any]) -> str:
        """The warning that is due after a line of the log, or an empty text; one for each time that it gets so far."""
        auroc = values.get("sgld/auroc")
        if auroc is None:
            return ""
        if 1 - TOLD_APART <= auroc <= TOLD_APART:
            self.balanced_at, self.warning = step, ""
        if step - self.balanced_at < PATIENCE or self.warning:
            return ""
        why = BEHIND if auroc > 0.5 else AHEAD
        self.warning = f"log p(x) tells samples from real images (AUROC {auroc:.2f}, {PATIENCE} steps): {why} may help"
        return self.warning
