"""DeepSpeed, behind one seam: the only package that imports it.

What the rest of the trainer sees is imported from here: start and stop of the process group, the merged
engine configuration, and an `Engine` that runs micro-steps, applies optimiser steps under a guard against
non-finite gradients, and shows the float32 state as `Shard`s, the same at every ZeRO stage.
"""

import os

import torch

if not torch.cuda.is_available():
    # Read when deepspeed is imported; without it a search for devices is made and its failure reported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tim_ds.trainer.engine.engine import GATHER_ELEMENTS, STATE_KEYS, Engine, Shard, Splitter, StepResult
from tim_ds.trainer.engine.file import (
    ENGINE_KEYS,
    RECIPE_KEYS,
    check_engine_config,
    merge_config,
    offloads,
    read_engine_file,
    zero_settings,
    zero_stage,
)
from tim_ds.trainer.engine.process_group import (
    TIMEOUT_MARGIN_S,
    TIMEOUT_S,
    collectives_through,
    start_world,
    stop_world,
)

__all__ = [
    "ENGINE_KEYS",
    "GATHER_ELEMENTS",
    "RECIPE_KEYS",
    "STATE_KEYS",
    "TIMEOUT_MARGIN_S",
    "TIMEOUT_S",
    "Engine",
    "Shard",
    "Splitter",
    "StepResult",
    "check_engine_config",
    "collectives_through",
    "merge_config",
    "offloads",
    "read_engine_file",
    "start_world",
    "stop_world",
    "zero_settings",
    "zero_stage",
]
