"""Pictures to latents and back, by exact pixels and by diffusers' models in their own file format."""

import pytest
import torch

from data_pipeline.config import AutoencoderConfig
from data_pipeline.encoders.autoencoder import PixelAutoencoder, build_autoencoder
from data_pipeline.errors import DataError
from tests.data_pipeline.tiny_models import save_autoencoders


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixels_come_back_exactly(factor, channels):
    autoencoder = build_autoencoder(AutoencoderConfig(kind="pixels", factor=factor, channels=channels))
    pixels = torch.rand(2, channels, 8, 16) * 2 - 1
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, channels * factor**2, 8 // factor, 16 // factor)
    assert (autoencoder.stride, autoencoder.channels) == (factor, channels * factor**2)
    assert torch.equal(autoencoder.decode(latents), pixels)
    latents = torch.randn(1, autoencoder.channels, 3, 5)
    assert torch.equal(autoencoder.encode(autoencoder.decode(latents)), latents)


def test_a_cell_holds_its_own_block_of_pixels():
    pixels = torch.arange(3 * 4 * 4.0).reshape(1, 3, 4, 4)
    cell = PixelAutoencoder(2, 3).encode(pixels)[0, :, 1, 0]
    assert torch.equal(cell, pixels[0, :, 2:4, 0:2].reshape(-1))


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 3, 8, 3), (1, 1, 8, 8), (3, 8, 8), (1, 3, 0, 8)])
def test_pictures_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError, match=r"multiples of 4.*nearest|expected \[B, 3, H, W\]"):
        PixelAutoencoder(4, 3).encode(torch.zeros(shape))


def test_latents_of_another_width_are_refused():
    with pytest.raises(DataError, match=r"expected \[B, 12, h, w\], received \[1, 4, 2, 2\]"):
        PixelAutoencoder(2, 3).decode(torch.zeros(1, 4, 2, 2))


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoders")
    return folder, save_autoencoders(folder)


EXPECTED = {"dc_ae": (2, 0.41407, 0.0), "sd_vae": (4, 0.18215, 0.25)}


@pytest.mark.parametrize("kind", EXPECTED)
def test_adapters_follow_the_saved_model(saved_models, kind):
    folder, models = saved_models
    stride, scale, shift = EXPECTED[kind]
    autoencoder = build_autoencoder(AutoencoderConfig(kind=kind, path=str(folder / kind)))
    assert (autoencoder.stride, autoencoder.channels, autoencoder.pixel_channels) == (stride, 4, 3)
    pixels = torch.rand(2, 3, 16, 8) * 2 - 1
    with torch.no_grad():
        encoded = models[kind].encode(pixels)
        z = encoded.latent if kind == "dc_ae" else encoded.latent_dist.mean
        decoded = models[kind].decode(z).sample
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, 4, 16 // stride, 8 // stride) and not latents.requires_grad
    # Two copies of a float32 model may sum in another order: measured 3e-7 on values of 0.1.
    torch.testing.assert_close(latents, (z - shift) * scale, rtol=1e-5, atol=2e-6)
    # The same, and the scale is undone with rounding of 1e-7, which the decoder may amplify a little.
    torch.testing.assert_close(autoencoder.decode(latents), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXPECTED)
def test_adapters_check_sizes_against_the_stride(saved_models, kind):
    folder, _ = saved_models
    stride = EXPECTED[kind][0]
    autoencoder = build_autoencoder(AutoencoderConfig(kind=kind, path=str(folder / kind)))
    with pytest.raises(DataError, match=rf"picture of 16x9 pixels: both sides must be multiples of {stride}"):
        autoencoder.encode(torch.zeros(1, 3, 16, 9))


def test_adapters_are_frozen_and_in_float32(saved_models):
    folder, _ = saved_models
    autoencoder = build_autoencoder(AutoencoderConfig(kind="dc_ae", path=str(folder / "dc_ae")))
    parameters = list(autoencoder.model.parameters())  # type: ignore[attr-defined]  # the adapter of a model
    assert parameters and all(p.dtype == torch.float32 and not p.requires_grad for p in parameters)


def test_a_folder_without_weights_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"data\.autoencoder\.path: cannot load AutoencoderDC from"):
        build_autoencoder(AutoencoderConfig(kind="dc_ae", path=str(tmp_path)))
