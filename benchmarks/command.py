"""What the scripts of this folder do with bad input."""

import sys
from collections.abc import Callable

from utils import UserError


def run_script(main: Callable[[], None]) -> None:
    """Run a script; a UserError is one line on stderr and exit status 2, as of the program itself."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
