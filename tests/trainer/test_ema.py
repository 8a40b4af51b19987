from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.cases import PREVIEW
from tests.trainer.conftest import Groups
from tests.trainer.ranks import lines_without_clock, recipe
from tim_ds.eval.sheet import SheetBlock, SheetRow, contact_sheet
from tim_ds.pipeline import TiMPipeline

CASES = ["zero0 fp32", "zero2 fp32", "zero3 fp32", "zero1 bf16", "zero3 bf16"]


@pytest.mark.parametrize("case", CASES)
def test_the_sharded_average_is_the_average_of_the_whole_masters(groups: Groups, case: str) -> None:
    for found in groups.results(2, "average_by_hand"):
        assert found[case]["error"] == 0.0
        assert found[case]["moved"] > 1e-3
        assert found[case]["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("case", CASES)
def test_each_rank_averages_its_own_pieces_from_stage_1_on(groups: Groups, case: str) -> None:
    first, second = (found[case] for found in groups.results(2, "average_by_hand"))
    if case.startswith("zero0"):
        assert first["elements"] == second["elements"] == first["parameters"]
    else:
        assert first["elements"] + second["elements"] == first["parameters"]
        assert max(first["elements"], second["elements"]) < 0.6 * first["parameters"]


@pytest.mark.parametrize("case", ["zero0", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nodes"])
def test_sampling_from_the_average_leaves_no_trace_in_training(groups: Groups, case: str) -> None:
    for found in groups.results(2, "borrow_average"):
        assert found[case]["error"] == 0.0
        assert found[case]["size"] > 1e-3
        assert found[case]["masters_equal"]


def test_a_teacher_under_zero3_is_split_and_refreshed_without_a_message(groups: Groups) -> None:
    both = groups.results(2, "refresh_teacher")
    for found in both:
        # Nothing stays whole between steps; partitions are padded by less than an element a parameter.
        assert found["whole"] == found["sent"] == 0
        assert found["stored"] < 0.6 * found["parameters"]
        assert found["trained"] == []
        # It is the average in use, and no other.
        assert found["equal"] and found["other"]
    assert sum(found["held"] for found in both) == both[0]["parameters"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_previews_evaluations_and_export_hold_the_average_one_module_at_a_time(
    groups: Groups, stage: int
) -> None:
    for found in groups.results(2, "gather_little"):
        module = found["sizes"]["module"]
        assert found["sizes"]["network"] > 4 * module
        peaks = found[f"zero{stage}"]["peaks"]
        assert peaks.keys() == {"Previews", "Evaluations", "export"}
        # ZeRO-3 gathers a block into one piece of memory and puts its parameters together in another. Half a
        # block more for the activations of so small a picture (3 %) and for garbage not yet collected.
        drawing = 1.5 * module if stage < 3 else 2.5 * module
        assert peaks["export"] <= 1.01 * module
        assert 0.9 * module < max(peaks["Previews"], peaks["Evaluations"]) < drawing


@pytest.mark.parametrize("stage", [1, 3])
def test_drawing_and_exporting_are_told_to_the_watch_as_they_go(groups: Groups, stage: int) -> None:
    """Who draws or writes for hours is not taken for a rank that hangs."""
    for rank, found in enumerate(groups.results(2, "gather_little")):
        moves = found[f"zero{stage}"]["moves"]
        # Two steps of a preview, two of an evaluation; rank 0 draws, and others where the weights are split.
        draws = 2 if rank == 0 or stage == 3 else 0
        assert moves == {"Previews": draws, "Evaluations": draws, "export": found["tensors"]}


def test_an_export_that_fills_the_disk_half_way_is_refused_on_every_rank(groups: Groups) -> None:
    for found in groups.results(2, "gather_little"):
        assert len(found["refusals"]) == 3
        assert all("tim.safetensors: cannot be written" in told for told in found["refusals"])
    assert list((groups.folder_of(2, "gather_little") / "full" / "export").iterdir()) == []


def drawn_from(export: Path, preview: str) -> np.ndarray:
    """The sheet of a preview, from exported weights."""
    config = recipe(export, preview).train.preview
    pipeline = TiMPipeline.from_pretrained(export)
    rows = [
        SheetRow(
            f"{n} steps" if n > 1 else "1 step",
            pipeline(config.prompts, config.sizes, num_steps=n, seeds=config.seed).pixels,
        )
        for n in config.num_steps
    ]
    return contact_sheet(
        config.prompts, [SheetBlock("", rows)], footnote=f"EMA weights of step {pipeline.export.step}"
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_previews_are_drawn_and_change_nothing(groups: Groups, stage: int) -> None:
    groups.results(2, "train_with_previews")
    run = groups.folder_of(2, "train_with_previews") / f"zero{stage}"
    plain = Path(groups.results(2, "train_every_stage")[0][f"zero{stage}"])
    assert lines_without_clock(run) == lines_without_clock(plain)
    assert sorted(path.name for path in (run / "previews").iterdir()) == [
        "step_000000002.png",
        "step_000000004.png",
    ]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Images("preview")] == [2, 4]
    early, late = (np.asarray(Image.open(path)) for path in sorted((run / "previews").iterdir()))
    assert early.shape == late.shape and (early != late).any()
    # Drawn anew in one process, from the averaged weights of that step.
    assert np.array_equal(late, drawn_from(run / "export", PREVIEW))
