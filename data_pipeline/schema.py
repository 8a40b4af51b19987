"""What one sample in a shard holds, and the checks that every reader applies.

Members of a sample `<key>` in a webdataset tar:

    <key>.latent.safetensors   tensor `latent` [C, h, w], float16, bfloat16 or float32, normalised
    <key>.text.safetensors     tensor `states` [n, E], trimmed to the caption's real length (text data)
    <key>.cls                  the class label in ASCII digits (class data)
    <key>.json                 object (optional): caption, source, sizes, crop, hashes

A sample carries text or a label, never both. Latents and states are stored in 16 bits and used in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.errors import DataError

MANIFEST_NAME = "manifest.json"
"""How the shards were made: settings, counts, encoders, hashes. Absent beside shards of other origin."""

NULL_NAME = "null.safetensors"
"""States of the empty caption, stored once beside the shards of text data."""

LATENT = "latent.safetensors"
TEXT = "text.safetensors"
LABEL = "cls"
META = "json"

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture as it lies in a shard.

    Shapes:
        latent: [C, h, w].   states: [n, E] or None.
    """

    key: str
    latent: Tensor
    states: Tensor | None = None
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def to_members(self) -> dict[str, bytes]:
        """The sample as tar members, extension to bytes.

        Raises:
            DataError: if the sample breaks the schema.
        """
        check_key(self.key)
        if (self.states is None) == (self.label is None):
            raise DataError(f"{self.key}: a sample carries either text states or a label")
        check_latent(self.latent, self.key)
        members = {LATENT: save({"latent": self.latent.contiguous()})}
        if self.states is not None:
            check_states(self.states, self.key)
            members[TEXT] = save({"states": self.states.contiguous()})
        if self.label is not None:
            if self.label < 0:
                raise DataError(f"{self.key}: label must not be negative, received {self.label}")
            members[LABEL] = str(self.label).encode("ascii")
        members[META] = json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode()
        return members


def check_key(key: str) -> None:
    """A key is one plain file name without a dot (webdataset splits at the first one).

    Raises:
        DataError: if it is empty, climbs out of the folder, or holds a dot in its last part.
    """
    parts = key.split("/")
    if not key or key.startswith("/") or ".." in parts or "" in parts or "." in parts[-1] or "\x00" in key:
        raise DataError(f"{key!r}: not a sample key; expected a relative name without dots or '..'")


def check_latent(latent: Tensor, where: str) -> None:
    """Raises DataError unless `latent` is a finite floating [C, h, w] with no side of zero."""
    if latent.ndim != 3 or 0 in latent.shape:
        raise DataError(f"{where}: latent: expected shape [C, h, w], received {list(latent.shape)}")
    _check_values(latent, f"{where}: latent")


def check_states(states: Tensor, where: str) -> None:
    """Raises DataError unless `states` is a finite floating [n, E] with n at least 1."""
    if states.ndim != 2 or 0 in states.shape:
        raise DataError(
            f"{where}: text states: expected shape [n, E] with n of at least 1, received {list(states.shape)}"
        )
    _check_values(states, f"{where}: text states")


def _check_values(tensor: Tensor, where: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise DataError(f"{where}: expected dtype float16, bfloat16 or float32, received {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{where}: holds NaN or infinity")


def decode_tensor(data: bytes, name: str, where: str) -> Tensor:
    """The tensor `name` of a safetensors member.

    Raises:
        DataError: if the bytes are no safetensors or do not hold it.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{where}: not a readable safetensors member ({error})") from error
    if name not in tensors:
        raise DataError(f"{where}: expected a tensor {name!r}, received {sorted(tensors)}")
    return tensors[name]


def decode_label(data: bytes, where: str) -> int:
    """The class label of a `.cls` member.

    Raises:
        DataError: if it is no non-negative integer.
    """
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdigit() or len(text) > 9:
        raise DataError(f"{where}: expected a class label in digits, received {text[:40]!r}")
    return int(text)


def decode_meta(data: bytes, where: str) -> dict[str, Any]:
    """The object of a `.json` member.

    Raises:
        DataError: if it is no JSON object.
    """
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: not readable JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{where}: expected a JSON object, received {type(meta).__name__}")
    return meta
