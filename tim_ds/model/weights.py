"""Reading and writing weight files, and loading them into a network, strictly by name and shape."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tim_ds.errors import CheckpointError

NESTINGS = ("state_dict", "model")
"""Keys under which a pickled file may hold its tensors; otherwise it has to be a mapping name -> tensor."""

_LISTED = 8
"""Keys that an error message spells out before it only counts."""

_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format: a larger header length means that the file is something else."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch `.bin` / `.pt` file, on the CPU, by name.

    The format is told from the content. A pickled file is read with `weights_only=True`: one that carries
    code is refused, not run. It may nest its tensors under one of `NESTINGS`.

    Raises:
        CheckpointError: if the file is absent, empty, truncated, of another kind, or carries code.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a weight file, received a folder; name the file inside it")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; fetch or write it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pickle(path, size)
    return _read_safetensors(path, size)


def open_weights(
    path: str | os.PathLike[str], expected: Mapping[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """The tensors of a safetensors file, read one at a time when they are asked for.

    Args:
        expected: names and shapes that the file must have exactly; on the meta device too.
    Returns:
        The tensor of a name, in the dtype of the tensor that it is asked for, on the CPU.
    Raises:
        CheckpointError: if the file cannot be read or does not hold these tensors.
    """
    try:
        stored: Any = safe_open(path, framework="pt")
        shapes = {
            name: torch.empty(stored.get_slice(name).get_shape(), device="meta")
            for name in stored.keys()  # noqa: SIM118  # not a mapping
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    check_weights(expected, shapes, source=str(path))
    return lambda name, like: stored.get_tensor(name).to(like.dtype)


def write_weights(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `state` as one safetensors file: aside, flushed to the disk, then renamed over `path`.

    Raises:
        CheckpointError: if it cannot be written (full disk, no permission). Nothing half-written is left,
            and a file that was at `path` is untouched.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    needed = sum(value.nbytes for value in tensors.values())
    write_aside(path, needed, lambda aside: save_file(tensors, aside, dict(metadata or {})))


def stream_weights(
    path: str | os.PathLike[str],
    network: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a float32 safetensors file tensor by tensor, so that one of them is in memory at a time.

    Args:
        network: a tensor of each name and shape, in the order in which `tensors` gives them.
    Raises:
        CheckpointError: as `write_weights`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name, like in network.items():
        begin, end = end, end + 4 * like.numel()
        entries[name] = {"dtype": "F32", "shape": list(like.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    # The format wants the data aligned to eight bytes; spaces are allowed.
    header += b" " * (-len(header) % 8)

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for (name, like), (given, value) in zip(network.items(), tensors, strict=True):
                if given != name or value.shape != like.shape:
                    raise CheckpointError(
                        f"{path}: expected {name} {list(like.shape)}, received {given} {list(value.shape)}"
                    )
                file.write(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())

    write_aside(Path(path), end, write)


def write_aside(path: Path, needed_bytes: int, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk and rename it to `path`.

    Raises:
        CheckpointError: naming the path and the bytes needed, if there is no room or the system refuses.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed_bytes:
            raise CheckpointError(_cannot_write(path, needed_bytes, f"the disk has {free:,} bytes left"))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        aside = Path(name)
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp gives mode 600; a weight file gets what an ordinary `open` would give.
        aside.chmod(0o666 & ~_umask())
        os.replace(aside, path)
        aside = None
        sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_cannot_write(path, needed_bytes, str(error))) from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_weights(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str) -> None:
    """Raises one CheckpointError with every missing, extra and misshapen key of `state`.

    Args:
        expected: tensors with the right names and shapes; a network's state dict, on the meta device too.
        source: where the weights come from, for the message.
    """
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    misshapen = [
        f"{name} (expected {list(value.shape)}, received {list(state[name].shape)})"
        for name, value in expected.items()
        if name in state and value.shape != state[name].shape
    ]
    if missing or extra or misshapen:
        raise CheckpointError(
            f"{source}: not the weights of this network "
            f"({len(expected)} tensors expected, {len(state)} received)"
            + _listing("missing", missing)
            + _listing("extra", extra)
            + _listing("misshapen", misshapen)
        )


def load_weights_into(network: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `state` into `network`, whose names and shapes it must have exactly; dtypes are converted.

    Raises:
        CheckpointError: as `check_weights`. The network is then unchanged.
    """
    own = network.state_dict()
    check_weights(own, state, source=source)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        is_header = size > 8 and 2 <= length <= _MAX_HEADER_BYTES and file.read(1) == b"{"
        if not is_header:
            raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch weight file")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated inside its header ({size:,} bytes); fetch it again")
        file.seek(8)
        raw = file.read(length)
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(raw).items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged; fetch it again") from error
    if size < expected:
        raise CheckpointError(
            f"{path}: truncated, expected {expected:,} bytes, received {size:,}; fetch it again"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file ({error})") from error


def _read_pickle(path: Path, size: int) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not plain tensors: the file is damaged, or carries objects or code that loading would "
            f"run, which is refused ({_first_line(error)}). Save its state dict alone, or ask for safetensors"
        ) from error
    except Exception as error:
        # What torch.load raises on damaged bytes has no list: struct.error and AssertionError are among it.
        raise CheckpointError(
            f"{path}: truncated or damaged ({size:,} bytes): {_first_line(error)}; fetch it again"
        ) from error
    return _flat(content, path)


def _flat(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in NESTINGS:
            inner = content.get(key)
            if isinstance(inner, Mapping):
                content = inner
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected tensors by name, received {type(content).__name__}")
    if not content:
        raise CheckpointError(f"{path}: holds no tensors")
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{path}: expected tensors by name (or under one of {list(NESTINGS)})"
            + _listing("not tensors", other)
        )
    return {str(name): value for name, value in content.items()}


def _listing(title: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = f"\n    ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"\n  {title} ({len(names)}):" + "".join(f"\n    {name}" for name in names[:_LISTED]) + more


def _cannot_write(path: Path, needed_bytes: int, reason: str) -> str:
    return (
        f"{path}: cannot be written, {needed_bytes:,} bytes needed: {reason}. "
        "Free space or choose another folder"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].strip()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
