"""What a case of the benchmark is: an op in one shape family, its inputs and who competes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tim_kernels.chunks import ChunkPlan

Inputs = dict[str, Tensor]
Function = Callable[[Inputs, Any], tuple[Tensor, ...]]
"""Of the inputs and the case's plan."""

MIXES: dict[str, tuple[int, ...]] = {
    "small": (64,),
    "uniform": (1024,),
    "mixed": (256, 1024, 640, 2304, 96, 4096),
}
"""Segment lengths, repeated: pictures of 256 px, of 1024 px, and of native sizes."""


NUM_POSITIONS = 64
"""Of a rotary table: the longer side of a picture of 2048 px."""
CAPTION = 128
"""Tokens of every caption."""


class NotHere(Exception):
    """A library that is not installed here, or not for these inputs."""


def chunk_plan(lengths: Sequence[int], device: torch.device) -> ChunkPlan:
    return ChunkPlan.from_lengths(lengths, device=device)


def lengths_of(mix: str, tokens: int) -> tuple[int, ...]:
    """Segments of the mix until there are `tokens` tokens; the last one is cut to fit."""
    lengths: list[int] = []
    for n in itertools.cycle(MIXES[mix]):
        rest = tokens - sum(lengths)
        if rest <= n:
            return (*lengths, rest)
        lengths.append(n)
    raise AssertionError("unreachable: a cycle has no end")


@dataclass(frozen=True)
class Spec:
    """One input: its columns (None: a vector), dtype, leading axis, and whether it takes a gradient.

    Axes: T, S, L (tokens of captions, one a segment), or a length of its own. Integers are positions.
    """

    columns: int | None
    dtype: torch.dtype = torch.float32
    axis: str | int = "T"
    gradient: bool = True


@dataclass(frozen=True)
class Case:
    """An op in one shape family.

    The byte model counts every tensor with a row a token once for each kernel that has to read or write it;
    modulation and partial sums (a few percent) are left out.
    """

    op: str
    label: str
    specs: dict[str, Spec]
    ours: Function
    twin: Function
    outputs_axis: str
    forward_bytes_per_token: int
    backward_bytes_per_token: int | None
    """None: a tangent, which has no backward."""
    float32_tolerance: float = 1e-4
    """Largest deviation of a float32 result from the float64 twin, over its largest magnitude: sums of up to
    some thousand terms, which an implementation may take in any order."""
    libraries: dict[str, Function] = field(default_factory=dict)
    """Other implementations of the same function, where they are installed."""
    yardsticks: dict[str, Function] = field(default_factory=dict)
    """Library kernels that do a part of the work: no rival, but a measure."""
    plan: Callable[[Sequence[int], torch.device], Any] = chunk_plan
    prepare: Callable[[Inputs, Any], Inputs] | None = None
    """Inputs that follow from others, to replace the random ones of their names."""
    flops: Callable[[Sequence[int]], int] | None = None
    """Of the forward, where arithmetic bounds the op and not memory."""
    backward_per_forward: float = 0.0
    """Arithmetic of the backward, in units of the forward's."""

    @property
    def name(self) -> str:
        return f"{self.op}, {self.label}"

    def inputs(
        self, lengths: tuple[int, ...], device: torch.device, seed: int = 0, *, prepared: bool = True
    ) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        size = {"T": sum(lengths), "S": len(lengths), "L": CAPTION * len(lengths)}
        made = {}
        for name, spec in self.specs.items():
            rows = size[spec.axis] if isinstance(spec.axis, str) else spec.axis
            shape = (rows,) if spec.columns is None else (rows, spec.columns)
            if spec.dtype.is_floating_point:
                x = torch.randn(shape, generator=generator, device=device)
            else:
                x = torch.randint(NUM_POSITIONS, shape, generator=generator, device=device)
            made[name] = x.to(spec.dtype).requires_grad_(spec.gradient)
        if self.prepare is not None and prepared:
            made |= self.prepare(made, self.plan(lengths, device))
        return made
