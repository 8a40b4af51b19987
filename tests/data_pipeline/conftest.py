"""Small shards shared by the tests of this folder."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_pipeline.config import AutoencoderConfig, DataConfig, TextEncoderConfig
from data_pipeline.index import build_index
from data_pipeline.schema import NULL_NAME, Sample
from data_pipeline.shards import write_shards

TEXT_WIDTH = 8
CHANNELS = 4


def text_samples(count: int) -> list[Sample]:
    """Pictures of five sizes whose every latent value is the sample's number (plus the channel)."""
    rng = np.random.default_rng(7)
    sizes = [(2, 2), (2, 4), (4, 2), (4, 4), (6, 2)]
    samples = []
    for number in range(count):
        h, w = sizes[int(rng.integers(len(sizes)))]
        latent = torch.full((CHANNELS, h, w), float(number)) + torch.arange(CHANNELS)[:, None, None]
        states = torch.full((int(rng.integers(1, 6)), TEXT_WIDTH), float(number))
        samples.append(
            Sample(
                f"s{number:05d}", latent.half(), states=states.half(), meta={"caption": f"number {number}"}
            )
        )
    return samples


def write_folder(folder: Path, samples: list[Sample], *, per_shard: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, "shard", samples, per_shard=per_shard)
    if samples[0].states is not None:
        null = torch.full((1, TEXT_WIDTH), -1.0).half()
        (folder / NULL_NAME).write_bytes(save({"states": null}))
    build_index(folder, progress=False).save()
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], *, tar_format: int = tarfile.PAX_FORMAT) -> None:
    """A tar as another program might write it."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 captioned pictures in four shards; never changed by a test."""
    return write_folder(tmp_path_factory.mktemp("text"), text_samples(150))


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled pictures of ten classes."""
    samples = [
        Sample(f"c{n:03d}", torch.full((CHANNELS, 2, 2), float(n)).half(), label=n % 10) for n in range(60)
    ]
    return write_folder(tmp_path_factory.mktemp("class"), samples)


@pytest.fixture(autouse=True)
def _loader_warnings_are_captured(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="data_pipeline"):
        yield


def data_config(folder: Path, **changes: object) -> DataConfig:
    """A recipe's data section for the folders above."""
    values: dict[str, object] = {
        "shards": str(folder),
        "tokens_per_pack": 64,
        "packs_per_step": 4,
        "autoencoder": AutoencoderConfig(kind="pixels", factor=2, channels=1),
        "text_encoder": TextEncoderConfig(kind="words", width=TEXT_WIDTH),
        "caption_dropout": 0.1,
        **changes,
    }
    return DataConfig(**values)  # type: ignore[arg-type]  # a test may pass any field
