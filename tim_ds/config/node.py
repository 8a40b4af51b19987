"""A configuration file as a tree whose leaves remember where they were written. Standard library only.

A plain (unquoted) word means one thing here: only `true` and `false` are booleans, a number is decimal, and
everything else is text. Spellings that YAML 1.1 and 1.2 read differently (`no`, `010`, `1_000`, `12:30`,
`2024-01-01`) therefore stay text, and a field that wants a number or a boolean refuses them by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tim_ds.errors import ConfigError

# Up to 18 digits: what every integer type downstream can hold.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS_OF_YAML_1_1 = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false"})


@dataclass(frozen=True, slots=True)
class Scalar:
    """One word or number. `text` is what was written; `quoted` text is never a number, a boolean or null."""

    value: str | int | float | bool | None
    text: str
    quoted: bool
    where: str
    """file:line, or the override that it came from; empty if neither is known."""

    def describe(self) -> str:
        """The scalar as a message shows it, with the reason when it is one of YAML's traps."""
        if self.value is None:
            return "nothing (null)"
        if isinstance(self.value, bool):
            return self.text
        if isinstance(self.value, (int, float)):
            return f"the number {self.text}"
        if self.quoted:
            return f"the text {self.value!r}"
        return f"{self.value!r}{_trap(self.text)}"


@dataclass(frozen=True, slots=True)
class Listing:
    items: tuple[Node, ...]
    where: str

    def describe(self) -> str:
        return f"a list of {len(self.items)}"


@dataclass(frozen=True, slots=True)
class Section:
    entries: dict[str, Node]
    where: str
    key_where: dict[str, str]
    """Where each key was written."""

    def describe(self) -> str:
        return f"a section with the keys {', '.join(self.entries)}" if self.entries else "an empty section"


Node = Scalar | Listing | Section


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted word stands for."""
    if text in _NULLS:
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _trap(text: str) -> str:
    """Why an unquoted word that some YAML reader takes for a number or a boolean is text here; else empty."""
    if text.lower() in _BOOLEANS_OF_YAML_1_1:
        return " (a bare yes/no/on/off is a boolean to some YAML readers; here only true and false are)"
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        return " (a leading zero means octal to some YAML readers; write the number without it)"
    if re.fullmatch(r"[-+]?[0-9][0-9_,]*(\.[0-9_]*)?", text):
        return " (write the digits of a number without separators)"
    if re.fullmatch(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+", text):
        return " (digits with colons are a base-60 number to some YAML readers; here they are text)"
    if re.fullmatch(r"[-+]?0[xob][0-9a-fA-F]+", text):
        return " (write the number in decimal)"
    if re.fullmatch(r"[-+]?\.?(inf|nan|infinity)", text, re.IGNORECASE):
        return " (a setting has to be finite)"
    return ""


def from_python(value: object, where: str = "", path: str = "") -> Node:
    """The tree of a plain Python value, such as one read from JSON.

    Raises:
        ConfigError: for a value other than a dict with text keys, a list or tuple, a number, text, a
            boolean or None.
    """
    if isinstance(value, str):
        return Scalar(value, value, True, where)
    if value is None or isinstance(value, bool):
        return Scalar(value, "null" if value is None else str(value).lower(), False, where)
    if isinstance(value, (int, float)):
        if isinstance(value, int) and abs(value) >= 10**18:
            raise ConfigError(f"{path or 'recipe'}: expected a whole number of at most 18 digits")
        if not math.isfinite(value):
            raise ConfigError(f"{path or 'recipe'}: expected a finite number, received {value}")
        return Scalar(value, repr(value), False, where)
    if isinstance(value, Mapping):
        entries: dict[str, Node] = {}
        for key, entry in cast(Mapping[object, object], value).items():
            if not isinstance(key, str):
                raise ConfigError(f"{path or 'recipe'}: keys have to be text, received {key!r}")
            entries[key] = from_python(entry, where, f"{path}.{key}" if path else key)
        return Section(entries, where, dict.fromkeys(entries, where))
    if isinstance(value, (list, tuple)):
        items = enumerate(cast(Sequence[object], value))
        return Listing(tuple(from_python(item, where, f"{path}[{i}]") for i, item in items), where)
    raise ConfigError(f"{path or 'recipe'}: {type(value).__name__} cannot be a setting, received {value!r}")
