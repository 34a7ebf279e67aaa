"""The terminal is not essential: whatever happens to stdout and stderr, a run goes on."""

import io
import os
import sys


class Forgiving(io.FileIO):
    """The file behind a text stream; what it cannot write is lost: a closed or full pipe, a full disk behind it."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content) or len(content)  # None: it would have to wait
        except OSError:
            return len(content)


def protect() -> None:
    """Make stdout and stderr forgiving; what their encoding lacks is printed as an escape sequence."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where the descriptor was closed
        file = io.BufferedWriter(Forgiving(os.dup(stream.fileno()), "w"))
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, errors="backslashreplace", line_buffering=True))


def leave(status: int, at_once: bool = False) -> None:
    """End the process. With ``at_once``, and after Ctrl-C, do not wait for other threads.

    A thread in the middle of torch.save would abort the process while Python ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once or status == 130:
        os._exit(status)
    sys.exit(status)
