"""What is timed: the images of one step, drawn once, as the baseline reads them and as a pack of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.batch import Latents
from tim_ds.config.recipe import Recipe, latent_stride
from tim_ds.errors import RequestError
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import build_transport
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition
from tim_ds.trainer.bench.baseline_step import Batch
from tim_ds.trainer.flops import PackShape
from tim_ds.trainer.inputs import StepInputs

Sides = tuple[int, int]
"""Height and width of an image in pixels."""

CHECKED_TOKENS = 4096
"""Images are compared in float32 up to so many tokens, at least one of each kind."""


@dataclass(frozen=True, eq=False)
class Work:
    """The images of one step: a batch of each size, its first images with r = t."""

    batches: tuple[Batch, ...]
    patch_size: int
    seed: int

    @property
    def num_images(self) -> int:
        return sum(len(batch.t) for batch in self.batches)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Of every image, in tokens, batch after batch."""
        p = self.patch_size
        return tuple((b.x.shape[2] // p, b.x.shape[3] // p) for b in self.batches for _ in range(len(b.t)))

    @property
    def num_tokens(self) -> int:
        return sum(h * w for h, w in self.grids)

    @property
    def is_diffusion(self) -> tuple[bool, ...]:
        """Images that train r = t, batch after batch."""
        return tuple(i < b.num_diffusion for b in self.batches for i in range(len(b.t)))

    @property
    def shape(self) -> PackShape:
        """Batch after batch."""
        texts = tuple(b.y.shape[1] for b in self.batches for _ in range(len(b.t)) if b.y.ndim == 3)
        return PackShape(tuple(h * w for h, w in self.grids), texts or None)

    @property
    def transition(self) -> tuple[int, ...]:
        """Images with r < t, batch after batch."""
        earlier = torch.cat([b.r < b.t for b in self.batches]).tolist()
        return tuple(i for i, e in enumerate(earlier) if e)

    def still(self) -> Work:
        """The same images, all with r = t: what flow matching trains."""
        return replace(self, batches=tuple(replace(b, r=b.t, num_diffusion=len(b.t)) for b in self.batches))

    def sample(self) -> Work:
        """A few images of every batch, the first with r = t and the last with r < t among them, up to
        CHECKED_TOKENS in all, but for these two."""
        return replace(
            self, batches=tuple(_chosen(b, i) for b, i in zip(self.batches, self._sampled(), strict=True))
        )

    def places_of_sample(self) -> list[int]:
        """Where the images of `sample` stand among all, batch after batch."""
        places, start = [], 0
        for batch, chosen in zip(self.batches, self._sampled(), strict=True):
            places += [start + i for i in chosen]
            start += len(batch.t)
        return places

    def _sampled(self) -> list[list[int]]:
        every = []
        for batch in self.batches:
            tokens = batch.x.shape[2] * batch.x.shape[3] // self.patch_size**2
            half = max(1, CHECKED_TOKENS // len(self.batches) // tokens // 2)
            first, total = batch.num_diffusion, len(batch.t)
            every.append([*range(min(half, first)), *range(max(first, total - half), total)])
        return every

    def order(self) -> Tensor:
        """Which image stands at each place of the pack: sizes and kinds are mixed, as a loader mixes them."""
        return torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed))


def _chosen(batch: Batch, images: Sequence[int]) -> Batch:
    index = torch.tensor(images, device=batch.t.device)
    return Batch(
        batch.x[index],
        batch.z[index],
        batch.t[index],
        batch.r[index],
        sum(i < batch.num_diffusion for i in images),
        batch.y[index],
        None if batch.features is None else batch.features[index],
    )


def shape_of(
    recipe: Recipe, images: Sequence[tuple[Sides, int]], text_tokens: int
) -> tuple[PackShape, tuple[int, ...]]:
    """Lengths of the work that `draw_work` would draw, and its images that do not train r = t."""
    lengths: list[int] = []
    transition: list[int] = []
    for sides, count in images:
        height, width = _grid(recipe, sides)
        first = len(lengths) + round(recipe.objective.diffusion_share * count)
        lengths += [height * width] * count
        transition += range(first, len(lengths))
    texts = (text_tokens,) * len(lengths) if recipe.model.condition == "text" else None
    return PackShape(tuple(lengths), texts), tuple(transition)


def _grid(recipe: Recipe, sides: Sides) -> tuple[int, int]:
    """Tokens along the sides of an image.

    Raises:
        RequestError: if they are no whole number.
    """
    pixels = latent_stride(recipe.data.autoencoder) * recipe.model.patch_size
    if sides[0] % pixels or sides[1] % pixels:
        raise RequestError(
            f"size {sides[0]}x{sides[1]}: expected multiples of {pixels} pixels, which one token of "
            f"{recipe.name} covers"
        )
    return sides[0] // pixels, sides[1] // pixels


def draw_work(
    recipe: Recipe, images: Sequence[tuple[Sides, int]], *, text_tokens: int, device: torch.device, seed: int
) -> Work:
    """Unit normal latents and text states, times as the authors draw and place them.

    Args:
        images: sizes, with the number of images of each.
    Raises:
        RequestError: if a size is no multiple of a token.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model, p = recipe.model, recipe.model.patch_size
    batches = []
    for sides, count in images:
        height, width = _grid(recipe, sides)
        shape = (count, model.in_channels, height * p, width * p)
        x, z = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        t, r, num_diffusion = _draw_times(recipe, count, generator, device)
        if model.condition == "text":
            states = (count, text_tokens, model.text_dim or 0)
            y = torch.randn(states, generator=generator, device=device)
        else:
            y = torch.randint(0, model.num_classes or 1, (count,), generator=generator, device=device)
        features = None
        if recipe.objective.repa_weight > 0:
            features = torch.randn(
                count, height * width, model.z_dim or 0, generator=generator, device=device
            )
        batches.append(Batch(x, z, t, r, num_diffusion, y, features))
    return Work(tuple(batches), p, seed)


def _draw_times(
    recipe: Recipe, count: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """t, r and how many have r = t: the first; the last have r = 0."""
    objective = recipe.objective
    mean, std = objective.transport.p_mean or 0.0, objective.transport.p_std or 1.0
    drawn = torch.sigmoid(mean + std * torch.randn(2, count, generator=generator, device=device))
    t, r = drawn.amax(0), drawn.amin(0)
    diffusion, consistency = (
        round(share * count) for share in (objective.diffusion_share, objective.consistency_share)
    )
    r[:diffusion] = t[:diffusion]
    r[count - consistency :] = 0.0
    return t, r, diffusion


def as_inputs(work: Work, recipe: Recipe) -> StepInputs:
    """The pack of a step, on the device of the work."""
    device, order = work.batches[0].x.device, work.order().tolist()
    grids = [work.grids[i] for i in order]
    x = _packed([image for batch in work.batches for image in batch.x], order)
    z = _packed([image for batch in work.batches for image in batch.z], order)
    t_S, r_S = (
        torch.cat(times)[order].cpu().double()  # as `Prepare` draws them
        for times in ([b.t for b in work.batches], [b.r for b in work.batches])
    )
    times = Times.from_tensors(
        build_transport(recipe.objective.transport), t_S, r_S, tuple(work.is_diffusion[i] for i in order)
    )
    y = [one for batch in work.batches for one in batch.y]
    condition: Condition
    if recipe.model.condition == "text":
        states = [y[i] for i in order]
        condition = TextCondition(torch.cat(states), Segments.from_lengths([len(s) for s in states]))
    else:
        condition = ClassCondition(torch.stack([y[i] for i in order]))
    features = None
    if work.batches[0].features is not None:
        every = [one for batch in work.batches if batch.features is not None for one in batch.features]
        features = torch.cat([every[i] for i in order])
    form = (tuple(grids), work.patch_size, recipe.model.in_channels)
    return StepInputs(
        latents=Latents(x, *form),
        z_TC=Latents(z, *form).tokens(),
        times=times.to(device),
        segments=Segments.from_grids(grids).to(device),
        condition=condition.to(device),
        null_condition=None,
        keys=tuple(f"image {i}" for i in order),
        sample_ids=tuple(order),
        images_in_step=work.num_images,
        epoch=0,
        step=0,
        features_TZ=features,
    )


def _packed(images: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    return torch.cat([images[i].flatten() for i in order])
