"""Recipe files, overrides and YAML text. The one place that imports yaml.

Only YAML's syntax is used (its event stream), never its guesses about types: those are made by the schema, in
`decode.py`, from what is written (`node.py`). A repeated key is an error. Anchors, aliases, merge keys, tags
and several documents in a file are refused: a reader of a recipe should see each value where it applies.
"""

# The stubs of PyYAML leave events and dumpers untyped.
# pyright: basic

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tim_ds.config.decode import decode
from tim_ds.config.node import Listing, Node, Scalar, Section, plain_value
from tim_ds.config.recipe import Recipe, to_dict
from tim_ds.errors import ConfigError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `section.key=value` overrides applied through the same checks.

    Raises:
        ConfigError: the file cannot be read, or it or an override is wrong; one line a problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, received the byte {error.object[error.start]:#x}"
        ) from error
    except OSError as error:
        reason = f"the recipe cannot be read: {error.strerror}; expected a YAML file"
        raise ConfigError(f"{path}: {reason}") from error
    return parse_recipe(text, overrides, source=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """The recipe in YAML text; `source` is what messages call the text."""
    root = parse_yaml(text, source)
    if not isinstance(root, Section):
        raise ConfigError(f"{source}: expected a section of keys, received {root.describe()}")
    return decode(Recipe, override(root, overrides), name=source)


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Command-line words to (paths, overrides): a word is an override if a dotted key and `=` begin it."""
    paths: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        (overrides if re.match(r"[A-Za-z_][\w.]*=", word) else paths).append(word)
    return paths, overrides


def override(root: Section, overrides: Sequence[str]) -> Section:
    """The tree with the settings `section.key=value` in place of its own.

    Raises:
        ConfigError: an override without `=`, not YAML, given twice, or beneath a plain value.
    """
    given: list[str] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"{word}: an override is written section.key=value")
        for other in given:
            if key == other or key.startswith(other + ".") or other.startswith(key + "."):
                raise ConfigError(f"{key}: given twice (overrides {other}=... and {key}=...)")
        given.append(key)
        where = f"override {word}"
        root = _replace(root, key.split("."), _parse_override(key, text, where), key, where)
    return root


def _parse_override(key: str, text: str, where: str) -> Node:
    try:
        node = _Parser(text, where, numbered=False).document()
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    # Without this, ` #` would start a comment and cut a caption short.
    if " #" in text and isinstance(node, Scalar) and not node.quoted:
        raise ConfigError(f"{key}: ' #' starts a comment in YAML; put the value in quotes ({where})")
    return node


def _replace(section: Section, keys: list[str], node: Node, dotted: str, where: str) -> Section:
    first, rest = keys[0], keys[1:]
    if rest:
        inner = section.entries.get(first)
        if inner is None or (isinstance(inner, Scalar) and inner.value is None):
            inner = Section({}, where, {})
        if not isinstance(inner, Section):
            raise ConfigError(f"{dotted}: {first!r} holds {inner.describe()}, not a section ({where})")
        node = _replace(inner, rest, node, dotted, where)
        where = section.key_where.get(first, where)
    return Section({**section.entries, first: node}, section.where, {**section.key_where, first: where})


def parse_yaml(text: str, source: str) -> Node:
    """YAML text to a tree whose leaves know their line.

    Raises:
        ConfigError: not YAML, a repeated key, an anchor, alias, merge key or tag, or a second document.
    """
    return _Parser(text, source, numbered=True).document()


class _Parser:
    def __init__(self, text: str, source: str, *, numbered: bool) -> None:
        self.source = source
        self.numbered = numbered
        self.text = text
        self.repeated: list[str] = []
        self.events: Iterator[Any] = iter(())

    def document(self) -> Node:
        try:
            self.events = iter(yaml.parse(self.text, Loader=yaml.SafeLoader))
            return self._document()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = self.where(mark) if mark else self.source
            hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
            raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}{hint}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.source}: not valid YAML: {error}") from error
        except RecursionError as error:
            raise ConfigError(f"{self.source}: brackets or sections nested too deep to read") from error

    def _document(self) -> Node:
        next(self.events)
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return Scalar(None, "", False, self.source)
        root = self.node(next(self.events), "")
        next(self.events)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise ConfigError(f"{self.where(event.start_mark)}: one document a file; remove the '---'")
        if self.repeated:
            raise ConfigError("\n".join(self.repeated))
        return root

    def where(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered else self.source

    def node(self, event: Any, path: str) -> Node:
        where = self.where(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ConfigError(f"{path or where}: no anchors and aliases here; write the value ({where})")
        if event.tag is not None:
            raise ConfigError(f"{path or where}: no tags such as {event.tag} here ({where})")
        if isinstance(event, yaml.ScalarEvent):
            # style is None for a plain word, else the kind of quote or block.
            quoted = event.style is not None
            return Scalar(event.value if quoted else plain_value(event.value), event.value, quoted, where)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(following := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(following, f"{path}[{len(items)}]"))
            return Listing(tuple(items), where)
        return self.section(where, path)

    def section(self, where: str, path: str) -> Section:
        entries: dict[str, Node] = {}
        key_where: dict[str, str] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            here = self.where(event.start_mark)
            if not isinstance(event, yaml.ScalarEvent):
                raise ConfigError(f"{path or here}: a key has to be a word ({here})")
            key = event.value
            dotted = f"{path}.{key}" if path else key
            if key == "<<" and event.style is None:
                raise ConfigError(f"{dotted}: no merge keys here; write the values ({here})")
            if event.tag is not None or event.anchor is not None:
                raise ConfigError(f"{dotted}: a key has no tag or anchor ({here})")
            entry = self.node(next(self.events), dotted)
            if key in entries:
                self.repeated.append(f"{dotted}: given twice ({key_where[key]} and {here})")
            entries[key] = entry
            key_where[key] = here
        return Section(entries, where, key_where)


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves words such as 1e-4 unquoted, because its own reader takes them for text.
    style = None if isinstance(plain_value(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML text that `parse_recipe` decodes to an equal recipe."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
