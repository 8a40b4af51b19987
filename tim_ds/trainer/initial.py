"""Weights that a run starts from: an export folder, a run, one of its checkpoints, or a released file."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from tim_ds.config.recipe import Recipe, from_dict
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import EXPORT_FILE, Export, meta_network, open_export
from tim_ds.model.weights import check_weights
from tim_ds.objective.config import TransportConfig
from tim_ds.sources import read_source
from tim_ds.trainer.checkpoint import MANIFEST, Checkpoint, find_checkpoints
from tim_ds.trainer.ema import piece_kind
from tim_ds.trainer.materialise import Values

logger = logging.getLogger(__name__)

PROJECTOR = "projector."

# What decides the projector alone, which a run may add, drop or train anew.
_OF_PROJECTOR = ("z_dim", "projector_dim", "encoder_depth")


class StoredState(Mapping[str, Tensor]):
    """Tensors by name, read from the disk when they are asked for, one at a time.

    Args:
        shapes: names and shapes, as tensors of the meta device.
        read: the tensor of a name, of the shape and dtype of another.
    """

    def __init__(self, shapes: Mapping[str, Tensor], read: Values) -> None:
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Averaged weights and what they are."""

    source: str
    model: ModelConfig
    transport: TransportConfig
    autoencoder: AutoencoderConfig | None
    text_encoder: TextEncoderConfig | None
    state: StoredState

    def value(self, name: str, like: Tensor) -> Tensor:
        """One of them, in the dtype of `like`."""
        return self.state[name].to(like.dtype)

    @property
    def digest(self) -> str:
        """Hash of names and values: another file with the same weights has the same."""
        found = hashlib.blake2b(digest_size=16)
        for name in sorted(self.state):
            value = self.state[name].detach().float().contiguous()
            found.update(f"{name}\x00{list(value.shape)}".encode())
            found.update(value.view(torch.uint8).numpy().data if value.numel() else b"")
        return f"blake2b:{found.hexdigest()}"


def read_initial(path: str) -> InitialWeights:
    """The averaged weights at `path`: an export folder, a run, a checkpoint in one, or a released file.

    Of a run folder, the export is taken if there is one, else the newest checkpoint.

    Raises:
        CheckpointError: if there are no such weights, or they are an adapter's.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(
            f"train.init_from: {path}: not there; expected an export folder, a run, one of its checkpoints, "
            "or a file of weights that the authors released"
        )
    if folder.is_file():
        released = read_source(folder)
        return _of_export(path, released.export, lambda name, like: released.state[name].to(like.dtype))
    for candidate in (folder, folder / "export"):
        if (candidate / EXPORT_FILE).exists():
            export, read = open_export(candidate)
            return _of_export(str(candidate), export, read)
    if (folder / MANIFEST).exists():
        found = [c for c in find_checkpoints(folder.parent) if c.path.name == folder.name]
    else:
        found = find_checkpoints(folder / "checkpoints")
    if not found:
        raise CheckpointError(
            f"train.init_from: {path}: no export folder ({EXPORT_FILE}), no run (checkpoints/) "
            f"and no checkpoint ({MANIFEST})"
        )
    return _of_checkpoint(found[0])


def read_base(checkpoint: Checkpoint, path: str) -> InitialWeights:
    """The weights at `path`, on which the adapter in a checkpoint was trained.

    Raises:
        CheckpointError: if there are none, or they are others.
    """
    initial = read_initial(path)
    expected = checkpoint.manifest["initial_weights"]
    if expected != initial.digest:
        raise CheckpointError(
            f"{checkpoint.path}: its adapter belongs to weights {expected}, received {initial.digest} "
            f"({initial.source}, of train.init_from or --base)"
        )
    return initial


def _of_export(source: str, export: Export, read: Values) -> InitialWeights:
    state = StoredState(meta_network(export.model).state_dict(), read)
    return InitialWeights(
        source, export.model, export.transport, export.autoencoder, export.text_encoder, state
    )


def _of_checkpoint(checkpoint: Checkpoint) -> InitialWeights:
    recipe = from_dict(checkpoint.manifest["recipe"], source=str(checkpoint.path))
    if recipe.train.adapter is not None:
        raise CheckpointError(
            f"train.init_from: {checkpoint.path}: holds an adapter alone; merge it into its weights with "
            f"`python -m tim_ds.trainer.export` and start from that"
        )
    kind = piece_kind(recipe.train.ema.used.name)

    def read(name: str, like: Tensor) -> Tensor:
        value = torch.empty(like.shape)
        checkpoint.fill(kind, f"network.{name}", 0, value.view(-1))
        return value

    return InitialWeights(
        str(checkpoint.path),
        recipe.model,
        recipe.objective.transport,
        recipe.data.autoencoder,
        recipe.data.text_encoder,
        StoredState(meta_network(recipe.model).state_dict(), read),
    )


def check_initial(initial: InitialWeights, recipe: Recipe) -> None:
    """Refuse weights of another architecture or of other latents and text states; warn of other habits.

    Raises:
        ConfigError: one line a difference.
    """
    problems = [
        f"model.{key}: {here!r}, but the weights in {initial.source} have {there!r}"
        for key, there, here in _differences(initial.model, recipe.model)
        if key not in _OF_PROJECTOR
    ]
    parts = [("autoencoder", initial.autoencoder, recipe.data.autoencoder)]
    if initial.text_encoder is not None and recipe.data.text_encoder is not None:
        parts.append(("text_encoder", initial.text_encoder, recipe.data.text_encoder))  # type: ignore[arg-type]
    for section, there, here in parts:
        if there is not None and there.kind != here.kind:
            problems.append(
                f"data.{section}.kind: {here.kind!r}, but the weights in {initial.source} were trained with "
                f"{there.kind!r}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    for line in _other_habits(initial, recipe):
        logger.warning(line)


def _differences(there: object, here: object) -> Iterator[tuple[str, object, object]]:
    for field in dataclasses.fields(there):  # type: ignore[arg-type]  # two dataclasses of one type
        values = getattr(there, field.name), getattr(here, field.name)
        if values[0] != values[1]:
            yield field.name, *values


def _other_habits(initial: InitialWeights, recipe: Recipe) -> Iterator[str]:
    for key, there, here in _differences(initial.transport, recipe.objective.transport):
        if key == "kind" or initial.transport.kind != "ot_fm":
            yield (
                f"objective.transport.{key}: {here!r}, the weights in {initial.source} were trained with "
                f"{there!r}: the network has to learn another path first"
            )
    there, here = initial.text_encoder, recipe.data.text_encoder
    if there is not None and here is not None and there.padding != here.padding:
        yield (
            f"data.text_encoder.padding: {here.padding!r}, the weights in {initial.source} were trained with "
            f"{there.padding!r}"
        )


def values_of(initial: InitialWeights, network: nn.Module, fresh: Values) -> Values:
    """First values of a network's parameters: those weights, one at a time. A projector that they lack is
    `fresh`.

    Raises:
        CheckpointError: if names or shapes differ in anything but the projector.
    """
    own = network.state_dict()
    shapes = {
        name: value
        for name, value in initial.state.shapes.items()
        if name in own or not name.startswith(PROJECTOR)
    }
    drawn = {name for name in own if name.startswith(PROJECTOR) and not _fits(shapes, name, own[name])}
    if drawn:
        logger.info("the projector is trained from a fresh start: %s has none of this shape", initial.source)
    check_weights(own, {**shapes, **{name: own[name] for name in drawn}}, source=initial.source)

    def make(name: str, like: Tensor) -> Tensor:
        return fresh(name, like) if name in drawn else initial.state[name].to(like.dtype)

    return make


def _fits(state: Mapping[str, Tensor], name: str, value: Tensor) -> bool:
    return name in state and state[name].shape == value.shape
