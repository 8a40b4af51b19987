from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.small_files import small_files
from tests.trainer.conftest import Groups
from tests.trainer.plain import steps_of
from tests.trainer.ranks import recipe
from tim_ds.errors import CheckpointError
from tim_ds.objective.loss import LossTerms
from tim_ds.objective.transport import build_transport
from tim_ds.trainer.flops import flops_of
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.loop import Progress
from tim_ds.trainer.metrics import (
    METRICS_FILE,
    NUM_BINS,
    MetricsLog,
    Sums,
    largest_memory,
    memory_of_process,
    read_metrics,
)
from tim_ds.trainer.run_state import restore
from tim_ds.trainer.world import World

DEVICE = torch.device("cpu")


def terms_of(values: torch.Tensor) -> LossTerms:
    return LossTerms(2 * values, values, 3 * values, 0 * values, values, values)


def test_means_are_over_images_and_bins_hold_the_images_of_their_times(shards: Path) -> None:
    settings = recipe(shards)
    transport = build_transport(settings.objective.transport)
    sums = Sums(transport, DEVICE)
    t_all, gap_all, value_all = [], [], []
    for micro in steps_of(settings, num_steps=3):
        for inputs in micro:
            values = torch.rand(inputs.num_images)
            sums.add(inputs, terms_of(values))
            t_all.append(inputs.times.t_S)
            gap_all.append(inputs.times.t_S - inputs.times.r_S)
            value_all.append(values)
        sums.end_step(applied=True, grad_norm=2.0)
    means = sums.take(World())
    values = torch.cat(value_all).double()
    assert means["denoising"] == pytest.approx(float(values.mean()), rel=1e-12)
    assert means["loss"] == pytest.approx(2 * float(values.mean()), rel=1e-6)
    assert (means["images"], means["packs"], means["grad_norm"]) == (len(values), 12, 2.0)
    for name, times in (("denoising_by_t", torch.cat(t_all)), ("denoising_by_interval", torch.cat(gap_all))):
        seen = 0
        for i, mean in enumerate(means[name]):
            inside = (times >= i / NUM_BINS) & ((times < (i + 1) / NUM_BINS) | (i == NUM_BINS - 1))
            seen += int(inside.sum())
            expected = float(values[inside].mean()) if inside.any() else None
            assert mean == (None if expected is None else pytest.approx(expected, rel=1e-12))
        assert seen == len(values)
    # The next interval starts empty.
    assert sums.take(World())["denoising"] is None


def test_replaced_images_and_operations_are_summed_over_micro_steps(shards: Path) -> None:
    settings = recipe(shards)
    count = partial(flops_of, config=settings.model, objective=settings.objective, checkpointing=True)
    sums = Sums(build_transport(settings.objective.transport), DEVICE, count)
    expected = {"model": 0, "executed": 0, "forward": 0, "derivative": 0}
    for i, inputs in enumerate(steps_of(settings, num_steps=1)[0]):
        inputs = replace(inputs, num_replaced=i)
        sums.add(inputs, terms_of(torch.rand(inputs.num_images)))
        flops = count(inputs)
        expected = {name: expected[name] + getattr(flops, name) for name in expected}
    sums.end_step(applied=True, grad_norm=1.0)
    means = sums.take(World())
    assert means["replaced"] == 0 + 1 + 2 + 3
    assert means["flops"] == expected and 0 < expected["model"] < expected["executed"]


def test_utilisation_is_of_all_devices_and_left_out_where_the_peak_is_unknown(tmp_path: Path) -> None:
    found = {}
    for name, peak in (("known", 2e12), ("unknown", None)):
        log = MetricsLog(tmp_path / name, tokens_per_pack=10, start_step=0, num_devices=4, peak_flops=peak)
        flops = {"model": 6e9, "executed": 9e9, "forward": 1.5e9, "derivative": 0.5e9}
        means = {"images": 4, "tokens": 30, "packs": 4, "flops": flops}
        phases = {"data_wait": {"mean": 1e-6, "max": 2e-6}}
        log.log(1, means, lr=1e-3, applied_steps=1, skipped_steps=0, phases=phases)
        log.close()
        found[name] = read_metrics(tmp_path / name)[0]["speed"]
    speed = found["known"]
    assert speed["mfu"] == pytest.approx(6e9 / speed["seconds"] / 4 / 2e12, rel=1e-12)
    assert speed["hfu"] == pytest.approx(1.5 * speed["mfu"], rel=1e-12)
    assert speed["tflops_per_device"] == pytest.approx(6e-3 / speed["seconds"] / 4, rel=1e-12)
    assert speed["derivative_share"] == 0.25
    assert speed["phases"]["data_wait"]["max"] == 2e-6 and speed["data_wait_share"] > 0
    assert found["unknown"]["mfu"] is None and found["unknown"]["tflops_per_device"] > 0
    board = EventAccumulator(str(tmp_path / "known" / "tensorboard"))
    board.Reload()
    assert {"speed/mfu", "speed/phases/data_wait/mean"} <= set(board.Tags()["scalars"])


def test_requests_for_data_that_were_made_again_are_counted_over_the_ranks(groups: Groups) -> None:
    lines = read_metrics(Path(groups.results(2, "ask_again")[0]))
    # Two packs a rank and step.
    assert [line["speed"]["retries"] for line in lines] == [2 * 1 + 2 * 2] * 4


def test_memory_is_that_of_the_ranks_that_have_most(groups: Groups) -> None:
    lines = read_metrics(Path(groups.results(2, "ask_again")[0]))
    assert len(lines) == 4
    for line in lines:
        assert (line["speed"]["memory_gib"], line["speed"]["host_memory_gib"]) == (11.0, 5.0)
    # Without a GPU there is none to compare.
    one = {"memory_gib": None, "host_memory_gib": 1.0}
    assert largest_memory([one, one]) == one and memory_of_process().keys() == one.keys()


def test_a_line_whose_images_are_older_than_the_process_counts_their_time(groups: Groups) -> None:
    folder = Path(groups.results(2, "cut_an_interval")[0])
    [line] = read_metrics(folder / "run")
    whole = json.loads((folder / "whole.jsonl").read_text())
    # The checkpoint says that its three steps took 1,000 s.
    assert line["step"] == 4 and line["images"] == whole["images"] and line["loss"] == whole["loss"]
    assert line["speed"]["seconds"] > 1000.0
    assert line["speed"]["images_per_s"] == line["images"] / line["speed"]["seconds"]


def test_a_refused_step_enters_no_mean(shards: Path) -> None:
    settings = recipe(shards)
    sums = Sums(build_transport(settings.objective.transport), DEVICE)
    inputs = steps_of(settings, num_steps=1)[0][0]
    sums.add(inputs, terms_of(torch.full((inputs.num_images,), torch.nan)))
    sums.end_step(applied=False, grad_norm=torch.nan)
    sums.add(inputs, terms_of(torch.full((inputs.num_images,), 0.5)))
    sums.end_step(applied=True, grad_norm=1.0)
    means = sums.take(World())
    assert (means["denoising"], means["images"], means["grad_norm"]) == (0.5, inputs.num_images, 1.0)


def test_an_interval_that_was_cut_goes_on(shards: Path) -> None:
    settings = recipe(shards)
    transport = build_transport(settings.objective.transport)
    batches = [micro[0] for micro in steps_of(settings, num_steps=4)]
    whole, first, second = (Sums(transport, DEVICE) for _ in range(3))
    for i, inputs in enumerate(batches):
        for sums in (whole, first if i < 2 else second):
            if i == 2 and sums is second:
                second.load_state({name: value.clone() for name, value in first.state().items()})
            sums.add(inputs, terms_of(torch.full((inputs.num_images,), 0.1 * i)))
            sums.end_step(applied=True, grad_norm=0.3 * i)
    assert second.take(World()) == whole.take(World())


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_interval_that_two_ranks_began_is_finished_by_others(shards: Path, ranks: int) -> None:
    settings = recipe(shards)
    transport = build_transport(settings.objective.transport)
    whole, *before = (Sums(transport, DEVICE) for _ in range(3))

    def count(batches: Sequence[StepInputs], counting: Sequence[Sums], norm: float) -> None:
        """Micro-batches of one step, dealt to the ranks."""
        for i, inputs in enumerate(batches):
            terms = terms_of(torch.linspace(0.1, norm, inputs.num_images))
            for sums in (whole, counting[i % len(counting)]):
                sums.add(inputs, terms)
        for sums in (whole, *counting):
            sums.end_step(applied=True, grad_norm=norm)

    first, second, third = steps_of(settings, num_steps=3)
    count(first, before, 0.5)
    count(second, before, 0.7)
    states = [{name: value.clone() for name, value in sums.state().items()} for sums in before]
    progress = {"step": 2, "applied_steps": 2}
    manifest = {"world_size": 2, "optimizer_steps": 2, "progress": progress}
    checkpoint: Any = SimpleNamespace(manifest=manifest, own=lambda rank: states[rank])
    after = [Sums(transport, DEVICE) for _ in range(ranks)]
    for rank, sums in enumerate(after):
        # Weights have tests of their own.
        engine: Any = SimpleNamespace(shards=(), world=World(rank, ranks), publish=lambda: None)
        ema: Any = SimpleNamespace(averages={})
        assert restore(checkpoint, engine, ema, sums) == Progress(**progress)
    count(third, after, 0.9)
    # As `take` does: counts over the ranks, the norm of rank 0.
    total = after[0]
    total.interval = torch.stack([sums.interval for sums in after]).sum(0)
    found, expected = total.take(World()), whole.take(World())
    assert found["images"] == expected["images"] > 0 and found["grad_norm"] == expected["grad_norm"]
    # Another order of float64 sums.
    for name in ("loss", "denoising", "directional"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name
    for name in ("denoising_by_t", "denoising_by_interval"):
        # A bin without images has no mean.
        ours, theirs = (
            [-1.0 if mean is None else mean for mean in means[name]] for means in (found, expected)
        )
        assert ours == pytest.approx(theirs, rel=1e-12) and max(ours) > 0, name


def log_steps(folder: Path, start: int, steps: range) -> None:
    log = MetricsLog(folder, tokens_per_pack=10, start_step=start)
    for step in steps:
        means = {
            "loss": 1.0 / step,
            "grad_norm": None,
            "denoising_by_t": [0.5, None],
            "images": 4,
            "tokens": 30,
            "packs": 4,
        }
        log.log(step, means, lr=1e-3, applied_steps=step, skipped_steps=0)
    log.close()


def test_lines_beyond_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(1, 6))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "los')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    kept = (tmp_path / METRICS_FILE).read_text().splitlines()[:3]
    log_steps(tmp_path, 3, range(4, 6))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert (tmp_path / METRICS_FILE).read_text().splitlines()[:3] == kept
    assert all(json.loads(line)["fill"] == 0.75 for line in kept)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(1, 6))
    log_steps(tmp_path, 3, range(4, 8))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    tags = board.Tags()["scalars"]
    assert "train/denoising_by_t/0.000-0.125" in tags and "train/denoising_by_t/0.125-0.250" not in tags
    assert "train/grad_norm" not in tags and "speed/images_per_s" in tags


def test_tensorboard_shows_nothing_of_a_process_that_was_lost_before_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    log_steps(tmp_path, 0, range(1, 6))
    log_steps(tmp_path, 0, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]


def test_a_disk_that_refuses_at_the_start_is_an_error_and_later_the_lines_wait(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics cannot be written: .*run the same command again"):
        MetricsLog(tmp_path / "file", tokens_per_pack=10, start_step=0)
    log = MetricsLog(tmp_path, tokens_per_pack=10, start_step=0)
    means = {"loss": 0.5, "images": 4, "tokens": 30, "packs": 4}
    with small_files(4096):
        for step in range(1, 50):
            log.log(step, means, lr=1e-3, applied_steps=step, skipped_steps=0, failed_saves=1)
        assert 0 < len(read_metrics(tmp_path)) < 49
        log.flush()
    log.flush()
    log.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 50))
    assert (lines[0]["speed"]["failed_saves"], lines[0]["speed"]["unsaved_steps"]) == (1, 0)
