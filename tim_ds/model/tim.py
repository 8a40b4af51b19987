"""The TiM network on packed tokens: F(x_t, t, r | condition). One class serves text and class conditions.

T image tokens, L text tokens, S segments, C token channels, D model width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tim_ds.errors import ShapeError
from tim_ds.model import ops
from tim_ds.model.blocks import FinalLayer, TransitionBlock
from tim_ds.model.config import ModelConfig
from tim_ds.model.context import BlockContext, CopiesStream, Pause
from tim_ds.model.embed import CaptionEmbedder, LabelEmbedder, Linear, PatchEmbedder, TimeEmbedder
from tim_ds.model.init import initialise
from tim_ds.model.tangent import Beside, Side, Tangent, TangentStream
from tim_ds.packed import (
    ClassCondition,
    Condition,
    Copies,
    Direction,
    NetworkOutput,
    Segments,
    TextCondition,
)


class TiM(nn.Module):
    """Transition network of the authors' architecture. State-dict names and shapes are the authors'.

    Args:
        config: the architecture.
        checkpoint_blocks: recompute every block in the backward instead of keeping its activations.
    """

    carries_copies = True

    def __init__(self, config: ModelConfig, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        width = config.hidden_size
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimeEmbedder(width)
        self.delta_embedder = TimeEmbedder(width) if config.separate_interval_embedder else None
        if config.condition == "text":
            assert config.text_dim is not None  # ModelConfig requires it
            self.y_embedder = CaptionEmbedder(config.text_dim, width)
        else:
            assert config.num_classes is not None  # ModelConfig requires it
            self.y_embedder = LabelEmbedder(config.num_classes + int(config.class_dropout), width)
        self.blocks = nn.ModuleList(TransitionBlock(config) for _ in range(config.depth))
        self.projector = None if config.z_dim is None else _projector(config, config.z_dim)
        self.final_layer = FinalLayer(config)
        if self.final_layer.linear.weight.device.type != "meta":
            # As every module of PyTorch, other values after each construction, the same after manual_seed.
            initialise(self, seed=int(torch.randint(1 << 62, (), device="cpu")))

    def forward(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
        direction: Direction | None = None,
        copies: Copies | None = None,
    ) -> NetworkOutput:
        """Evaluate F for every image of a pack, and its derivative along `direction`, or F at `copies`.

        The derivative is carried beside the value through every layer, exact to first order and without
        gradient, and costs about one forward of the images that move. Copies pass every layer behind the
        value, without gradient, and read its captions' keys and values. Both leave the value and its
        gradients as they are to the bit.

        Shapes:
            x_TC: [T, C], C = patch_size^2 * in_channels. t_S, r_S: [S]. condition: one entry an image.
        Units:
            t_S and r_S are c_noise(t) and c_noise(r), not multiplied by 1000.
        Returns:
            F_TC [T, C], float32 (float64 when x_TC is); the projector's features when `with_features`; dF_TC
            or copies_F_TC in the dtype of F, when there is a direction or there are copies.
        Raises:
            ShapeError: if the parts of the pack and what it carries do not fit together, both are carried, or
                features are asked of a network without projector.
        """
        self._check(x_TC, t_S, r_S, segments, condition, with_features)
        side_x: Side | None = None
        side_t: Side | None = None
        side_delta: Side | None = None
        again_S = None
        if direction is not None:
            self._check_direction(direction, segments, copies)
            side_x = Tangent(ops.plan_tangent(segments, direction.indices), direction.dx_TC)
            side_t = Tangent(ops.plan_segment_tangent(segments, direction.indices), direction.dt_S)
            side_delta = side_t.fork()
        elif copies is not None:
            self._check_copies(copies, segments)
            again_S = torch.tensor(_originals(copies)).to(x_TC.device, non_blocking=True)
            side_x, side_t = Beside(copies.x_TC), Beside(copies.t_S)
            side_delta = Beside(copies.t_S - r_S.index_select(0, again_S))
        interval_SD, side_interval = self._interval(t_S, r_S, side_t, side_delta, again_S)
        modulation_SD = self.t_embedder(t_S, side_t) + interval_SD
        label_SD = None
        text_LD, cross_plan = None, None
        if isinstance(condition, TextCondition):
            text_LD = ops.plain_norm(self.y_embedder(condition.states_LE))
            cross_plan = ops.plan_attention(
                _readers(segments, condition.images_per_caption), condition.segments
            )
        elif isinstance(condition, ClassCondition):
            label_SD = self.y_embedder(condition.labels_S)
            modulation_SD = modulation_SD + label_SD
        x_TD = ops.at_least_float32(self.x_embedder(x_TC, side_x))
        stream = copies_stream = None
        if side_x is not None and side_t is not None and side_interval is not None:
            c_SD = side_t.value + side_interval
            if direction is not None and isinstance(side_x, Tangent) and isinstance(side_t, Tangent):
                stream = self._stream(
                    direction.indices, segments, condition, side_x, side_t, c_SD, side_interval
                )
            elif copies is not None and again_S is not None:
                if label_SD is not None:
                    c_SD = c_SD + label_SD.detach().index_select(0, again_S)
                copies_stream = self._copies(copies, segments, condition, side_x.value, c_SD, side_interval)
        context = BlockContext(
            segments=segments,
            modulation_SD=modulation_SD,
            interval_SD=interval_SD,
            table=ops.rotary_table(segments, self.config.head_dim, self.config.rope_layout, x_TD.dtype),
            chunks=ops.plan_chunks(segments),
            self_plan=ops.plan_attention(segments, segments),
            text_LD=text_LD,
            cross_plan=cross_plan,
            stream=stream,
            copies=copies_stream,
        )
        features = None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_TD = checkpoint(
                    block,
                    x_TD,
                    context,
                    use_reentrant=False,
                    context_fn=partial(_recompute_contexts, context.pause),
                )
            else:
                x_TD = block(x_TD, context)
            if with_features and number == self.config.encoder_depth:
                features = self.projector(x_TD)  # type: ignore[misc]  # _check refuses features without a projector
        F_TC = self.final_layer(x_TD, context)
        return NetworkOutput(
            F_TC,
            features,
            None if stream is None else stream.value,
            None if copies_stream is None else copies_stream.value,
        )

    def _interval(
        self,
        t_S: Tensor,
        r_S: Tensor,
        side_t: Side | None,
        side_delta: Side | None,
        again_S: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The interval embedding of `time_condition`, [S, D], and what belongs to it beside.

        r stands still: its embedding has no tangent, and is that of the image for every copy (`again_S`).
        """
        embed_t = self.t_embedder
        embed_d = self.t_embedder if self.delta_embedder is None else self.delta_embedder
        t, r, delta = (t_S, side_t), (r_S, None), (t_S - r_S, side_delta)
        terms = {
            "t-r": [(embed_d, delta)],
            "r": [(embed_d, r)],
            "t,r": [(embed_t, t), (embed_d, r)],
            "t,t-r": [(embed_t, t), (embed_d, delta)],
            "r,t-r": [(embed_t, r), (embed_d, delta)],
            "t,r,t-r": [(embed_t, t), (embed_t, r), (embed_d, delta)],
        }[self.config.time_condition]
        parts: list[Tensor] = []
        beside: list[Tensor] = []
        for embed, (time_S, moving) in terms:
            own = None if moving is None else moving.fork()
            parts.append(embed(time_S, own))
            if own is not None:
                beside.append(own.value)
            elif again_S is not None:
                beside.append(parts[-1].detach().index_select(0, again_S))
        total_SD = reduce(torch.add, parts)
        if side_t is None:
            return total_SD, None
        still = parts[0].new_zeros(side_t.value.shape[0], parts[0].shape[1])
        return total_SD, reduce(torch.add, beside, still)

    def _stream(
        self,
        indices: tuple[int, ...],
        segments: Segments,
        condition: Condition,
        x: Tangent,
        t: Tangent,
        modulation_SD: Tensor,
        interval_SD: Tensor,
    ) -> TangentStream:
        """What the blocks need to carry the tangents of the images `indices`: those of embedded tokens, times
        and intervals, and where these images and their captions lie in the pack."""
        residual_TD = ops.at_least_float32(x.value)
        cross_plan = None
        if isinstance(condition, TextCondition):
            captions = _captions_of(indices, condition)
            cross_plan = ops.plan_attention_tangent(segments, condition.segments, indices, captions)
        return TangentStream(
            plan=x.plan,
            value=residual_TD,
            segment_plan=t.plan,
            residual_TD=residual_TD,
            modulation_SD=modulation_SD,
            interval_SD=interval_SD,
            self_plan=ops.plan_attention_tangent(segments, segments, indices, indices),
            cross_plan=cross_plan,
        )

    def _copies(
        self,
        copies: Copies,
        segments: Segments,
        condition: Condition,
        x_TD: Tensor,
        modulation_SD: Tensor,
        interval_SD: Tensor,
    ) -> CopiesStream:
        """The copies as a pack of their own. All copies of an image read its caption as one segment."""
        pack = segments.select(_originals(copies))
        x_TD = ops.at_least_float32(x_TD)
        text_index, cross_plan = None, None
        if isinstance(condition, TextCondition):
            captions = _captions_of(copies.indices, condition)
            text_index = condition.segments.token_index(captions)
            cross_plan = ops.plan_attention(_readers(pack, copies.count), condition.segments.select(captions))
        context = BlockContext(
            segments=pack,
            modulation_SD=modulation_SD,
            interval_SD=interval_SD,
            table=ops.rotary_table(pack, self.config.head_dim, self.config.rope_layout, x_TD.dtype),
            chunks=ops.plan_chunks(pack),
            self_plan=ops.plan_attention(pack, pack),
            text_LD=None,
            cross_plan=cross_plan,
        )
        return CopiesStream(x_TD, context, text_index)

    def _check(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        with_features: bool,
    ) -> None:
        expected = (segments.num_tokens, self.config.token_channels)
        if tuple(x_TC.shape) != expected:
            raise ShapeError(
                f"x_TC: expected {list(expected)} (tokens, channels), received {list(x_TC.shape)}"
            )
        for name, value in (("t_S", t_S), ("r_S", r_S)):
            if tuple(value.shape) != (segments.num_segments,):
                raise ShapeError(
                    f"{name}: expected [{segments.num_segments}], one time an image, "
                    f"received {list(value.shape)}"
                )
        wanted = TextCondition if self.config.condition == "text" else ClassCondition
        if not isinstance(condition, wanted):
            raise ShapeError(
                f"condition: this network takes a {wanted.__name__}, received {type(condition).__name__}"
            )
        if condition.num_segments != segments.num_segments:
            raise ShapeError(
                f"condition: expected one for each of {segments.num_segments} images, "
                f"received {condition.num_segments}"
            )
        if isinstance(condition, TextCondition) and condition.states_LE.shape[1] != self.config.text_dim:
            raise ShapeError(
                f"text states: expected width {self.config.text_dim}, received {condition.states_LE.shape[1]}"
            )
        if with_features and self.projector is None:
            raise ShapeError("features were asked of a network without projector (model.z_dim is null)")

    def _check_direction(self, direction: Direction, segments: Segments, copies: Copies | None) -> None:
        if copies is not None:
            raise ShapeError("direction and copies: a forward carries one of them, received both")
        indices = direction.indices
        _check_indices("direction", indices, segments)
        expected = (sum(segments.lengths[i] for i in indices), self.config.token_channels)
        if tuple(direction.dx_TC.shape) != expected or tuple(direction.dt_S.shape) != (len(indices),):
            raise ShapeError(
                f"direction: expected dx_TC {list(expected)} and dt_S [{len(indices)}], received "
                f"{list(direction.dx_TC.shape)} and {list(direction.dt_S.shape)}"
            )

    def _check_copies(self, copies: Copies, segments: Segments) -> None:
        _check_indices("copies", copies.indices, segments)
        tokens = copies.count * sum(segments.lengths[i] for i in copies.indices)
        expected, times = (tokens, self.config.token_channels), (copies.count * len(copies.indices),)
        if tuple(copies.x_TC.shape) != expected or tuple(copies.t_S.shape) != times:
            raise ShapeError(
                f"copies: expected x_TC {list(expected)} and t_S {list(times)}, received "
                f"{list(copies.x_TC.shape)} and {list(copies.t_S.shape)}"
            )


def _check_indices(name: str, indices: tuple[int, ...], segments: Segments) -> None:
    if (
        not indices
        or len(set(indices)) != len(indices)
        or not set(indices) <= set(range(segments.num_segments))
    ):
        raise ShapeError(
            f"{name}: expected different segments among the {segments.num_segments} of the pack, at "
            f"least one, received {list(indices)}"
        )


def _recompute_contexts(pause: Pause) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first run and of its recomputation."""
    return nullcontext(), pause.held()


def _readers(segments: Segments, count: int) -> Segments:
    """The image tokens that read each caption, as one segment: `count` neighbours share keys and values."""
    if count == 1:
        return segments
    lengths = segments.lengths
    together = [sum(lengths[i : i + count]) for i in range(0, len(lengths), count)]
    return Segments.from_lengths(together).to(segments.cu_seqlens.device, non_blocking=True)


def _captions_of(indices: tuple[int, ...], condition: TextCondition) -> list[int]:
    return [i // condition.images_per_caption for i in indices]


def _originals(copies: Copies) -> list[int]:
    """The image of every copy."""
    return [i for i in copies.indices for _ in range(copies.count)]


def _projector(config: ModelConfig, z_dim: int) -> nn.Sequential:
    """REPA projector on the raw output of block `encoder_depth`: [T, D] -> [T, z_dim]."""
    width, hidden = config.hidden_size, config.projector_dim
    return nn.Sequential(
        Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, z_dim)
    )
