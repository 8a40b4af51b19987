"""The training loop without DeepSpeed, ranks or accumulation: what every arrangement has to reproduce."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.index import load_index
from data_pipeline.loader import build_loader
from tim_ds.config.recipe import Recipe
from tim_ds.objective.loss import transition_loss
from tim_ds.trainer.agreement import DataFacts
from tim_ds.trainer.assembly import build_root, prepare_of
from tim_ds.trainer.initial import read_initial
from tim_ds.trainer.inputs import StepInputs


class PlainRun(NamedTuple):
    denoising: list[float]
    """Mean over the images of each applied step."""
    grad_norms: list[float]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    skipped: list[int]


def steps_of(recipe: Recipe, *, rank: int = 0, world_size: int = 1, num_steps: int) -> list[list[StepInputs]]:
    data = DataFacts.of(load_index(recipe.data.shards))
    loader = build_loader(
        recipe.data,
        patch_size=recipe.model.patch_size,
        rank=rank,
        world_size=world_size,
        seed=recipe.train.seed,
        num_steps=num_steps,
        finish=prepare_of(recipe, data),
    )
    return list(loader)


def train_plainly(recipe: Recipe) -> PlainRun:
    """Mean loss over all images, one backward, clip, AdamW, EMA. Steps that are not finite are left out."""
    config = recipe.train
    path = recipe.train.init_from
    root = build_root(recipe, 1, None if path is None else read_initial(path))
    network, teacher = root.network, root.teacher
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    run = PlainRun([], [], {}, ema, [])
    applied = 0
    for micro_batches in steps_of(recipe, num_steps=config.steps):
        total, denoising, images = torch.zeros(()), 0.0, 0
        for x in micro_batches:
            terms = transition_loss(
                network,  # type: ignore[arg-type]  # build_root makes a TiM
                root.transport,
                recipe.objective,
                x.x_TC,
                x.z_TC,
                x.times,
                x.segments,
                x.condition,
                latent_channels=recipe.model.in_channels,
                teacher=teacher,  # type: ignore[arg-type]
                null_condition=x.null_condition,
                features_TZ=x.features_TZ,
            )
            total = total + terms.total_S.sum()
            denoising += float(terms.denoising_S.double().sum())
            images += x.num_images
        optimizer.zero_grad()
        (total / images).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.optimizer.grad_clip)
        if not bool(norm.isfinite()):
            run.skipped.append(micro_batches[0].step + 1)
            continue
        applied += 1
        warmup = config.optimizer.warmup_steps
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, applied / max(warmup, 1))
        optimizer.step()
        run.denoising.append(denoising / images)
        run.grad_norms.append(float(norm))
        with torch.no_grad():
            for name, p in parameters.items():
                ema[name] += (1 - (config.ema.used.decay or 0.0)) * (p - ema[name])
            if teacher is not None:
                for name, p in teacher.named_parameters():
                    p.copy_(ema[name])
    run.weights.update({name: p.detach().clone() for name, p in parameters.items()})
    return run
