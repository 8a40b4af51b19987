"""The npz files of ADM's evaluator: pictures as `arr_0`, perhaps statistics; read and written piece by piece.

Letters used in shapes: N pictures, H and W pixels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tim_ds.errors import RequestError
from tim_ds.eval.generate import load_picture
from tim_ds.model.weights import write_aside

PICTURES = "arr_0"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True, slots=True)
class Reference:
    """What a reference file holds.

    Shapes:
        statistics: mu [D], sigma [D, D], mu_s [D'], sigma_s [D', D']; None if the file has none.
    """

    path: Path
    num_pictures: int
    """0 if it holds statistics alone."""
    statistics: dict[str, NDArray[Any]] | None
    size: tuple[int, int] | None = None
    """(height, width) of the pictures; None without any."""


def read_reference(path: Path) -> Reference:
    """Look into a reference file, without reading its pictures.

    Raises:
        RequestError: if it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            statistics = {name: file[name] for name in STATISTICS} if names >= set(STATISTICS) else None
        shape, dtype = _header(path) if PICTURES in names else ((0,), np.dtype(np.uint8))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RequestError(
            f"--reference {path}: cannot be read ({error}); expected a reference batch of ADM's evaluator, "
            f"such as VIRTUAL_imagenet256_labeled.npz of https://github.com/openai/guided-diffusion"
        ) from error
    if PICTURES not in names and statistics is None:
        raise RequestError(
            f"--reference {path}: holds neither {PICTURES} nor {', '.join(STATISTICS)}, but {sorted(names)}"
        )
    if PICTURES in names and (len(shape) != 4 or shape[3] != 3 or dtype != np.uint8):
        raise RequestError(
            f"--reference {path}: expected {PICTURES} uint8 [N, H, W, 3], received {dtype} {list(shape)}"
        )
    count, *sides = (int(side) for side in shape)
    return Reference(path, count, statistics, (sides[0], sides[1]) if sides else None)


def read_pictures(path: Path, size: int) -> Iterator[NDArray[np.uint8]]:
    """The pictures of `arr_0`, uint8 [n, H, W, 3] with n up to `size`, never more than that in memory."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
        shape, _ = _read_header(file)
        picture_bytes = int(np.prod(shape[1:]))
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            content = file.read(count * picture_bytes)
            if len(content) != count * picture_bytes:
                raise RequestError(f"{path}: cut short inside {PICTURES}; fetch it again")
            yield np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])


def write_samples(path: Path, pictures: Sequence[Path]) -> None:
    """All pictures as `arr_0`, uint8 [N, H, W, 3], not compressed: what the published evaluator reads.

    Raises:
        RequestError: if they are not of one size.
        CheckpointError: if the disk refuses; nothing half-written is left.
    """
    height, width, _ = np.asarray(load_picture(pictures[0])).shape
    shape = (len(pictures), height, width, 3)

    def write(aside: Path) -> None:
        with (
            zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive,
            archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as file,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)  # type: ignore[arg-type]  # a zip member is a binary file
            for one in pictures:
                picture = np.asarray(load_picture(one))
                if picture.shape != shape[1:]:
                    raise RequestError(
                        f"{one}: expected {height}x{width} pixels as {pictures[0]}, received "
                        f"{picture.shape[0]}x{picture.shape[1]}"
                    )
                file.write(picture.tobytes())

    write_aside(path, int(np.prod(shape)), write)


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
        return _read_header(file)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]  # type: ignore[arg-type]
    shape, is_fortran, dtype = read(file)  # type: ignore[arg-type]
    if is_fortran:
        raise ValueError(f"{PICTURES} is stored column by column")
    return shape, dtype
