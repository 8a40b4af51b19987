"""A picture of 4096 x 4096 by the command line: whole, without seams, within the announced memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.config import AutoencoderConfig
from data_pipeline.encoders.autoencoder import PretrainedAutoencoder
from tests.data_pipeline.encoders.test_tiling import dc_ae
from tests.memory import peak_growth
from tests.networks import export_of, write_tiny_export
from tim_ds.eval import sample
from tim_ds.model.export_folder import Export
from tim_ds.model.memory import gib
from tim_ds.pipeline import TiMPipeline, read_settings

SIDE, TILE = 4096, 512


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network on latents of a DC-AE in the released layout, with 8 channels at full resolution."""
    folder = tmp_path_factory.mktemp("large")
    autoencoder = dc_ae(8, layers=3)
    autoencoder.model.save_pretrained(folder / "dc_ae")
    tiny = export_of()
    described: Export = replace(
        tiny,
        model=replace(tiny.model, in_channels=autoencoder.channels),
        autoencoder=AutoencoderConfig(kind="dc_ae", path=str(folder / "dc_ae")),
    )
    return write_tiny_export(folder / "export", described)


def seam_contrast(levels: np.ndarray, axis: int) -> float:
    """Mean step across the borders of tiles over that across other borders of cells.

    A decoder of random weights draws a grid of its own, one cell of 32 pixels like the other: borders of
    tiles are compared with the lines halfway between them, which lie on borders of cells too.
    """
    lines = np.arange(TILE, SIDE, TILE)

    def step(at: np.ndarray) -> float:
        after, before = levels.take(at, axis).astype(np.int32), levels.take(at - 1, axis).astype(np.int32)
        return float(np.abs(after - before).mean())

    return step(lines) / step(lines[:-1] + TILE // 2)


@pytest.mark.slow
def test_the_whole_path_at_4096(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, sums = PretrainedAutoencoder.decode, []

    def summed(self: PretrainedAutoencoder, latents: Tensor) -> Tensor:
        pixels = decode(self, latents)
        # In float64 no sum of so many finite numbers overflows: it is finite if every pixel is.
        sums.append(float(pixels.sum(dtype=torch.float64)))
        return pixels

    monkeypatch.setattr(PretrainedAutoencoder, "decode", summed)
    size = f"{SIDE}x{SIDE}"
    common = ["--export", str(export), "--prompt", "a three", "--steps", "1", "--device", "cpu"]
    # Imports and the libraries' own buffers are there before memory is counted.
    assert sample.main([*common, "--size", "64x64", "--out", str(tmp_path / "small")]) == 0
    words = [*common, "--size", size, "--tile", str(TILE), "--out", str(tmp_path / "out")]
    status: list[int] = []
    start = time.perf_counter()
    measured = peak_growth(lambda: status.append(sample.main(words)))
    seconds = time.perf_counter() - start
    assert status == [0] and len(sums) == 2 and np.isfinite(sums).all()

    pipe = TiMPipeline.from_pretrained(export)
    pipe.autoencoder.tile_px = TILE  # type: ignore[attr-defined]  # a DC-AE has it
    estimate = pipe.needed_bytes((SIDE, SIDE), pipe.export.sampler)
    with capsys.disabled():
        print(f"\n{size}: {seconds:.0f} s, peak {gib(measured)}, estimated {gib(estimate)}")
    # What refuses a size must not refuse what would fit by far, nor let pass what does not fit.
    assert 0.3 * estimate < measured < estimate

    [path] = (tmp_path / "out").glob("0*.png")
    settings = read_settings(path)
    assert (settings["size"], settings["nfe"], settings["prompt"]) == (size, 1, "a three")
    with Image.open(path) as image:
        assert image.size == (SIDE, SIDE) and image.mode == "RGB"
        levels = np.asarray(image)
    # Levels are cut at 0 and 255: a picture that is mostly cut could hide a step.
    assert float(((levels == 0) | (levels == 255)).mean()) < 0.5 and levels.std() > 5
    for axis in (0, 1):
        # Means over 7 lines of 4,096 x 3 values differ by a percent; tiles without margins gave 1.12, 1.18.
        assert seam_contrast(levels, axis) == pytest.approx(1.0, abs=0.05)
