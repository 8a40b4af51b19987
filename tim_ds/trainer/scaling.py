"""A model of how a run scales over GPUs and nodes, from counted operations and bytes. Nothing is measured.

    python -m tim_ds.trainer.scaling RECIPE --ds FILE --gpus 8,16,64,512 --mfu 0.4 --peak-tflops 989 \\
        --intra-gbs 400 --inter-gbs 200 --overlap 0.7 [--packs-per-gpu 4] [section.key=value ...]

Operations of a step are those of `flops.py`. Bytes of a step follow from what DeepSpeed gathers and reduces
at the stage of the engine file. How fast a GPU computes (its peak and the share that a step reaches alone),
how fast GPUs of a node and nodes talk, and how much of that passes behind the computation are inputs: none
is assumed here, and none of the results is more true than they are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.command import command
from tim_ds.config.load import load_recipe, split_arguments
from tim_ds.config.recipe import Recipe, latent_stride
from tim_ds.errors import ConfigError, TimError
from tim_ds.model.export_folder import meta_network
from tim_ds.trainer.engine import GATHER_ELEMENTS, read_engine_file, zero_settings, zero_stage
from tim_ds.trainer.flops import PackShape, StepFlops, step_flops
from tim_ds.trainer.memory import IMAGE_SIDE_PIXELS, Ranks, trained_sizes

GRADIENT_BYTES = 4
"""Of one element of a gradient on the wire (`communication_data_type` is float32)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the model is told about the machines."""

    flops_per_s: float
    """Of one GPU on this step, alone: its peak times the utilisation of the model's operations (MFU), with
    optimiser, recomputation and all else that is no communication in the time."""
    intra_bytes_per_s: float
    """That a GPU sends to others of its node in a collective (bus bandwidth)."""
    inter_bytes_per_s: float
    """That a node sends to others in a collective, all its network cards together."""
    overlap: float
    """Share of the communication that can pass behind computation, 0 to 1."""
    message_s: float = 0.0
    """Latency of one message of a ring."""


@dataclass(frozen=True, slots=True)
class Volume:
    """Bytes that one GPU sends in a step, in collectives over all GPUs and over those of a node."""

    everywhere: float
    in_node: float
    messages: float
    """Messages that follow each other."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A step on so many GPUs."""

    ranks: Ranks
    images: float
    """Of a step, over all GPUs."""
    compute_s: float
    communication_s: float
    exposed_s: float
    """Communication that the GPUs wait for."""
    volume: Volume

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def efficiency(self) -> float:
        """Throughput of a GPU over that of one GPU alone with as many packs."""
        return self.compute_s / self.step_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.step_s


def even_pack(recipe: Recipe, image_tokens: int | None = None, text_tokens: int | None = None) -> PackShape:
    """A pack full of equal images.

    Args:
        image_tokens: of one image; None: of 1024 x 1024 pixels, or the whole pack where that is smaller.
        text_tokens: of one caption; None: as many as the text encoder allows.
    """
    tokens = recipe.data.tokens_per_pack
    if image_tokens is None:
        stride = latent_stride(recipe.data.autoencoder) * recipe.model.patch_size
        image_tokens = min(tokens, (IMAGE_SIDE_PIXELS // stride) ** 2)
    images = max(1, tokens // image_tokens)
    encoder = recipe.data.text_encoder
    if encoder is None:
        return PackShape((image_tokens,) * images)
    text = encoder.max_tokens if text_tokens is None else text_tokens
    return PackShape((image_tokens,) * images, (text,) * images)


def expected_flops(recipe: Recipe, pack: PackShape, null_text_length: int = 0) -> StepFlops:
    """Operations of a micro-step, with as many transitions as the recipe asks for on average. A guided target
    is counted for the mean share of times in its interval, which is that of even times."""
    images, objective = len(pack.image_lengths), recipe.objective
    moving = round((1.0 - objective.diffusion_share) * images)
    guided = 0
    if objective.guided_target is not None:
        # Times of the transports with an end beyond 1 are clipped: an interval there is counted whole.
        share = min(1.0, objective.guided_target.end - objective.guided_target.start)
        guided = round(share * images)
    return step_flops(
        recipe.model,
        objective,
        pack,
        transition=range(moving),
        guided=range(guided),
        null_text_length=null_text_length,
        checkpointing=recipe.train.activation_checkpointing,
    )


def step_volume(recipe: Recipe, engine: Mapping[str, Any], ranks: Ranks, packs_per_gpu: int) -> Volume:
    """What a GPU sends in a step with DeepSpeed's collectives, as rings: (N - 1) / N of a tensor for a gather
    or a reduction to shards, twice that where the sum goes to all."""
    N, stage = ranks.size, zero_stage(engine)
    if N == 1:
        return Volume(0.0, 0.0, 0.0)
    settings = zero_settings(engine)
    network = meta_network(recipe.model)
    trained = sum(trained_sizes(recipe, network))
    whole = sum(p.numel() for p in network.parameters()) + (trained if recipe.train.adapter else 0)
    weight_bytes = 2 if recipe.train.precision == "bf16" else 4
    ring, gradients, weights = (N - 1) / N, GRADIENT_BYTES * trained, weight_bytes * trained
    buckets = math.ceil(trained / int(settings.reduce_bucket_size))
    if stage == 0:
        return Volume(2 * ring * gradients, 0.0, 2 * buckets * (N - 1))
    if stage < 3:
        # Stage 1 reduces once a step, stage 2 after every micro-step; both gather the new weights once.
        reductions = packs_per_gpu if stage == 2 else 1
        if settings.use_multi_rank_bucket_allreduce or not settings.reduce_scatter:
            # DeepSpeed's default: the sum goes to everyone, who keep their part.
            reductions *= 2
        gathers = math.ceil(weights / max(1, int(settings.allgather_bucket_size)))
        volume = ring * (reductions * gradients + weights)
        messages = (reductions * buckets + gathers) * (N - 1)
        if recipe.objective.guided_target is not None:
            # The teacher is whole on every GPU; after each step the parts of the average are summed into it.
            volume += 2 * ring * gradients
            messages += 2 * math.ceil(trained / GATHER_ELEMENTS) * (N - 1)
        return Volume(volume, 0.0, messages)
    # For the forward, with which dF/dt comes, and where it was dropped since for the backward. A teacher is
    # gathered for its forward.
    own, networks = weight_bytes * whole, 1 if recipe.objective.guided_target is None else 2
    again = _dropped_share(whole, int(settings.max_reuse_distance))
    first = packs_per_gpu * networks * own
    second = packs_per_gpu * again * own
    units = recipe.model.depth + 1
    messages = packs_per_gpu * ((again + networks) * units + buckets) * (N - 1)
    group = min(settings.zero_hpz_partition_size, N)
    if group > 1:
        # Hierarchical partitioning: the backward gathers from a second copy inside the node.
        in_node = (group - 1) / group * second
        return Volume(ring * (first + packs_per_gpu * gradients), in_node, messages)
    return Volume(ring * (first + second + packs_per_gpu * gradients), 0.0, messages)


def _dropped_share(parameters: int, reuse_distance: int) -> float:
    """Share of the weights that ZeRO-3 drops after the forward: those that the backward reaches only after
    more than `reuse_distance` parameters, of which what follows in the forward counts twice."""
    return max(0.0, 1.0 - reuse_distance / (2 * parameters))


def scale(
    recipe: Recipe,
    engine: Mapping[str, Any],
    hardware: Hardware,
    ranks: Ranks,
    *,
    packs_per_gpu: int,
    pack: PackShape,
) -> Scaled:
    """One step on `ranks`, each with `packs_per_gpu` packs like `pack`."""
    operations = packs_per_gpu * expected_flops(recipe, pack).model
    compute_s = operations / hardware.flops_per_s
    volume = step_volume(recipe, engine, ranks, packs_per_gpu)
    everywhere = hardware.intra_bytes_per_s
    if ranks.nodes > 1:
        # A ring over all GPUs leaves every node once for each of its channels, which share the node's cards.
        everywhere = min(everywhere, hardware.inter_bytes_per_s)
    communication_s = (
        volume.everywhere / everywhere
        + volume.in_node / hardware.intra_bytes_per_s
        + volume.messages * hardware.message_s
    )
    hidden_s = min(hardware.overlap * communication_s, compute_s)
    images = packs_per_gpu * ranks.size * len(pack.image_lengths)
    return Scaled(ranks, images, compute_s, communication_s, communication_s - hidden_s, volume)


def table(rows: Sequence[Scaled]) -> str:
    lines = [
        f"{'GPUs':>6} {'nodes':>6} {'compute s':>10} {'GB sent':>9} {'comm s':>8} {'exposed s':>10} "
        f"{'step s':>8} {'images/s':>10} {'efficiency':>11}"
    ]
    for row in rows:
        sent = (row.volume.everywhere + row.volume.in_node) / 1e9
        lines.append(
            f"{row.ranks.size:>6} {row.ranks.nodes:>6} {row.compute_s:>10.3f} {sent:>9.2f} "
            f"{row.communication_s:>8.3f} {row.exposed_s:>10.3f} {row.step_s:>8.3f} "
            f"{row.images_per_s:>10.1f} {row.efficiency:>11.1%}"
        )
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError("expected positive numbers")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.scaling",
        description="A model of step time and efficiency over GPUs and nodes. All rates are yours to give.",
    )
    parser.add_argument("recipe", nargs="+", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--ds", required=True, type=Path, help="engine file: ds_configs/*.json")
    parser.add_argument("--gpus", required=True, type=_numbers, metavar="N,N,...")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node (8)")
    parser.add_argument("--peak-tflops", required=True, type=float, help="dense peak of one GPU")
    parser.add_argument(
        "--mfu", required=True, type=float, help="share of the peak that a step reaches on one GPU, 0 to 1"
    )
    parser.add_argument("--intra-gbs", required=True, type=float, help="GB/s a GPU sends within its node")
    parser.add_argument("--inter-gbs", required=True, type=float, help="GB/s a node sends to other nodes")
    parser.add_argument(
        "--overlap",
        required=True,
        type=float,
        help="share of communication that passes behind computation",
    )
    parser.add_argument("--message-us", type=float, default=0.0, help="latency of a ring's message (0)")
    parser.add_argument(
        "--packs-per-gpu",
        type=int,
        help="packs a GPU and step, at any number of GPUs; without it the recipe's global batch is divided",
    )
    parser.add_argument("--image-tokens", type=int, metavar="T", help="of one image (of 1024 pixels a side)")
    return parser


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 2 for a wrong recipe, file or number."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1 or not 0 < options.mfu <= 1 or not 0 <= options.overlap <= 1:
        parser.error("expected one recipe, 0 < --mfu <= 1 and 0 <= --overlap <= 1")
    hardware = Hardware(
        flops_per_s=1e12 * options.peak_tflops * options.mfu,
        intra_bytes_per_s=1e9 * options.intra_gbs,
        inter_bytes_per_s=1e9 * options.inter_gbs,
        overlap=options.overlap,
        message_s=1e-6 * options.message_us,
    )
    recipe, engine = load_recipe(paths[0], overrides), read_engine_file(options.ds)
    pack = even_pack(recipe, options.image_tokens)
    rows = []
    for gpus in options.gpus:
        packs, rest = divmod(recipe.data.packs_per_step, gpus)
        if options.packs_per_gpu is None and (rest or not packs):
            raise ConfigError(
                f"data.packs_per_step: {recipe.data.packs_per_step} cannot be divided among {gpus} GPUs; "
                "give --packs-per-gpu to let the global batch grow, or set data.packs_per_step"
            )
        rows.append(
            scale(
                recipe,
                engine,
                hardware,
                Ranks(gpus, options.per_node),
                packs_per_gpu=options.packs_per_gpu or packs,
                pack=pack,
            )
        )
    batch = "grows with the GPUs" if options.packs_per_gpu else "is the recipe's"
    print(
        f"A model, nothing is measured. {recipe.name}, ZeRO stage {zero_stage(engine)}; "
        f"the global batch {batch}.\n"
        f"Given: {options.peak_tflops:g} TFLOP/s a GPU at {options.mfu:.0%}; {options.intra_gbs:g} GB/s a "
        f"GPU in a node of {options.per_node}, {options.inter_gbs:g} GB/s a node; "
        f"overlap {options.overlap:.0%}; {options.message_us:g} us a message.\n"
        f"Packs of {len(pack.image_lengths)} images of {pack.image_lengths[0]} tokens.\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
