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
from tim_ds.model.carried import Carried, carry
from tim_ds.model.config import ModelConfig
from tim_ds.model.context import BlockContext, CopiesStream, Pause
from tim_ds.model.embed import CaptionEmbedder, LabelEmbedder, Linear, PatchEmbedder, TimeEmbedder
from tim_ds.model.init import initialise
from tim_ds.model.shapes import check_pack
from tim_ds.model.tangent import TangentStream
from tim_ds.packed import ClassCondition, Condition, Copies, Direction, NetworkOutput, Segments, TextCondition


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
        Dtypes:
            t_S, r_S and the times of what is carried: any, whatever the network's. Phases and t - r are made
            in it; float32 knows VP's 999 t to 3e-5.
        Returns:
            F_TC [T, C], float32 (float64 of a float64 network); the projector's features when
            `with_features`; dF_TC or copies_F_TC in the dtype of F, when there is a direction or there are
            copies.
        Raises:
            ShapeError: if the parts of the pack and what it carries do not fit together, both are carried, or
                features are asked of a network without projector.
        """
        check_pack(self.config, x_TC, t_S, r_S, segments, condition)
        if with_features and self.projector is None:
            raise ShapeError("features were asked of a network without projector (model.z_dim is null)")
        carried = carry(self.config, segments, r_S, direction, copies)
        # Before t is embedded: the interval may begin from the same t.
        interval_SD, beside_interval = self._interval(t_S, r_S, carried)
        modulation_SD = self.t_embedder(t_S, None if carried is None else carried.t) + interval_SD
        text_LD, label_SD, cross_plan = None, None, None
        if isinstance(condition, TextCondition):
            text_LD = ops.plain_norm(self.y_embedder(condition.states_LE))
            readers = segments.joined(condition.images_per_caption)
            cross_plan = ops.plan_attention(readers, condition.segments)
        elif isinstance(condition, ClassCondition):
            label_SD = self.y_embedder(condition.labels_S)
            modulation_SD = modulation_SD + label_SD
        x_TD = ops.at_least_float32(self.x_embedder(x_TC, None if carried is None else carried.x))
        beside = None
        if carried is not None:
            beside = carried.stream(self.config, condition, beside_interval, label_SD)
        context = BlockContext.of(
            self.config,
            segments,
            x_TD.dtype,
            modulation_SD,
            interval_SD,
            text_LD=text_LD,
            cross_plan=cross_plan,
            beside=beside,
        )
        x_TD, features_TZ = self._blocks(x_TD, context, with_features)
        # What is carried holds what belongs to F after the last module.
        F_TC = self.final_layer(x_TD, context)
        return NetworkOutput(
            F_TC,
            features_TZ,
            beside.value if isinstance(beside, TangentStream) else None,
            beside.value if isinstance(beside, CopiesStream) else None,
        )

    def _blocks(
        self, x_TD: Tensor, context: BlockContext, with_features: bool
    ) -> tuple[Tensor, Tensor | None]:
        features_TZ = None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                contexts = partial(_recompute_contexts, context.pause)
                x_TD = checkpoint(block, x_TD, context, use_reentrant=False, context_fn=contexts)
            else:
                x_TD = block(x_TD, context)
            if with_features and self.projector is not None and number == self.config.encoder_depth:
                features_TZ = self.projector(x_TD)
        return x_TD, features_TZ

    def _interval(self, t_S: Tensor, r_S: Tensor, carried: Carried | None) -> tuple[Tensor, list[Tensor]]:
        """The interval embedding of `time_condition`, [S, D], and the terms of what is carried beside it."""
        embed_t = self.t_embedder
        embed_d = self.t_embedder if self.delta_embedder is None else self.delta_embedder
        side_t, side_delta = (None, None) if carried is None else (carried.t, carried.delta)
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
            side = None if moving is None else moving.fork()
            parts.append(embed(time_S, side))
            if side is not None:
                beside.append(side.value)
            elif carried is not None:
                beside += carried.of_still(parts[-1])
        return reduce(torch.add, parts), beside


def _recompute_contexts(pause: Pause) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first run and of its recomputation."""
    return nullcontext(), pause.held()


def _projector(config: ModelConfig, z_dim: int) -> nn.Sequential:
    """REPA projector on the raw output of block `encoder_depth`: [T, D] -> [T, z_dim]."""
    width, hidden = config.hidden_size, config.projector_dim
    return nn.Sequential(
        Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, z_dim)
    )
