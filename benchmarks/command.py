"""What the scripts of this folder do with bad input."""

import sys
from collections.abc import Callable

import torch

from utils import UserError, pick_device


def device_named(name: str) -> torch.device:
    """The device of ``--device``: cpu, cuda, or cuda:N; raises UserError if there is none such."""
    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no CUDA device; cpu is there")
    if name != "cpu" and not (kind == "cuda" and (index or "0").isdecimal()):
        raise UserError(f"--device takes cpu, cuda or cuda:N, not {name!r}")
    return pick_device("cpu" if name == "cpu" else index or "0")


def run_script(main: Callable[[], None]) -> None:
    """Run a script; a UserError is one line on stderr and exit status 2, as of the program itself."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
