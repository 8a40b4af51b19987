"""Decoding in tiles: exact for DC-AE, blended otherwise, and within the memory that is estimated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.encoders import tiling
from data_pipeline.encoders.autoencoder import PretrainedAutoencoder, decode_bytes
from data_pipeline.errors import DataError
from tests.memory import peak_growth


def dc_ae(
    width: int = 8, *, upsample: str = "pixel_shuffle", norm: str = "rms_norm", layers: int = 2
) -> PretrainedAutoencoder:
    """Random weights in the layout of the released f32c32: attention in the three coarsest stages."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    torch.manual_seed(0)
    blocks: Any = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    channels = (width, 2 * width, 2 * width, 2 * width, 4 * width, 4 * width)
    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(layers,) * 6,
        upsample_block_type=upsample,
        decoder_norm_types=norm,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return PretrainedAutoencoder(model, stride=32, channels=8)


def sd_vae(width: int = 8) -> PretrainedAutoencoder:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    down: Any = ("DownEncoderBlock2D",) * 4
    up: Any = ("UpDecoderBlock2D",) * 4
    channels: Any = (width, 2 * width, 2 * width, 2 * width)
    model = AutoencoderKL(
        block_out_channels=channels, down_block_types=down, up_block_types=up, norm_num_groups=4
    )
    return PretrainedAutoencoder(model, stride=8, channels=4)


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """[1, 3, 416, 608] in [-1, 1]: the temple that scikit-learn ships."""
    from sklearn.datasets import load_sample_image

    image: Any = load_sample_image("china.jpg")
    pixels = torch.from_numpy(np.ascontiguousarray(image[:416, :608])).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def whole(autoencoder: PretrainedAutoencoder, latents: Tensor) -> Tensor:
    autoencoder.tile_px = 1 << 20
    return autoencoder.decode(latents)


def border_contrast(difference: Tensor, borders: list[int]) -> float:
    """Mean step of `difference` from one column to the next at the borders, over that everywhere else."""
    steps = (difference[..., 1:] - difference[..., :-1]).abs().mean((0, 1, 2))
    at = torch.zeros(len(steps), dtype=torch.bool)
    at[[b - 1 for b in borders]] = True
    return float(steps[at].mean() / steps[~at].mean())


class TestDcAe:
    @pytest.mark.parametrize("tile_px", [96, 160])
    def test_tiles_give_the_pixels_of_the_whole(self, photograph: Tensor, tile_px: int) -> None:
        autoencoder = dc_ae()
        assert autoencoder.tiles_exactly
        latents = autoencoder.encode(photograph)
        expected = whole(autoencoder, latents)
        autoencoder.tile_px = tile_px
        # Float32 sums in another order, through some forty layers: measured 2e-6 on values up to 2.
        torch.testing.assert_close(autoencoder.decode(latents), expected, rtol=0, atol=5e-5)
        assert float(expected.std()) > 0.1

    def test_interpolation_and_batch_norm_too(self) -> None:
        for upsample, norm in (("interpolate", "rms_norm"), ("pixel_shuffle", "batch_norm")):
            autoencoder = dc_ae(upsample=upsample, norm=norm)
            latents = torch.randn(2, 8, 5, 4)
            expected = whole(autoencoder, latents)
            autoencoder.tile_px = 64
            torch.testing.assert_close(autoencoder.decode(latents), expected, rtol=0, atol=5e-5)

    def test_a_smaller_margin_would_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The margin is not there for nothing: half of it, and pixels change."""
        autoencoder = dc_ae()
        latents = torch.randn(1, 8, 6, 6)
        expected = whole(autoencoder, latents)
        autoencoder.tile_px = 64
        reach = tiling._reach_of
        monkeypatch.setattr(tiling, "_reach_of", lambda layers: (reach(layers)[0] // 2, reach(layers)[1]))
        assert float((autoencoder.decode(latents) - expected).abs().max()) > 1e-3

    def test_no_step_at_the_borders_of_tiles(self, photograph: Tensor) -> None:
        autoencoder = dc_ae()
        latents = autoencoder.encode(photograph)
        expected = whole(autoencoder, latents)
        autoencoder.tile_px = 96
        tiled = autoencoder.decode(latents)
        # A picture of random weights has a grid of its own: borders of tiles are compared with other
        # columns of the same place within a cell.
        borders = [*range(96, 608, 96)]
        others = [b + 32 for b in borders if b + 32 < 608]
        at, elsewhere = (border_contrast(tiled, columns) for columns in (borders, others))
        whole_at, whole_elsewhere = (border_contrast(expected, columns) for columns in (borders, others))
        assert at / elsewhere == pytest.approx(whole_at / whole_elsewhere, rel=1e-3)
        assert 0.5 < at / elsewhere < 2.0

    def test_the_margin_of_the_released_layout(self) -> None:
        """Three residual layers a stage, as released: 57 pixels of reach, 64 in whole cells of 8."""
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

        with torch.device("meta"):
            blocks: Any = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
            model = AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks)
        assert tiling.margin_px(model.decoder, 32) == 64
        # 4096x4096 of the released widths within 8 GiB of work, on top of its weights.
        assert tiling.exact_bytes(model.decoder, 4096, 4096, 1024**2, 32) < 8 * 2**30

    def test_layers_of_unknown_reach_are_not_tiled_exactly(self) -> None:
        autoencoder = dc_ae()
        autoencoder.model.decoder.up_blocks[0].append(torch.nn.GroupNorm(2, 8))
        assert not tiling.reaches_known(autoencoder.model.decoder)
        with pytest.raises(DataError, match="the reach of a GroupNorm is not known"):
            tiling.decode_exactly(autoencoder.model.decoder, torch.randn(1, 8, 4, 4), 64, 32)


class TestBlending:
    def test_a_local_decoder_is_not_changed_at_all(self) -> None:
        """Where nothing depends on the surroundings, fading tiles into each other changes nothing."""
        latents = torch.randn(1, 3, 11, 14, dtype=torch.float64)

        def repeat(part: Tensor) -> Tensor:
            return part.repeat_interleave(4, 2).repeat_interleave(4, 3)

        for tile_px in (4, 16, 20, 44):
            blended = tiling.decode_blended(repeat, latents, tile_px, 4)
            torch.testing.assert_close(blended, repeat(latents), rtol=0, atol=1e-14)

    def test_tiles_that_disagree_fade_without_a_step(self) -> None:
        """Each tile a constant of its own: no two neighbouring pixels differ by more than the fade allows."""
        levels = iter(range(1000))

        def constant(part: Tensor) -> Tensor:
            return torch.full((1, 1, part.shape[2] * 8, part.shape[3] * 8), float(next(levels) % 2))

        blended = tiling.decode_blended(constant, torch.zeros(1, 1, 8, 29), 64, 8)
        fade = 8 * round(8 * tiling.OVERLAP_SHARE)
        assert float(blended.amin()) == 0.0 and float(blended.amax()) == 1.0
        assert float((blended[..., 1:] - blended[..., :-1]).abs().max()) <= 1.0 / fade + 1e-6

    def test_sd_vae_keeps_its_tiles_near_the_whole_and_shows_no_seam(
        self, photograph: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        autoencoder = sd_vae()
        assert not autoencoder.tiles_exactly
        latents = autoencoder.encode(photograph)
        expected = whole(autoencoder, latents)
        autoencoder.tile_px = 160
        tiled = autoencoder.decode(latents)
        error = (tiled - expected).abs()
        # Group norms see another picture in each tile. With random weights, which no training made to agree,
        # the mean error is 0.44 of the picture's own spread.
        assert float(error.mean()) < 0.6 * float(expected.std())
        size, overlap = 160, 8 * round(20 * tiling.OVERLAP_SHARE)
        starts = [8 * s for s in tiling._starts(76, 20, overlap // 8)]
        borders = [*starts[1:], *(s + size for s in starts[:-1])]
        blended = border_contrast(tiled - expected, borders)
        monkeypatch.setattr(tiling, "OVERLAP_SHARE", 0.0)
        monkeypatch.setattr(
            tiling, "_starts", lambda length, tile, _: [*range(0, length - tile, tile), length - tile]
        )
        abutting = autoencoder.decode(latents)
        seams = border_contrast(abutting - expected, [160, 320, 448])
        # Beside each other the tiles step where they meet; faded they do not.
        assert blended < 1.5 < 2.0 < seams


def test_memory_stays_below_the_estimate() -> None:
    autoencoder = dc_ae(16)
    autoencoder.tile_px = 512
    latents = torch.randn(1, 8, 32, 32)
    autoencoder.decode(latents[:, :, :2, :2])
    measured = peak_growth(lambda: autoencoder.decode(latents))
    assert 0.3 * decode_bytes(autoencoder, 1024, 1024) < measured < decode_bytes(autoencoder, 1024, 1024)


def test_the_estimate_grows_with_the_tile_and_barely_with_the_picture() -> None:
    autoencoder = dc_ae(16)
    autoencoder.tile_px = 512
    small, large = decode_bytes(autoencoder, 512, 512), decode_bytes(autoencoder, 2048, 2048)
    assert large < 6 * small
    autoencoder.tile_px = 2048
    assert decode_bytes(autoencoder, 2048, 2048) > 3 * small
