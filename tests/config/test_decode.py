from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from tim_ds.config.decode import decode
from tim_ds.config.load import parse_yaml
from tim_ds.config.node import from_python
from tim_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    width: int = 3
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"inner.width: expected at least 1, received {self.width}")
        if self.ratio > 1:
            raise ValueError("the ratio is beyond 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int = 1
    rate: float = 1.0
    title: str = "t"
    on: bool = False
    kind: Literal["a", "b", "no"] = "a"
    level: Literal[1, 2] = 1
    limit: int | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None


def read(text: str) -> Outer:
    return decode(Outer, parse_yaml(text, "f.yaml"))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),
        ("rate: 1E+3", "rate", 1000.0),
        ("rate: .5", "rate", 0.5),
        ("rate: 2.", "rate", 2.0),
        ("rate: 3", "rate", 3.0),
        ("rate: -1.5e-06", "rate", -1.5e-6),
        ("count: -7", "count", -7),
        ("count: 0", "count", 0),
        ("on: true", "on", True),
        ("on: false", "on", False),
        ("title: 12:30", "title", "12:30"),
        ("title: 010", "title", "010"),
        ("title: 2024-01-01", "title", "2024-01-01"),
        ("title: 1_000", "title", "1_000"),
        ("title: no", "title", "no"),
        ("title: on", "title", "on"),
        ("title: 'true'", "title", "true"),
        ("title: '12'", "title", "12"),
        ("title: ''", "title", ""),
        ("title: |\n  two\n  lines\n", "title", "two\nlines\n"),
        ("title: a three above a seven", "title", "a three above a seven"),
        ("kind: b", "kind", "b"),
        ("kind: no", "kind", "no"),
        ("level: 2", "level", 2),
        ("limit: 4", "limit", 4),
        ("limit: null", "limit", None),
        ("limit: ~", "limit", None),
        ("limit:", "limit", None),
        ("pair: [0, 0.5]", "pair", (0.0, 0.5)),
        ("names: [a, no, '3']", "names", ("a", "no", "3")),
        ("names: []", "names", ()),
        ("names:\n  - a b\n  - c\n", "names", ("a b", "c")),
        ("inner: {width: 9}", "inner", Inner(width=9)),
        ("extra: {}", "extra", Inner()),
        ("extra: null", "extra", None),
    ],
)
def test_value_is_decoded_by_the_type_of_its_field(text: str, name: str, value: object):
    decoded = getattr(read(text), name)
    assert decoded == value
    assert type(decoded) is type(value)


def test_no_digits_are_advised_for_a_whole_number_that_a_float_cannot_hold():
    with pytest.raises(ConfigError) as caught:
        read("count: 1" + "0" * 24)
    assert "write" not in str(caught.value)


def test_whole_number_for_a_float_field_becomes_a_float():
    assert isinstance(read("rate: 3").rate, float)
    assert [type(x) for x in read("pair: [0, 1]").pair] == [float, float]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("count: 1.5", ["count: expected a whole number", "the number 1.5"]),
        ("count: 1e5", ["count: expected a whole number", "write 100000"]),
        ("count: true", ["count: expected a whole number, received true"]),
        ("count: 'many'", ["count: expected a whole number", "the text 'many'"]),
        ("count: '3'", ["count: expected a whole number", "remove the quotes"]),
        ("count: 010", ["count: expected a whole number", "leading zero means octal"]),
        ("count: 1_000", ["count: expected a whole number", "without separators"]),
        ("count: 1,000", ["count: expected a whole number", "without separators"]),
        ("count: 0x10", ["count: expected a whole number", "in decimal"]),
        ("count: 12:30", ["count: expected a whole number", "base-60"]),
        ("count: " + "9" * 19, ["count: expected a whole number, received the number 999"]),
        ("count: " + "9" * 5000, ["count: expected a whole number, received the number 999"]),
        ("count: null", ["count: expected a whole number, received nothing (null)"]),
        ("count: [1]", ["count: expected a whole number, received a list of 1"]),
        ("count: {a: 1}", ["count: expected a whole number, received a section with the keys a"]),
        ("rate: true", ["rate: expected a number, received true"]),
        ("rate: '1e-4'", ["rate: expected a number", "remove the quotes"]),
        ("rate: fast", ["rate: expected a number, received 'fast'"]),
        ("rate: .inf", ["rate: expected a number", "finite"]),
        ("rate: nan", ["rate: expected a number", "finite"]),
        ("rate: 1e999", ["rate: expected a finite number, received 1e999"]),
        ("on: yes", ["on: expected true or false", "a bare yes/no/on/off"]),
        ("on: off", ["on: expected true or false", "a bare yes/no/on/off"]),
        ("on: True", ["on: expected true or false", "write true"]),
        ("on: 1", ["on: expected true or false, received the number 1"]),
        ("on: 'true'", ["on: expected true or false", "remove the quotes"]),
        ("title: 12", ["title: expected text, received the number 12", "put it in quotes"]),
        ("title: true", ["title: expected text, received true", "put it in quotes"]),
        ("title: null", ["title: expected text, received nothing"]),
        ("kind: yes", ["kind: expected one of 'a', 'b', 'no'", "a bare yes/no/on/off"]),
        ("kind: 1", ["kind: expected one of"]),
        ("level: 3", ["level: expected one of 1, 2"]),
        ("level: true", ["level: expected one of 1, 2, received true"]),
        ("pair: [1, 2, 3]", ["pair: expected a list of 2, received a list of 3"]),
        ("pair: 1", ["pair: expected a list, received the number 1"]),
        ("pair: [1, x]", ["pair[1]: expected a number, received 'x'"]),
        ("names: [a, 3]", ["names[1]: expected text, received the number 3"]),
        ("names: word", ["names: expected a list, received 'word'"]),
        ("inner: 3", ["inner: expected a section of keys (width, ratio), received the number 3"]),
        ("inner:", ["inner: expected a section of keys (", "received nothing (null); {} is one of defaults"]),
        ("extra: [1]", ["extra: expected a section of keys (", "), received a list of 1"]),
    ],
)
def test_mistyped_value_is_refused_by_its_dotted_key(text: str, parts: list[str]):
    message = refusal(text)
    assert message.startswith(parts[0])
    assert all(part in message for part in parts)
    assert message.endswith("(f.yaml:1)")


def test_every_mistake_is_reported_with_its_own_line():
    lines = refusal("count: x\nrat: 1\ninner:\n  wdith: 3\n  ratio: fast\n").splitlines()
    assert len(lines) == 4
    assert [line.partition(":")[0] for line in lines] == ["count", "rat", "inner.wdith", "inner.ratio"]
    assert [line[-3:-1] for line in lines] == [":1", ":2", ":4", ":5"]


def test_unknown_key_names_the_nearest_key_of_its_section():
    assert "did you mean 'width'?" in refusal("inner: {wdith: 3}")


def test_unknown_key_names_the_section_where_it_belongs():
    assert refusal("width: 3").startswith("width: unknown key; did you mean 'inner.width' or 'extra.width'?")


def test_misspelt_key_of_another_section_is_found_there():
    assert "did you mean 'inner.width' or 'extra.width'?" in refusal("widths: 3")


def test_unknown_key_without_a_neighbour_lists_what_is_known():
    assert "known here: width, ratio" in refusal("inner: {zzzz: 3}")


def test_dotted_key_in_a_file_is_explained():
    assert refusal("inner.width: 3").startswith("inner.width: unknown key; in a file every dot is a section")


def test_misspelt_choice_names_the_nearest_one():
    @dataclass(frozen=True, kw_only=True)
    class Choice:
        mode: Literal["transition", "diffusion"]

    with pytest.raises(ConfigError, match="did you mean 'diffusion'"):
        decode(Choice, from_python({"mode": "difusion"}))


def test_missing_key_is_reported_at_its_section():
    @dataclass(frozen=True, kw_only=True)
    class Strict:
        steps: int

    @dataclass(frozen=True, kw_only=True)
    class Root:
        train: Strict

    # Names of local classes cannot be resolved from text, so the hint is set as it would be at module level.
    Root.__annotations__["train"] = Strict
    with pytest.raises(ConfigError) as caught:
        decode(Root, parse_yaml("\ntrain:\n\n  {}\n", "f.yaml"))
    assert str(caught.value) == "train.steps: required and not given (f.yaml:2)"


def test_rule_of_a_section_carries_the_full_key_and_its_line():
    message = refusal("count: 1\nextra:\n  width: 0\n")
    assert message == "extra: inner.width: expected at least 1, received 0 (f.yaml:2)"
    message = refusal("count: 1\ninner:\n  width: 0\n")
    assert message == "inner.width: expected at least 1, received 0 (f.yaml:3)"


def test_rule_without_a_key_gets_the_key_of_its_section():
    assert refusal("inner: {ratio: 2}") == "inner: the ratio is beyond 1 (f.yaml:1)"


def test_plain_python_values_are_checked_like_a_file():
    values = {"count": 2, "rate": 1, "pair": (0, 1), "inner": {"width": 4}, "kind": "no", "limit": None}
    assert decode(Outer, from_python(values)) == Outer(count=2, kind="no", inner=Inner(width=4))
    with pytest.raises(ConfigError, match=r"^count: expected a whole number, received true"):
        decode(Outer, from_python({"count": True}))
    with pytest.raises(ConfigError, match=r"^rate: expected a number, received the text '1'"):
        decode(Outer, from_python({"rate": "1"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": float("nan")}, "rate: expected a finite number"),
        ({"count": 10**400}, "count: expected a whole number of at most 18 digits"),
        ({"inner": {3: 1}}, "inner: keys have to be text"),
        ({"names": ["a", object()]}, r"names\[1\]: object cannot be a setting"),
        ({"names": b"ab"}, "names: bytes cannot be a setting"),
    ],
)
def test_python_value_that_no_file_could_hold_is_refused(values: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_python(values)
