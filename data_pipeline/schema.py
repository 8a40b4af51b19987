"""What one sample in a shard holds, and the checks that every reader applies.

Members of a sample `<key>` in a webdataset tar:

    <key>.latent.safetensors   tensor `latent` [C, h, w], float16, bfloat16 or float32, normalised
    <key>.text.safetensors     tensor `states` [n, E], trimmed to the caption's real length (text data)
    <key>.cls                  the class label in ASCII digits (class data)
    <key>.json                 object (optional): caption, source, sizes, crop, hashes

A sample carries text or a label, never both. Latents and states are stored in 16 bits and used in float32.

Variants are stored, so that nothing is encoded anew: the latent member may hold `flipped`, the latent of the
mirror image, and the text member `states.1`, `states.2`, ..., those of further captions.

Shards for encoders that run while training hold, instead of a latent or of states:

    <key>.png, .jpg, .webp     the picture; its json says its crop and what the autoencoder makes of it
    <key>.text.safetensors     tensor `ids` int32 [n] (and `ids.1`, ...), the caption's tokens
    <key>.txt                  the caption itself, UTF-8; further ones in the json's `captions`

The json then gives `text_width`, and for a picture `latent` (channels, stride): what the encoders make of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
"""States of the empty caption, and of padding (Gemma), stored once beside the shards of text data."""

LATENT = "latent.safetensors"
TEXT = "text.safetensors"
CAPTION = "txt"
LABEL = "cls"
META = "json"

PICTURES = ("png", "jpg", "webp")
"""Members that hold a picture for an autoencoder that runs while training."""

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Types of latents and states, under safetensors' names."""

FLOAT_DTYPES = tuple(FLOATS.values())


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture as it lies in a shard: a latent or a picture, and states, ids, a caption or a label.

    Shapes:
        latent, flipped: [C, h, w].   states, each of more_states: [n, E].   each of ids: int32 [n].
    """

    key: str
    latent: Tensor | None = None
    states: Tensor | None = None
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    flipped: Tensor | None = None
    """Latent of the mirror image."""
    more_states: tuple[Tensor, ...] = ()
    """States of further captions."""
    ids: tuple[Tensor, ...] = ()
    """Tokens of the captions, for a text encoder that runs while training."""
    caption: str | None = None
    """The caption itself, for a tokenizer that runs while training."""
    picture: tuple[str, bytes] | None = None
    """(one of `PICTURES`, the file's bytes), for an autoencoder that runs while training."""

    def to_members(self) -> dict[str, bytes]:
        """The sample as tar members, extension to bytes.

        Raises:
            DataError: if the sample breaks the schema.
        """
        check_key(self.key)
        given = [self.states is not None, bool(self.ids), self.caption is not None, self.label is not None]
        if sum(given) != 1:
            raise DataError(
                f"{self.key}: a sample carries either text states or a label (or, for an encoder that runs "
                f"while training, ids or a caption); received {sum(given)} of these"
            )
        if (self.latent is None) == (self.picture is None):
            raise DataError(f"{self.key}: a sample carries either a latent or a picture")
        members = self._picture_members()
        members.update(self._text_members())
        members[META] = json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode()
        return members

    def _picture_members(self) -> dict[str, bytes]:
        if self.picture is not None:
            ending, data = self.picture
            if ending not in PICTURES or not data:
                raise DataError(
                    f"{self.key}: expected a picture of {', '.join(PICTURES)}, received {ending!r} of "
                    f"{len(data)} bytes"
                )
            return {ending: data}
        assert self.latent is not None
        tensors = {"latent": self.latent}
        check_latent(self.latent, self.key)
        if self.flipped is not None:
            check_latent(self.flipped, f"{self.key}: flipped")
            if self.flipped.shape != self.latent.shape:
                raise DataError(
                    f"{self.key}: flipped: expected the shape of the latent {list(self.latent.shape)}, "
                    f"received {list(self.flipped.shape)}"
                )
            tensors["flipped"] = self.flipped
        return {LATENT: save({name: tensor.contiguous() for name, tensor in tensors.items()})}

    def _text_members(self) -> dict[str, bytes]:
        if self.label is not None:
            if self.label < 0:
                raise DataError(f"{self.key}: label must not be negative, received {self.label}")
            return {LABEL: str(self.label).encode("ascii")}
        if self.caption is not None:
            return {CAPTION: self.caption.encode()}
        if self.ids:
            for row in self.ids:
                check_ids(row, self.key)
            return {TEXT: save({variant("ids", n): row.contiguous() for n, row in enumerate(self.ids)})}
        assert self.states is not None
        captions = (self.states, *self.more_states)
        for states in captions:
            check_states(states, self.key)
        if len({states.shape[1] for states in captions}) > 1:
            raise DataError(f"{self.key}: text states: the captions differ in the width of their states")
        return {TEXT: save({variant("states", n): s.contiguous() for n, s in enumerate(captions)})}


def variant(name: str, number: int) -> str:
    """Name of caption `number`'s tensor: the first has the plain name."""
    return f"{name}.{number}" if number else name


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


def check_ids(ids: Tensor, where: str) -> None:
    """Raises DataError unless `ids` is int32 [n], not negative, with n at least 1."""
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype != torch.int32:
        raise DataError(f"{where}: ids: expected int32 [n], n >= 1, received {ids.dtype} {list(ids.shape)}")
    if int(ids.min()) < 0:
        raise DataError(f"{where}: ids: expected none below 0, received {int(ids.min())}")


def _check_values(tensor: Tensor, where: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise DataError(f"{where}: expected dtype float16, bfloat16 or float32, received {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{where}: holds NaN or infinity")


def decode_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """All tensors of a safetensors member.

    Raises:
        DataError: if the bytes are no safetensors.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{where}: not a readable safetensors member ({error})") from error


def tensor_places(header: bytes, start: int) -> dict[str, tuple[str, int, int]]:
    """(safetensors' name of its type, first byte, byte after the last) of each tensor of a member.

    Args:
        header: of a member that `decode_tensors` has read.
        start: byte of the member at which the data begin, after the header.
    """
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return {
        name: (entry["dtype"], start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in entries.items()
    }


def take_tensor(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """The tensor `name` of a member.

    Raises:
        DataError: if it is not there.
    """
    if name not in tensors:
        raise DataError(f"{where}: expected a tensor {name!r}, received {sorted(tensors)}")
    return tensors[name]


def take_variants(tensors: Mapping[str, Tensor], name: str, where: str) -> tuple[Tensor, ...]:
    """The tensors `name`, `name.1`, `name.2`, ... of a member: one a caption.

    Raises:
        DataError: if the first is not there.
    """
    found = [take_tensor(tensors, name, where)]
    while (further := tensors.get(variant(name, len(found)))) is not None:
        found.append(further)
    return tuple(found)


def decode_tensor(data: bytes, name: str, where: str) -> Tensor:
    """The tensor `name` of a safetensors member.

    Raises:
        DataError: if the bytes are no safetensors or do not hold it.
    """
    return take_tensor(decode_tensors(data, where), name, where)


def picture_of(members: Mapping[str, object]) -> str | None:
    """The extension of the picture among a sample's members."""
    return next((ending for ending in PICTURES if ending in members), None)


def planned_latent(meta: dict[str, Any], where: str) -> tuple[int, int, int]:
    """Shape [C, h, w] of the latent that an autoencoder will make of a stored picture, as its json says.

    Raises:
        DataError: if the json does not say it.
    """
    try:
        channels, stride = (int(meta["latent"][name]) for name in ("channels", "stride"))
        height, width = int(meta["height_px"]), int(meta["width_px"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: the json of a picture must give height_px, width_px and latent (channels, stride); "
            f"missing or wrong: {error}. Prepare the shards with `python -m data_pipeline.prepare`"
        ) from error
    if min(channels, stride, height, width) < 1 or height % stride or width % stride:
        raise DataError(
            f"{where}: {height}x{width} pixels at stride {stride} and {channels} channels make no latent"
        )
    return channels, height // stride, width // stride


def planned_text_width(meta: dict[str, Any], where: str) -> int:
    """Width of the states that a text encoder will make of ids or of a caption, as the sample's json says.

    Raises:
        DataError: if the json does not say it.
    """
    width = meta.get("text_width")
    if not isinstance(width, int) or width < 1:
        raise DataError(
            f"{where}: the json must give the text_width of captions that are not encoded, received {width!r}"
        )
    return width


def decode_caption(data: bytes, where: str) -> str:
    """The caption of a `.txt` member.

    Raises:
        DataError: if it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the caption is not UTF-8 ({error})") from error


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
