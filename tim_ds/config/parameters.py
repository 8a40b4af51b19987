"""How many parameters a network has, from its configuration alone. Standard library only.

The sums follow the names and shapes of the authors' state dict, so that a recipe can be judged without torch.
"""

from __future__ import annotations

from tim_ds.model.config import ModelConfig

# Sines and cosines that enter the time embedder.
_TIME_FEATURES = 256


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _swiglu(inputs: int, hidden: int, outputs: int) -> int:
    """Two gated halves and the projection back."""
    return 2 * _linear(inputs, hidden) + _linear(hidden, outputs)


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the network, by the name that the part has in the state dict."""
    width, text = model.hidden_size, model.condition == "text"
    embedder = _linear(_TIME_FEATURES, width) + _linear(width, width)
    # A LayerNorm with weight and bias over one head, for q and for k.
    head_norms = 2 * 2 * model.head_dim if model.qk_norm else 0
    attention = _linear(width, 3 * width) + head_norms + _linear(width, width)
    if model.distance_aware:
        attention += 3 * width * width
    chunks = 6
    block = attention + _swiglu(width, model.mlp_hidden, width)
    if text:
        chunks = 9
        block += _linear(width, width) + _linear(width, 2 * width) + head_norms + _linear(width, width)
    block += _swiglu(width, model.adaln_width, chunks * width)

    counts = {"x_embedder": _linear(model.token_channels, width), "t_embedder": embedder}
    if model.separate_interval_embedder:
        counts["delta_embedder"] = embedder
    if text:
        text_dim = model.text_dim or 0
        counts["y_embedder"] = 2 * text_dim + _swiglu(text_dim, 4 * width, width)
    else:
        counts["y_embedder"] = ((model.num_classes or 0) + model.class_dropout) * width
    counts["blocks"] = model.depth * block
    if model.z_dim is not None:
        inner = model.projector_dim
        counts["projector"] = _linear(width, inner) + _linear(inner, inner) + _linear(inner, model.z_dim)
    counts["final_layer"] = _linear(width, model.token_channels) + _swiglu(width, width // 2, 2 * width)
    return counts
