"""The loader: the plan's packs in order, whatever the ranks, workers and damage."""

import json
import logging
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_pipeline.batch import PackedBatch
from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import build_loader
from data_pipeline.reader import ShardReader
from data_pipeline.schema import Sample
from tests.data_pipeline.conftest import (
    CHANNELS,
    TEXT_WIDTH,
    data_config,
    text_samples,
    write_folder,
    write_tar,
)
from tim_ds.packed import patchify


def batches_equal(a: PackedBatch, b: PackedBatch) -> bool:
    plain = ("grids", "text_lengths", "sample_ids", "keys", "epoch", "step", "images_in_step", "dropped_S")
    tensors = ("latents_TC", "text_LE", "labels_S")
    return all(getattr(a, name) == getattr(b, name) for name in plain) and all(
        (getattr(a, n) is None and getattr(b, n) is None) or torch.equal(getattr(a, n), getattr(b, n))
        for n in tensors
    )


def damage(folder: Path, sample_ids: list[int]) -> None:
    """Flip a byte in the middle of each sample's latent; sizes stay as they are."""
    index = load_index(folder)
    columns = index.columns
    for i in sample_ids:
        with open(folder / index.shards[columns["shard"][i]], "r+b") as stream:
            place = int(columns["offset"][i] + columns["latent_start"][i] + columns["latent_size"][i] - 1)
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ 0xFF]))


def test_batches_hold_the_planned_samples_as_they_were_stored(text_folder):
    samples = text_samples(150)
    loader = build_loader(data_config(text_folder, caption_dropout=0.0), patch_size=2, seed=3, num_steps=4)
    checked = 0
    for step, packs in enumerate(loader):
        planned = loader.plan.step(step)
        assert tuple(b.sample_ids for b in packs) == planned.packs
        for batch in packs:
            assert (batch.step, batch.epoch) == (step, planned.epoch)
            assert batch.images_in_step == sum(len(p) for p in planned.packs)
            chosen = [samples[i] for i in batch.sample_ids]
            assert torch.equal(batch.latents_TC, torch.cat([patchify(s.latent.float(), 2) for s in chosen]))
            assert batch.latents_TC.dtype == torch.float32 and batch.latents_TC.shape[1] == 4 * CHANNELS
            assert batch.grids == tuple((s.latent.shape[1] // 2, s.latent.shape[2] // 2) for s in chosen)
            states = [s.states.float() for s in chosen if s.states is not None]
            assert batch.text_LE is not None and torch.equal(batch.text_LE, torch.cat(states))
            assert batch.text_lengths == tuple(s.shape[0] for s in states)
            assert batch.labels_S is None and not any(batch.dropped_S) and batch.num_replaced == 0
            checked += len(chosen)
    assert checked > 100


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_global_sequence(text_folder, world_size):
    config = data_config(text_folder)
    alone = [b for step in build_loader(config, patch_size=1, num_steps=3) for b in step]
    ranks = [
        list(build_loader(config, patch_size=1, rank=r, world_size=world_size, num_steps=3))
        for r in range(world_size)
    ]
    for n, expected in enumerate(alone):
        step, place = divmod(n, 4)
        assert batches_equal(ranks[place % world_size][step][place // world_size], expected)


def test_resume_gives_the_remaining_packs(text_folder):
    config = data_config(text_folder)
    whole = list(build_loader(config, patch_size=1, num_steps=12))
    epochs = {b.epoch for step in whole for b in step}
    assert epochs >= {0, 1}, "the run must cross an epoch"
    for start in (1, 5, 11):
        resumed = list(build_loader(config, patch_size=1, start_step=start, num_steps=12 - start))
        assert len(resumed) == 12 - start
        for expected, received in zip(whole[start:], resumed, strict=True):
            assert all(batches_equal(a, b) for a, b in zip(expected, received, strict=True))


def test_workers_change_nothing(text_folder):
    alone = list(build_loader(data_config(text_folder), patch_size=1, num_steps=6))
    state = torch.random.get_rng_state()
    shared = list(build_loader(data_config(text_folder, workers=2), patch_size=1, num_steps=6))
    assert torch.equal(torch.random.get_rng_state(), state), (
        "the loader must not advance the global generator"
    )
    for expected, received in zip(alone, shared, strict=True):
        assert all(batches_equal(a, b) for a, b in zip(expected, received, strict=True))


def total(batch: PackedBatch) -> float:
    return float(batch.latents_TC.sum())


@pytest.mark.parametrize("workers", [0, 2])
def test_finish_is_applied_to_every_batch(text_folder, workers):
    config = data_config(text_folder, workers=workers)
    plain = [
        [total(b) for b in step] for step in build_loader(data_config(text_folder), patch_size=1, num_steps=3)
    ]
    assert list(build_loader(config, patch_size=1, num_steps=3, finish=total)) == plain


def test_an_uncached_loader_reads_the_same(text_folder):
    cached = list(build_loader(data_config(text_folder), patch_size=1, num_steps=6))
    read = list(build_loader(data_config(text_folder), patch_size=1, num_steps=6, cache_bytes=0))
    for expected, received in zip(cached, read, strict=True):
        assert all(batches_equal(a, b) for a, b in zip(expected, received, strict=True))


def test_dropped_captions_are_the_null_states(text_folder):
    dropped = kept = 0
    for step in build_loader(data_config(text_folder, caption_dropout=0.5), patch_size=1, num_steps=8):
        for batch in step:
            assert batch.text_LE is not None and batch.text_lengths is not None
            texts = batch.text_LE.split(list(batch.text_lengths))
            for number, text, drop in zip(batch.sample_ids, texts, batch.dropped_S, strict=True):
                assert bool((text == (-1.0 if drop else float(number))).all())
                assert not drop or text.shape[0] == 1
                dropped, kept = dropped + drop, kept + (not drop)
    # Standard deviation of the share is below 0.05 at 100 images; the run has several hundred.
    assert 0.35 < dropped / (dropped + kept) < 0.65


def test_captions_are_filled_up_to_the_longest_of_their_pack_the_null_states_too(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    filled = TextEncoderConfig(kind="gemma", path="not loaded", padding="constant")
    config = data_config(folder, caption_dropout=0.5, text_encoder=filled)
    with pytest.raises(
        DataError, match=r"padding: 'constant', but .*null\.safetensors holds no tensor 'padding'"
    ):
        build_loader(config, patch_size=1, num_steps=1)
    tensors = {"states": torch.full((1, TEXT_WIDTH), -1.0), "padding": torch.full((1, TEXT_WIDTH), -2.0)}
    (folder / "null.safetensors").write_bytes(save(tensors))
    plain = build_loader(data_config(folder, caption_dropout=0.5), patch_size=1, num_steps=4)
    for workers in (0, 1):
        seen = 0
        loader = build_loader(replace(config, workers=workers), patch_size=1, num_steps=4)
        for batch, other in zip(chain.from_iterable(loader), chain.from_iterable(plain), strict=True):
            assert batch.text_LE is not None and other.text_LE is not None and other.text_lengths
            longest = max(other.text_lengths)
            assert batch.text_lengths == (longest,) * len(batch.sample_ids) and other.padding_1E is None
            assert batch.padding_1E is not None and torch.equal(batch.padding_1E, tensors["padding"])
            texts = zip(batch.text_LE.split(longest), other.text_LE.split(other.text_lengths), strict=True)
            for long, short in texts:
                assert torch.equal(long[: len(short)], short) and bool((long[len(short) :] == -2.0).all())
            seen += sum(batch.dropped_S)
        assert seen > 10


def test_caption_dropout_is_drawn_afresh_each_epoch(text_folder):
    config = data_config(text_folder, caption_dropout=0.5)
    loader = build_loader(config, patch_size=1, num_steps=1)
    chosen: dict[int, dict[int, bool]] = {0: {}, 1: {}}
    for step in build_loader(config, patch_size=1, num_steps=2 * loader.steps_per_epoch):
        for batch in step:
            chosen[batch.epoch].update(zip(batch.sample_ids, batch.dropped_S, strict=True))
    common = chosen[0].keys() & chosen[1].keys()
    assert len(common) > 100
    assert {(chosen[0][i], chosen[1][i]) for i in common} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_class_data_give_labels_and_the_null_label(class_folder):
    config = data_config(class_folder, text_encoder=None, caption_dropout=0.5)
    seen = set()
    for step in build_loader(config, patch_size=1, num_steps=3):
        for batch in step:
            assert (
                batch.labels_S is not None and batch.labels_S.dtype == torch.int64 and batch.text_LE is None
            )
            for number, label, drop in zip(
                batch.sample_ids, batch.labels_S.tolist(), batch.dropped_S, strict=True
            ):
                assert label == (10 if drop else number % 10)
                seen.add(drop)
    assert seen == {True, False}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_logged_and_replaced_by_one_of_its_size(text_folder, tmp_path, caplog, workers):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    clean = list(build_loader(data_config(folder), patch_size=1, num_steps=4))
    bad = [clean[0][0].sample_ids[0], clean[2][1].sample_ids[1]]
    damage(folder, bad)
    config = data_config(folder, workers=workers)
    with caplog.at_level(logging.WARNING):
        first = list(build_loader(config, patch_size=1, num_steps=4))
    logged = caplog.text
    again = list(build_loader(config, patch_size=1, num_steps=4))
    replaced = 0
    for step, (before, after, repeated) in enumerate(zip(clean, first, again, strict=True)):
        for a, b, c in zip(before, after, repeated, strict=True):
            assert batches_equal(b, c), "the replacement must not depend on the run"
            assert a.grids == b.grids and a.images_in_step == b.images_in_step
            differing = {x for x, y in zip(a.sample_ids, b.sample_ids, strict=True) if x != y}
            assert differing == set(a.sample_ids) & set(bad) and b.num_replaced == len(differing), step
            replaced += len(differing)
    assert replaced >= 2
    if workers == 0:
        names = {load_index(folder).name(i) for i in bad}
        assert all(name in logged for name in names) and "checksum differs" in logged
        assert logged.count("damaged sample replaced") == 2, "each damaged sample is logged once"


def test_too_many_damaged_samples_stop_the_run(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    damage(folder, list(range(0, 150, 5)))
    with pytest.raises(
        DataError,
        match=r"9 of \d+ samples read by (a process of )?rank 0 are damaged.*last: shard-\d+\.tar:s",
    ):
        list(build_loader(data_config(folder), patch_size=1, num_steps=5))


def test_a_worker_reports_the_same_error(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    damage(folder, list(range(0, 150, 2)))
    with pytest.raises(DataError, match=r"^9 of \d+ samples read by .*rank 0 are damaged"):
        list(build_loader(data_config(folder, workers=1), patch_size=1, num_steps=8))


def size_of(sample: Sample) -> tuple[int, ...]:
    assert sample.latent is not None
    return tuple(sample.latent.shape[1:])


def test_a_damaged_sample_without_a_substitute_is_an_error(tmp_path):
    samples = text_samples(12)
    smallest = [n for n, s in enumerate(samples) if size_of(s) == (2, 2)][:1]
    assert smallest
    keep = [s for n, s in enumerate(samples) if size_of(s) != (2, 2) or n in smallest]
    folder = write_folder(tmp_path / "few", keep)
    damage(folder, [n for n, s in enumerate(keep) if size_of(s) == (2, 2)])
    with pytest.raises(DataError, match=r"checksum differs.*none of 0 samples of its size or smaller"):
        list(build_loader(data_config(folder, packs_per_step=1), patch_size=1, num_steps=2))


def test_a_damaged_sample_of_a_size_of_its_own_is_replaced_by_a_smaller_one(tmp_path):
    lone = Sample(
        "lone", torch.full((CHANNELS, 8, 2), 500.0).half(), states=torch.full((2, TEXT_WIDTH), 500.0).half()
    )
    folder = write_folder(tmp_path / "lone", [*text_samples(60), lone])
    before = [b for step in build_loader(data_config(folder), patch_size=1, num_steps=8) for b in step]
    damage(folder, [60])
    after = [b for step in build_loader(data_config(folder), patch_size=1, num_steps=8) for b in step]
    replaced = 0
    for a, b in zip(before, after, strict=True):
        for planned, found, grid in zip(a.sample_ids, b.sample_ids, b.grids, strict=True):
            if planned == 60:
                # 16 tokens: the nearest size below is 4 x 4, of as many.
                assert found != 60 and grid == (4, 4)
                replaced += 1
            else:
                assert found == planned
    assert replaced >= 1


def test_the_limit_counts_the_workers_of_a_rank_together(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    bad = list(range(0, 150, 12))
    damage(folder, bad)
    config = data_config(folder, workers=2)
    # Thirteen damaged samples over two workers: neither meets nine within an epoch, the rank does.
    with pytest.raises(
        DataError, match=r"^9 of \d+ samples read by rank 0 are damaged \(allowed: 8, or 1%\)"
    ):
        list(build_loader(config, patch_size=1, num_steps=12))


def test_several_captions_and_mirror_images_are_drawn_for_each_epoch(tmp_path):
    count = 40
    members = []
    for n in range(count):
        latent = torch.full((CHANNELS, 2, 2), float(n)).half()
        texts = {
            "states": torch.full((2, TEXT_WIDTH), float(n)),
            "states.1": torch.full((5, TEXT_WIDTH), n + 0.5),
        }
        members.append((f"k{n:03d}.latent.safetensors", save({"latent": latent, "flipped": -latent - 1})))
        members.append((f"k{n:03d}.text.safetensors", save(texts)))
    write_tar(tmp_path / "s.tar", members)
    (tmp_path / "null.safetensors").write_bytes(save({"states": torch.zeros(1, TEXT_WIDTH)}))
    build_index(tmp_path, progress=False).save()
    config = data_config(tmp_path, caption_dropout=0.0)

    def drawn(world_size: int) -> dict[tuple[int, int], tuple[float, int]]:
        found = {}
        for rank in range(world_size):
            for step in build_loader(config, patch_size=1, num_steps=6, rank=rank, world_size=world_size):
                for batch in step:
                    assert batch.text_LE is not None and batch.text_lengths is not None
                    texts = batch.text_LE.split(list(batch.text_lengths))
                    tokens = batch.latents_TC.split([4] * len(batch.grids))
                    for i, x, y in zip(batch.sample_ids, tokens, texts, strict=True):
                        assert float(x[0, 0]) in (float(i), -i - 1.0) and float(y[0, 0]) in (i, i + 0.5)
                        assert len(y) == (2 if float(y[0, 0]) == i else 5)
                        found[batch.epoch, i] = (float(x[0, 0]), len(y))
        return found

    alone = drawn(1)
    assert drawn(2) == alone, "who reads a sample must not change what is drawn"
    kinds = Counter((x < 0, length) for x, length in alone.values())
    # Four kinds, equally often: 60 of 240, give or take four standard deviations.
    assert len(alone) == 240 and all(33 <= kinds[kind] <= 87 for kind in kinds) and len(kinds) == 4


def test_a_shard_cut_short_while_training_loses_its_last_samples_only(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    loader = build_loader(data_config(folder), patch_size=1, num_steps=8)
    index, shard = load_index(folder), folder / "shard-000002.tar"
    lost = np.flatnonzero(index.columns["shard"] == 2)[-3:]
    with open(shard, "r+b") as stream:
        stream.truncate(int(index.columns["offset"][lost[0]]) + 100)
    batches = [b for step in loader for b in step]
    assert loader.num_damaged == 3 and sum(b.num_replaced for b in batches) >= 3
    assert not set(lost.tolist()) & {i for b in batches for i in b.sample_ids}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 7}, r"latent: the index says a floating \[4, 7, \d\], the shard holds torch\.float16"),
        ({"text_length": 99}, r"states: the index says a floating \[99, 8\], the shard holds"),
        ({"latent_size": 30}, "not a readable safetensors member"),
    ],
    ids=["size", "caption_length", "member"],
)
def test_a_sample_unlike_its_row_is_refused(text_folder, change, message):
    index = build_index(text_folder, progress=False)
    for name, value in change.items():
        index.columns[name][5] = value
    with pytest.raises(DataError, match=r"shard-000000\.tar:s00005: " + message):
        ShardReader(index).read(5)


@pytest.mark.gpu
def test_batches_are_pinned_where_there_is_a_device(text_folder):
    for workers in (0, 2):
        for step in build_loader(data_config(text_folder, workers=workers), patch_size=1, num_steps=2):
            for batch in step:
                assert batch.latents.values.is_pinned()
                assert batch.text_LE is not None and batch.text_LE.is_pinned()


def test_a_spawned_worker_maps_the_index_anew(text_folder):
    index = load_index(text_folder)
    data = pickle.dumps(index)
    assert len(data) < 500, "the rows must not travel"
    again = pickle.loads(data)
    assert again.hash == index.hash and again.name(149) == index.name(149)


def test_a_shard_that_disappears_while_training_is_named(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    loader = build_loader(data_config(folder), patch_size=1, num_steps=6)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000\d\.tar:s\d+: cannot be read"):
        list(loader)


REFUSED = {
    "ranks_do_not_divide": ({}, {"world_size": 3}, r"packs_per_step: 4 is not divisible by the world size 3"),
    "rank_beyond_the_world": ({}, {"rank": 2, "world_size": 2}, "rank: expected 0 to 1, received 2"),
    "negative_start": ({}, {"start_step": -1}, "start_step"),
    "budget_too_small": ({"tokens_per_pack": 8}, {}, "the budget is 8"),
    "more_packs_than_images": ({"packs_per_step": 400}, {}, "400 packs need"),
    "patch_size": ({}, {"patch_size": 4}, "no multiple of the patch size 4"),
    "no_text_encoder": ({"text_encoder": None}, {}, "hold captions, the recipe says null"),
    "text_width": (
        {"text_encoder": TextEncoderConfig(kind="words", width=16)},
        {},
        "hold states of width 8, the recipe says 16",
    ),
    "factor": (
        {"autoencoder": AutoencoderConfig(kind="pixels", factor=4, channels=1)},
        {},
        "give latents of 16 channels, the shards in .* hold 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_training(text_folder, name):
    changes, arguments, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        build_loader(data_config(text_folder, **changes), **{"patch_size": 1, "num_steps": 1, **arguments})


def test_captions_for_class_data_are_refused(class_folder):
    with pytest.raises(DataError, match="hold class labels, the recipe says an encoder"):
        build_loader(data_config(class_folder), patch_size=1, num_steps=1)


def test_the_manifest_decides_which_encoders_made_the_shards(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    (folder / "manifest.json").write_text(json.dumps({"autoencoder": {"kind": "dc_ae"}}))
    with pytest.raises(
        DataError, match=r"data\.autoencoder\.kind: .* made with 'dc_ae', the recipe says 'pixels'"
    ):
        build_loader(data_config(folder), patch_size=1, num_steps=1)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not a readable manifest"):
        build_loader(data_config(folder), patch_size=1, num_steps=1)


@pytest.mark.parametrize("state", ["missing", "damaged", "wrong_width"])
def test_null_states_are_checked(text_folder, tmp_path, state):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    path = folder / "null.safetensors"
    if state == "missing":
        path.unlink()
    else:
        path.write_bytes(b"junk" if state == "damaged" else save({"states": torch.zeros(1, 5)}))
    with pytest.raises(DataError, match=r"null\.safetensors: (missing|expected)"):
        build_loader(data_config(folder), patch_size=1, num_steps=1)
