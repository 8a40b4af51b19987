"""Runs that draw with encoders that are watched: who loads them, what they do, how long they live."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from data_pipeline.encoders.text import WordsEncoder
from tests.trainer.ranks import CHANNELS, TEXT_WIDTH, engine_file, recipe
from tim_ds.config.recipe import Recipe
from tim_ds.trainer import drawing
from tim_ds.trainer.preview import Previews
from tim_ds.trainer.run import train
from tim_ds.trainer.world import World

PROMPTS = ("a cat", "a dog before a cat")
BENCHMARK = "train.evaluation={every_steps: 2, kinds: [], benchmarks: [{kind: dpg, size: 8x8}]}"


class Weights:
    """A part of a pipeline that has weights."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 3)

    @property
    def device(self) -> torch.device:
        return self.model.weight.device

    def to(self, device: torch.device | str) -> Weights:
        self.model.to(device)
        return self


class Decoder(Weights):
    """In place of an SD-VAE: its sizes, and a picture that its latent decides."""

    stride, channels, pixel_channels = 8, CHANNELS, 3

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen

    def encode(self, pixels: Tensor) -> Tensor:
        raise AssertionError("a drawing encodes no picture")

    def decode(self, latents: Tensor) -> Tensor:
        self._seen["pictures decoded"] += 1
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).tanh()


class Writer(Weights):
    """In place of a Gemma."""

    width, padding_state = TEXT_WIDTH, None

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen
        self._words = WordsEncoder(TEXT_WIDTH)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        self._seen["captions encoded"] += len(captions)
        return self._words.encode(captions)


@contextmanager
def watched(seen: Counter[str]) -> Iterator[None]:
    """Counts what is loaded and used on this rank, and text encoders that live while it draws."""
    alive: list[weakref.ref[Writer]] = []

    def build_text_encoder(_: Any) -> Writer:
        writer = Writer(seen)
        alive.append(weakref.ref(writer))
        seen["text encoders loaded"] += 1
        return writer

    def build_autoencoder(_: Any) -> Decoder:
        seen["autoencoders loaded"] += 1
        return Decoder(seen)

    draw = Previews._draw

    def drawn(self: Previews, num_steps: int) -> Any:
        gc.collect()
        seen["text encoders beside a drawing"] += sum(reference() is not None for reference in alive)
        output = draw(self, num_steps)
        seen["drawings"] += output is not None
        return output

    with (
        patch.object(drawing, "build_text_encoder", build_text_encoder),
        patch.object(drawing, "build_autoencoder", build_autoencoder),
        patch.object(Previews, "_draw", drawn),
    ):
        yield


def settings_of(shards: Path, *overrides: str, steps: int = 2) -> Recipe:
    encoders = shards.parent / "gemma"
    encoders.mkdir(exist_ok=True)
    (encoders / "config.json").write_text("{}")
    preview = f"{{every_steps: 1, prompts: [{', '.join(PROMPTS)}], sizes: [16x24, 32x16], num_steps: [1, 2]}}"
    return recipe(
        shards,
        "data.autoencoder={kind: sd_vae, path: nowhere}",
        f"data.text_encoder={{kind: gemma, path: {encoders}}}",
        f"train.preview={preview}",
        f"train.steps={steps}",
        "train.optimizer.warmup_steps=0",
        *overrides,
    )


def draw_where_needed(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """At stages 1 and 3; at 3 also stopped after a step whose drawing failed, and continued."""
    counts: dict[str, Counter[str]] = {}

    def run(name: str, stage: int, settings: Recipe, place: str) -> None:
        seen = counts[name] = Counter()
        file = world.from_main(engine_file(folder, stage) if world.is_main else Path())
        with watched(seen):
            train(settings, folder / place, file, world)

    plain = settings_of(shards)
    decode = Decoder.decode

    def failing(self: Decoder, latents: Tensor) -> Tensor:
        found = decode(self, latents)
        if self._seen["pictures decoded"] == 1:
            raise RuntimeError("out of memory")
        return found

    run("stage 1", 1, plain, "stage_1")
    run("stage 3", 3, plain, "stage_3")
    with patch.object(Decoder, "decode", failing):
        run("stopped", 3, settings_of(shards, steps=1), "continued")
    run("continued", 3, plain, "continued")
    loaded = Counter[str]()
    with watched(loaded):
        drawing.drawing_pipeline(
            settings_of(shards, BENCHMARK),
            drawing_export(plain),
            nn.Linear(1, 1),
            folder,
            world,
            NothingRuns(),  # type: ignore[arg-type]  # what it reads of a loader
        )
    return {"counts": counts, "with a benchmark": loaded}


class NothingRuns:
    """A loader without frozen encoders."""

    autoencoder = text_encoder = None


def drawing_export(settings: Recipe) -> Any:
    from tim_ds.trainer.preview import describe_export

    return describe_export(settings, 0, "")
