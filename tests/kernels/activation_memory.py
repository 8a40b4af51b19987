"""What a block keeps for its backward on the kernels, op by op.

TRITON_INTERPRET=1 python -m tests.kernels.activation_memory

Every storage counts whole and once, for the op that keeps it first, whatever view of it is kept. Two packs of
the same images at different lengths are run and subtracted, so that what does not grow with the tokens
(weights, modulation of an image) drops out. Attention runs on the CPU's kernel, which keeps what the
libraries on a GPU keep: q, k, v, its result and a logarithm of a sum for each head and query.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import meta_network
from tim_ds.model.tim import TiM
from tim_ds.packed import Segments, TextCondition
from tim_kernels import use_path

XL = ModelConfig(
    condition="text", in_channels=32, hidden_size=1152, depth=1, num_heads=16, encoder_depth=1, text_dim=64,
    z_dim=None,
)  # fmt: skip
"""One block at the widths of the 865M network."""
IMAGE_TOKENS_PER_TEXT_TOKEN = 4
"""A picture of 1024 x 1024 at stride 32 has 1024 tokens, its caption up to 256."""
OPS = (
    "residual_modulated_norm",
    "gated_residual",
    "qkv_norm_rope",
    "q_norm_rope",
    "kv_norm",
    "attention",
    "swiglu",
)


class _Kept:
    """Storages that autograd keeps while a block runs, by the op that keeps them first."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.counts = Counter[str]()
        self.labels: list[str] = []
        self._seen: dict[int, Tensor] = {p.untyped_storage().data_ptr(): p for p in parameters}

    def pack(self, x: Tensor) -> Tensor:
        if self.labels and (address := x.untyped_storage().data_ptr()) not in self._seen:
            # Holding the tensor keeps its address from being given out again.
            self._seen[address] = x
            self.counts[self.labels[-1]] += x.untyped_storage().nbytes()
        return x

    def labelled(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._under(label):
                return function(*args, **kwargs)

        return call

    def watch(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: Any) -> None:
            self.labels.append(name)

        def leave(*_: Any) -> None:
            self.labels.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    @contextmanager
    def _under(self, label: str) -> Iterator[None]:
        """Within the block; what other parts of the network keep is not counted."""
        if not self.labels:
            yield
            return
        self.labels.append(label)
        try:
            yield
        finally:
            self.labels.pop()


def kept_by_a_block(network: TiM, tokens: int) -> Counter[str]:
    """Bytes by op, for one image of `tokens` tokens and its caption."""
    kept = _Kept(network.parameters())
    block = network.blocks[0]
    handles = kept.watch("", block)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("adaLN"):
            handles += kept.watch(name, module)
    segments = Segments.from_grids([(tokens // 4, 4)])
    text = Segments.from_lengths([tokens // IMAGE_TOKENS_PER_TEXT_TOKEN])
    condition = TextCondition(torch.zeros(text.num_tokens, network.config.text_dim or 0), text)
    x, t = torch.zeros(tokens, network.config.token_channels), torch.tensor([0.7])
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        for name in OPS:
            stack.enter_context(mock.patch.object(ops, name, kept.labelled(name, getattr(ops, name))))
        stack.enter_context(use_path("triton"))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x))
        network(x, t, 0.2 * t, segments, condition)
    return kept.counts


def bytes_per_unit(config: ModelConfig = XL, tokens: tuple[int, int] = (8, 16)) -> dict[str, float]:
    """Bytes per column of the model width and image token, by op; what is 0 is left out.

    bfloat16 weights and products, float32 residual stream.
    """
    network = meta_network(config).to(torch.bfloat16).to_empty(device="cpu")
    few, many = (kept_by_a_block(network, n) for n in tokens)
    units = (tokens[1] - tokens[0]) * config.hidden_size
    return {name: (many[name] - few[name]) / units for name in many if many[name] != few[name]}


def main() -> int:
    found = bytes_per_unit()
    print("| kept by | bytes |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")
    print(f"| **in total** | **{sum(found.values()):.2f}** |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
