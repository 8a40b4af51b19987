"""Memory of a run before it runs: what a GPU, a host and a disk have to hold, from the recipe alone.

    python -m tim_ds.trainer.memory RECIPE --ds FILE --gpus N [--nodes M] [--card-gib 24] [section.key=value]

Nothing is allocated and no GPU is needed. Weights, gradients, optimiser and averages follow from the shapes
and from how ZeRO splits them; activations from what every operation of the network keeps for its backward,
with the kernels of `tim_kernels` (the plain definitions, which run where there is no GPU, keep more).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.command import command
from tim_ds.config.load import load_recipe, split_arguments
from tim_ds.config.recipe import Recipe, latent_stride
from tim_ds.errors import TimError
from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import PreciseLinear
from tim_ds.model.export_folder import meta_network
from tim_ds.model.tim import TiM
from tim_ds.trainer.config import EmaConfig
from tim_ds.trainer.encoder_memory import EncoderMemory, encoder_memory
from tim_ds.trainer.engine import (
    STATE_KEYS,
    merge_config,
    offloads,
    read_engine_file,
    zero_settings,
    zero_stage,
)

GIB = 1 << 30

RUNTIME_BYTES = int(1.25 * GIB)
"""CUDA context, library workspaces and NCCL's buffers of one process, an assumption."""
PROCESS_HOST_BYTES = int(3.0 * GIB)
"""Host memory of one process with its libraries, an assumption."""
WORKER_HOST_BYTES = int(0.75 * GIB)
"""Host memory of one loader process, an assumption."""
SLACK = 0.10
"""Share of activations and buffers by which an allocator holds more than is used, an assumption."""
IMAGE_SIDE_PIXELS = 1024
"""Side of the images of a pack, where nothing else is said: how many images share a pack."""

_LOADER, _COPY = "loader", "copy of a checkpoint"
"""Parts that are there from the first step on."""

_FLOAT32 = 4
_ALIGNMENT = 2
"""ZeRO 1 and 2 pad the flat tensor of all weights to a multiple of this times the number of ranks."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """GPUs of a run, one process each."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.per_node)


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the table: of rank 0, which the others do not exceed."""

    name: str
    device: int
    """Bytes on the GPU."""
    host: int
    """Bytes in host memory."""
    note: str
    spread: float = 0.0
    """Share by which `device` may be off, either way."""
    main_only: bool = False
    """Whether `host` is rank 0's alone."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run needs."""

    ranks: Ranks
    parameters: int
    parts: tuple[Part, ...]
    checkpoint_bytes: int
    """One checkpoint on the disk, of all ranks."""
    export_bytes: int
    snapshot_bytes: int
    """One snapshot of the power-function averages on the disk; 0 where the run makes none."""
    unknown: tuple[str, ...] = ()
    """Encoders that are not in it, and why."""

    @property
    def device_bytes(self) -> int:
        """On the fullest GPU, at the peak of a step."""
        return sum(part.device for part in self.parts)

    @property
    def device_spread(self) -> int:
        """By which `device_bytes` may be off, either way."""
        return round(sum(part.device * part.spread for part in self.parts))

    @property
    def host_bytes(self) -> int:
        """Of rank 0, which holds more than others."""
        return sum(part.host for part in self.parts)

    @property
    def host_bytes_of_others(self) -> int:
        """Of every other rank."""
        return sum(part.host for part in self.parts if not part.main_only)

    @property
    def host_bytes_per_node(self) -> int:
        """Of the node that has rank 0."""
        others = min(self.ranks.per_node, self.ranks.size) - 1
        return self.host_bytes + others * self.host_bytes_of_others

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def fits(self, card_gib: float) -> bool | None:
        """Whether a GPU of that size holds it; None where the uncertainty does not tell."""
        size = card_gib * GIB
        if self.device_bytes + self.device_spread <= size:
            return True
        return None if self.device_bytes - self.device_spread <= size else False

    def table(self, card_gib: float | None = None) -> str:
        """The estimate as aligned text."""
        ranks = self.ranks
        lines = [
            f"{self.parameters:,} trained parameters, {ranks.size} GPU{'s' if ranks.size > 1 else ''} on "
            f"{ranks.nodes} node{'s' if ranks.nodes > 1 else ''}; GiB a rank",
            "",
            f"{'':<30} {'GPU':>8} {'host':>8}",
        ]
        for part in self.parts:
            lines.append(f"{part.name:<30} {_gib(part.device)} {_gib(part.host)}  {part.note}".rstrip())
        lines += [
            f"{'total':<30} {_gib(self.device_bytes)} {_gib(self.host_bytes)}"
            f"  GPU +- {self.device_spread / GIB:.1f}",
            "",
            f"host memory a rank   {self.host_bytes / GIB:.1f} GiB"
            + (f", {self.host_bytes_of_others / GIB:.1f} of ranks other than 0" if ranks.size > 1 else ""),
            f"host memory a node   {self.host_bytes_per_node / GIB:.1f} GiB",
            f"one checkpoint       {self.checkpoint_bytes / GIB:.1f} GiB on the disk",
            f"exported weights     {self.export_bytes / GIB:.1f} GiB on the disk",
        ]
        if self.snapshot_bytes:
            lines.append(f"one EMA snapshot     {self.snapshot_bytes / GIB:.1f} GiB on the disk")
        lines += [f"not counted          {text}" for text in self.unknown]
        if card_gib is not None:
            answer = {True: "fits", False: "does not fit", None: "may fit: the uncertainty does not tell"}
            aside = ", what is not counted aside" if self.unknown else ""
            lines.append(f"a card of {card_gib:g} GiB    {answer[self.fits(card_gib)]}{aside}")
        return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f}" if size else f"{'-':>8}"


def estimate(
    recipe: Recipe,
    engine_config: Mapping[str, Any],
    world: Ranks,
    *,
    image_tokens: int | None = None,
    encoder_bytes: int | None = None,
    online: Collection[str] | None = None,
) -> MemoryEstimate:
    """Memory of a run of `recipe` under an engine file.

    Args:
        engine_config: content of an engine file.
        image_tokens: tokens of one image, which says how many share a pack; None: of 1024 x 1024 pixels, or
            the whole pack where that is smaller.
        encoder_bytes: of frozen encoders on the GPU, their activations included, where their configs are not
            here to tell.
        online: what the shards leave to encode, as their index says; None: all that the recipe allows.
    Raises:
        ConfigError: if recipe, engine file and ranks do not go together.
    """
    merge_config(
        engine_config, recipe.train, packs_per_step=recipe.data.packs_per_step, world_size=world.size
    )
    network = meta_network(recipe.model)
    sizes = trained_sizes(recipe, network)
    frozen = _numel(network) if recipe.train.adapter is not None else 0
    split = _Split.of(recipe, engine_config, world, sizes)
    pack = _Pack.of(recipe, image_tokens)
    copies = average_copies(recipe)
    activations = list(_activations(recipe, pack))
    encoders = EncoderMemory(resident=encoder_bytes or 0, running="as given")
    if encoder_bytes is None:
        encoders = encoder_memory(
            recipe,
            pack.images,
            pack.tokens // pack.images,
            online,
            split=split.stage == 3 and world.size > 1,
        )
    others = list(_others(recipe, pack, split, copies))
    parts = [
        *_states(recipe, split, copies, frozen, world),
        *_buffers(recipe, engine_config, split, network),
        *activations,
        *_encoders(encoders, sum(part.device for part in activations), others),
        *others,
    ]
    total = sum(sizes)
    return MemoryEstimate(
        ranks=world,
        parameters=total,
        parts=tuple(part for part in parts if part.device or part.host),
        checkpoint_bytes=_FLOAT32 * total * (1 + len(STATE_KEYS) + copies),
        export_bytes=_FLOAT32 * (frozen or total),
        snapshot_bytes=_FLOAT32 * total * snapshot_copies(recipe.train.ema),
        unknown=encoders.unknown,
    )


def trained_sizes(recipe: Recipe, network: TiM) -> list[int]:
    """Elements of every trained parameter: of the network, or of the adapters on it."""
    adapter = recipe.train.adapter
    if adapter is None:
        return [parameter.numel() for parameter in network.parameters()]
    return [
        adapter.rank * features
        for block in network.blocks
        for target in adapter.targets
        for features in reversed(block.get_submodule(target).weight.shape)  # type: ignore[union-attr]
    ]


def average_copies(recipe: Recipe) -> int:
    """Averages of the weights that a run keeps."""
    return len(recipe.train.ema.averages)


def snapshot_copies(config: EmaConfig) -> int:
    """Averages that a snapshot holds; 0 where there are no snapshots."""
    return sum(one.sigma_rel is not None for one in config.averages) if config.snapshots.every_steps else 0


@dataclass(frozen=True, slots=True)
class _Split:
    """How one rank's share is stored."""

    stage: int
    weight_bytes: int
    """Of one element of a weight."""
    whole: int
    """Elements of all weights, padded as the stage pads them."""
    own: int
    """Elements whose masters this rank updates."""
    real: int
    """Of these, the ones that are no padding."""
    largest: int
    """Elements of the largest parameter."""
    weights_on_host: bool
    optimizer_on_host: bool

    @classmethod
    def of(cls, recipe: Recipe, engine: Mapping[str, Any], world: Ranks, sizes: Sequence[int]) -> _Split:
        stage, total = zero_stage(engine), sum(sizes)
        if stage == 0:
            whole = own = real = total
        elif stage < 3:
            unit = _ALIGNMENT * world.size
            whole = math.ceil(total / unit) * unit
            own = whole // world.size
            real = min(own, total)
        else:
            whole, own = total, sum(math.ceil(n / world.size) for n in sizes)
            real = sum(min(n, math.ceil(n / world.size)) for n in sizes)
        return cls(
            stage=stage,
            weight_bytes=2 if recipe.train.precision == "bf16" else _FLOAT32,
            whole=whole,
            own=own,
            real=real,
            largest=max(sizes),
            weights_on_host=offloads(engine, "offload_param"),
            optimizer_on_host=offloads(engine, "offload_optimizer"),
        )


def _placed(name: str, size: int, on_host: bool, note: str, spread: float = 0.0) -> Part:
    return Part(name, 0 if on_host else size, size if on_host else 0, note, spread)


def _states(recipe: Recipe, split: _Split, copies: int, frozen: int, world: Ranks) -> Iterator[Part]:
    shared = f"split, stage {split.stage}" if split.stage else "whole on every rank"
    held = split.own if split.stage == 3 else split.whole
    yield _placed(
        "weights",
        split.weight_bytes * held,
        split.weights_on_host,
        f"{8 * split.weight_bytes} bits, {shared if split.stage == 3 else 'whole on every rank'}",
    )
    rest = math.ceil(frozen / world.size) if split.stage == 3 else frozen
    if rest:
        yield _placed(
            "frozen weights", split.weight_bytes * rest, split.weights_on_host, "beneath the adapters"
        )
    if split.stage:
        # Of float32 weights too: DeepSpeed compares a device with its name, and copies (0.19.8, measured).
        yield _placed("float32 masters", _FLOAT32 * split.own, split.optimizer_on_host, shared)
    yield _placed("AdamW averages", _FLOAT32 * len(STATE_KEYS) * split.own, split.optimizer_on_host, shared)
    yield _placed(
        "averaged weights",
        _FLOAT32 * copies * split.real,
        split.optimizer_on_host,
        f"{copies} cop{'y' if copies == 1 else 'ies'}, {shared}",
    )
    if split.stage < 2:
        yield Part("gradients", _FLOAT32 * split.whole, 0, "whole on every rank")
    else:
        yield _placed("gradients", _FLOAT32 * split.own, split.optimizer_on_host, shared)
    if split.stage:
        # In float32, flat, from the end of the backward to the end of the step; with an optimiser on the host
        # the sums of several micro-steps, beside the gradient that the optimiser reads.
        yield _placed("gradients for the step", _FLOAT32 * split.own, split.optimizer_on_host, shared)
    if recipe.objective.guided_target is not None:
        yield _placed(
            "teacher",
            split.weight_bytes * (held + rest),
            split.weights_on_host,
            "frozen, follows the average",
        )


def _buffers(recipe: Recipe, engine: Mapping[str, Any], split: _Split, network: TiM) -> Iterator[Part]:
    settings = zero_settings(engine)
    networks = 1 if recipe.objective.guided_target is None else 2
    total = sum(parameter.numel() for parameter in network.parameters())
    if split.stage:
        buckets = 2 if split.stage < 3 and settings.overlap_comm else 1
        bucket = max(int(settings.reduce_bucket_size), split.largest)
        yield Part(
            "gradient buckets",
            buckets * bucket * split.weight_bytes,
            0,
            f"reduce_bucket_size {int(settings.reduce_bucket_size):,} x {buckets}",
            SLACK,
        )
    if split.stage in (1, 2) and split.optimizer_on_host:
        staging = split.largest * split.weight_bytes
        # The new weights pass through host memory in their own dtype.
        yield Part("staging of the host step", staging, staging + split.own * split.weight_bytes, "")
    if split.stage == 3:
        unit = max(_numel(network.blocks[0]), _numel(network.final_layer), split.largest)
        live = int(settings.max_live_parameters) + unit
        gathered = min(networks * total, live)
        yield Part(
            "gathered weights",
            gathered * split.weight_bytes,
            0,
            f"stage3_max_live_parameters {int(settings.max_live_parameters):,}",
            0.15,
        )
        ahead = min(int(settings.prefetch_bucket_size), total) * split.weight_bytes
        yield Part("prefetched weights", ahead, 0, "stage3_prefetch_bucket_size", 0.5)
        if settings.zero_hpz_partition_size > 1:
            yield Part(
                "weights of the node",
                networks * total * split.weight_bytes // settings.zero_hpz_partition_size,
                0,
                f"a second split among {settings.zero_hpz_partition_size} GPUs",
            )
    if recipe.train.precision == "bf16_autocast":
        cast = sum(
            int(layer.in_features) * int(layer.out_features)  # type: ignore[arg-type]
            for layer in network.modules()
            if hasattr(layer, "in_features") and not isinstance(layer, PreciseLinear)
        )
        yield Part("weights in bfloat16", 2 * cast, 0, "autocast keeps them through a forward", 0.1)


def _numel(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, slots=True)
class _Pack:
    """What one micro-step holds: T image tokens of S images, L text tokens."""

    tokens: int
    images: int
    text: int
    moving: float
    """Share of the tokens whose time derivative is taken."""
    width: int
    """Bytes of an element of what a product takes."""

    @classmethod
    def of(cls, recipe: Recipe, image_tokens: int | None) -> _Pack:
        tokens = recipe.data.tokens_per_pack
        if image_tokens is None:
            stride = latent_stride(recipe.data.autoencoder) * recipe.model.patch_size
            image_tokens = (IMAGE_SIDE_PIXELS // stride) ** 2
        images = max(1, tokens // image_tokens)
        encoder = recipe.data.text_encoder
        moving = 1.0 - recipe.objective.diffusion_share
        return cls(
            tokens=tokens,
            images=images,
            text=0 if encoder is None else images * encoder.max_tokens,
            moving=min(1.0, math.ceil(moving * images) / images),
            width=_FLOAT32 if recipe.train.precision == "fp32" else 2,
        )


def kept_by_block(model: ModelConfig, *, tokens: int, text: int, images: int, width: int) -> int:
    """Bytes that a block keeps for its backward, with the kernels.

    Args:
        width: bytes of an element of what a product takes; the residual stream is float32.
    """
    D, M, A = model.hidden_size, model.mlp_hidden, model.adaln_width
    heads = model.num_heads
    has_text = model.condition == "text"
    branches = 3 if has_text else 2
    # In front of every branch: the residual stream (float32) and the branch itself. Of the normalised inputs,
    # the MLP's alone: those of qkv and of q across are made again in the backward, as is SwiGLU's product.
    a_token = branches * (4 * D + width * D) + width * D
    # Packed q, k and v before shift and norm, each of them after, the result, and a sum a head.
    a_token += width * (3 + (3 if model.distance_aware else 2) + 1) * D + 4 * heads
    if has_text:
        # q before and after its norm, the result, a sum a head.
        a_token += width * 3 * D + 4 * heads
    a_token += width * 2 * M
    # The captions as the product takes them, k and v, k after its norm.
    a_text = (width * D if width < _FLOAT32 else 0) + width * 3 * D if has_text else 0
    # Shift, scale and gate of every branch; the generator's gate, up and product; the shift of q, k and v.
    an_image = _FLOAT32 * (3 * branches * D + 3 * A + (3 * D if model.distance_aware else 0))
    return tokens * a_token + text * a_text + images * an_image


def kept_around_blocks(model: ModelConfig, *, tokens: int, text: int, images: int, width: int) -> int:
    """Bytes that embedders, projector and final layer keep for the backward."""
    D, C = model.hidden_size, model.token_channels
    a_token = width * C + 2 * _FLOAT32 * D
    if model.z_dim is not None:
        a_token += width * (D + 4 * model.projector_dim)
    a_text = 0
    if model.condition == "text":
        assert model.text_dim is not None  # ModelConfig requires it
        # The state and its normalised form, gate, up and product of the caption embedder, the norm's input.
        a_text = (_FLOAT32 + width) * model.text_dim + width * 3 * 4 * D + 2 * _FLOAT32 * D
    # Two time embedders: sinusoid, hidden, activation.
    an_image = _FLOAT32 * (2 * (256 + 2 * D) + 8 * D)
    return tokens * a_token + text * a_text + images * an_image


def taken_by_copies(model: ModelConfig, *, tokens: int, text: int, images: int, width: int) -> int:
    """Bytes that copies (both sides of `dde`) take beside a forward, at the most: their own residual stream,
    and what a block makes of them on its way without a graph.

    Args:
        tokens, images: of the copies.
        text: tokens of the captions that they read.
        width: as in `kept_by_block`.
    """
    D, M = model.hidden_size, model.mlp_hidden
    branches = 3 if model.condition == "text" else 2
    # The stream before the block and within it, float32; the embedded tokens, held to the end of the forward.
    a_token = 2 * _FLOAT32 * D + width * D
    # In the MLP, where most is held: the branch before it, its input, gate, up and product, and its output.
    a_token += width * (3 * D + 3 * M)
    # Keys and values; the captions themselves are those of the main stream.
    a_text = width * 2 * D if model.condition == "text" else 0
    # Embedded time and interval; shift, scale and gate of every branch.
    an_image = _FLOAT32 * (2 + 3 * branches) * D
    return tokens * a_token + text * a_text + images * an_image


def _activations(recipe: Recipe, pack: _Pack) -> Iterator[Part]:
    model = recipe.model
    D, M, c = model.hidden_size, model.mlp_hidden, pack.width
    sizes = {"tokens": pack.tokens, "text": pack.text, "images": pack.images, "width": c}
    block, around = kept_by_block(model, **sizes), kept_around_blocks(model, **sizes)
    held = f"{pack.tokens:,} tokens in {pack.images} image{'s' if pack.images > 1 else ''}"
    if recipe.train.activation_checkpointing:
        yield Part("block inputs", model.depth * pack.tokens * _FLOAT32 * D, 0, held, SLACK)
        yield Part("one block, recomputed", block, 0, "", 0.15)
        yield Part("around the blocks", around, 0, "", 0.15)
    else:
        yield Part("activations", model.depth * block + around, 0, held, 0.15)
    # Gradients of the widest layer and of the residual stream.
    backward = pack.tokens * (c * 4 * M + 2 * _FLOAT32 * D)
    yield Part("backward of one block", backward, 0, "", 0.3)
    passing = 2 * _FLOAT32 * D + c * (D + 3 * M)
    if pack.moving and recipe.objective.derivative == "dde":
        sides = taken_by_copies(
            model,
            tokens=math.ceil(2 * pack.moving * pack.tokens),
            text=math.ceil(pack.moving * pack.text),
            images=math.ceil(2 * pack.moving * pack.images),
            width=c,
        )
        # They are gone when the backward comes, which takes its own share of the same memory.
        later = backward + (block if recipe.train.activation_checkpointing else 0)
        yield Part("derivative", max(0, sides - later), 0, "two sides, beyond what the backward takes", 0.3)
    elif pack.moving and recipe.objective.derivative == "paired":
        # Tangents are taken in float32.
        wide = 3 * _FLOAT32 * D + _FLOAT32 * (D + 3 * M)
        yield Part("derivative", round(pack.moving * pack.tokens * wide), 0, "carried beside the value", 0.4)
    elif pack.moving:
        yield Part("derivative", round(3 * pack.moving * pack.tokens * passing), 0, "forward mode", 0.5)


def _encoders(encoders: EncoderMemory, activations: int, others: Sequence[Part]) -> Iterator[Part]:
    """They encode and draw between steps, when the activations of a step are gone."""
    yield Part("frozen encoders", encoders.resident, 0, encoders.running)
    yield Part("encoding", max(0, encoders.encoding - activations), 0, "beyond what a step takes later", 0.3)
    everywhere = encoders.waiting_everywhere
    yield Part(
        "decoder of pictures",
        0,
        encoders.waiting,
        "on the host between drawings" + ("" if everywhere else ", rank 0 alone"),
        main_only=not everywhere,
    )
    # Of two that are never at the same time, the second counts beyond the first.
    later = sum(part.host for part in others if part.name in (_LOADER, _COPY))
    yield Part(
        "encoding of captions",
        0,
        max(0, encoders.preparing - later),
        "rank 0 alone, before what it takes later",
        main_only=True,
    )
    taken = max(activations, encoders.encoding)
    yield Part("drawing", max(0, encoders.drawing - taken), 0, "beyond what a step takes later", 0.3)


def _others(recipe: Recipe, pack: _Pack, split: _Split, copies: int) -> Iterator[Part]:
    model = recipe.model
    # Clean tokens, noise, the point on the path, output, target, their difference and its square, and the
    # same for the directional term; captions.
    batch = _FLOAT32 * (12 * pack.tokens * model.token_channels + pack.text * (model.text_dim or 0))
    yield Part("batch and loss", batch, 0, "", 0.3)
    yield Part("CUDA, NCCL, workspaces", RUNTIME_BYTES, 0, "assumed", 0.4)
    yield Part("process", 0, PROCESS_HOST_BYTES, "assumed")
    if recipe.data.workers:
        yield Part(
            _LOADER, 0, recipe.data.workers * WORKER_HOST_BYTES, f"{recipe.data.workers} workers, assumed"
        )
    pieces = split.real if split.stage else split.own
    yield Part(
        _COPY,
        0,
        _FLOAT32 * pieces * (1 + len(STATE_KEYS) + copies),
        "from the first step on",
    )


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 1 if a given card is too small, 2 for a wrong recipe or file."""
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.memory", description="Memory that a run of a recipe needs."
    )
    parser.add_argument("recipe", nargs="+", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--ds", required=True, type=Path, help="engine file: ds_configs/*.json")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of a node")
    parser.add_argument("--nodes", type=int, default=1, metavar="M")
    parser.add_argument(
        "--card-gib", type=float, metavar="GIB", help="say whether a GPU of this size holds it"
    )
    parser.add_argument(
        "--image-tokens", type=int, metavar="T", help="tokens of one image (of 1024 pixels a side)"
    )
    parser.add_argument(
        "--encoders-gib", type=float, help="frozen encoders on the GPU, where their config.json is not here"
    )
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1 or options.gpus < 1 or options.nodes < 1:
        parser.error("expected one recipe and at least one GPU and node")
    found = estimate(
        load_recipe(paths[0], overrides),
        read_engine_file(options.ds),
        Ranks(options.gpus * options.nodes, options.gpus),
        image_tokens=options.image_tokens,
        encoder_bytes=None if options.encoders_gib is None else round(options.encoders_gib * GIB),
    )
    print(found.table(options.card_gib))
    return int(options.card_gib is not None and found.fits(options.card_gib) is False)


if __name__ == "__main__":
    sys.exit(main())
