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
from tim_ds.model.blocks import BlockContext, FinalLayer, TransitionBlock
from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import CaptionEmbedder, LabelEmbedder, Linear, PatchEmbedder, TimeEmbedder
from tim_ds.model.init import initialise
from tim_ds.model.tangent import Side, TangentStream
from tim_ds.packed import ClassCondition, Condition, Direction, NetworkOutput, Segments, TextCondition


class TiM(nn.Module):
    """Transition network of the authors' architecture. State-dict names and shapes are the authors'.

    Args:
        config: the architecture.
        checkpoint_blocks: recompute every block in the backward instead of keeping its activations.
    """

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
    ) -> NetworkOutput:
        """Evaluate F for every image of a pack, and its derivative along `direction`.

        The derivative is carried beside the value through every layer, exact to first order and without
        gradient. It leaves the value and its gradients as they are to the bit, and costs about one forward of
        the images that move.

        Shapes:
            x_TC: [T, C], C = patch_size^2 * in_channels. t_S, r_S: [S]. condition: one entry an image.
        Units:
            t_S and r_S are c_noise(t) and c_noise(r), not multiplied by 1000.
        Returns:
            F_TC [T, C], float32 (float64 when x_TC is); the projector's features when `with_features`; dF_TC
            in the dtype of F, when there is a direction.
        Raises:
            ShapeError: if the parts of the pack and the direction do not fit together, or features are asked
                of a network without projector.
        """
        self._check(x_TC, t_S, r_S, segments, condition, with_features)
        side_x = side_t = side_interval = None
        if direction is not None:
            self._check_direction(direction, segments)
            side_x = Side(ops.plan_tangent(segments, direction.indices), direction.dx_TC)
            side_t = Side(ops.plan_segment_tangent(segments, direction.indices), direction.dt_S)
            side_interval = side_t.fork()
        interval_SD = self._interval(t_S, r_S, side_interval)
        modulation_SD = self.t_embedder(t_S, side_t) + interval_SD
        text_LD, cross_plan = None, None
        if isinstance(condition, TextCondition):
            text_LD = ops.plain_norm(self.y_embedder(condition.states_LE))
            cross_plan = ops.plan_attention(_readers(segments, condition), condition.segments)
        else:
            modulation_SD = modulation_SD + self.y_embedder(condition.labels_S)
        x_TD = ops.at_least_float32(self.x_embedder(x_TC, side_x))
        stream = None
        if direction is not None and side_x is not None and side_t is not None and side_interval is not None:
            stream = self._stream(direction.indices, segments, condition, side_x, side_t, side_interval)
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
        )
        features = None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_TD = checkpoint(
                    block, x_TD, context, use_reentrant=False, context_fn=partial(_recompute_contexts, stream)
                )
            else:
                x_TD = block(x_TD, context)
            if with_features and number == self.config.encoder_depth:
                features = self.projector(x_TD)  # type: ignore[misc]  # _check refuses features without a projector
        F_TC = self.final_layer(x_TD, context)
        return NetworkOutput(F_TC, features, None if stream is None else stream.value)

    def _interval(self, t_S: Tensor, r_S: Tensor, side: Side | None) -> Tensor:
        """The interval embedding of `time_condition`: [S, D].

        `side` enters with the tangent of t; r stands still.
        """
        embed_t = self.t_embedder
        embed_d = self.t_embedder if self.delta_embedder is None else self.delta_embedder
        t, r, delta = (t_S, side), (r_S, None), (t_S - r_S, side)
        terms = {
            "t-r": [(embed_d, delta)],
            "r": [(embed_d, r)],
            "t,r": [(embed_t, t), (embed_d, r)],
            "t,t-r": [(embed_t, t), (embed_d, delta)],
            "r,t-r": [(embed_t, r), (embed_d, delta)],
            "t,r,t-r": [(embed_t, t), (embed_t, r), (embed_d, delta)],
        }[self.config.time_condition]
        parts: list[Tensor] = []
        tangents: list[Tensor] = []
        for embed, (time_S, moving) in terms:
            own = None if moving is None else moving.fork()
            parts.append(embed(time_S, own))
            if own is not None:
                tangents.append(own.value)
        if side is not None:
            still = parts[0].new_zeros(side.value.shape[0], parts[0].shape[1])
            side.value = reduce(torch.add, tangents, still)
        return reduce(torch.add, parts)

    def _stream(
        self,
        indices: tuple[int, ...],
        segments: Segments,
        condition: Condition,
        x: Side,
        t: Side,
        interval: Side,
    ) -> TangentStream:
        """What the blocks need to carry the tangents of the images `indices`: those of embedded tokens, times
        and intervals, and where these images and their captions lie in the pack."""
        residual_TD = ops.at_least_float32(x.value)
        cross_plan = None
        if isinstance(condition, TextCondition):
            captions = [i // condition.images_per_caption for i in indices]
            cross_plan = ops.plan_attention_tangent(segments, condition.segments, indices, captions)
        return TangentStream(
            plan=x.plan,
            value=residual_TD,
            segment_plan=t.plan,
            residual_TD=residual_TD,
            modulation_SD=t.value + interval.value,
            interval_SD=interval.value,
            self_plan=ops.plan_attention_tangent(segments, segments, indices, indices),
            cross_plan=cross_plan,
        )

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

    def _check_direction(self, direction: Direction, segments: Segments) -> None:
        indices = direction.indices
        if (
            not indices
            or len(set(indices)) != len(indices)
            or not set(indices) <= set(range(segments.num_segments))
        ):
            raise ShapeError(
                f"direction: expected different segments among the {segments.num_segments} of the pack, at "
                f"least one, received {list(indices)}"
            )
        expected = (sum(segments.lengths[i] for i in indices), self.config.token_channels)
        if tuple(direction.dx_TC.shape) != expected or tuple(direction.dt_S.shape) != (len(indices),):
            raise ShapeError(
                f"direction: expected dx_TC {list(expected)} and dt_S [{len(indices)}], received "
                f"{list(direction.dx_TC.shape)} and {list(direction.dt_S.shape)}"
            )


def _recompute_contexts(
    stream: TangentStream | None,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first run and of its recomputation."""
    return nullcontext(), nullcontext() if stream is None else stream.held()


def _readers(segments: Segments, condition: TextCondition) -> Segments:
    """The image tokens that read each caption, as one segment: neighbours share keys and values."""
    count = condition.images_per_caption
    if count == 1:
        return segments
    lengths = segments.lengths
    together = [sum(lengths[i : i + count]) for i in range(0, len(lengths), count)]
    return Segments.from_lengths(together).to(segments.cu_seqlens.device, non_blocking=True)


def _projector(config: ModelConfig, z_dim: int) -> nn.Sequential:
    """REPA projector on the raw output of block `encoder_depth`: [T, D] -> [T, z_dim]."""
    width, hidden = config.hidden_size, config.projector_dim
    return nn.Sequential(
        Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, z_dim)
    )
