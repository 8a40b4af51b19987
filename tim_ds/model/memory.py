"""What sampling takes of a device's memory, estimated before it is asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from tim_ds.model.config import ModelConfig

_SLACK_BYTES = 64 * 2**20
"""What libraries and allocators take for themselves."""
_STATE_BYTES = 64
"""Per token and channel: the state in float64, its next value and F, the network's input and output."""


def sampling_bytes(model: ModelConfig, num_tokens: int) -> int:
    """Estimate of the peak of one forward without gradients over that many image tokens, weights not counted.

    A block keeps the residual stream and, at its widest, either the packed q, k and v while they are
    shifted by the interval, normed and rotated in float32, or both halves of the MLP and their product;
    weights in bfloat16 save little of it. No term grows with the square of a picture: attention does not
    store its scores. Measured in float32 and bfloat16: 0.6 to 0.8 of the estimate.
    """
    wide = max(4 * model.hidden_size, 3 * model.mlp_hidden)
    token = 4 * (3 * model.hidden_size + 3 * wide) + model.token_channels * _STATE_BYTES
    return num_tokens * token + _SLACK_BYTES


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process can still get; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [value for value in (_machine_bytes(), _group_bytes()) if value is not None]
    return min(found, default=None)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that was in use at one time: of the device since `reset_peak`, of a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _field(Path("/proc/self/status"), "VmHWM:")


def reset_peak(device: torch.device) -> None:
    """Count anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gib(size: int) -> str:
    """Readable size: `1.50 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def _machine_bytes() -> int | None:
    return _field(Path("/proc/meminfo"), "MemAvailable:")


def _group_bytes() -> int | None:
    """What the container may still take."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
    except (OSError, ValueError):
        return None
