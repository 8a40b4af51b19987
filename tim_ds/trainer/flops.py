"""Floating-point operations of training, in closed form: matrix products and attention of the network.

A multiply-add counts two. Norms, activations, gates and rotations are left out: they are bound by memory, and
by convention no utilisation counts them. All counts follow from the architecture and from the lengths of a
pack, on the host; a test compares them with PyTorch's counter on the real network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import TIME_FREQUENCIES
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.guidance_target import guided_segments
from tim_ds.packed import TextCondition
from tim_ds.trainer.inputs import StepInputs

# Embeddings of a time in one forward: besides that of t, those of `time_condition`; and how many of all move
# with t while r stands still.
_TIME_TERMS = {"t-r": 2, "r": 2, "t,r": 3, "t,t-r": 3, "r,t-r": 3, "t,r,t-r": 4}
_MOVING_TIME_TERMS = {"t-r": 2, "r": 1, "t,r": 2, "t,t-r": 3, "r,t-r": 2, "t,r,t-r": 3}

# Dense bfloat16 peak of one device in TFLOP/s, float32 accumulation, without sparsity: the makers' data
# sheets. Sought as whole words of the device's name ("RTX A4000" is no A40), first match wins.
PEAK_BF16_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
    ("MI325X", 1307.4),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of one device in FLOP/s, or None where it is not known: another device, or float32, whose peak
    depends on whether products are rounded to TF32."""
    if precision == "fp32":
        return None
    return next(
        (1e12 * tflops for name, tflops in PEAK_BF16_TFLOPS if re.search(rf"\b{name}\b", device_name)), None
    )


@dataclass(frozen=True, slots=True)
class PackShape:
    """Lengths of a pack: all that its cost depends on."""

    image_lengths: tuple[int, ...]
    """Tokens of every image."""
    text_lengths: tuple[int, ...] | None = None
    """Tokens of every caption; None for classes."""
    images_per_caption: int = 1
    """Neighbouring images that share a caption, which is embedded once."""

    @property
    def num_tokens(self) -> int:
        return sum(self.image_lengths)

    @property
    def num_text_tokens(self) -> int:
        return sum(self.text_lengths or ())

    @property
    def num_self_pairs(self) -> int:
        """Query-key pairs of self-attention."""
        return sum(n * n for n in self.image_lengths)

    @property
    def num_cross_pairs(self) -> int:
        """Query-key pairs of cross-attention."""
        if self.text_lengths is None:
            return 0
        count = self.images_per_caption
        return sum(n * self.text_lengths[i // count] for i, n in enumerate(self.image_lengths))

    def select(self, indices: Sequence[int]) -> PackShape:
        """The images `indices` with a caption each."""
        text = self.text_lengths
        return PackShape(
            tuple(self.image_lengths[i] for i in indices),
            None if text is None else tuple(text[i // self.images_per_caption] for i in indices),
        )

    def doubled(self) -> PackShape:
        """Every image twice, its caption once."""
        lengths = tuple(n for n in self.image_lengths for _ in range(2))
        return PackShape(lengths, self.text_lengths, 2 * self.images_per_caption)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of one micro-step, by part."""

    forward: int
    backward: int
    """Two products for each of the forward, less those whose input needs no gradient."""
    derivative: int
    """dF/dt: two forwards (`dde`), or the tangent beside the value (`paired`, `jvp`)."""
    teacher: int
    """Forward of the averaged network, for a guided target."""
    recompute: int
    """What is computed a second time: blocks under activation checkpointing, and the logits of attention
    where the tangent needs them again."""

    @property
    def model(self) -> int:
        """What the objective asks for: the numerator of the model's utilisation (MFU)."""
        return self.forward + self.backward + self.derivative + self.teacher

    @property
    def executed(self) -> int:
        """What the device does: the numerator of the hardware's utilisation (HFU)."""
        return self.model + self.recompute


class _Product(NamedTuple):
    rows: int
    inner: int
    outer: int
    in_block: bool = True
    input_has_gradient: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer


class _Rows(NamedTuple):
    """How many rows pass through the layers of each kind."""

    tokens: int
    text: int
    segments: int
    times: int
    """Embedded times, over all segments."""


def _rows(config: ModelConfig, pack: PackShape) -> _Rows:
    segments = len(pack.image_lengths)
    times = segments * _TIME_TERMS[config.time_condition]
    return _Rows(pack.num_tokens, pack.num_text_tokens, segments, times)


def _products(config: ModelConfig, rows: _Rows, *, with_features: bool) -> Iterator[_Product]:
    """Matrix products with weights, in one forward."""
    width, hidden = config.hidden_size, config.mlp_hidden
    tokens, text, segments = rows.tokens, rows.text, rows.segments
    is_text = config.condition == "text"
    branches = 3 if is_text else 2

    yield _Product(tokens, config.token_channels, width, False, False)
    yield _Product(rows.times, 2 * TIME_FREQUENCIES, width, False, False)
    yield _Product(rows.times, width, width, False)
    if is_text:
        assert config.text_dim is not None  # ModelConfig requires it
        yield _Product(text, config.text_dim, 8 * width, False)
        yield _Product(text, 4 * width, width, False)
    for _ in range(config.depth):
        yield _Product(segments, width, 2 * config.adaln_width)
        yield _Product(segments, config.adaln_width, 3 * branches * width)
        yield _Product(tokens, width, 3 * width)
        if config.distance_aware:
            yield _Product(segments, width, 3 * width)
        yield _Product(tokens, width, width)
        if is_text:
            yield _Product(tokens, width, 2 * width)  # queries and output
            yield _Product(text, width, 2 * width)
        yield _Product(tokens, width, 2 * hidden)
        yield _Product(tokens, hidden, width)
    yield _Product(segments, width, 2 * (width // 2), False)
    yield _Product(segments, width // 2, 2 * width, False)
    yield _Product(tokens, width, config.token_channels, False)
    if with_features and config.z_dim is not None:
        yield _Product(tokens, width, config.projector_dim, False)
        yield _Product(tokens, config.projector_dim, config.projector_dim, False)
        yield _Product(tokens, config.projector_dim, config.z_dim, False)


def _attention(config: ModelConfig, pack: PackShape, *, self_products: int, cross_products: int) -> int:
    """Operations of attention in all blocks, given the products of each query-key pair."""
    pairs = self_products * pack.num_self_pairs + cross_products * pack.num_cross_pairs
    return 2 * config.depth * config.hidden_size * pairs


def forward_flops(config: ModelConfig, pack: PackShape, *, with_features: bool = False) -> int:
    """One evaluation of the network. `with_features`: the projector of the alignment term runs too."""
    products = _products(config, _rows(config, pack), with_features=with_features)
    return sum(p.flops for p in products) + _attention(config, pack, self_products=2, cross_products=2)


def backward_flops(config: ModelConfig, pack: PackShape, *, with_features: bool = False) -> int:
    """The gradient of one evaluation with respect to the weights."""
    products = _products(config, _rows(config, pack), with_features=with_features)
    weights = sum(p.flops * (2 if p.input_has_gradient else 1) for p in products)
    return weights + _attention(config, pack, self_products=4, cross_products=4)


def recompute_flops(config: ModelConfig, pack: PackShape) -> int:
    """A second forward of the blocks, whose activations were not kept."""
    products = _products(config, _rows(config, pack), with_features=False)
    blocks = sum(p.flops for p in products if p.in_block)
    return blocks + _attention(config, pack, self_products=2, cross_products=2)


def tangent_flops(config: ModelConfig, moving: PackShape) -> int:
    """The tangent of the images `moving`, carried beside a forward. Captions stand still."""
    return _carried_flops(config, moving, self_products=4)


def copies_flops(config: ModelConfig, copies: PackShape) -> int:
    """Copies of images that a forward carries. Captions and the times r are those of the main stream."""
    return _carried_flops(config, copies, self_products=2)


def _carried_flops(config: ModelConfig, carried: PackShape, *, self_products: int) -> int:
    segments = len(carried.image_lengths)
    times = segments * _MOVING_TIME_TERMS[config.time_condition]
    products = _products(config, _Rows(carried.num_tokens, 0, segments, times), with_features=False)
    pairs = _attention(config, carried, self_products=self_products, cross_products=2)
    return sum(p.flops for p in products) + pairs


def tangent_recompute_flops(config: ModelConfig, moving: PackShape) -> int:
    """Logits that the tangent of attention takes again."""
    return _attention(config, moving, self_products=1, cross_products=1)


def step_flops(
    config: ModelConfig,
    objective: ObjectiveConfig,
    pack: PackShape,
    *,
    transition: Sequence[int],
    guided: Sequence[int] = (),
    null_text_length: int = 0,
    checkpointing: bool = False,
) -> StepFlops:
    """One micro-step.

    Args:
        transition: images with r < t, which need dF/dt.
        guided: images whose target is guided.
        null_text_length: tokens of the empty caption, for a guided target on captions.
        checkpointing: whether blocks are computed again in the backward.
    """
    with_features = objective.repa_weight > 0
    derivative = recompute = teacher = 0
    if objective.derivative == "paired":
        if transition:
            derivative = tangent_flops(config, pack.select(transition))
            recompute = tangent_recompute_flops(config, pack.select(transition))
    elif objective.derivative == "dde":
        derivative = copies_flops(config, pack.select(transition).doubled())
    elif objective.diffusion_share < 1.0:
        # Where no image has r < t the network is called on the first all the same.
        chosen = pack.select(transition or (0,))
        derivative = forward_flops(config, chosen) + tangent_flops(config, chosen)
    if objective.guided_target is not None:
        called = pack.select(guided or (0,))
        text = called.text_lengths
        if text is not None:
            text = (*text, *(null_text_length for _ in text))
        teacher = forward_flops(config, PackShape(2 * called.image_lengths, text))
    if checkpointing:
        recompute += recompute_flops(config, pack)
    return StepFlops(
        forward=forward_flops(config, pack, with_features=with_features),
        backward=backward_flops(config, pack, with_features=with_features),
        derivative=derivative,
        teacher=teacher,
        recompute=recompute,
    )


def flops_of(
    inputs: StepInputs, config: ModelConfig, objective: ObjectiveConfig, *, checkpointing: bool
) -> StepFlops:
    """Operations of one micro-step, from what it reads. Asks the device for nothing."""
    text, null_length = None, 0
    if isinstance(inputs.condition, TextCondition):
        text = inputs.condition.segments.lengths
    if isinstance(inputs.null_condition, TextCondition):
        null_length = inputs.null_condition.segments.max_length
    guided: Sequence[int] = ()
    if objective.guided_target is not None:
        guided = guided_segments(objective.guided_target, inputs.times)
    return step_flops(
        config,
        objective,
        PackShape(inputs.segments.lengths, text),
        transition=inputs.times.transition_indices,
        guided=guided,
        null_text_length=null_length,
        checkpointing=checkpointing,
    )
