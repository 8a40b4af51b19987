"""The TiM network on packed tokens: F(x_t, t, r | condition). One class serves text and class conditions.

T image tokens, L text tokens, S segments, C token channels, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tim_ds.errors import ShapeError
from tim_ds.model import ops
from tim_ds.model.blocks import BlockContext, FinalLayer, TransitionBlock
from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import CaptionEmbedder, LabelEmbedder, Linear, PatchEmbedder, TimeEmbedder
from tim_ds.model.init import initialise
from tim_ds.model.rope import rotary_table
from tim_ds.packed import ClassCondition, Condition, NetworkOutput, Segments, TextCondition


class TiM(nn.Module):
    """Transition network (reference_spec 1). State-dict names and shapes are the authors'.

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
            initialise(self)

    def forward(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        """Evaluate F for every image of a pack.

        Shapes:
            x_TC: [T, C], C = patch_size^2 * in_channels. t_S, r_S: [S]. condition: one entry an image.
        Units:
            t_S and r_S are c_noise(t) and c_noise(r), not multiplied by 1000.
        Returns:
            F_TC [T, C], float32 (float64 when x_TC is), and the projector's features when `with_features`.
        Raises:
            ShapeError: if the parts of the pack do not fit together, or features are asked of a network
                without projector.
        """
        self._check(x_TC, t_S, r_S, segments, condition, with_features)
        interval_SD = self._interval(t_S, r_S)
        modulation_SD = self.t_embedder(t_S) + interval_SD
        text_LD, cross_plan = None, None
        if isinstance(condition, TextCondition):
            text_LD = ops.plain_norm(self.y_embedder(condition.states_LE))
            cross_plan = ops.plan_attention(segments, condition.segments)
        else:
            modulation_SD = modulation_SD + self.y_embedder(condition.labels_S)
        x_TD = ops.at_least_float32(self.x_embedder(x_TC))
        context = BlockContext(
            segments=segments,
            modulation_SD=modulation_SD,
            interval_SD=interval_SD,
            table=rotary_table(segments, self.config.head_dim, self.config.rope_layout, x_TD.dtype),
            chunks=ops.plan_chunks(segments),
            self_plan=ops.plan_attention(segments, segments),
            text_LD=text_LD,
            cross_plan=cross_plan,
        )
        features = None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, context, use_reentrant=False)
            else:
                x_TD = block(x_TD, context)
            if with_features and number == self.config.encoder_depth:
                features = self.projector(x_TD)  # type: ignore[misc]  # _check refuses features without a projector
        return NetworkOutput(self.final_layer(x_TD, modulation_SD, context.chunks), features)

    def _interval(self, t_S: Tensor, r_S: Tensor) -> Tensor:
        """The interval embedding of `time_condition` (reference_spec 1.4): [S, D]."""
        embed_t = self.t_embedder
        embed_d = self.t_embedder if self.delta_embedder is None else self.delta_embedder
        match self.config.time_condition:
            case "t-r":
                return embed_d(t_S - r_S)
            case "r":
                return embed_d(r_S)
            case "t,r":
                return embed_t(t_S) + embed_d(r_S)
            case "t,t-r":
                return embed_t(t_S) + embed_d(t_S - r_S)
            case "r,t-r":
                return embed_t(r_S) + embed_d(t_S - r_S)
            case "t,r,t-r":
                return embed_t(t_S) + embed_t(r_S) + embed_d(t_S - r_S)

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


def _projector(config: ModelConfig, z_dim: int) -> nn.Sequential:
    """REPA projector on the raw output of block `encoder_depth`: [T, D] -> [T, z_dim]."""
    width, hidden = config.hidden_size, config.projector_dim
    return nn.Sequential(
        Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, z_dim)
    )
