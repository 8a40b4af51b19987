"""What the ranks of a run draw with: an autoencoder where pictures are decoded, captions encoded beforehand.

Previews and evaluations draw the same captions for as long as a run lasts. Rank 0 encodes them before the
first step, and their states lie in the run folder, from which every rank reads; the text encoder is dropped.
A run that continues finds them there, and loads a text encoder only for captions that are new. Encoders that
run while training are used as they are, on the device, and never loaded twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.config import TextEncoderConfig
from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder
from data_pipeline.encoders.identity import LatentShape, revision
from data_pipeline.encoders.text import TextEncoder, build_text_encoder
from data_pipeline.errors import DataError
from data_pipeline.loader import StepLoader
from tim_ds.config.recipe import Recipe
from tim_ds.errors import CheckpointError, RequestError, TimError
from tim_ds.model.export_folder import Export
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import PipelineOutput, PromptLike, TiMPipeline
from tim_ds.trainer.encoder_memory import decodes_everywhere
from tim_ds.trainer.in_step import InStep, is_split
from tim_ds.trainer.world import World

CAPTIONS_FILE = "captions.safetensors"
"""In a run folder: states of the captions that previews and evaluations draw."""

_PADDING = "padding"
_ERRORS = (TimError, DataError)


class DrawnCaptions:
    """The text encoder of a run's drawings: it knows the captions that `prepare` was given, and no others.

    Args:
        path: of the file that holds their states.
        config: what encodes captions that the file lacks.
        width: of a state, as the network expects it.
    """

    def __init__(self, path: Path, config: TextEncoderConfig, width: int) -> None:
        self._path = path
        self._config = config
        self._width = width
        self._file: Any = None
        self._names: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        return self._width

    @property
    def padding_state(self) -> Tensor | None:
        return self._read(_PADDING) if _PADDING in self._names else None

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [n, width] of each caption, on the CPU.

        Raises:
            RequestError: for a caption that was not prepared.
        """
        for caption in captions:
            if _name(caption) not in self._names:
                raise RequestError(f"{self._path}: caption {caption!r} was not encoded before the first step")
        return [self._read(_name(caption)) for caption in captions]

    def prepare(
        self,
        captions: Iterable[str],
        world: World,
        running: Callable[[], TextEncoder | None],
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode what the file lacks, on rank 0, and open it on every rank; called by all ranks.

        Args:
            captions: the same on every rank; the empty caption is added.
            running: the encoder that runs while training, if one does.
            moved: called with every caption that is encoded.
        Raises:
            RequestError, DataError: if the encoder cannot be loaded, or does not fit the network.
            CheckpointError: if the file cannot be written, or a rank cannot read it.
        """
        wanted = {_name(caption): caption for caption in ("", *captions)}

        def complete() -> None:
            if world.is_main:
                self._complete(wanted, world.device, running, moved)

        world.together(complete, _ERRORS)
        world.together(self._open, _ERRORS)

    def _complete(
        self,
        wanted: dict[str, str],
        device: torch.device,
        running: Callable[[], TextEncoder | None],
        moved: Callable[[], None],
    ) -> None:
        made_by = self._made_by()
        states = self._stored(made_by)
        if wanted.keys() <= states.keys():
            return
        encoder: Any = running() or build_text_encoder(self._config)
        if encoder.width != self._width:
            raise RequestError(
                f"data.text_encoder: makes states of width {encoder.width}, the network expects "
                f"{self._width} (model.text_dim)"
            )
        encoder.to(device)
        states = {name: state for name, state in states.items() if name in wanted}
        for name, caption in wanted.items():
            if name not in states:
                # Each alone: a state depends on its caption, and not on what is encoded beside it.
                states[name] = _exact(encoder.encode([caption])[0])
                moved()
        if encoder.padding_state is not None:
            states[_PADDING] = encoder.padding_state
        if made_by["revision"] is None:
            # A name of the hub: known since it was loaded.
            made_by = self._made_by()
        metadata = {"encoder": json.dumps(made_by)}
        size = sum(state.nbytes for state in states.values())
        write_aside(self._path, size, lambda aside: save_file(states, aside, metadata))

    def _made_by(self) -> dict[str, Any]:
        return {**asdict(self._config), "path": None, "revision": revision(self._config.path)}

    def _stored(self, made_by: dict[str, Any]) -> dict[str, Tensor]:
        """What the file holds; nothing where another encoder made it, or none that is known."""
        try:
            with safe_open(self._path, framework="pt") as file:
                if made_by["revision"] is None or json.loads(file.metadata()["encoder"]) != made_by:
                    return {}
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}

    def _open(self) -> None:
        try:
            self._file = safe_open(self._path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._path}: cannot be read ({error}); the run folder has to be the same one on every host"
            ) from error
        self._names = frozenset(self._file.keys())

    def _read(self, name: str) -> Tensor:
        # From pages that the processes of a machine share.
        return self._file.get_tensor(name).float()


def _name(caption: str) -> str:
    return blake2b(caption.encode(), digest_size=16).hexdigest()


def _exact(state: Tensor) -> Tensor:
    """In half the bytes where these hold the same values, as those of bfloat16 models do."""
    half = state.bfloat16()
    return half if torch.equal(half.float(), state) else state


@dataclass(frozen=True)
class _Elsewhere(LatentShape):
    """The sizes of an autoencoder whose weights other ranks have."""

    def encode(self, pixels: Tensor) -> Tensor:
        raise RuntimeError("pictures are not encoded on this rank")

    def decode(self, latents: Tensor) -> Tensor:
        raise RuntimeError("pictures are not decoded on this rank")


def drawing_pipeline(
    recipe: Recipe, export: Export, network: nn.Module, run_dir: Path, world: World, loader: StepLoader[Any]
) -> TiMPipeline:
    """What previews and evaluations of a run draw with; called by all ranks. `prepare_captions` completes it.

    Rank 0 decodes; others do where they have pictures of their own to draw. An autoencoder that does not run
    while training waits on the host.

    Args:
        export: as `describe_export`.
        network: the network that is sampled from, inside the root module.
    Raises:
        RequestError, DataError: if an encoder is not there or does not fit.
    """
    decodes = world.is_main or decodes_everywhere(recipe, split=is_split(network, world))
    config = recipe.data.autoencoder

    def load() -> Autoencoder | None:
        if config.path is None or decodes:
            return loader.autoencoder or build_autoencoder(config)
        return loader.autoencoder

    autoencoder = world.together(load, _ERRORS)
    shape = None
    if autoencoder is not None:
        shape = LatentShape(autoencoder.stride, autoencoder.channels, autoencoder.pixel_channels)
    shape = world.from_main(shape)
    captions = None
    text_encoder, width = recipe.data.text_encoder, recipe.model.text_dim
    if text_encoder is not None and text_encoder.path is not None and width is not None:
        captions = DrawnCaptions(run_dir / CAPTIONS_FILE, text_encoder, width)

    def build() -> TiMPipeline:
        assert shape is not None  # rank 0 decodes
        return TiMPipeline(
            network, export, autoencoder=autoencoder or _Elsewhere(**asdict(shape)), text_encoder=captions
        )

    pipeline = world.together(build, _ERRORS)
    # Memory differs between ranks, and a rank that refused alone would leave the others waiting.
    pipeline.checks_memory = False
    return pipeline


def draw_for_main(
    pipeline: TiMPipeline,
    in_step: InStep,
    world: World,
    prompts: Sequence[PromptLike],
    sizes: Sequence[str],
    *,
    num_steps: int,
    seeds: int | Sequence[int],
) -> PipelineOutput | None:
    """Pictures on rank 0. The others take part where the weights are split, and decode nothing."""
    if not world.is_main and not in_step.needed:
        return None
    output_type = "pil" if world.is_main else "latent"
    with pipeline.encoders_beside_network():
        return pipeline(prompts, sizes, num_steps=num_steps, seeds=seeds, output_type=output_type)


def prepare_captions(
    pipeline: TiMPipeline,
    prompts: Iterable[PromptLike],
    world: World,
    loader: StepLoader[Any],
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Encode what the run will draw; called by all ranks, with the same prompts.

    Args:
        moved: called with every caption that is encoded.
    Raises:
        RequestError, DataError, CheckpointError: as `DrawnCaptions.prepare`.
    """
    captions = pipeline.text_encoder
    if isinstance(captions, DrawnCaptions):
        captions.prepare(map(str, prompts), world, lambda: loader.text_encoder, moved)
        if world.device.type == "cuda":
            # The steps that follow ask for other sizes than the encoder did.
            torch.cuda.empty_cache()
