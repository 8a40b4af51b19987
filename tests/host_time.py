"""What the host does to queue one micro-step: `python -m tests.host_time launch/recipes/t2i_xl_native.yaml`.

A device is busy only while Python queues faster than it computes. Needs no GPU: tensors of the host stand
for the device's, so narrow that their arithmetic is little, in a network of the recipe's depth and with the
recipe's images a pack; kernels of Triton go through its launcher up to the launch
(`tests/kernels/dry_run.py`), attention is a stand-in. So it counts and times what does not depend on widths:
Python, checks, autograd, dispatch, plans. It leaves out what the driver takes for each launch, and DeepSpeed,
whose hooks depend on stage and ranks. Times are of this process's CPU, the best of several.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver

from data_pipeline.batch import Latents, PackedBatch
from data_pipeline.command import command
from tests.kernels.dry_run import Driver
from tim_ds.config.load import load_recipe
from tim_ds.config.recipe import Recipe
from tim_ds.errors import ConfigError
from tim_ds.model.tim import TiM
from tim_ds.trainer.inputs import Prepare, StepInputs
from tim_ds.trainer.step import TransitionStep
from tim_kernels import dispatch, use_path
from tim_kernels.shipped import variants
from tim_kernels.varlen_attention import op as attention_op
from tim_kernels.varlen_attention.plan import AttentionPlan

HEADS, HEAD_DIM, TEXT_DIM, CHANNELS = 2, 8, 8, 8
STRIDE_PX = 32
"""Of the XL recipes' autoencoder."""
TOKENS_OF_AN_IMAGE = 2
WORDS = 3
NO_LAUNCH = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "promote_types", "_unsafe_view")


@dataclass
class Seen:
    """What one micro-step queued."""

    kernels: Counter[str]
    """Launches of our kernels, by name."""
    operations: Counter[str]
    """torch's operations that compute: a launch each on a device, a copy or a product included. The few dozen
    that make plans on the host are among them."""
    others: int = 0
    """Views and empty tensors."""

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + sum(self.operations.values())


@contextmanager
def stand_ins(kernels: Counter[str], *, prepare: bool = True) -> Iterator[None]:
    """Within the block kernels are counted and not launched, and attention is an operation that does nothing.

    Args:
        prepare: take them through Triton's launcher for an sm_90, which compiles each once.
    """
    driver.set_active(Driver())  # type: ignore[arg-type]  # what a launch without a device asks
    chosen, wrapped = attention_op._choose, {id(v.kernel): v.kernel for v in variants()}.values()
    interpreting, runs = dispatch.is_interpreting, [kernel.run for kernel in wrapped]

    def counted(kernel: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernels[kernel.fn.__name__] += 1
            return run(*args, grid=grid, warmup=True, **options) if prepare else None

        return launch

    try:
        # CPU tensors stand for CUDA tensors.
        dispatch.is_interpreting = lambda: True  # type: ignore[assignment]  # it is cached, this is not
        attention_op._choose = lambda *_: ("stand_in", "stand-in")
        attention_op._loaded["stand_in"] = _attend
        for kernel, run in zip(wrapped, runs, strict=True):
            kernel.run = counted(kernel, run)
        with use_path("triton"):
            yield
    finally:
        dispatch.is_interpreting, attention_op._choose = interpreting, chosen
        del attention_op._loaded["stand_in"]
        for kernel, run in zip(wrapped, runs, strict=True):
            kernel.run = run


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    return _Attention.apply(q, k, v)  # type: ignore[return-value]  # torch types it as one tensor


class _Counting(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if func.is_view or name in NO_LAUNCH:
            self._seen.others += 1
        else:
            self._seen.operations[name] += 1
        return result


class MicroStep:
    """One micro-step of a recipe, and how to run its parts."""

    def __init__(self, recipe: Recipe, side_px: int, *, depth: int | None = None) -> None:
        images = recipe.data.tokens_per_pack // (side_px // STRIDE_PX) ** 2
        model = replace(
            recipe.model, hidden_size=HEADS * HEAD_DIM, num_heads=HEADS, text_dim=TEXT_DIM,
            in_channels=CHANNELS, depth=depth or recipe.model.depth, adaln_hidden=HEAD_DIM,
        )  # fmt: skip
        network = TiM(model, checkpoint_blocks=recipe.train.activation_checkpointing)
        self.step = TransitionStep(network, recipe.objective, latent_channels=CHANNELS, world_size=1)
        self.inputs = _inputs(recipe, images)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision != "fp32")

    def forward(self) -> Tensor:
        with self.autocast:
            return self.step(replace(self.inputs)).loss

    def run(self) -> tuple[float, float]:
        """Seconds of the forward and of the backward."""
        self.step.zero_grad(set_to_none=True)
        begin = time.process_time()
        loss = self.forward()
        middle = time.process_time()
        loss.backward()
        return middle - begin, time.process_time() - middle


def _inputs(recipe: Recipe, images: int) -> StepInputs:
    batch = PackedBatch(
        latents=Latents(
            torch.zeros(images * TOKENS_OF_AN_IMAGE * CHANNELS, dtype=torch.float16),
            ((1, TOKENS_OF_AN_IMAGE),) * images,
            1,
            CHANNELS,
        ),
        text_LE=torch.zeros(images * WORDS, TEXT_DIM),
        text_lengths=(WORDS,) * images,
        labels_S=None,
        sample_ids=tuple(range(images)),
        keys=tuple(map(str, range(images))),
        epoch=0,
        step=0,
        images_in_step=images,
        dropped_S=(False,) * images,
    )
    return Prepare(recipe.objective, recipe.train.seed)(batch)


def count(micro_step: MicroStep, kernels: Counter[str]) -> Seen:
    """What a micro-step queues; within `stand_ins`, given the same `kernels`."""
    seen = Seen(Counter(), Counter())
    kernels.clear()
    with _Counting(seen):
        micro_step.run()
    return replace(seen, kernels=Counter(kernels))


@command(ConfigError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.host_time", description="What the host does to queue a step."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--side", type=int, nargs="+", default=[256, 1024], help="pixels (default: 256 1024)")
    parser.add_argument("--repeats", type=int, default=10, help="the best is shown (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="where Python spends it, by function")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe)
    kernels: Counter[str] = Counter()
    for side_px in options.side:
        micro_step = MicroStep(recipe, side_px)
        with stand_ins(kernels):
            micro_step.run()
            seen = count(micro_step, kernels)
            runs = [micro_step.run() for _ in range(options.repeats)]
            if options.profile:
                with cProfile.Profile() as profile:
                    micro_step.run()
                pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(45)
        forward, backward = (1e3 * min(part) for part in zip(*runs, strict=True))
        print(
            f"{recipe.name}, {side_px} px, {micro_step.inputs.num_images} images a pack: {forward:.1f} ms "
            f"forward, {backward:.1f} ms backward\n"
            f"  launches: {seen.launches} = {sum(seen.kernels.values())} of our kernels "
            f"+ {sum(seen.operations.values())} of torch's; views and empty tensors: {seen.others}\n"
            f"  kernels: {dict(seen.kernels.most_common())}\n"
            f"  torch: {dict(seen.operations.most_common(25))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
