"""A configuration tree to frozen dataclasses, by their type hints. Standard library only.

The dataclass is the schema, the defaults and the documentation in one. Supported field types: int, float,
str, bool, Literal, X | None, tuple[X, ...], tuple[X, Y] and dataclasses. All mistakes of a file are reported
together.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tim_ds.config.node import Listing, Node, Scalar, Section
from tim_ds.errors import ConfigError

T = TypeVar("T")


class _Invalid:
    """Stands for a value that could not be decoded; its reason is among the problems."""


_INVALID = _Invalid()


def decode(cls: type[T], node: Node, *, name: str = "recipe") -> T:
    """The dataclass `cls` from a tree.

    Args:
        cls: a dataclass whose fields have supported types.
        node: the tree, from `load.parse_yaml` or `node.from_python`.
        name: what the root is called in messages.

    Raises:
        ConfigError: one line a problem; it begins with the dotted key and ends with where that was written.
    """
    decoder = _Decoder(cls, name)
    value = decoder.dataclass(cls, node, "")
    if decoder.problems:
        raise ConfigError("\n".join(decoder.problems))
    return cast(T, value)


class _Decoder:
    def __init__(self, schema: type, name: str) -> None:
        self.schema = schema
        self.name = name
        self.problems: list[str] = []
        self.where: dict[str, str] = {}

    def problem(self, path: str, message: str, where: str) -> _Invalid:
        self.problems.append(f"{path or self.name}: {message}" + (f" ({where})" if where else ""))
        return _INVALID

    def value(self, annotation: Any, node: Node, path: str, where: str) -> Any:
        """The value at `path`, written at `where` (for a section, the line of its key)."""
        self.where[path] = where
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (Union, types.UnionType):
            return self.optional(arguments, node, path, where)
        if origin is Literal:
            return self.choice(arguments, node, path)
        if origin is tuple:
            return self.sequence(arguments, node, path)
        if is_dataclass(annotation):
            return self.dataclass(cast(type, annotation), node, path)
        if annotation in (bool, int, float, str):
            return self.scalar(annotation, node, path)
        raise TypeError(f"{path}: a setting cannot have the type {annotation}")

    def optional(self, arguments: tuple[Any, ...], node: Node, path: str, where: str) -> Any:
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) != 1 or len(inner) == len(arguments):
            raise TypeError(f"{path}: the only union a setting can have is with None")
        if isinstance(node, Scalar) and node.value is None:
            return None
        return self.value(inner[0], node, path, where)

    def choice(self, choices: tuple[Any, ...], node: Node, path: str) -> Any:
        if isinstance(node, Scalar):
            for choice in choices:
                if type(choice) is type(node.value) and choice == node.value:
                    return choice
        listed = ", ".join(repr(c) for c in choices)
        nearest = ""
        if isinstance(node, Scalar) and isinstance(node.value, str):
            nearest = _did_you_mean(node.value, [c for c in choices if isinstance(c, str)])
        return self.problem(
            path, f"expected one of {listed}, received {node.describe()}{nearest}", node.where
        )

    def sequence(self, arguments: tuple[Any, ...], node: Node, path: str) -> Any:
        if not isinstance(node, Listing):
            return self.problem(path, f"expected a list, received {node.describe()}", node.where)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            annotations = (arguments[0],) * len(node.items)
        elif len(arguments) == len(node.items):
            annotations = arguments
        else:
            return self.problem(
                path, f"expected a list of {len(arguments)}, received {node.describe()}", node.where
            )
        pairs = zip(annotations, node.items, strict=True)
        items = [self.value(a, item, f"{path}[{i}]", item.where) for i, (a, item) in enumerate(pairs)]
        return _INVALID if _INVALID in items else tuple(items)

    def scalar(self, kind: type, node: Node, path: str) -> Any:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        if not isinstance(node, Scalar):
            return self.problem(path, f"expected {expected}, received {node.describe()}", node.where)
        value = node.value
        # bool is a subclass of int in Python; a setting must not pass for the other by accident.
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                return self.problem(path, f"expected a finite number, received {node.text}", node.where)
            return float(value)
        if type(value) is kind:
            return value
        advice = ""
        if kind is int and isinstance(value, float) and value.is_integer():
            # Beyond, a float no longer tells which whole number was meant.
            advice = f"; write {int(value)}" if abs(value) < 2**53 else ""
        elif kind is str and value is not None:
            advice = "; put it in quotes"
        elif kind is bool and not node.quoted and node.text.lower() == "true":
            advice = "; write true"
        elif kind is bool and not node.quoted and node.text.lower() == "false":
            advice = "; write false"
        elif node.quoted and kind is not str:
            advice = "; remove the quotes" if value else ""
        return self.problem(path, f"expected {expected}, received {node.describe()}{advice}", node.where)

    def dataclass(self, cls: type, node: Node, path: str) -> Any:
        if not isinstance(node, Section):
            empty = isinstance(node, Scalar) and node.value is None
            advice = "; {} is one of defaults" if path and empty else ""
            keys = ", ".join(f.name for f in fields(cls) if f.init)
            return self.problem(
                path, f"expected a section of keys ({keys}), received {node.describe()}{advice}", node.where
            )
        hints = get_type_hints(cls)
        known = {f.name: f for f in fields(cls) if f.init}
        values: dict[str, Any] = {}
        for key, entry in node.entries.items():
            if key in known:
                values[key] = self.value(hints[key], entry, _join(path, key), node.key_where[key])
            else:
                former: dict[str, str] = getattr(cls, "FORMER_KEYS", {})
                if key in former:
                    where = node.key_where[key]
                    self.problem(_join(path, key), f"no longer a key; write {former[key]}", where)
                else:
                    self.unknown(key, list(known), path, node.key_where[key])
                values[key] = _INVALID
        for name, field in known.items():
            if name not in node.entries and _is_required(field):
                self.problem(_join(path, name), "required and not given", self.where.get(path, node.where))
                values[name] = _INVALID
        if _INVALID in values.values():
            return _INVALID
        try:
            return cls(**values)
        except ValueError as error:
            for line in str(error).splitlines():
                self.located(line, path)
            return _INVALID

    def unknown(self, key: str, known: list[str], path: str, where: str) -> None:
        """A key that the section does not have; the nearest right one is named, from here or elsewhere."""
        everywhere = [dotted for dotted in _dotted_keys(self.schema) if dotted != _join(path, key)]
        if "." in key:
            advice = "; in a file every dot is a section of its own"
        elif nearest := _did_you_mean(key, known):
            advice = nearest
        elif elsewhere := [dotted for dotted in everywhere if dotted.rpartition(".")[2] == key]:
            advice = f"; did you mean {' or '.join(repr(e) for e in elsewhere)}?"
        else:
            leaves = sorted({dotted.rpartition(".")[2] for dotted in everywhere})
            close = difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
            elsewhere = [dotted for dotted in everywhere if close and dotted.rpartition(".")[2] == close[0]]
            advice = (
                f"; did you mean {' or '.join(repr(e) for e in elsewhere)}?"
                if elsewhere
                else f"; known here: {', '.join(known)}"
            )
        self.problem(_join(path, key), f"unknown key{advice}", where)

    def located(self, message: str, path: str) -> None:
        """Records what a dataclass refused, under its full dotted key and with the line of that key.

        A section says `weight.warp: ...` wherever it sits; inside `objective` that becomes
        `objective.weight.warp: ...`.
        """
        parts = path.split(".") if path else []
        for i in range(len(parts)):
            tail = ".".join(parts[i:])
            if re.match(rf"{re.escape(tail)}\b", message):
                message = path + message[len(tail) :]
                break
        else:
            message = f"{path}: {message}" if path else message
        key = re.match(r"[\w.\[\]]+", message)
        dotted = key.group().rstrip(".") if key else path
        while dotted and dotted not in self.where:
            dotted = re.sub(r"(\.|\[|^)[^.\[]*$", "", dotted)
        where = self.where.get(dotted, "")
        self.problems.append(f"{message} ({where})" if where else message)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _dotted_keys(cls: type, path: str = "") -> Iterator[str]:
    """Every key of a schema, dotted."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        dotted = _join(path, field.name)
        yield dotted
        for annotation in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(annotation):
                yield from _dotted_keys(cast(type, annotation), dotted)
