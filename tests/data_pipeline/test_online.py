"""Encoders that run while training: in the training process, whoever reads, the same whatever the ranks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline import online
from data_pipeline import prepare as prepare_module
from data_pipeline.batch import PackedBatch
from data_pipeline.config import AutoencoderConfig, DataConfig, ImageEncoderConfig, TextEncoderConfig
from data_pipeline.encoders.image import build_image_encoder
from data_pipeline.encoders.language_model import load_gemma
from data_pipeline.errors import DataError
from data_pipeline.loader import StepLoader, build_loader
from tests.data_pipeline import source_folders, tiny_models

# A batch of another composition sums in another order: float32 for the autoencoder (seen: 2e-6), bfloat16 for
# the language model, as in test_prepare.
LATENT_TOLERANCE = 1e-4
STATES_TOLERANCE = 0.06


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_autoencoders(folder)
    tiny_models.save_gemma(folder / "gemma")
    tiny_models.save_vision(folder)
    return folder


@pytest.fixture(scope="module")
def shards(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of several sizes with token ids, for a DC-AE and a Gemma."""
    folder = tmp_path_factory.mktemp("online")
    prepared(
        source_folders.folder(folder / "source", 12),
        folder / "shards",
        *("--autoencoder", "dc_ae", "--autoencoder-path", str(models / "dc_ae")),
        *("--text-encoder", "gemma", "--text-encoder-path", str(models / "gemma")),
        *(
            "--pictures",
            "png",
            "--text",
            "ids",
            "--dtype",
            "bfloat16",
            "--max-area",
            "24x24",
            "--patch-size",
            "4",
        ),
    )
    return folder / "shards"


@pytest.fixture(scope="module")
def pixel_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of `pixels` and states of `words`: nothing is left to encode."""
    folder = tmp_path_factory.mktemp("pixels")
    prepared(
        source_folders.folder(folder / "source", 8),
        folder / "shards",
        *("--autoencoder", "pixels", "--factor", "4", "--text-encoder", "words", "--text-width", "8"),
        *("--max-area", "64x64", "--flip"),
    )
    return folder / "shards"


def prepared(source: Path, out: Path, *options: str) -> None:
    assert prepare_module.main([str(source), "--out", str(out), *options]) == 0


def config_of(shards: Path, models: Path, **changes: object) -> DataConfig:
    values: dict[str, object] = {
        "shards": str(shards),
        "tokens_per_pack": 2048,
        "packs_per_step": 2,
        "autoencoder": AutoencoderConfig(kind="dc_ae", path=str(models / "dc_ae")),
        "text_encoder": TextEncoderConfig(kind="gemma", path=str(models / "gemma")),
        "encode_online": True,
        "caption_dropout": 0.0,
        **changes,
    }
    return DataConfig(**values)  # type: ignore[arg-type]  # a test may pass any field


def pixels_config(shards: Path, **changes: object) -> DataConfig:
    return DataConfig(
        shards=str(shards),
        tokens_per_pack=1024,
        packs_per_step=1,
        autoencoder=AutoencoderConfig(kind="pixels", factor=4),
        text_encoder=TextEncoderConfig(kind="words", width=8),
        **changes,  # type: ignore[arg-type]  # likewise
    )


def samples_of(loader: StepLoader[PackedBatch]) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and states of every sample that the loader's packs hold, by epoch and id.

    An epoch draws its own captions.
    """
    found = {}
    for batch in (batch for step in loader for batch in step):
        assert batch.text_LE is not None and batch.text_lengths is not None
        tokens = batch.latents_TC.split([h * w for h, w in batch.grids])
        found.update(
            zip(
                ((batch.epoch, sample_id) for sample_id in batch.sample_ids),
                zip(tokens, batch.text_LE.split(batch.text_lengths), strict=True),
                strict=True,
            )
        )
    return found


def test_a_sample_is_encoded_alike_on_any_rank_with_any_workers_and_after_a_resume(
    shards: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(shards, models)
    reference = samples_of(build_loader(config, patch_size=1, num_steps=3))
    assert len({sample_id for _, sample_id in reference}) == 12
    by_rank = [
        samples_of(build_loader(config, patch_size=1, rank=rank, world_size=2, num_steps=3))
        for rank in (0, 1)
    ]
    assert {*by_rank[0], *by_rank[1]} == set(reference)
    with_workers = build_loader(dataclasses.replace(config, workers=2), patch_size=1, num_steps=3)
    resumed = build_loader(config, patch_size=1, start_step=1, num_steps=2)
    one_by_one = build_loader(config, patch_size=1, num_steps=3)
    entered: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    # Workers only read: encoding, and what is put around it, happens here.
    with_workers.watch_encoders(around)
    variants = [*by_rank, samples_of(with_workers), samples_of(resumed)]
    assert entered and entered == ["in", "out"] * (len(entered) // 2)
    monkeypatch.setattr(online, "LATENT_PIXELS", 1)
    monkeypatch.setattr(online, "CAPTION_BATCH", 1)
    variants.append(samples_of(one_by_one))
    for variant in variants:
        for sample, (tokens, states) in variant.items():
            torch.testing.assert_close(tokens, reference[sample][0], rtol=0, atol=LATENT_TOLERANCE)
            torch.testing.assert_close(states, reference[sample][1], rtol=0.05, atol=STATES_TOLERANCE)


def test_pictures_of_one_size_share_a_batch_and_are_encoded_once(
    shards: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    plain = online.FrozenEncoders._latents

    def counting(self: online.FrozenEncoders, pixels: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(online.FrozenEncoders, "_latents", counting)
    for workers in (0, 2):
        batches.clear()
        config = config_of(shards, models, workers=workers, packs_per_step=1)
        loader = build_loader(config, patch_size=1, num_steps=1)
        loader.num_steps = 3 * loader.steps_per_epoch
        list(loader)
        assert sum(batches) == 12 and max(batches) > 1, workers


@pytest.fixture(scope="module")
def picture_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `pixel_shards`, left to encode."""
    folder = tmp_path_factory.mktemp("pictures")
    prepared(
        source_folders.folder(folder / "source", 8),
        folder / "shards",
        *("--autoencoder", "pixels", "--factor", "4", "--text-encoder", "words", "--text-width", "8"),
        *("--max-area", "64x64", "--pictures", "png"),
    )
    return folder / "shards"


def test_pictures_are_mirrored_where_stored_mirror_images_are_used(
    pixel_shards: Path, picture_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    plain = online.FrozenEncoders._latents

    def counting(self: online.FrozenEncoders, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(online.FrozenEncoders, "_latents", counting)
    encoder = ImageEncoderConfig(kind="patches", width=8)
    epochs = 6
    stored = build_loader(pixels_config(pixel_shards, image_encoder=encoder), patch_size=1, num_steps=1)
    stored.num_steps = steps = epochs * stored.steps_per_epoch
    expected = [batch for step in stored for batch in step]
    for workers in (0, 2):
        config = pixels_config(
            picture_shards, image_encoder=encoder, encode_online=True, flip_online=True, workers=workers
        )
        encoded.clear()
        seen: dict[int, set[float]] = {}
        for batch, other in zip(
            (b for step in build_loader(config, patch_size=1, num_steps=steps) for b in step),
            expected,
            strict=True,
        ):
            assert batch.sample_ids == other.sample_ids and batch.features_TZ is not None
            assert other.features_TZ is not None
            # What was stored was rounded to float16, of which the features take 16 numbers and more.
            torch.testing.assert_close(batch.latents_TC, other.latents_TC, rtol=0, atol=2**-11)
            torch.testing.assert_close(batch.features_TZ, other.features_TZ, rtol=0, atol=2**-8)
            for sample_id, tokens in zip(
                batch.sample_ids, batch.latents_TC.split([h * w for h, w in batch.grids]), strict=True
            ):
                seen.setdefault(sample_id, set()).add(float(tokens[0].sum()))
        # Each of them as it is and mirrored at the most, and each of these is encoded once.
        variants = [len(found) for found in seen.values()]
        assert len(seen) == 8 and max(variants) == 2 and sum(variants) > 12
        assert sum(encoded) == sum(variants)


def test_a_run_that_resumes_mirrors_what_it_would_have_mirrored(picture_shards: Path) -> None:
    config = pixels_config(picture_shards, encode_online=True, flip_online=True)
    whole = samples_of(build_loader(config, patch_size=1, num_steps=6))
    rest = samples_of(build_loader(config, patch_size=1, start_step=4, num_steps=2))
    assert rest and all(torch.equal(whole[sample][0], tokens) for sample, (tokens, _) in rest.items())


def test_mirroring_is_refused_where_it_has_no_picture(shards: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.flip_online: .* data\.encode_online is false"):
        config_of(shards, models, encode_online=False, flip_online=True)
    prepared(
        source_folders.folder(tmp_path / "source", 2),
        tmp_path / "out",
        *("--autoencoder", "pixels", "--factor", "4", "--max-area", "64x64", "--text", "caption"),
        *("--text-encoder", "words", "--text-width", "8"),
    )
    config = pixels_config(tmp_path / "out", encode_online=True, flip_online=True)
    with pytest.raises(DataError, match=r"data\.flip_online: true, but the shards .* hold latents"):
        build_loader(config, patch_size=1, num_steps=1)


def test_captions_that_are_encoded_here_are_filled_up_to_the_longest_of_their_pack(
    shards: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    plain = online.FrozenEncoders._texts

    def counting(self: online.FrozenEncoders, samples):
        encoded.append(len(samples))
        return plain(self, samples)

    monkeypatch.setattr(online.FrozenEncoders, "_texts", counting)
    encoder = TextEncoderConfig(kind="gemma", path=str(models / "gemma"), padding="constant")
    changes = {"text_encoder": encoder, "caption_dropout": 0.5}
    trimmed = build_loader(config_of(shards, models, caption_dropout=0.5), patch_size=1, num_steps=4)
    expected = [batch for step in trimmed for batch in step]
    for workers in (0, 2):
        encoded.clear()
        loader = build_loader(
            config_of(shards, models, workers=workers, **changes), patch_size=1, num_steps=4
        )
        filled = shorter = 0
        for batch, other in zip(chain.from_iterable(loader), expected, strict=True):
            assert batch.text_LE is not None and other.text_LE is not None and other.text_lengths
            assert batch.padding_1E is not None and batch.dropped_S == other.dropped_S
            longest = max(other.text_lengths)
            assert batch.text_lengths == (longest,) * len(other.text_lengths)
            for long, short, is_null in zip(
                batch.text_LE.split(longest),
                other.text_LE.split(other.text_lengths),
                batch.dropped_S,
                strict=True,
            ):
                torch.testing.assert_close(long[: len(short)], short, rtol=0.05, atol=STATES_TOLERANCE)
                assert torch.equal(long[len(short) :], batch.padding_1E.expand(longest - len(short), -1))
                filled, shorter = filled + is_null, shorter + (len(short) < longest)
        # Dropped captions are among those that were filled up; what is kept is not filled up, so it is kept.
        assert filled > 3 and shorter > filled / 2 and sum(encoded) == 12


def test_prepared_shards_hold_the_padding_state(shards: Path, models: Path) -> None:
    stored = load_file(shards / "null.safetensors")
    encoder = load_gemma(str(models / "gemma"), max_tokens=16, constant_padding=True)
    assert encoder.padding_state is not None and stored["states"].shape == (1, 16)
    assert torch.equal(stored["padding"], encoder.padding_state.bfloat16())


def test_encoders_are_recorded_with_the_revision_of_their_weights(shards: Path, models: Path) -> None:
    loader = build_loader(config_of(shards, models), patch_size=1, num_steps=1)
    recorded = loader.encoders
    assert set(recorded) == {"autoencoder", "text_encoder"}
    assert recorded["autoencoder"]["kind"] == "dc_ae"
    assert all(str(part["revision"]).startswith("blake2b:") for part in recorded.values())


def test_a_sample_whose_latent_is_not_finite_is_replaced(
    shards: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = online.FrozenEncoders.encode
    poisoned = "000003"

    def poisoning(self: online.FrozenEncoders, samples, names):
        return [
            DataError(f"{name}: the encoders give NaN or infinity") if poisoned in name else sample
            for sample, name in zip(plain(self, samples, names), names, strict=True)
        ]

    monkeypatch.setattr(online.FrozenEncoders, "encode", poisoning)
    seen = []
    for workers in (0, 2):
        loader = build_loader(config_of(shards, models, workers=workers), patch_size=1, num_steps=2)
        packs = [batch for step in loader for batch in step]
        assert loader.num_damaged == 1
        assert sum(batch.num_replaced for batch in packs) >= 1
        seen.append([batch.sample_ids for batch in packs])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode_online": False}, r"data\.encode_online: false, but .* leave picture and ids to be encoded"),
        (
            {"autoencoder": AutoencoderConfig(kind="sd_vae", path="SD")},
            r"data\.autoencoder\.kind: the shards .* were made with 'dc_ae', the recipe says 'sd_vae'",
        ),
        (
            {"autoencoder": AutoencoderConfig(kind="pixels", factor=4)},
            r"data\.autoencoder\.kind",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(
    changes: dict[str, object], message: str, shards: Path, models: Path
) -> None:
    with pytest.raises(DataError, match=message):
        build_loader(config_of(shards, models, **changes), patch_size=1, num_steps=1)


def test_an_autoencoder_of_another_stride_or_width_is_refused(
    shards: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = online.latent_shape(AutoencoderConfig(kind="dc_ae", path=str(models / "dc_ae")))
    monkeypatch.setattr(online, "latent_shape", lambda _: dataclasses.replace(shape, stride=8))
    with pytest.raises(DataError, match=r"a cell is 8 pixels a side, the pictures .* prepared for 2"):
        build_loader(config_of(shards, models), patch_size=1, num_steps=1)
    monkeypatch.setattr(online, "latent_shape", lambda _: dataclasses.replace(shape, channels=16))
    with pytest.raises(DataError, match=r"gives latents of 16 channels, the shards .* prepared for 4"):
        build_loader(config_of(shards, models), patch_size=1, num_steps=1)
    monkeypatch.setattr(online, "latent_shape", lambda _: shape)
    monkeypatch.setattr(online, "text_width", lambda _: 99)
    with pytest.raises(DataError, match=r"gives states of width 99, the shards .* prepared for 16"):
        build_loader(config_of(shards, models), patch_size=1, num_steps=1)


def test_shards_of_latents_take_no_online_encoder(pixel_shards: Path) -> None:
    with pytest.raises(DataError, match=r"data\.encode_online: true, but .* hold latents and states already"):
        build_loader(pixels_config(pixel_shards, encode_online=True), patch_size=1, num_steps=1)


def test_shards_of_latents_load_nothing_for_encoders(pixel_shards: Path) -> None:
    program = f"""
import sys
from data_pipeline.config import *
from data_pipeline.loader import build_loader
config = DataConfig(shards={str(pixel_shards)!r}, tokens_per_pack=1024, packs_per_step=1,
    autoencoder=AutoencoderConfig(kind="pixels", factor=4),
    text_encoder=TextEncoderConfig(kind="words", width=8))
loader = build_loader(config, patch_size=1, num_steps=2)
assert len(list(loader)) == 2 and loader.encoders == {{}}
assert not {{"transformers", "diffusers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def features_by_sample(config: DataConfig) -> dict[int, torch.Tensor]:
    loader = build_loader(config, patch_size=1, num_steps=2)
    found = {}
    for batch in (batch for step in loader for batch in step):
        assert batch.features_TZ is not None
        found.update(
            zip(batch.sample_ids, batch.features_TZ.split([h * w for h, w in batch.grids]), strict=True)
        )
    return found


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "radio"])
def test_features_of_a_pretrained_model_come_one_a_token(kind: str, shards: Path, models: Path) -> None:
    encoder = ImageEncoderConfig(
        kind="radio" if kind == "radio" else "dino", path=str(models / kind), dtype="float32"
    )
    config = config_of(shards, models, image_encoder=encoder)
    loader = build_loader(config, patch_size=1, num_steps=1)
    assert set(loader.encoders) == {"autoencoder", "text_encoder", "image_encoder"}
    found = features_by_sample(config)
    assert len(found) > 6 and all(rows.shape[1] == 16 for rows in found.values())
    # Rows follow the picture: the features of a token change when its pixels do, and far ones less.
    extractor = build_image_encoder(encoder)
    pixels = torch.zeros(1, 3, 8, 12)
    assert extractor.features(pixels, (4, 6)).shape == (1, 24, 16)


def test_a_grid_of_features_is_row_major() -> None:
    extractor = build_image_encoder(ImageEncoderConfig(kind="patches", width=8))
    pixels = torch.zeros(1, 1, 8, 20)
    changed = pixels.clone()
    changed[:, :, 4:, 16:] = 1.0
    moved = (extractor.features(changed, (2, 5)) - extractor.features(pixels, (2, 5))).abs().amax(-1)[0] > 0
    # The last token and its neighbours see it.
    assert moved.nonzero().flatten().tolist() == [3, 4, 8, 9]


def test_latents_of_pixels_are_pictures_enough_for_features(pixel_shards: Path) -> None:
    """Exactly invertible: the features are those of the picture, mirrored where the mirror image is used."""
    encoder = ImageEncoderConfig(kind="patches", width=8)
    config = pixels_config(pixel_shards, image_encoder=encoder)
    loader = build_loader(config, patch_size=1, num_steps=2)
    extractor = build_image_encoder(encoder)
    checked = 0
    for batch in (batch for step in loader for batch in step):
        assert batch.features_TZ is not None
        lengths = [h * w for h, w in batch.grids]
        parts = zip(
            batch.latents_TC.split(lengths), batch.features_TZ.split(lengths), batch.grids, strict=True
        )
        for tokens, features, (h, w) in parts:
            # A token of patch 1 is a cell: channels of a 4x4 block, (pixel channel, row, column).
            picture = tokens.view(h, w, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 3, 4 * h, 4 * w)
            torch.testing.assert_close(features, extractor.features(picture, (h, w))[0], rtol=0, atol=1e-5)
            checked += 1
    assert checked > 4


def test_latents_of_an_autoencoder_are_not_pictures(models: Path, tmp_path: Path) -> None:
    prepared(
        source_folders.folder(tmp_path / "source", 2),
        tmp_path / "out",
        *("--autoencoder", "dc_ae", "--autoencoder-path", str(models / "dc_ae"), "--max-area", "64x64"),
        *("--text-encoder", "words", "--text-width", "8"),
    )
    config = DataConfig(
        shards=str(tmp_path / "out"),
        tokens_per_pack=2048,
        packs_per_step=1,
        autoencoder=AutoencoderConfig(kind="dc_ae", path=str(models / "dc_ae")),
        text_encoder=TextEncoderConfig(kind="words", width=8),
        image_encoder=ImageEncoderConfig(kind="patches"),
    )
    with pytest.raises(DataError, match=r"data\.image_encoder: reads pictures, .* hold latents of dc_ae"):
        build_loader(config, patch_size=1, num_steps=1)


def test_an_image_encoder_of_another_kind_is_refused(shards: Path, models: Path) -> None:
    encoder = ImageEncoderConfig(kind="radio", path=str(models / "dinov2"))
    with pytest.raises(DataError, match=r"expected a model of type radio .* received 'dinov2'"):
        build_loader(config_of(shards, models, image_encoder=encoder), patch_size=1, num_steps=1)


@pytest.mark.gpu
def test_encoders_on_a_gpu_agree_with_those_on_the_cpu(shards: Path, models: Path) -> None:
    encoder = ImageEncoderConfig(kind="dino", path=str(models / "dinov2"), dtype="float32")
    for workers in (0, 2):
        config = config_of(shards, models, image_encoder=encoder, workers=workers)
        here = build_loader(config, patch_size=1, num_steps=2)
        there = build_loader(config, patch_size=1, num_steps=2, device=torch.device("cuda"))
        for a, b in zip(chain.from_iterable(here), chain.from_iterable(there), strict=True):
            assert a.features_TZ is not None and b.features_TZ is not None
            # TF32 in convolutions: 10 bits.
            torch.testing.assert_close(b.latents_TC, a.latents_TC, rtol=0, atol=2e-2)
            torch.testing.assert_close(b.features_TZ, a.features_TZ, rtol=0, atol=2e-2)
            assert a.text_lengths == b.text_lengths
