from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.ranks import recipe
from tim_ds.errors import ConfigError
from tim_ds.trainer.config import OptimizerConfig, TrainConfig
from tim_ds.trainer.engine import ENGINE_KEYS, RECIPE_KEYS, merge_config, read_engine_file

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def test_every_key_of_the_lists_is_one_that_deepspeed_reads() -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations
    source = "".join(
        path.read_text(errors="replace")
        for folder in ("runtime", "monitor", "comm", "profiling", "utils", "compile")
        for path in (Path(spec.submodule_search_locations[0]) / folder).rglob("*.py")
    )
    for key in (*ENGINE_KEYS, *RECIPE_KEYS):
        assert f'"{key}"' in source or f"'{key}'" in source, key


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_accepted(path: Path) -> None:
    merged = merge_config(read_engine_file(path), TrainConfig(steps=1), packs_per_step=16, world_size=8)
    assert merged["gradient_accumulation_steps"] == 2 and merged["train_batch_size"] == 16


def test_files_are_shipped_for_every_stage() -> None:
    stages = {json.loads(path.read_text())["zero_optimization"]["stage"] for path in SHIPPED}
    assert stages == {0, 1, 2, 3}


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimisation": {"stage": 1}},
        "zero_optimisation: unknown key; did you mean 'zero_optimization'?",
    ),
    ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag: unknown key; did you mean 'stage'?"),
    ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: "),
    ({"zero_optimization": 1}, "zero_optimization: expected an object"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage: expected a value, received 'auto'"),
    ({"timers": 3}, "timers: expected an object, received 3"),
    ({"timers": {"throughputt": {}}}, "timers.throughputt: unknown key; did you mean 'throughput'?"),
    (
        {"timers": {"throughput": {"enable": False}}},
        "timers.throughput.enable: unknown key; did you mean 'enabled'?",
    ),
    ({"timers": {"throughput": 3}}, "timers.throughput: expected an object, received 3"),
    (
        {"flops_profiler": {"profile_stp": 3}},
        "flops_profiler.profile_stp: unknown key; did you mean 'profile_step'?",
    ),
    (
        {"flops_profiler": {"enabled": "yes"}},
        "flops_profiler.enabled: expected a value like the default False, received 'yes'",
    ),
    (
        {"flops_profiler": {"profile_step": True}},
        "flops_profiler.profile_step: expected a value like the default 1, received True",
    ),
    ({"flops_profiler": {"output_file": 3}}, "flops_profiler.output_file: expected a value like"),
    ({"aio": {"block_sizee": 1}}, "aio.block_sizee: unknown key; did you mean 'block_size'?"),
    ({"aio": {"queue_depth": 1.5}}, "aio.queue_depth: expected a value like the default 8, received 1.5"),
    ({"comms_logger": {"verbos": True}}, "comms_logger.verbos: unknown key; did you mean 'verbose'?"),
    ({"comms_logger": {"prof_ops": 3}}, "comms_logger.prof_ops: Input should be a valid list, received 3"),
    ({"compile": {"deepcompil": True}}, "compile.deepcompil: unknown key; did you mean 'deepcompile'?"),
    ({"compile": {"deepcompile": "auto"}}, "compile.deepcompile: expected a value, received 'auto'"),
    ({"steps_per_print": "ten"}, "steps_per_print: expected a number above 0, received 'ten'"),
    (
        {"gradient_clipping": 1.0},
        "gradient_clipping: follows from train.optimizer.grad_clip in the recipe; remove it here",
    ),
    ({"train_batch_size": 8}, "train_batch_size: follows from data.packs_per_step"),
    ({"bf16": {"enabled": True}}, "bf16: follows from train.precision"),
    ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm: expected true"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "offload_optimizer.device: expected cpu or none",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "offload_param: expected stage 3",
    ),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: expected stage 1"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "offload_optimizer.ratio: expected 1.0",
    ),
    (
        {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}},
        "zero_hpz_partition_size: expected stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "zero_quantized_weights: expected false",
    ),
    (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
        "zero_optimization.mics_shard_size: unknown key",
    ),
    (
        {"zero_force_ds_cpu_optimizer": True},
        "zero_force_ds_cpu_optimizer: chooses the optimiser of an offloaded",
    ),
]


def test_what_deepspeed_reads_within_a_key_is_accepted(tmp_path: Path) -> None:
    content = {
        "timers": {"throughput": {"enabled": True, "synchronized": False}},
        "flops_profiler": {"enabled": True, "recompute_fwd_factor": 1, "output_file": "flops.txt"},
        "aio": {"block_size": 1 << 20, "overlap_events": True},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "compile": {"deepcompile": False, "passes": ["z1"]},
    }
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    assert read_engine_file(path) == content


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_a_wrong_key_is_refused_by_name(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        read_engine_file(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"fp16": {}, "zero_optimization": {"stag": 1}, "nonsense": 1}))
    with pytest.raises(ConfigError) as error:
        read_engine_file(path)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"log_level": "info", "log_level": "debug"}', "log_level: given twice"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_engine_file(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_engine_file(tmp_path / "none.json")


def test_float32_accumulation_and_messages_are_asked_for_in_every_precision() -> None:
    for precision in ("fp32", "bf16_autocast", "bf16"):
        train = TrainConfig(steps=1, precision=precision)
        merged = merge_config({"zero_optimization": {"stage": 1}}, train, packs_per_step=1, world_size=1)
        assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
        assert merged["communication_data_type"] == "fp32"
        assert ("bf16" in merged, "torch_autocast" in merged) == (
            precision == "bf16",
            precision == "bf16_autocast",
        )


def test_clipping_is_the_recipes() -> None:
    train = TrainConfig(steps=1, optimizer=OptimizerConfig(grad_clip=0.25))
    merged = merge_config({"zero_optimization": {"stage": 2}}, train, packs_per_step=1, world_size=1)
    assert merged["gradient_clipping"] == 0.25


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ((), 3, "data.packs_per_step: expected a multiple of the number of ranks 3, received 4"),
        (("train.precision=bf16",), 1, "train.precision: 'bf16' keeps float32 masters"),
    ],
)
def test_a_recipe_that_the_engine_cannot_run_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], world_size: int, message: str
) -> None:
    settings = recipe(tmp_path, *overrides)
    with pytest.raises(ConfigError) as error:
        merge_config({}, settings.train, packs_per_step=4, world_size=world_size)
    assert message in str(error.value)


def test_the_gpus_of_a_node_divide_the_ranks() -> None:
    zero = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    with pytest.raises(ConfigError, match="expected a divisor of the number of ranks 12"):
        merge_config(zero, TrainConfig(steps=1), packs_per_step=12, world_size=12)
