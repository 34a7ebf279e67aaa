"""What an option is: its description in a dataclass, its value checked, its place on the command line."""

import argparse
import difflib
import math
import os
import re
from dataclasses import Field, field, fields
from typing import Any

from utils import UserError

PROPERTIES = {  # of an option, where its line in options.py does not say otherwise
    "minimum": -math.inf,  # allowed, as maximum is
    "maximum": 2**31 - 1,  # a larger step, size or factor would only overflow somewhere
    "above": -math.inf,  # not allowed itself
    "flags": (),  # short names
    "is_path": False,  # of a file or folder; choices are words that are no paths
    "resumable": False,  # a resumed run may change it: where or how long it goes on, what it writes
    "of_network": False,  # with another value it is another network
    "needs": (),  # it is not used unless one of these attributes of Config, NAME or NAME=VALUE, is set
}
KINDS = {bool: "no value, or True or False", int: "a whole number", float: "a number", str: "a text"}
SWITCH_VALUES = {"true": True, "1": True, "false": False, "0": False}


def option(group: str, default: Any, help: str, choices: tuple = (), *, modes: tuple, **properties: Any) -> Any:
    """A dataclass field with what the command line and the checks need to know; ``modes`` are those that read it."""
    known = {"group": group, "help": help, "choices": choices, "modes": modes}
    return field(default=default, metadata=PROPERTIES | properties | known)


def kind_of(f: Field) -> type:
    """The type of an option's values, apart from None."""
    return next(kind for kind in KINDS if f.type in (kind, kind | None))


def absolute_path(f: Field, value: Any) -> Any:
    """The value of an option; a path with ~ expanded and from the root, so that it means the same everywhere."""
    value = value.item() if getattr(value, "ndim", 1) == 0 else value  # NumPy's
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not (f.metadata["is_path"] and type(value) is str) or value in ("", *f.metadata["choices"]) or "://" in value:
        return value
    if "\0" in value:
        raise UserError(f"--{f.name} {value!r} is not on this machine: no path has a null byte")
    path = os.path.expanduser(value)
    return path if path.startswith("~") else os.path.abspath(path)


def check_value(f: Field, value: Any) -> str:
    """What is wrong with a value of option ``f``, or an empty text."""
    meta, name, kind = f.metadata, f"--{f.name}", kind_of(f)
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if not fits and (value is not None or f.type is kind):
        return f"{name} takes {KINDS[kind]}, not {value!r}"
    if meta["choices"] and not meta["is_path"] and value not in meta["choices"]:
        return f"{name} takes one of {', '.join(meta['choices'])}, not {value!r}"
    if meta["is_path"] and (value.startswith("~") or "://" in value):  # of no known user, or on another machine
        return f"{name} {value} is not on this machine: give a folder or file that is"
    if kind not in (int, float) or value is None:
        return ""
    if value > meta["maximum"]:
        return f"{name} must be at most {meta['maximum']:.10g}, not {value}"
    if not (value >= meta["minimum"] and value > meta["above"]):  # nan is neither
        least = f"above {meta['above']:g}" if meta["minimum"] == -math.inf else f"at least {meta['minimum']:g}"
        return f"{name} must be {least}, not {value}"
    return ""


def read_value(f: Field, text: str) -> Any:
    """The value of option ``f`` that a command line gives as text. Raises UserError if it is none."""
    kind, nullable = kind_of(f), f.type in (int | None, float | None)
    if nullable and text == "off":
        return None
    if text == "" and f.metadata["is_path"]:  # a shell variable that is not set
        raise UserError(f"--{f.name} is empty: give a path")
    try:
        if kind is bool:
            return SWITCH_VALUES[text.lower()]
        if kind is int:
            return int(re.sub(r"\.0+$", "", text))  # programs that start this one may write 2 as 2.0
        return absolute_path(f, kind(text))
    except (KeyError, ValueError):
        raise UserError(f"--{f.name} takes {KINDS[kind]}{', or off (default)' * nullable}, not {text!r}") from None


def option_names(f: Field) -> list[str]:
    """How option ``f`` is typed: a switch also as --no_NAME, which switches off what a recipe has switched on."""
    return [f"--{f.name}"] + ([f"--no_{f.name}"] if f.type is bool and not f.name.startswith("no_") else [])


def as_typed(name: str, value: Any) -> str:
    """An option with a value, as a command line has it."""
    return f"--{name}" if value is True else f"--{name} {'off' if value is None else value}"


class Switch(argparse.Action):
    """--NAME and --no_NAME, with or without True or False behind."""

    def __call__(self, parser, namespace, value, option_string=None):
        if option_string != f"--{self.dest}":
            value = str(not SWITCH_VALUES[value.lower()]) if value.lower() in SWITCH_VALUES else value
        setattr(namespace, self.dest, value)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python main.py --help")


def build_parser(config: type) -> Parser:
    """A parser with every option of the dataclass, in its groups; what is not given is not in its result."""
    parser = Parser(
        usage="python main.py [--mode MODE] [--recipe NAME] [options]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a network as a classifier and as an energy-based model, for example: python main.py "
        "--recipe sada-jem --dataset digits. --NAME off takes back a recipe's number where there is no default.",
        epilog="Exit status: 0 done; 1 training failed for good; 2 a bad option, a missing or broken input; 129, 130, "
        "143 stopped by SIGHUP, Ctrl-C, SIGTERM, after a checkpoint was written.",
    )
    titles = dict.fromkeys(f.metadata["group"] for f in fields(config))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for f in fields(config):
        meta, default = f.metadata, "off" if f.default is False else f.default
        text = meta["help"] + ("" if default in (None, "") else f" (default: {default})")
        values = [*meta["choices"], "PATH"] if meta["is_path"] else meta["choices"] or [kind_of(f).__name__.upper()]
        how = {"help": text.replace("%", "%%"), "metavar": "|".join(values)}
        if f.type is bool:
            how |= {"action": Switch, "nargs": "?", "const": "True"}
        groups[meta["group"]].add_argument(*option_names(f), *meta["flags"], **how)
    return parser


def parse(arguments: list[str], config: type) -> dict[str, Any]:
    """The options that a command line gives. Raises UserError that names all that are unknown or of another kind."""
    namespace, rest = build_parser(config).parse_known_args(arguments)
    unknown = [word.partition("=")[0] for word in rest if re.match("--?[A-Za-z]", word)]
    known = [typed for f in fields(config) for typed in option_names(f)]
    problems, given = [], {}
    for name in unknown or rest:
        near = difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_").lower(), known, 1, cutoff=0.88)
        problems.append(f"there is no option {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    for f in fields(config):
        if f.name in namespace:
            try:
                given[f.name] = read_value(f, getattr(namespace, f.name))
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems) + "; see python main.py --help")
    return given
