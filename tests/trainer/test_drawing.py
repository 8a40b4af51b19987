"""What the ranks of a run draw with: who holds which encoder, and captions that are encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from data_pipeline.config import TextEncoderConfig
from data_pipeline.encoders.text import TextEncoder, build_text_encoder, fill_up
from tests.data_pipeline.tiny_models import save_gemma
from tests.trainer.conftest import Groups
from tests.trainer.drawing import Decoder, Writer, drawing_export, settings_of, watched
from tests.trainer.ranks import lines_without_clock
from tim_ds.errors import CheckpointError, RequestError
from tim_ds.trainer import drawing
from tim_ds.trainer.drawing import CAPTIONS_FILE, DrawnCaptions, drawing_pipeline, prepare_captions
from tim_ds.trainer.world import World


@pytest.fixture(scope="module")
def seen(groups: Groups) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """Of rank 0 and of rank 1."""
    first, second = (found["counts"] for found in groups.results(2, "draw_where_needed"))
    return first, second


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_holds_an_autoencoder_and_none_a_text_encoder(
    seen: tuple[dict[str, Counter[str]], dict[str, Counter[str]]], stage: int
) -> None:
    first, second = (counts[f"stage {stage}"] for counts in seen)
    assert first["autoencoders loaded"] == 1 and second["autoencoders loaded"] == 0
    assert first["text encoders loaded"] == 1 and second["text encoders loaded"] == 0
    assert first["text encoders beside a drawing"] == second["text encoders beside a drawing"] == 0
    # Two prompts and the empty one; two sheets of two rows of two pictures.
    assert first["captions encoded"] == 3 and first["pictures decoded"] == 8
    assert first["drawings"] == 4
    # Where the weights are split, the other rank takes part, and decodes nothing.
    assert second["drawings"] == (4 if stage == 3 else 0) and second["pictures decoded"] == 0


def test_all_ranks_decode_where_they_share_the_pictures_of_a_benchmark(groups: Groups) -> None:
    for found in groups.results(2, "draw_where_needed"):
        loaded = found["with a benchmark"]
        assert loaded["autoencoders loaded"] == 1 and loaded["text encoders loaded"] == 0


def test_a_continued_run_loads_no_text_encoder_and_draws_the_same(
    groups: Groups, seen: tuple[dict[str, Counter[str]], dict[str, Counter[str]]]
) -> None:
    """Though its first sheet lacks a row, whose decoding failed on rank 0: no bit of the run is another."""
    assert [counts["stopped"]["text encoders loaded"] for counts in seen] == [1, 0]
    assert [counts["continued"]["text encoders loaded"] for counts in seen] == [0, 0]
    folder = groups.folder_of(2, "draw_where_needed")
    whole, continued = folder / "stage_3", folder / "continued"
    assert lines_without_clock(whole) == lines_without_clock(continued)
    (first, last), others = (sorted((run / "previews").iterdir()) for run in (whole, continued))
    assert [sheet.name for sheet in others] == [first.name, last.name]
    assert first.read_bytes() != others[0].read_bytes() and last.read_bytes() == others[1].read_bytes()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    save_gemma(folder)
    return folder


def encoded_by(captions: DrawnCaptions, *texts: str) -> int:
    """How many captions `prepare` encoded; it told the watch of each."""
    counted, moves = 0, []

    def running() -> TextEncoder:
        nonlocal counted
        encoder: Any = build_text_encoder(captions._config)
        encode: Callable[..., Any] = encoder.encode

        def counting(captions: list[str]) -> Any:
            nonlocal counted
            counted += len(captions)
            return encode(captions)

        encoder.encode = counting
        return encoder

    captions.prepare(texts, World(), running, lambda: moves.append(counted))
    assert moves == list(range(1, counted + 1))
    return counted


def test_states_are_those_of_the_encoder_and_fill_up_alike(gemma: Path, tmp_path: Path) -> None:
    config = TextEncoderConfig(kind="gemma", path=str(gemma), max_tokens=12, padding="constant")
    real = build_text_encoder(config)
    captions = DrawnCaptions(tmp_path / CAPTIONS_FILE, config, 16)
    texts = ["a three above a seven", "a gap"]
    captions.prepare(texts, World(), lambda: None)
    expected = [real.encode([text])[0] for text in ["", *texts]]
    found = captions.encode(["", *texts])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {state.dtype for state in found} == {torch.float32}
    for one, other in zip(
        fill_up(found, captions.padding_state), fill_up(expected, real.padding_state), strict=True
    ):
        assert torch.equal(one, other)
    # A bfloat16 model's states lose nothing in half the bytes.
    with safe_open(tmp_path / CAPTIONS_FILE, framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys() if name != "padding"}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}
    with pytest.raises(RequestError, match="caption 'a seven' was not encoded before the first step"):
        captions.encode(["a seven"])


def test_only_what_the_file_lacks_is_encoded(gemma: Path, tmp_path: Path) -> None:
    config = TextEncoderConfig(kind="gemma", path=str(gemma), max_tokens=12)
    captions = DrawnCaptions(tmp_path / CAPTIONS_FILE, config, 16)
    assert encoded_by(captions, "a three", "a seven", "a three") == 3
    before = captions.encode(["a three"])[0]
    assert encoded_by(captions, "a seven") == 0
    assert encoded_by(captions, "a three", "a gap above a seven") == 1
    assert torch.equal(before, captions.encode(["a three"])[0])
    # Of another length, and of other weights, all anew.
    other = TextEncoderConfig(kind="gemma", path=str(gemma), max_tokens=11)
    assert encoded_by(DrawnCaptions(tmp_path / CAPTIONS_FILE, other, 16), "a three") == 2
    (gemma / "notes.txt").write_text("other files")
    assert encoded_by(DrawnCaptions(tmp_path / CAPTIONS_FILE, other, 16), "a three") == 2
    # So for a file that is damaged.
    (tmp_path / CAPTIONS_FILE).write_bytes(b"{}")
    assert encoded_by(DrawnCaptions(tmp_path / CAPTIONS_FILE, other, 16), "a three") == 2


def test_an_encoder_of_another_width_or_a_folder_that_cannot_be_written_ends_the_run(
    gemma: Path, tmp_path: Path
) -> None:
    config = TextEncoderConfig(kind="gemma", path=str(gemma))
    with pytest.raises(RequestError, match=r"states of width 16, the network expects 24 \(model.text_dim\)"):
        DrawnCaptions(tmp_path / CAPTIONS_FILE, config, 24).prepare(["a"], World(), lambda: None)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        DrawnCaptions(tmp_path / "file" / CAPTIONS_FILE, config, 16).prepare(["a"], World(), lambda: None)


def test_encoders_that_run_while_training_draw_too_and_are_not_loaded_again(
    shards: Path, tmp_path: Path
) -> None:
    seen, settings = Counter[str](), settings_of(shards)

    class Loader:
        autoencoder, text_encoder = Decoder(seen), Writer(seen)

    loader: Any = Loader()
    with watched(seen):
        pipeline = drawing_pipeline(
            settings, drawing_export(settings), nn.Linear(1, 1), tmp_path, World(), loader
        )
        prepare_captions(pipeline, ["a cat"], World(), loader)
    assert pipeline.autoencoder is loader.autoencoder
    assert seen == {"captions encoded": 2}


def test_encoders_without_weights_are_on_every_rank(shards: Path, tmp_path: Path) -> None:
    from tests.trainer.drawing import NothingRuns
    from tests.trainer.ranks import recipe

    settings = recipe(shards)
    loader: Any = NothingRuns()
    pipeline = drawing_pipeline(
        settings, drawing_export(settings), nn.Linear(1, 1), tmp_path, World(), loader
    )
    prepare_captions(pipeline, ["a cat"], World(), loader)
    assert not isinstance(pipeline.text_encoder, drawing.DrawnCaptions) and not list(tmp_path.iterdir())
