"""The terminal is not essential: whatever happens to stdout and stderr, a run goes on."""

import os
import sys
from typing import Any, TextIO


class Forgiving:
    """A text stream whose errors are ignored: a closed pipe, a full disk behind it. After the first it is silent."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._silence()

    def _silence(self) -> None:
        """Let all that follows, and what is still in the buffer, go nowhere."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # it has no descriptor
            self._stream = open(os.devnull, "w")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> None:
    """Make stdout and stderr forgiving; what their encoding lacks is printed as an escape sequence."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where the descriptor was closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Forgiving(stream))


def leave(status: int, at_once: bool = False) -> None:
    """End the process. With ``at_once``, and after Ctrl-C, do not wait for other threads.

    A thread in the middle of torch.save would abort the process while Python ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once or status == 130:
        os._exit(status)
    sys.exit(status)
