"""Draws belong to the sample: not to its rank, its pack or its place in it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.index import load_index
from data_pipeline.loader import build_loader
from tests.trainer.plain import steps_of
from tests.trainer.ranks import recipe
from tim_ds.packed import TextCondition
from tim_ds.trainer.agreement import DataFacts
from tim_ds.trainer.assembly import prepare_of
from tim_ds.trainer.inputs import StepInputs


def draws_by_sample(
    steps: list[list[StepInputs]],
) -> dict[tuple[int, int], tuple[torch.Tensor, float, float]]:
    """(epoch, sample) -> noise, t, r."""
    found = {}
    for batch in (b for micro in steps for b in micro):
        noise = batch.segments.split(batch.z_TC)
        for i, sample in enumerate(batch.sample_ids):
            assert (batch.epoch, sample) not in found
            found[batch.epoch, sample] = (noise[i], float(batch.times.t_S[i]), float(batch.times.r_S[i]))
    return found


def test_a_sample_draws_the_same_on_one_rank_and_on_two_and_in_other_packs(shards: Path) -> None:
    settings = recipe(shards)
    alone = draws_by_sample(steps_of(settings, num_steps=4))
    ranks = [draws_by_sample(steps_of(settings, rank=r, world_size=2, num_steps=4)) for r in range(2)]
    assert not ranks[0].keys() & ranks[1].keys()
    repacked = draws_by_sample(steps_of(recipe(shards, "data.tokens_per_pack=40"), num_steps=2))
    shared = 0
    for other in (*ranks, repacked):
        for key in other.keys() & alone.keys():
            shared += 1
            assert torch.equal(other[key][0], alone[key][0]) and other[key][1:] == alone[key][1:]
    assert shared > 80


def test_no_two_samples_or_epochs_or_seeds_share_their_noise(shards: Path) -> None:
    draws = draws_by_sample(steps_of(recipe(shards), num_steps=10))
    assert {epoch for epoch, _ in draws} == {0, 1}
    values = torch.cat([noise[0] for noise, _, _ in draws.values()])
    assert values.unique().numel() == values.numel()
    assert len({t for _, t, _ in draws.values()}) == len(draws)
    other = draws_by_sample(steps_of(recipe(shards, "train.seed=1"), num_steps=4))
    assert all(not torch.equal(other[key][0], draws[key][0]) for key in other.keys() & draws.keys())


def test_noise_is_unit_and_times_keep_their_order(shards: Path) -> None:
    batches = [b for micro in steps_of(recipe(shards), num_steps=10) for b in micro]
    noise = torch.cat([b.z_TC.flatten() for b in batches])
    # Standard errors of the mean and of the variance of n normals: n^-1/2 and (2 / n)^1/2; four of them.
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / n**0.5 and abs(float(noise.var()) - 1) < 4 * (2 / n) ** 0.5
    assert all(bool((b.times.r_S <= b.times.t_S).all()) for b in batches)
    # The network is told them as they are drawn.
    assert {x.dtype for b in batches for x in (b.times.t_S, b.times.r_S)} == {torch.float64}


def test_the_loader_may_prepare_in_other_processes(shards: Path) -> None:
    settings = recipe(shards, "objective.guided_target={w_cond: 0.5}")
    prepare = prepare_of(settings, DataFacts.of(load_index(shards)))
    batch = steps_of(settings, num_steps=1)[0][0]
    assert batch.null_condition is not None and batch.null_condition.num_segments == batch.num_images
    again = pickle.loads(pickle.dumps(prepare))
    assert again.seed == prepare.seed
    assert prepare.null_states_LE is not None and again.null_states_LE.equal(prepare.null_states_LE)


def test_empty_captions_of_guidance_are_as_long_as_the_captions_of_a_pack_that_is_filled_up(
    shards: Path,
) -> None:
    settings = recipe(shards, "objective.guided_target={w_cond: 0.5}", "data.caption_dropout=0.1")
    prepare = prepare_of(settings, DataFacts.of(load_index(shards)))
    null_states = prepare.null_states_LE
    packs = [pack for step in build_loader(settings.data, patch_size=1, num_steps=2) for pack in step]
    packed = max(packs, key=lambda pack: max(pack.text_lengths or (0,)))
    assert null_states is not None and packed.text_lengths is not None
    longest = max(packed.text_lengths)
    assert longest > len(null_states)
    padding = torch.full_like(null_states[:1], 9.0)
    for pack, length in ((packed, len(null_states)), (replace(packed, padding_1E=padding), longest)):
        null = prepare(pack).null_condition
        assert isinstance(null, TextCondition) and null.segments.lengths == (length,) * len(pack.grids)
        for states in null.states_LE.split(length):
            assert torch.equal(states[: len(null_states)], null_states)
            assert bool((states[len(null_states) :] == 9.0).all())


@pytest.mark.parametrize("guided", [False, True])
def test_moving_to_a_device_keeps_everything(shards: Path, guided: bool) -> None:
    overrides = ("objective.guided_target={w_cond: 0.5}",) if guided else ()
    batch = steps_of(recipe(shards, *overrides), num_steps=1)[0][0]
    moved = batch.to(torch.device("meta"))
    assert moved.x_TC.device.type == moved.z_TC.device.type == moved.times.t_S.device.type == "meta"
    assert moved.segments.cu_seqlens.device.type == "meta"
    assert (moved.keys, moved.images_in_step) == (batch.keys, batch.images_in_step)
    assert (moved.null_condition is not None) == guided


@pytest.mark.gpu
def test_the_large_tensors_are_pinned_where_there_is_a_device(shards: Path) -> None:
    batch = steps_of(recipe(shards), num_steps=1)[0][0]
    pinned = batch.pin_memory()
    assert pinned.latents.values.is_pinned() and pinned.z_TC.is_pinned()
    assert torch.equal(pinned.x_TC, batch.x_TC) and torch.equal(pinned.z_TC, batch.z_TC)
    assert pinned.keys == batch.keys and pinned.times is batch.times
