"""A model of how a run scales over GPUs and nodes: counted operations and bytes, measured or given rates.

    python -m tim_ds.trainer.scaling RECIPE --ds FILE --gpus 8,16,64,512 --measured pieces.json
    python -m tim_ds.trainer.scaling RECIPE --ds FILE --gpus 8,16,64,512 --mfu 0.4 --peak-tflops 989 \\
        --intra-gbs 400 --inter-gbs 200 --overlap 0.7 [--packs-per-gpu 4] [section.key=value ...]

Operations of a step are those of `flops.py`. Bytes of a step follow from what DeepSpeed gathers and reduces
at the stage of the engine file. How fast a GPU computes, how fast GPUs of a node and nodes talk, and how much
of that passes behind the computation are measured by `tim_ds.trainer.pieces`, or given: none is assumed here,
and none of the results is more true than they are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from data_pipeline.command import command
from tim_ds.config.load import load_recipe, split_arguments
from tim_ds.config.recipe import Recipe, latent_stride
from tim_ds.errors import ConfigError, RequestError, TimError
from tim_ds.model.export_folder import meta_network
from tim_ds.trainer.engine import GATHER_ELEMENTS, read_engine_file, zero_settings, zero_stage
from tim_ds.trainer.flops import PackShape, StepFlops, step_flops
from tim_ds.trainer.measured import (
    Kind,
    Link,
    Pieces,
    Sent,
    differences,
    load_pieces,
    sent_bytes,
)
from tim_ds.trainer.memory import IMAGE_SIDE_PIXELS, Ranks, trained_sizes

GRADIENT_BYTES = 4
"""Of one element of a gradient on the wire (`communication_data_type` is float32)."""
PER_NODE = 8
"""GPUs of a node, where nothing says otherwise."""

Links = Mapping[Kind, Link]


def even_links(bytes_per_s: float, message_s: float = 0.0) -> Links:
    """The same for collectives of every kind."""
    return dict.fromkeys(get_args(Kind), Link(bytes_per_s, message_s))


@dataclass(frozen=True)
class Hardware:
    """What the model is told about the machines."""

    flops_per_s: float
    """Of one GPU on the packs of this recipe, alone, with recomputation and all else that is no communication
    in the time."""
    within: Links
    """Collectives of the GPUs of a node: what a GPU sends."""
    between: Links
    """Collectives over nodes: what a node sends, all its network cards together."""
    overlap: float
    """Share of what can pass behind computation, the shorter of both, that does: 0 to 1."""
    update_s: float = 0.0
    """Of optimiser and averages on a GPU that updates all parameters, where `flops_per_s` leaves it out."""

    def everywhere(self, ranks: Ranks) -> Links:
        """Of collectives over all GPUs."""
        if ranks.nodes == 1:
            return self.within
        # A ring over all GPUs leaves every node once for each of its channels, which share the node's cards.
        return {
            kind: replace(link, bytes_per_s=min(link.bytes_per_s, self.within[kind].bytes_per_s))
            if kind in self.within
            else link
            for kind, link in self.between.items()
        }


@dataclass(frozen=True)
class Volume:
    """What one GPU sends in a step."""

    parts: tuple[Sent, ...]

    @property
    def everywhere(self) -> float:
        """Bytes, in collectives over all GPUs."""
        return sum(part.sent_bytes for part in self.parts if part.scope == "everywhere")

    @property
    def in_node(self) -> float:
        """Bytes, in collectives over the GPUs of a node."""
        return sum(part.sent_bytes for part in self.parts if part.scope == "node")


@dataclass(frozen=True, slots=True)
class Scaled:
    """A step on so many GPUs."""

    ranks: Ranks
    images: float
    """Of a step, over all GPUs."""
    alone_s: float
    """Of one GPU without others, with as many packs."""
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
        return self.alone_s / self.step_s

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
        return Volume(())
    settings = zero_settings(engine)
    sizes = trained_sizes(recipe, meta_network(recipe.model))
    trained, guided = sum(sizes), recipe.objective.guided_target is not None
    gradients, weights = GRADIENT_BYTES * trained, _weight_bytes(recipe) * trained
    buckets = math.ceil(trained / int(settings.reduce_bucket_size))

    def sent(kind: Kind, whole_bytes: float, calls: float) -> Sent:
        return Sent(kind, "everywhere", N, sent_bytes(kind, whole_bytes, N), calls)

    if stage == 0:
        return Volume((sent("all_reduce", gradients, buckets),))
    # The norm of the gradient is one number.
    norm = sent("all_reduce", 8, 1)
    if stage == 3:
        return Volume((*_sharded_volume(recipe, engine, ranks, packs_per_gpu), norm))
    # Stage 1 reduces once a step, stage 2 after every micro-step; both gather the new weights once, at once.
    reductions = packs_per_gpu if stage == 2 else 1
    # DeepSpeed's default: the sum goes to everyone, who keep their part. Else each part goes to its owner.
    to_all = settings.use_multi_rank_bucket_allreduce or not settings.reduce_scatter
    calls = reductions * (buckets if to_all else max(buckets, N))
    parts = [
        sent("all_reduce" if to_all else "reduce", reductions * gradients, calls),
        sent("all_gather", weights, 1),
        norm,
    ]
    if guided:
        # The teacher is whole on every GPU; after each step the parts of the average are summed into it.
        parts.append(sent("all_reduce", gradients, math.ceil(trained / GATHER_ELEMENTS)))
    return Volume(tuple(parts))


def _weight_bytes(recipe: Recipe) -> int:
    return 2 if recipe.train.precision == "bf16" else 4


def _sharded_volume(
    recipe: Recipe, engine: Mapping[str, Any], ranks: Ranks, packs_per_gpu: int
) -> Sequence[Sent]:
    """Weights and gradients of ZeRO-3."""
    N, settings = ranks.size, zero_settings(engine)
    network = meta_network(recipe.model)
    trained = trained_sizes(recipe, network)
    every = [p.numel() for p in network.parameters()] + (trained if recipe.train.adapter else [])
    # Small parameters stay whole between steps: each is gathered by itself when it has a new value, and those
    # of a teacher once more when that is refreshed.
    kept = [size for size in every if size <= int(settings.param_persistence_threshold)]
    passing = sum(every) - sum(kept)
    guided = recipe.objective.guided_target is not None
    networks, refreshes = (2, 3) if guided else (1, 1)
    # For the forward, with which dF/dt comes, and where it was dropped since for the backward. A teacher is
    # gathered for its forward.
    again = _dropped_share(passing, settings)
    units = recipe.model.depth + 1 if passing else 0
    buckets = math.ceil(sum(trained) / int(settings.reduce_bucket_size))
    w, A = _weight_bytes(recipe), packs_per_gpu

    def sent(kind: Kind, whole_bytes: float, calls: float, size: int = N) -> Sent:
        scope = "everywhere" if size == N else "node"
        return Sent(kind, scope, size, sent_bytes(kind, whole_bytes, size), calls)

    # Hierarchical partitioning: the backward gathers from a second copy inside the node.
    group = min(settings.zero_hpz_partition_size, N)
    parts = [
        sent("all_gather", A * networks * w * passing, A * networks * units),
        sent("all_gather", refreshes * w * sum(kept), refreshes * len(kept)),
        sent("all_gather", A * again * w * passing, A * again * units, group if group > 1 else N),
        sent("reduce_scatter", A * GRADIENT_BYTES * sum(trained), A * buckets),
    ]
    return [part for part in parts if part.calls]


def _dropped_share(parameters: int, settings: Any) -> float:
    """Share of the weights that ZeRO-3 drops after the forward and gathers again for the backward. It keeps
    what the backward reaches within the reuse distance, of which what follows in the forward counts twice,
    and, where it fetches ahead, as much as may be gathered at a time: what it meets then and finds gathered
    is not dropped any more (counted with DeepSpeed 0.19.8)."""
    ahead = int(settings.max_live_parameters) if settings.prefetch_bucket_size else 0
    kept = int(settings.max_reuse_distance) / 2 + ahead
    return max(0.0, 1.0 - kept / parameters) if parameters else 0.0


def scale(
    recipe: Recipe,
    engine: Mapping[str, Any],
    hardware: Hardware,
    ranks: Ranks,
    *,
    packs_per_gpu: int,
    pack: PackShape,
) -> Scaled:
    """One step on `ranks`, each with `packs_per_gpu` packs like `pack`.

    Raises:
        RequestError: if nothing says how fast a collective of this step is.
    """
    packs_s = packs_per_gpu * expected_flops(recipe, pack).model / hardware.flops_per_s
    # From stage 1 on the ranks share the update.
    compute_s = packs_s + hardware.update_s / (ranks.size if zero_stage(engine) else 1)
    volume = step_volume(recipe, engine, ranks, packs_per_gpu)
    communication_s = 0.0
    for part in volume.parts:
        inside = part.scope == "node" or ranks.nodes == 1
        links = hardware.within if inside else hardware.everywhere(ranks)
        if part.kind not in links:
            where, option = ("in a node", "--intra-gbs") if inside else ("between nodes", "--inter-gbs")
            raise RequestError(
                f"{ranks.size} GPUs on {ranks.nodes} nodes: nothing says how fast {part.kind} is {where}; "
                f"give {option}, or --measured with a file of machines where it was measured"
            )
        communication_s += links[part.kind].seconds(part)
    hidden_s = hardware.overlap * min(communication_s, compute_s)
    images = packs_per_gpu * ranks.size * len(pack.image_lengths)
    alone_s = packs_s + hardware.update_s
    return Scaled(ranks, images, alone_s, compute_s, communication_s, communication_s - hidden_s, volume)


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


@dataclass(frozen=True)
class Given:
    """Rates of the command line, in place of measured ones; None: not given."""

    peak_tflops: float | None = None
    mfu: float | None = None
    intra_gbs: float | None = None
    inter_gbs: float | None = None
    message_us: float | None = None
    overlap: float | None = None


def hardware_of(recipe: Recipe, given: Given, pieces: Pieces | None) -> tuple[Hardware, list[str]]:
    """What the model is told, and for every rate in words whether it was measured or given.

    Raises:
        RequestError: if a rate is neither, or none that a rate can be.
    """
    _check(given, pieces)
    told = []
    update_s = 0.0
    if given.peak_tflops is not None and given.mfu is not None:
        flops_per_s = 1e12 * given.peak_tflops * given.mfu
        told.append(f"computation   given: {given.peak_tflops:g} TFLOP/s a GPU at {given.mfu:.0%}")
    else:
        assert pieces is not None  # _check
        measured = even_pack(recipe, pieces.image_tokens)
        flops_per_s = expected_flops(recipe, measured).model / pieces.pack_s
        shards = pieces.ranks if pieces.stage else 1
        update_s = shards * pieces.update_s
        told.append(
            f"computation   measured at stage {pieces.stage}: {pieces.pack_s:.4g} s a pack "
            f"({flops_per_s / 1e12:.4g} TFLOP/s), {pieces.update_s:.4g} s an update of 1/{shards} of "
            "the parameters"
        )
    within, between = {}, {}
    if pieces is not None:
        within = pieces.links("everywhere" if pieces.nodes == 1 else "node")
        between = pieces.links("everywhere") if pieces.nodes > 1 else {}
    message_s = None if given.message_us is None else 1e-6 * given.message_us
    used = _overridden(within, given.intra_gbs, message_s), _overridden(between, given.inter_gbs, message_s)
    told.append(f"in a node     {_told(within, used[0], given.intra_gbs, message_s)}")
    told.append(f"over nodes    {_told(between, used[1], given.inter_gbs, message_s)}")
    overlap = given.overlap
    if overlap is None:
        assert pieces is not None and pieces.overlap is not None  # _check
        overlap = pieces.overlap
    told.append(f"overlap       {'measured' if given.overlap is None else 'given'}: {overlap:.0%}")
    return Hardware(flops_per_s, *used, overlap, update_s), told


def _check(given: Given, pieces: Pieces | None) -> None:
    problems = []
    for option, value, top in (
        ("--peak-tflops", given.peak_tflops, None),
        ("--mfu", given.mfu, 1.0),
        ("--intra-gbs", given.intra_gbs, None),
        ("--inter-gbs", given.inter_gbs, None),
    ):
        if value is not None and not (value > 0 and (top is None or value <= top)):
            problems.append(
                f"{option}: expected a number above 0{' up to 1' if top else ''}, received {value}"
            )
    if given.overlap is not None and not 0 <= given.overlap <= 1:
        problems.append(f"--overlap: expected 0 to 1, received {given.overlap}")
    if given.message_us is not None and given.message_us < 0:
        problems.append(f"--message-us: expected 0 or more, received {given.message_us}")
    if (given.peak_tflops is None) != (given.mfu is None):
        problems.append("--peak-tflops and --mfu go together")
    if pieces is None:
        absent = [
            f"--{name.replace('_', '-')}"
            for name in ("peak_tflops", "mfu", "intra_gbs", "inter_gbs", "overlap")
            if getattr(given, name) is None
        ]
        if absent:
            problems.append(f"give {', '.join(absent)}, or --measured with a file of tim_ds.trainer.pieces")
    else:
        if given.mfu is None and pieces.pack_s <= 0:
            problems.append(
                "--measured: more packs took no longer; measure again on machines with less to do"
            )
        if given.overlap is None and pieces.overlap is None:
            problems.append("--measured: of one rank, which talks to nobody; give --overlap")
    if problems:
        raise RequestError("\n".join(problems))


def _overridden(found: Links, gbs: float | None, message_s: float | None) -> Links:
    """Measured links with what was given: the bandwidth of the fastest kind; others keep their share."""
    if gbs is not None and not found:
        return even_links(1e9 * gbs, message_s or 0.0)
    factor = 1.0 if gbs is None else 1e9 * gbs / max(link.bytes_per_s for link in found.values())
    return {
        kind: Link(factor * link.bytes_per_s, link.message_s if message_s is None else message_s)
        for kind, link in found.items()
    }


def _told(found: Links, used: Links, gbs: float | None, message_s: float | None) -> str:
    if not used:
        return "unknown"
    if not found:
        link = next(iter(used.values()))
        return f"given: {gbs:g} GB/s, {1e6 * link.message_s:g} us a message"
    rates = ", ".join(
        f"{kind} {link.bytes_per_s / 1e9:.4g} GB/s {1e6 * link.message_s:.3g} us"
        for kind, link in used.items()
    )
    told = "measured" if gbs is None else "given for the fastest kind, the others in the measured proportion"
    return f"{told}: {rates}" + ("" if message_s is None else " (latency given)")


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError("expected positive numbers")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.scaling",
        description="A model of step time and efficiency over GPUs and nodes. Rates are measured, or given.",
    )
    parser.add_argument("recipe", nargs="+", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--ds", required=True, type=Path, help="engine file: ds_configs/*.json")
    parser.add_argument("--gpus", required=True, type=_numbers, metavar="N,N,...")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="of tim_ds.trainer.pieces; what is given goes before it"
    )
    parser.add_argument(
        "--per-node", type=int, metavar="N", help=f"GPUs of a node (as measured, or {PER_NODE})"
    )
    parser.add_argument("--peak-tflops", type=float, help="dense peak of one GPU")
    parser.add_argument("--mfu", type=float, help="share of the peak that a step reaches on one GPU, 0 to 1")
    parser.add_argument("--intra-gbs", type=float, help="GB/s a GPU sends within its node")
    parser.add_argument("--inter-gbs", type=float, help="GB/s a node sends to other nodes")
    parser.add_argument("--overlap", type=float, help="share of what can pass behind computation that does")
    parser.add_argument("--message-us", type=float, help="latency of a ring's message (as measured, or 0)")
    parser.add_argument(
        "--packs-per-gpu",
        type=int,
        help="packs a GPU and step, at any number of GPUs; without it the recipe's global batch is divided",
    )
    parser.add_argument(
        "--image-tokens", type=int, metavar="T", help="of one image (as measured, or of 1024 pixels a side)"
    )
    return parser


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 2 for a wrong recipe, file or number."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1:
        parser.error("expected one recipe")
    recipe, engine = load_recipe(paths[0], overrides), read_engine_file(options.ds)
    pieces = None if options.measured is None else load_pieces(options.measured)
    given = Given(**{name: getattr(options, name) for name in Given.__dataclass_fields__})
    if pieces is not None and given.mfu is None and (wrong := differences(pieces, recipe)):
        raise ConfigError(
            f"{options.measured}: of another recipe, so its computation says nothing:\n" + "\n".join(wrong)
        )
    hardware, told = hardware_of(recipe, given, pieces)
    per_node = options.per_node or (pieces.per_node if pieces is not None and pieces.ranks > 1 else PER_NODE)
    image_tokens = options.image_tokens or (None if pieces is None else pieces.image_tokens)
    pack = even_pack(recipe, image_tokens)
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
                Ranks(gpus, per_node),
                packs_per_gpu=options.packs_per_gpu or packs,
                pack=pack,
            )
        )
    batch = "grows with the GPUs" if options.packs_per_gpu else "is the recipe's"
    source = "nothing is measured" if pieces is None else f"measured means {pieces.where}"
    print(
        f"A model, {source}. {recipe.name}, ZeRO stage {zero_stage(engine)}; "
        f"the global batch {batch}; {per_node} GPUs a node.\n"
        + "\n".join(told)
        + f"\nPacks of {len(pack.image_lengths)} images of {pack.image_lengths[0]} tokens.\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
