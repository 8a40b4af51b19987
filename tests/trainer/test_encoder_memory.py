"""Memory of frozen encoders, from their configs alone, against what the same classes allocate on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import AutoencoderConfig, DataConfig, ImageEncoderConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import build_autoencoder
from data_pipeline.encoders.footprint import (
    Footprint,
    autoencoder_footprint,
    image_footprint,
    text_footprint,
)
from data_pipeline.encoders.image import build_image_encoder
from data_pipeline.encoders.text import build_text_encoder
from data_pipeline.errors import DataError
from data_pipeline.online import FEATURE_PIXELS, LATENT_PIXELS, encoder_footprints
from data_pipeline.pictures import normalise
from tests.data_pipeline.tiny_models import save_autoencoders, save_gemma, save_t5, save_vision
from tests.memory import LiveBytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_autoencoders(folder)
    save_gemma(folder / "gemma")
    save_t5(folder / "t5")
    save_vision(folder)
    return folder


def measured(encoder: Any, run: Callable[[], object]) -> Footprint:
    """With real weights and a real batch."""
    model = encoder.model
    weights = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), LiveBytes(weights) as live:
        run()
    return Footprint(sum(tensor.nbytes for tensor in weights), live.peak)


def pixels(count: int, height: int, width: int) -> torch.Tensor:
    return normalise(torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("kind", "size"), [("dc_ae", (2, 16, 24)), ("dc_ae", (1, 2, 2)), ("sd_vae", (3, 8, 16))]
)
def test_autoencoders(saved: Path, kind: Any, size: tuple[int, int, int]) -> None:
    config = AutoencoderConfig(kind=kind, path=str(saved / kind))
    real = build_autoencoder(config)
    # The same operations on the same sizes: the same bytes.
    assert autoencoder_footprint(config, *size) == measured(real, lambda: real.encode(pixels(*size)))


@pytest.mark.parametrize(("kind", "captions"), [("gemma", 3), ("t5", 3), ("gemma", 1)])
def test_text_encoders(saved: Path, kind: Any, captions: int) -> None:
    config = TextEncoderConfig(kind=kind, path=str(saved / kind), max_tokens=12)
    real: Any = build_text_encoder(config)
    # The last caption is half as long: a mask is needed.
    ids = [torch.ones(12, dtype=torch.int32)] * captions + [torch.ones(6, dtype=torch.int32)]
    found = text_footprint(config, captions + 1)
    expected = measured(real, lambda: real.encode_ids(ids))
    assert found.weights == expected.weights
    # Beside the forward: ids and mask in another dtype and on the way; states of one caption in float32.
    assert found.peak == pytest.approx(expected.peak, rel=0.05)


@pytest.mark.parametrize(("name", "kind"), [("dinov2", "dino"), ("dinov3", "dino"), ("radio", "radio")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_image_encoders(saved: Path, name: str, kind: Any, dtype: Any) -> None:
    config = ImageEncoderConfig(kind=kind, path=str(saved / name), dtype=dtype)
    real = build_image_encoder(config)
    found = image_footprint(config, 2, 24, 16, (3, 2))
    expected = measured(real, lambda: real.features(pixels(2, 24, 16), (3, 2)))
    assert found.weights == expected.weights
    # Sums a head that the CPU's attention keeps.
    assert found.peak == pytest.approx(expected.peak, rel=0.02)


def test_encoders_without_weights_take_their_batch() -> None:
    found = autoencoder_footprint(AutoencoderConfig(kind="pixels"), 2, 8, 8)
    assert found.weights == 0 and found.peak >= 4 * 2 * 3 * 8 * 8
    assert text_footprint(TextEncoderConfig(kind="words"), 4) == Footprint(0, 0)
    assert image_footprint(ImageEncoderConfig(kind="patches"), 2, 8, 8, (2, 2)).peak > 0


def test_what_runs_follows_from_what_the_shards_leave(saved: Path) -> None:
    config = DataConfig(
        shards="shards",
        tokens_per_pack=64,
        packs_per_step=1,
        autoencoder=AutoencoderConfig(kind="dc_ae", path=str(saved / "dc_ae")),
        text_encoder=TextEncoderConfig(kind="t5", path=str(saved / "t5"), max_tokens=12),
        image_encoder=ImageEncoderConfig(kind="dino", path=str(saved / "dinov2")),
        encode_online=True,
    )

    def found(pictures: int, online: set[str] | None) -> dict[str, Footprint]:
        return encoder_footprints(config, pictures, (4, 4), patch_size=1, online=online)

    assert found(4, set()).keys() == {"image_encoder"}
    assert found(4, {"ids"}).keys() == {"text_encoder", "image_encoder"}
    everything = found(4, None)
    assert everything.keys() == {"autoencoder", "text_encoder", "image_encoder"}
    one = autoencoder_footprint(config.autoencoder, 1, 8, 8)
    assert everything["autoencoder"].peak == 4 * one.peak
    # However many pictures a pack has, a batch has no more than so many pixels.
    most = found(10**6, {"picture"})
    assert most["autoencoder"] == autoencoder_footprint(config.autoencoder, LATENT_PIXELS // 64, 8, 8)
    assert config.image_encoder is not None
    features = image_footprint(config.image_encoder, FEATURE_PIXELS // 64, 8, 8, (4, 4))
    assert most["image_encoder"] == features


def test_a_config_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.autoencoder\.path"):
        autoencoder_footprint(AutoencoderConfig(kind="dc_ae", path=nowhere), 1, 8, 8)
    with pytest.raises(DataError, match=r"data\.text_encoder\.path"):
        text_footprint(TextEncoderConfig(kind="gemma", path=nowhere), 1)
    with pytest.raises(DataError, match=r"data\.image_encoder\.path"):
        image_footprint(ImageEncoderConfig(kind="dino", path=nowhere), 1, 8, 8, (2, 2))
