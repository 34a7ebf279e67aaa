"""The exceptions that cross module borders."""


class UserError(Exception):
    """Something the user can mend: a bad option, a missing or broken input, a full disk.

    The message is one line that names the thing and says how to mend it. ``main.py`` prints it on stderr and
    exits with status 2; nothing has been overwritten when it is raised.
    """


class TrainingFailed(Exception):
    """Training cannot go on; ``main.py`` prints the message and exits with status 1."""
