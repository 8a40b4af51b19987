"""The file of one rank in a checkpoint: safetensors, written without a copy, with a checksum.

The library's own writer copies every tensor and holds Python's lock meanwhile. This one hands the memory of a
tensor to the system in blocks, so that a thread can write while the run trains on.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tim_ds.errors import CheckpointError

BLOCK_BYTES = 1 << 24
"""Bytes that are summed and written at a time."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    crc32: int

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "crc32": f"{self.crc32:08x}"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FileRecord:
        return cls(int(content["bytes"]), int(content["crc32"], 16))


def write_rank_file(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write tensors as a safetensors file and flush it to the disk. Those of a GPU pass through the host one
    by one.

    Raises:
        OSError: if it cannot be written.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        shape = list(value.shape)
        entries[name] = {"dtype": _NAMES[value.dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    # The format wants the data aligned to eight bytes; spaces are allowed.
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    checksum = zlib.crc32(head)
    with path.open("wb") as file:
        file.write(head)
        for value in tensors.values():
            # Both calls leave Python's lock to others.
            content = memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(content), BLOCK_BYTES):
                block = content[start : start + BLOCK_BYTES]
                checksum = zlib.crc32(block, checksum)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(head) + end, checksum)


def check_rank_file(path: Path, record: FileRecord) -> None:
    """Read a file once from end to end.

    Raises:
        CheckpointError: if it is not what was written.
    """
    checksum = size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                checksum = zlib.crc32(block, checksum)
                size += len(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if (size, checksum) != record:
        raise CheckpointError(
            f"{path}: damaged: expected {record.bytes:,} bytes with checksum {record.crc32:08x}, received "
            f"{size:,} with {checksum:08x}"
        )
