from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.config.recipes import TEXT, recipe
from tim_ds.config.load import dump, load_recipe, parse_recipe, parse_yaml, split_arguments
from tim_ds.config.node import Listing, Scalar, Section
from tim_ds.config.recipe import recipe_hash
from tim_ds.errors import ConfigError


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, overrides, source="f.yaml")
    return str(caught.value)


def test_recipe_file_is_read(tmp_path: Path):
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    assert load_recipe(path) == recipe()
    assert load_recipe(path, ["train.steps=7"]).train.steps == 7


def test_repeated_key_names_both_lines():
    assert refusal("name: a\nmodel:\n  depth: 1\n  width: 2\n  depth: 3\n") == (
        "model.depth: given twice (f.yaml:3 and f.yaml:5)"
    )


def test_every_repeated_key_is_reported():
    lines = refusal("name: a\nname: b\ntrain: {steps: 1, steps: 2, steps: 3}\n").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["name", "train.steps", "train.steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: &x a\n", "name: no anchors and aliases here"),
        ("name: *x\n", "name: no anchors and aliases here"),
        ("train: &t {steps: 1}\n", "train: no anchors and aliases here"),
        ("train:\n  <<: {steps: 1}\n", "train.<<: no merge keys here"),
        ("name: !!str 3\n", "name: no tags such as tag:yaml.org,2002:str here"),
        ("name: !!python/object/apply:os.system [ls]\n", "name: no tags such as tag:yaml.org,2002:python"),
        ("train: !x {steps: 1}\n", "train: no tags such as !x here"),
        ("? [a, b]\n: 1\n", "f.yaml:1: a key has to be a word"),
        ("name: a\n---\nname: b\n", "f.yaml:2: one document a file"),
        (
            "train:\n\tsteps: 1\n",
            "f.yaml:2: not valid YAML: found character '\\t' that cannot start any token; ",
        ),
        ("train: [1\n", "f.yaml:2: not valid YAML"),
        ("train:\n  steps: 1\n name: a\n", "f.yaml:3: not valid YAML"),
        ("name: a\x00b\n", "f.yaml: not valid YAML"),
        ("name: " + "[" * 3000 + "]" * 3000, "f.yaml: brackets or sections nested too deep to read"),
        ("", "f.yaml: expected a section of keys, received nothing (null)"),
        ("# only a comment\n", "f.yaml: expected a section of keys, received nothing (null)"),
        ("- a\n", "f.yaml: expected a section of keys, received a list of 1"),
        ("word\n", "f.yaml: expected a section of keys, received 'word'"),
    ],
)
def test_text_that_is_not_one_plain_section_is_refused(text: str, message: str):
    assert refusal(text).startswith(message)


def test_a_literal_double_angle_in_quotes_is_only_an_unknown_key():
    assert "<<: unknown key" in refusal(TEXT + "'<<': 1\n")


@pytest.mark.parametrize("word", ["no", "on", "yes", "y", "1", "null", "2024-01-01"])
def test_key_is_always_text(word: str):
    root = parse_yaml(f"{word}: 1\n", "f.yaml")
    assert isinstance(root, Section)
    assert list(root.entries) == [word]


def test_leaves_remember_their_lines():
    root = parse_yaml("a:\n  b:\n    - 1\n    - x\n", "f.yaml")
    assert isinstance(root, Section)
    inner = root.entries["a"]
    assert isinstance(inner, Section)
    items = (Scalar(1, "1", False, "f.yaml:3"), Scalar("x", "x", False, "f.yaml:4"))
    assert inner.entries["b"] == Listing(items, "f.yaml:3")


def test_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: the recipe cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"the recipe cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: expected UTF-8 text, received the byte 0xe9"):
        load_recipe(tmp_path / "latin.yaml")


def test_override_goes_through_the_same_checks():
    assert recipe("train.optimizer.lr=2e-4").train.optimizer.lr == 2e-4
    message = refusal(TEXT, "train.optimizer.lr=fast", "model.dept=3", "train.lr=1", "train.precision=no")
    lines = message.splitlines()
    assert lines[0] == "model.dept: unknown key; did you mean 'depth'? (override model.dept=3)"
    assert lines[1].startswith("train.optimizer.lr: expected a number, received 'fast'")
    assert lines[2] == "train.lr: unknown key; did you mean 'train.optimizer.lr'? (override train.lr=1)"
    assert lines[3].startswith(
        "train.precision: expected one of 'fp32', 'bf16_autocast', 'bf16', received 'no' (a"
    )
    assert len(lines) == 4


def test_override_replaces_the_value_of_the_file_alone():
    changed = recipe("train.steps=20")
    assert changed.train.steps == 20
    assert changed.model == recipe().model
    assert changed.data == recipe().data


def test_override_may_open_a_section_that_the_file_leaves_out():
    assert recipe("objective.guided_target.w_cond=0.5").objective.guided_target is not None
    assert recipe("objective.guided_target={}", "sampler={num_steps: 3}").sampler.num_steps == 3
    assert parse_recipe(TEXT + "sampler:\n", ["sampler.num_steps=3"]).sampler.num_steps == 3


def test_override_takes_lists_quotes_and_null():
    changed = recipe(
        "train.preview.prompts=[a three, 'no', \"12\"]",
        "train.preview.sizes=[8x8, 8x16, 24x8]",
        "model.z_dim=null",
    )
    assert changed.train.preview.prompts == ("a three", "no", "12")
    assert changed.train.preview.sizes == ("8x8", "8x16", "24x8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps"], "train.steps: an override is written section.key=value"),
        (["=3"], "=3: an override is written section.key=value"),
        (["train..steps=3"], "train..steps=3: an override is written section.key=value"),
        (["train.steps=3", "train.steps=4"], "train.steps: given twice"),
        (["train={steps: 3}", "train.steps=4"], "train.steps: given twice"),
        (["train.steps=4", "train={steps: 3}"], "train: given twice"),
        (["train.steps.more=4"], "train.steps.more: 'steps' holds the number 10, not a section"),
        (["data.shards=[a"], "data.shards: override data.shards=[a: not valid YAML"),
        (["train.steps={a: 1, a: 2}"], "train.steps: a: given twice"),
        (["name=&x a"], "name: override name=&x a: no anchors"),
        (["data.shards=a b #3"], "data.shards: ' #' starts a comment in YAML; put the value in quotes"),
        (["train.steps="], "train.steps: expected a whole number, received nothing (null)"),
    ],
)
def test_override_that_makes_no_sense_is_refused(overrides: list[str], message: str):
    assert refusal(TEXT, *overrides).startswith(message)


def test_hash_sign_survives_in_quotes():
    assert recipe("data.shards='a b #3'").data.shards == "a b #3"


def test_command_line_splits_into_paths_and_overrides():
    words = ["a.yaml", "train.steps=3", "./x=y/b.yaml", "sampler.cfg_interval=[0, 1]"]
    assert split_arguments(words) == (
        ["a.yaml", "./x=y/b.yaml"], ["train.steps=3", "sampler.cfg_interval=[0, 1]"]
    )  # fmt: skip


@pytest.mark.parametrize(
    "shards",
    ["1e-4", "010", "no", "12:30", "null", "a: b", "# x", "- x", "'q'", '"q"', "é\t\n", " x ", "<<"],
)
def test_dumped_recipe_reads_back_equal(shards: str):
    values = recipe(
        "train.optimizer.eps=1e-8",
        "train.checkpoint.milestones=[3, 5]",
        "train.preview.prompts=['1e3', 'a, b']",
        "train.preview.sizes=[8x8, 16x8]",
        "objective.guided_target={}",
        "sampler.cfg_interval=[0.1, 1]",
    )
    original = replace(values, data=replace(values.data, shards=shards))
    again = parse_recipe(dump(original))
    assert again == original
    assert recipe_hash(again) == recipe_hash(original)


def test_dump_writes_every_default():
    text = dump(recipe())
    for line in ("  lr: 0.0001", "    eps: 1.0e-06", "  guided_target: null", "  cfg_interval: [0.0, 1.0]"):
        assert line in text
