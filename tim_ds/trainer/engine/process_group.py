"""Start and stop of the process group, and what DeepSpeed sends in it through a wrapper."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.comm.comm
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger

from tim_ds.errors import ConfigError
from tim_ds.trainer.meeting import START_WITHIN_S, connect, meet
from tim_ds.trainer.watch import HUNG_AFTER_S, Watch
from tim_ds.trainer.world import World

TIMEOUT_MARGIN_S = 120.0
"""By which the collectives wait longer than the watch, so that who is missing is named before one fails."""
TIMEOUT_S = HUNG_AFTER_S + TIMEOUT_MARGIN_S
"""How long a collective waits for the other ranks, where nothing else is said."""

_COUNTS_OF_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How srun and the kinds of mpirun tell a process how many were started with it; none of them sets RANK."""


def start_world(
    timeout_s: float = TIMEOUT_S, start_within_s: float = START_WITHIN_S, watch: Watch | None = None
) -> World:
    """Join the process group of the launcher, or be a group of one without a launcher.

    Args:
        timeout_s: how long a collective waits for the other ranks before it fails.
        start_within_s: how long the first rank waits for the last one.
        watch: begun as soon as this rank can be heard by the others.
    Raises:
        ConfigError: processes were started together, but nothing says which rank each is.
        RankAbsentError: if a rank did not start.
    """
    if "RANK" not in os.environ:
        _refuse_tasks()
        # No launcher. DeepSpeed would look for MPI. Port 0: whichever is free when the one rank listens.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(_is_news)
    # Older names of collectives, which DeepSpeed calls: a line a call.
    deprecated = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    _leave_out_shm_op()
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    connection = connect(start_within_s)
    if connection is not None:
        if watch is not None:
            watch.start(connection)
        meet(connection, start_within_s)
    if watch is not None:
        watch.enter("process group")
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(),
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
    del connection
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Every rank would take all cores, and they would wait for each other.
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_host))
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
    if watch is not None:
        watch.world = world
    return world


def _refuse_tasks() -> None:
    for name in _COUNTS_OF_TASKS:
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{name} says that {count} processes were started together, but RANK is not set, so that "
                "each would be a run of its own. Start them in a way of launch/README.md (under Slurm: "
                "launch/slurm/train.sbatch), or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
                "MASTER_PORT for each"
            )


def stop_world(world: World, *, failed: bool = False) -> None:
    """Leave the process group. Ranks that end well wait for each other: a group torn down while a peer
    still uses it can abort that peer."""
    if not torch.distributed.is_initialized():
        return
    if not failed or world.shared_error is not None:
        world.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def collectives_through(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """What DeepSpeed sends goes through `wrap(backend)` meanwhile, an object with the backend's methods."""
    home: Any = deepspeed.comm.comm
    backend = home.cdb
    home.cdb = wrap(backend)
    try:
        yield
    finally:
        home.cdb = backend


def _leave_out_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective for CPUs when the process group starts.

    It would need ninja, a C++ compiler and a minute, and is used for inference only. The table is otherwise
    filled on first use by trying to compile every operation that DeepSpeed has; nothing else reads it.
    """
    operations: Any = deepspeed.ops
    operations.__compatible_ops__ = {"deepspeed_shm_comm": False}


def _is_news(record: logging.LogRecord) -> bool:
    """Drops two warnings. One, about the hooks of ZeRO-3, does not apply: blocks take and give plain tensors
    besides their context, and tests compare the stages. One, about skipped steps, the loop says better."""
    message = record.getMessage()
    return "unknown inputs or outputs type" not in message and "OVERFLOW! Skipping step" not in message
