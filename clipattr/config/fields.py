"""What the schema allows: every field of a job by its dotted name, its type in words, its doc."""

import ast
import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum, EnumType
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING


class Field(NamedTuple):
    """One setting of a job."""

    name: str
    allowed: str
    default: str
    doc: str


def list_fields(section: Any, prefix: str = "") -> Iterator[Field]:
    """Every setting of a job and of its sections, in the order of the schema.

    `section` is an instance, not a class: a job may change the defaults of a shared section.
    """
    hints = get_type_hints(type(section))
    docs = read_docs(type(section))
    for entry in fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        if is_dataclass(hints[entry.name]):
            yield from list_fields(value, f"{name}.")
        else:
            yield Field(
                name, describe(hints[entry.name]), format_value(value), docs.get(entry.name, "")
            )


def read_docs(section: type) -> dict[str, str]:
    """The docstring line under each field; Python itself drops them, so the source is read."""
    docs = {}
    for owner in reversed(section.__mro__[:-1]):
        definition = ast.parse(inspect.getsource(owner)).body[0]
        for field, line in pairwise(getattr(definition, "body", [])):
            match field, line:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = text
    return docs


def describe(annotation: Any) -> str:
    """A type in words, as messages and `--help` print it."""
    if isinstance(annotation, EnumType):
        return "one of " + ", ".join(annotation.__members__)
    if is_dataclass(annotation):
        return f"a section with keys {', '.join(entry.name for entry in fields(annotation))}"
    if get_origin(annotation) is list:
        item = get_args(annotation)[0]
        inner = describe(item).removeprefix("a ").removeprefix("an ")
        return (
            f"a list of {inner.replace('section', 'sections', 1) if is_dataclass(item) else inner}"
        )
    if get_origin(annotation) in (Union, UnionType):
        options = get_args(annotation)
        words = [describe(option) for option in options if get_origin(option) is not list]
        return " or ".join(words) + (", or a list" if len(words) < len(options) else "")
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    words[NoneType] = "null"
    return words[annotation]


def format_value(value: object) -> str:
    """A value as it is written in YAML or after `key=`."""
    if value == MISSING:
        return "required"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return "[" + ", ".join(map(format_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def suggest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean X?', or nothing when no allowed word is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""
