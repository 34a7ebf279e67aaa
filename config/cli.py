"""What an option is: its description in a dataclass, its checks, its place on the command line."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from utils import UserError


def option(
    default: Any,
    group: str,
    text: str,
    choices: tuple = (),
    minimum: float = -math.inf,
    maximum: float = 2**31 - 1,
    above: float = -math.inf,
    flags: tuple = (),
    path_but: tuple | None = None,
    off: bool = False,
) -> Any:
    """A dataclass field that carries what the command line and the checks need to know of it.

    ``minimum`` and ``maximum`` are allowed values, ``above`` is not. A step, a size or a factor beyond 2**31 - 1 would
    only overflow somewhere. ``path_but``: a value is the path of a file or folder, unless it is one of these words.
    ``off``: that word is the value None, which takes back what a recipe has set.
    """
    return field(
        default=default,
        metadata={
            "group": group,
            "help": text,
            "choices": choices,
            "minimum": minimum,
            "maximum": maximum,
            "above": above,
            "flags": flags,
            "path_but": path_but,
            "off": off,
        },
    )


def absolute_paths(config: type, options: dict[str, Any]) -> dict[str, str]:
    """Those options that are paths, with ~ expanded and from the root: they mean the same wherever they are read."""
    paths = {}
    for f in fields(config):
        path, words = options.get(f.name, ""), f.metadata["path_but"]
        if words is None or path in ("", *words):
            continue
        if "://" in path:
            raise UserError(f"--{f.name} {path} is not on this machine: mount it and give the folder, or copy it")
        try:
            paths[f.name] = os.path.abspath(Path(path).expanduser())
        except RuntimeError as error:  # no such user
            raise UserError(f"--{f.name} {path}: {error}") from None
    return paths


def check_value(f, value) -> None:
    """Raise UserError unless ``value`` is one that option ``f`` allows."""
    meta, name = f.metadata, f"--{f.name}"
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name} takes one of {', '.join(meta['choices'])}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value <= meta["above"]:
        raise UserError(f"{name} must be above {meta['above']:g}, not {value}")
    if value < meta["minimum"]:
        raise UserError(f"{name} must be at least {meta['minimum']:g}, not {value}")
    if value > meta["maximum"]:
        raise UserError(f"{name} must be at most {meta['maximum']:.10g}, not {value}")


def option_names(f) -> list[str]:
    """How option ``f`` is typed: a switch also as --no_NAME, which switches off what a recipe has switched on."""
    return [f"--{f.name}"] + ([f"--no_{f.name}"] if f.type is bool and not f.name.startswith("no_") else [])


def as_typed(name: str, value: Any) -> str:
    """An option with a value, as a command line has it."""
    if value is None:
        return f"the default --{name}"
    if value is False:
        return f"no --{name}" if name.startswith("no_") else f"--no_{name}"
    return f"--{name}" if value is True else f"--{name} {value}"


def or_off(kind: type) -> Callable[[str], Any]:
    """The type of a number that may be absent: "off" is None."""

    def parse(text: str) -> Any:
        return None if text == "off" else kind(text)

    parse.__name__ = kind.__name__  # argparse's messages name it
    return parse


class Switch(argparse.Action):
    """True by --NAME, False by --no_NAME."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Give a parser every option of the class Config, in its groups.

    Only options that were given appear in the parsed namespace, so that a resumed run can tell them from defaults.
    """
    names = dict.fromkeys(f.metadata["group"] for f in fields(config))
    groups = {name: parser.add_argument_group(name) for name in names}
    for f in fields(config):
        group, text = groups[f.metadata["group"]], f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            group.add_argument(*option_names(f), action=Switch, nargs=0, default=argparse.SUPPRESS, help=text)
            continue
        kind = next(t for t in (int, float, str) if t is f.type or f.type == t | None)
        if f.default not in (None, ""):
            text += f" (default: {f.default})"
        if f.metadata["off"]:
            text += "; the word off takes back a recipe's value"
        group.add_argument(
            *option_names(f),
            *f.metadata["flags"],
            type=or_off(kind) if f.metadata["off"] else kind,
            default=argparse.SUPPRESS,
            help=text,
            metavar="|".join(f.metadata["choices"]) or kind.__name__.upper(),
        )
