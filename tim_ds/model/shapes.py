"""Whether the parts of a pack fit together, and with the network: asked once, before anything is computed."""

from __future__ import annotations

from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.model.config import ModelConfig
from tim_ds.packed import ClassCondition, Condition, Copies, Direction, Segments, TextCondition


def check_pack(
    config: ModelConfig, x_TC: Tensor, t_S: Tensor, r_S: Tensor, segments: Segments, condition: Condition
) -> None:
    """Raise ShapeError unless tokens, times and conditions fit `segments` and the network."""
    expected = (segments.num_tokens, config.token_channels)
    if tuple(x_TC.shape) != expected:
        raise ShapeError(f"x_TC: expected {list(expected)} (tokens, channels), received {list(x_TC.shape)}")
    for name, value in (("t_S", t_S), ("r_S", r_S)):
        if tuple(value.shape) != (segments.num_segments,):
            raise ShapeError(
                f"{name}: expected [{segments.num_segments}], one time an image, received {list(value.shape)}"
            )
    wanted = TextCondition if config.condition == "text" else ClassCondition
    if not isinstance(condition, wanted):
        raise ShapeError(
            f"condition: this network takes a {wanted.__name__}, received {type(condition).__name__}"
        )
    if condition.num_segments != segments.num_segments:
        raise ShapeError(
            f"condition: expected one for each of {segments.num_segments} images, "
            f"received {condition.num_segments}"
        )
    if isinstance(condition, TextCondition) and condition.states_LE.shape[1] != config.text_dim:
        raise ShapeError(
            f"text states: expected width {config.text_dim}, received {condition.states_LE.shape[1]}"
        )


def check_direction(config: ModelConfig, direction: Direction, segments: Segments) -> None:
    """Raise ShapeError unless the direction is one of images of the pack."""
    indices = direction.indices
    _check_indices("direction", indices, segments)
    expected = (sum(segments.lengths[i] for i in indices), config.token_channels)
    if tuple(direction.dx_TC.shape) != expected or tuple(direction.dt_S.shape) != (len(indices),):
        raise ShapeError(
            f"direction: expected dx_TC {list(expected)} and dt_S [{len(indices)}], received "
            f"{list(direction.dx_TC.shape)} and {list(direction.dt_S.shape)}"
        )


def check_copies(config: ModelConfig, copies: Copies, segments: Segments) -> None:
    """Raise ShapeError unless the copies are of images of the pack."""
    _check_indices("copies", copies.indices, segments)
    tokens = copies.count * sum(segments.lengths[i] for i in copies.indices)
    expected, times = (tokens, config.token_channels), (copies.count * len(copies.indices),)
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
