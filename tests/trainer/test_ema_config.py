from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.ranks import recipe
from tim_ds.config.recipe import to_dict
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.trainer.agreement import DataFacts, check_same_run
from tim_ds.trainer.checkpoint import Checkpoint

TWO = "{name: a, decay: 0.9}, {name: b, sigma_rel: 0.1}"


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        ("{averages: []}", "train.ema.averages: expected at least one, received an empty list"),
        (f"{{averages: [{TWO}]}}", "train.ema.use: required with several averages, one of a, b"),
        (f"{{use: c, averages: [{TWO}]}}", "train.ema.use: expected one of a, b, received 'c'"),
        (
            "{use: a, averages: [{name: a, decay: 0.9}, {name: a, decay: 0.99}]}",
            r"train.ema.averages\[1\].name: 'a' is the name of another average",
        ),
        ("{averages: [{name: a}]}", r"averages\[0\]: decay: expected one of decay .* received neither"),
        ("{averages: [{decay: 0.9, sigma_rel: 0.1}]}", r"averages\[0\]: decay: .* received both"),
        ("{averages: [{decay: 1.0}]}", "decay: expected 0 up to but not 1, received 1.0"),
        ("{averages: [{sigma_rel: 0.3}]}", r"sigma_rel: expected above 0 up to 0.2887 .* received 0.3"),
        ("{averages: [{sigma_rel: 0.1, warmup: true}]}", "warmup: belongs to decay"),
        ("{averages: [{decay: 0.9, name: a/b}]}", "name: expected letters, digits, dashes"),
        ("{averages: [{decay: 0.9}], snapshots: {every_steps: 5}}", "snapshots: needs an average with sigma"),
        ("{snapshots: {keep: 2}}", "train.ema.snapshots.keep: expected at least 3, received 2"),
    ],
)
def test_averages_that_make_no_sense_are_refused(ema: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(Path("data"), f"train.ema={ema}")


def test_snapshots_of_adapters_are_refused() -> None:
    ema = "train.ema={averages: [{sigma_rel: 0.1}], snapshots: {every_steps: 5}}"
    with pytest.raises(ConfigError, match="a fit of adapters is not made"):
        recipe(Path("data"), ema, "train.init_from=export", "train.adapter={}")


def test_the_former_key_is_refused_with_what_to_write() -> None:
    with pytest.raises(
        ConfigError, match=r"train.ema_decay: no longer a key; write ema: {averages: \[{decay"
    ):
        recipe(Path("data"), "train.ema_decay=0.9")


def test_a_single_average_need_not_be_named() -> None:
    assert recipe(Path("data"), "train.ema={averages: [{sigma_rel: 0.1}]}").train.ema.used.name == "ema"
    assert recipe(Path("data"), f"train.ema={{use: b, averages: [{TWO}]}}").train.ema.used.sigma_rel == 0.1


def test_a_run_of_the_former_kind_is_refused_as_such() -> None:
    settings = recipe(Path("data"))
    stored = to_dict(settings)
    del stored["train"]["ema"]
    stored["train"]["ema_decay"] = 0.9
    checkpoint = Checkpoint(Path("step"), {"recipe": stored, "versions": {"tim_ds": "0.1"}})
    with pytest.raises(CheckpointError, match=r"step: written when a run kept one average .*tim_ds 0.1"):
        check_same_run(checkpoint, settings, DataFacts("", "", 0, 4, 8, 0))
